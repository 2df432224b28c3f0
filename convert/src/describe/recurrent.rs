//! Layers that mix tokens by a state: selective state spaces, short convolutions, lightning attention.

use moepack_format::Result;
use serde_json::Value;

use super::{Base, switch};
use crate::family::{GqaRule, MixerRule, StateRule, StepRule};
use crate::hparams::{Config, Keys};
use crate::limits::{GROUPS_MAX, HEAD_DIM_MAX, HEADS_MAX, HIDDEN_MAX, KERNEL_MAX, RANK_MAX, STATE_MAX};
use crate::spec::{Attention, Lightning, ShortConv, StateSpace};

/// What mixes the tokens of layer `l`; `full` are the layers with attention.
pub(super) fn mixer(
    rule: &MixerRule,
    full: &GqaRule,
    config: &Config,
    base: &Base,
    l: usize,
) -> Result<Attention> {
    Ok(match rule {
        MixerRule::StateSpace(rule) => Attention::StateSpace(state_space(rule, config, base)?),
        MixerRule::ShortConv => Attention::ShortConv(ShortConv {
            kernel: config.uint_opt(&["conv_L_cache"], 1, KERNEL_MAX)?.unwrap_or(3),
            bias: config.flag(&["conv_bias"], false)?,
        }),
        MixerRule::Lightning => {
            let head_dim = super::heads::head_dim(full, config, base)?;
            Attention::Lightning(Lightning { head_dim, slopes: slopes(base, l) })
        }
    })
}

fn state_space(rule: &StateRule, config: &Config, base: &Base) -> Result<StateSpace> {
    let expand = config.uint_opt(&["mamba_expand"], 1, HIDDEN_MAX)?.unwrap_or(2);
    let inner = expand.saturating_mul(base.hidden);
    let (n_heads, head_dim) = if rule.n_heads.is_empty() {
        (inner, 1)
    } else {
        let n_heads = config.uint(rule.n_heads, 1, HEADS_MAX)?;
        (n_heads, auto(config, rule.head_dim, HEAD_DIM_MAX)?.unwrap_or(inner / n_heads))
    };
    if n_heads.saturating_mul(head_dim) > HIDDEN_MAX {
        return Err(
            config.error(format!("{n_heads} heads of {head_dim}, expected at most {HIDDEN_MAX} channels"))
        );
    }
    let n_groups = match rule.n_groups {
        [] => 1,
        keys => config.uint_opt(keys, 1, GROUPS_MAX)?.unwrap_or(1),
    };
    if head_dim == 0 || !n_heads.is_multiple_of(n_groups) {
        let what = format!("{n_heads} heads of {head_dim} channels do not divide among {n_groups} groups");
        return Err(config.error(what));
    }
    let step_rank = match rule.step_rank {
        [] => None,
        keys => Some(auto(config, keys, RANK_MAX)?.unwrap_or(base.hidden.div_ceil(16))),
    };
    Ok(StateSpace {
        n_heads,
        head_dim,
        n_groups: if step_rank.is_some() { 1 } else { n_groups },
        state_dim: config.uint(rule.state_dim, 1, STATE_MAX)?,
        kernel: config.uint_opt(rule.kernel, 1, KERNEL_MAX)?.unwrap_or(4),
        conv_bias: switch(config, rule.conv_bias)?,
        bias: switch(config, rule.bias)?,
        step_rank,
        steps: steps(rule.steps, config)?,
    })
}

/// A size; `None` where it is missing or `"auto"`.
fn auto(config: &Config, keys: Keys, max: usize) -> Result<Option<usize>> {
    match config.find(keys) {
        Some((_, Value::String(s))) if s == "auto" => Ok(None),
        _ => config.uint_opt(keys, 1, max),
    }
}

fn steps(rule: StepRule, config: &Config) -> Result<[f32; 2]> {
    match rule {
        StepRule::Free => Ok([0.0, f32::INFINITY]),
        StepRule::Least(keys, default) => {
            Ok([config.number_opt(keys)?.unwrap_or(default) as f32, f32::INFINITY])
        }
        StepRule::Limits(key) => {
            let Some((_, value)) = config.find(&[key]) else { return Ok([0.0, f32::INFINITY]) };
            let two = value.as_array().filter(|a| a.len() == 2);
            let two = two.and_then(|a| a.iter().map(extended).collect::<Option<Vec<f32>>>());
            match two.as_deref() {
                Some(&[least, most]) if least <= most => Ok([least, most]),
                _ => Err(config.bad(key, value, "two numbers, the smaller first")),
            }
        }
    }
}

/// A number that may be infinite, which transformers writes as `{"__float__": "Infinity"}`.
fn extended(value: &Value) -> Option<f32> {
    let text = |v: &Value| v.as_str().map(str::to_owned);
    match value.get("__float__").and_then(text).or_else(|| text(value)).as_deref() {
        Some("Infinity") => Some(f32::INFINITY),
        Some(_) => None,
        None => value.as_f64().map(|n| n as f32),
    }
}

/// Decay of each head: `2^(−8 (h + 1) / n_heads)`, less in later layers (transformers' `get_slope_rate`).
fn slopes(base: &Base, l: usize) -> Vec<f32> {
    let n = base.n_heads as f64;
    let factor = 1.0 - l as f64 / (base.n_layers as f64 - 1.0 + 1e-5) + 1e-5;
    let root = 1.0 / libm::pow(2.0, 8.0 / n);
    (1..=base.n_heads).map(|h| (libm::pow(root, h as f64) as f32 as f64 * factor) as f32).collect()
}
