//! Linear attention.

use moepack_format::Result;

use crate::family::{Bound, DeltaRule};
use crate::hparams::{Config, Keys};
use crate::limits::{HEAD_DIM_MAX, HEADS_MAX, KERNEL_MAX};
use crate::spec::Delta;

/// The sizes that config.json gives to the gated delta rule.
pub(super) fn delta(rule: DeltaRule, config: &Config) -> Result<Delta> {
    if rule.projections.is_kimi() {
        let size = |keys| config.uint(keys, 1, HEADS_MAX);
        let n = size(&["linear_attn_config.num_heads", "linear_num_heads", "num_attention_heads"])?;
        let dim = size(&["linear_attn_config.head_dim", "linear_head_dim", "head_dim"])?;
        const KERNEL: Keys = &[
            "linear_attn_config.short_conv_kernel_size",
            "linear_conv_kernel_dim",
            "short_conv_kernel_size",
        ];
        let kernel = config.uint_opt(KERNEL, 1, KERNEL_MAX)?.unwrap_or(4);
        return Ok(Delta {
            n_k_heads: n,
            n_v_heads: n,
            k_dim: dim,
            v_dim: dim,
            kernel,
            projections: rule.projections,
            sigmoid_gate: true,
            decay_bound: decay_bound(rule, config)?,
        });
    }
    let n_k_heads = config.uint(&["linear_num_key_heads"], 1, HEADS_MAX)?;
    let n_v_heads = config.uint(&["linear_num_value_heads"], 1, HEADS_MAX)?;
    if !n_v_heads.is_multiple_of(n_k_heads) {
        let what = format!("{n_v_heads} value heads do not divide among {n_k_heads} key heads");
        return Err(config.error(what));
    }
    Ok(Delta {
        n_k_heads,
        n_v_heads,
        k_dim: config.uint(&["linear_key_head_dim"], 1, HEAD_DIM_MAX)?,
        v_dim: config.uint(&["linear_value_head_dim"], 1, HEAD_DIM_MAX)?,
        kernel: config.uint_opt(&["linear_conv_kernel_dim"], 1, KERNEL_MAX)?.unwrap_or(4),
        projections: rule.projections,
        sigmoid_gate: sigmoid_gate(rule, config)?,
        decay_bound: None,
    })
}

fn sigmoid_gate(rule: DeltaRule, config: &Config) -> Result<bool> {
    let Some((key, value)) = rule.gate_key.and_then(|key| config.find(&[key])) else { return Ok(false) };
    match value.as_str() {
        Some("silu") => Ok(false),
        Some("sigmoid") => Ok(true),
        _ => Err(config.bad(key, value, "\"silu\" or \"sigmoid\"")),
    }
}

fn decay_bound(rule: DeltaRule, config: &Config) -> Result<Option<f32>> {
    let Some(Bound { switch, keys, default }) = rule.bound else { return Ok(None) };
    let off = match switch {
        Some(key) => !config.flag(&[key], true)?,
        None => false,
    };
    let given = config.number_opt(keys)?;
    if off || given.is_none() && config.mentions(keys) {
        return Ok(None);
    }
    Ok(Some(given.unwrap_or(default) as f32))
}
