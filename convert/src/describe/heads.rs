//! How many heads a layer has, how wide they are, and what gates them.

use moepack_format::Result;

use super::Base;
use crate::family::GqaRule;
use crate::hparams::Config;
use crate::limits::{HEAD_DIM_MAX, HEADS_MAX, LAYERS_MAX};
use crate::spec::Gate;

/// Heads of a layer that may have others than most.
pub(super) struct Wide {
    pub(super) n_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) k_is_v: bool,
}

/// Heads of layers without a window: `per_layer_config` says them of a layer, which are the same for all here.
pub(super) fn wide_heads(config: &Config, key: &'static str, n_kv_heads: usize) -> Result<Wide> {
    let k_is_v = config.flag(&[key], false)?;
    let mut found = Vec::new();
    if let Some(section) = config.object_opt(&["per_layer_config"])? {
        for layer in 0..LAYERS_MAX {
            let Some(of_layer) = section.object_opt(&layer.to_string())? else { continue };
            let size = |key, max| -> Result<Option<usize>> {
                let n = of_layer.number_opt(key)?;
                match n {
                    Some(n) if n.fract() != 0.0 || !(1.0..=max as f64).contains(&n) => {
                        Err(of_layer.error(key, &format!("is {n}, expected an integer from 1 to {max}")))
                    }
                    n => Ok(n.map(|n| n as usize)),
                }
            };
            found.push((size("head_dim", HEAD_DIM_MAX)?, size("num_key_value_heads", HEADS_MAX)?));
        }
    }
    if found.windows(2).any(|two| matches!(two, [a, b] if a != b)) {
        return Err(config.error("per_layer_config gives different heads to layers of one kind"));
    }
    let (listed_dim, listed_heads) = found.first().copied().unwrap_or_default();
    let dim = config.uint_opt(&["global_head_dim"], 1, HEAD_DIM_MAX)?.unwrap_or(512);
    let heads = config.uint_opt(&["num_global_key_value_heads"], 1, HEADS_MAX)?.filter(|_| k_is_v);
    Ok(Wide {
        n_kv_heads: listed_heads.or(heads).unwrap_or(n_kv_heads),
        head_dim: listed_dim.unwrap_or(dim),
        k_is_v,
    })
}

pub(super) fn head_dim(rule: &GqaRule, config: &Config, base: &Base) -> Result<usize> {
    match (config.uint_opt(&["head_dim"], 1, HEAD_DIM_MAX)?, rule.head_dim) {
        (Some(given), _) | (None, Some(given)) => Ok(given),
        (None, None) if base.hidden.is_multiple_of(base.n_heads) => Ok(base.hidden / base.n_heads),
        (None, None) => {
            let text = format!("head_dim is missing and hidden_size {} does not divide by", base.hidden);
            Err(config.error(format!("{text} {} heads", base.n_heads)))
        }
    }
}

pub(super) fn gate(rule: &GqaRule, config: &Config) -> Result<Option<Gate>> {
    let Some(key) = rule.gate_per_head else { return Ok(rule.gate) };
    let per_head = config.find(&[key]).is_none_or(|(_, v)| match v {
        serde_json::Value::Bool(is) => *is,
        other => other.as_str() == Some("per-head"),
    });
    Ok(if per_head { Some(Gate::PerHead) } else { rule.gate })
}

/// Query heads of each layer.
pub(super) fn heads_of_layers(rule: &GqaRule, config: &Config, base: &Base) -> Result<Vec<usize>> {
    let Some(listed) = config.uints_opt(rule.heads_of_layers, HEADS_MAX)? else {
        return Ok(vec![base.n_heads; base.n_layers]);
    };
    if listed.len() == base.n_layers && !listed.contains(&0) {
        return Ok(listed);
    }
    let what = format!("numbers of heads are {listed:?}, expected one for each of {} layers", base.n_layers);
    Err(config.error(what))
}

pub(super) fn check_groups(config: &Config, n_heads: usize, n_kv_heads: usize) -> Result<()> {
    if n_heads.is_multiple_of(n_kv_heads) {
        return Ok(());
    }
    let text = format!("{n_heads} attention heads do not divide among {n_kv_heads} key-value heads");
    Err(config.error(text))
}
