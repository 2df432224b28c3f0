//! From a family and a config.json to the model's description.
//!
//! Every number is bounded before it is used. The rules that hold between numbers (heads divide into groups,
//! no more experts chosen than there are …) are checked here too, because the forward pass relies on them.

use moepack_format::Result;

use crate::encoding::BlockSize;
use crate::family::{
    ActivationRule, AttentionRule, Family, Fixed, MoeLayers, RouterRule, SharedRule, Switch, WindowRule,
};
use crate::hparams::{Config, Keys};
use crate::limits::{
    BLOCK_SIDE_MAX, EXPERTS_MAX, HEAD_DIM_MAX, HEADS_MAX, HIDDEN_MAX, INTER_MAX, LAYERS_MAX, POSITIONS_MAX,
    RANK_MAX, SHARED_MAX, VOCAB_MAX,
};
use crate::rope::rope;
use crate::spec::{
    Activation, Attention, Gqa, Groups, LayerSpec, Mla, Mlp, ModelSpec, Moe, Norm, Pairing, Residual, Router,
    Shared,
};

/// The model that config.json describes. `tied_head` is what config.json says; whether there is a head of its
/// own is for the tensors to decide.
///
/// # Errors
/// `BadData` for a missing key, a value out of range, or values that contradict each other.
pub fn describe(family: &'static Family, config: &Config) -> Result<ModelSpec> {
    check_fixed(family, config)?;
    let n_layers = config.uint(&["num_hidden_layers"], 1, LAYERS_MAX)?;
    let base = Base {
        hidden: config.uint(&["hidden_size"], 1, HIDDEN_MAX)?,
        positions: config.uint(&["max_position_embeddings"], 1, POSITIONS_MAX)?,
        n_heads: config.uint(&["num_attention_heads"], 1, HEADS_MAX)?,
    };
    let attention = attention(family, config, &base)?;
    let windows = windows(family, config, n_layers)?;
    let has_experts = moe_layers(family.moe_layers, config, n_layers)?;
    let moe = Mlp::Moe(moe(family, config)?);
    let dense = if has_experts.iter().all(|&m| m) { None } else { Some(dense(family, config)?) };
    let layer = |l: usize| LayerSpec {
        attention: with_window(&attention, windows.get(l).copied().flatten()),
        mlp: match (&dense, has_experts.get(l)) {
            (Some(dense), Some(false)) => dense.clone(),
            _ => moe.clone(),
        },
        residual: Residual::Plain,
    };
    Ok(ModelSpec {
        family: family.name(),
        hidden: base.hidden,
        vocab: config.uint(&["vocab_size"], 1, VOCAB_MAX)?,
        norm: Norm::Rms { eps: eps(config, family.norm_eps)? },
        tied_head: config.flag(&["tie_word_embeddings"], false)?,
        max_positions: base.positions,
        layers: (0..n_layers).map(layer).collect(),
    })
}

struct Base {
    hidden: usize,
    positions: usize,
    n_heads: usize,
}

/// Refuses a model that only looks like the family.
fn check_fixed(family: &Family, config: &Config) -> Result<()> {
    for &(key, want) in family.fixed {
        let Some((_, value)) = config.find(&[key]) else { continue };
        let (same, expected) = match want {
            Fixed::Text(t) => (value.as_str() == Some(t), format!("{t:?}")),
            Fixed::Int(n) => (value.as_i64() == Some(n), n.to_string()),
        };
        if !same {
            let error = config.bad(key, value, &format!("{expected}, as every {} has it", family.name()));
            return Err(
                error.hint("this is another architecture under the same model_type; it is not supported")
            );
        }
    }
    Ok(())
}

fn eps(config: &Config, default: f64) -> Result<f32> {
    let eps = config.number_opt(&["rms_norm_eps"])?.unwrap_or(default) as f32;
    if (0.0..1.0).contains(&eps) {
        return Ok(eps);
    }
    Err(config.error(format!("rms_norm_eps is {eps}, expected 0 or more and less than 1")))
}

fn switch(config: &Config, switch: Switch) -> Result<bool> {
    match switch {
        Switch::Always => Ok(true),
        Switch::Never => Ok(false),
        Switch::Key(key, default) => config.flag(&[key], default),
    }
}

fn attention(family: &Family, config: &Config, base: &Base) -> Result<Attention> {
    match family.attention {
        AttentionRule::Gqa { .. } => gqa(family, config, base).map(Attention::Gqa),
        AttentionRule::Mla { .. } => mla(family, config, base).map(Attention::Mla),
    }
}

fn gqa(family: &Family, config: &Config, base: &Base) -> Result<Gqa> {
    let AttentionRule::Gqa { head_dim, qk_norm, qkv_bias, o_bias, clip, window: _, sinks } = family.attention
    else {
        return Err(config.error("grouped-query attention was asked of a family without it"));
    };
    let n_heads = base.n_heads;
    let n_kv_heads = config.uint_opt(&["num_key_value_heads"], 1, HEADS_MAX)?.unwrap_or(n_heads);
    if !n_heads.is_multiple_of(n_kv_heads) {
        let text = format!("{n_heads} attention heads do not divide among {n_kv_heads} key-value heads");
        return Err(config.error(text));
    }
    let head_dim = match (config.uint_opt(&["head_dim"], 1, HEAD_DIM_MAX)?, head_dim) {
        (Some(given), _) | (None, Some(given)) => given,
        (None, None) if base.hidden.is_multiple_of(n_heads) => base.hidden / n_heads,
        (None, None) => {
            let text = format!("head_dim is missing and hidden_size {} does not divide by", base.hidden);
            return Err(config.error(format!("{text} {n_heads} heads")));
        }
    };
    rotary_pairs(config, "head_dim", head_dim)?;
    let clip = match clip {
        Some(key) => positive(config, key)?,
        None => None,
    };
    Ok(Gqa {
        n_heads,
        n_kv_heads,
        head_dim,
        qk_norm,
        qkv_bias: switch(config, qkv_bias)?,
        o_bias: switch(config, o_bias)?,
        clip,
        window: None,
        sinks,
        scale: (1.0 / (head_dim as f64).sqrt()) as f32,
        rope: rope(config, family.rope, Pairing::Half, head_dim, base.positions)?.rope,
    })
}

fn mla(family: &Family, config: &Config, base: &Base) -> Result<Mla> {
    let AttentionRule::Mla { latent_eps, bias, adjacent } = family.attention else {
        return Err(config.error("latent attention was asked of a family without it"));
    };
    let nope_dim = config.uint(&["qk_nope_head_dim"], 1, HEAD_DIM_MAX)?;
    let rope_dim = config.uint(&["qk_rope_head_dim"], 1, HEAD_DIM_MAX)?;
    rotary_pairs(config, "qk_rope_head_dim", rope_dim)?;
    let pairing = if switch(config, adjacent)? { Pairing::Adjacent } else { Pairing::Half };
    let scaled = rope(config, family.rope, pairing, rope_dim, base.positions)?;
    // A missing q_lora_rank would mean V3's 1536 to transformers, null means a direct projection: both are
    // written.
    let q_lora = config.uint_opt(&["q_lora_rank"], 1, RANK_MAX)?;
    if q_lora.is_none() && !config.mentions(&["q_lora_rank"]) {
        return Err(
            config.error("q_lora_rank is missing; null means that queries have no low-rank projection")
        );
    }
    let scale = 1.0 / ((nope_dim + rope_dim) as f64).sqrt() * scaled.logit_factor;
    Ok(Mla {
        n_heads: base.n_heads,
        q_lora,
        kv_lora: config.uint(&["kv_lora_rank"], 1, RANK_MAX)?,
        nope_dim,
        rope_dim,
        v_dim: config.uint(&["v_head_dim"], 1, HEAD_DIM_MAX)?,
        latent_eps: latent_eps as f32,
        bias: switch(config, bias)?,
        scale: scale as f32,
        rope: scaled.rope,
    })
}

fn rotary_pairs(config: &Config, key: &str, dim: usize) -> Result<()> {
    if dim.is_multiple_of(2) {
        return Ok(());
    }
    Err(config.error(format!("{key} is {dim}, expected an even number: dimensions rotate in pairs")))
}

/// A number above zero, if the key is there.
fn positive(config: &Config, key: &'static str) -> Result<Option<f32>> {
    let keys = [key];
    let Some((_, value)) = config.find(&keys) else { return Ok(None) };
    match value.as_f64().map(|n| n as f32) {
        Some(n) if n > 0.0 && n.is_finite() => Ok(Some(n)),
        _ => Err(config.bad(key, value, "a number above 0")),
    }
}

fn with_window(attention: &Attention, window: Option<usize>) -> Attention {
    match attention {
        Attention::Gqa(gqa) => Attention::Gqa(Gqa { window, ..gqa.clone() }),
        Attention::Mla(mla) => Attention::Mla(mla.clone()),
    }
}

/// The window of each layer.
fn windows(family: &Family, config: &Config, n_layers: usize) -> Result<Vec<Option<usize>>> {
    let AttentionRule::Gqa { window, .. } = family.attention else { return Ok(vec![None; n_layers]) };
    // transformers 5 writes 0 for "not used".
    let size = config.uint_opt(&["sliding_window"], 0, POSITIONS_MAX)?;
    let unused = size == Some(0);
    let size = size.filter(|&n| n > 0);
    let used = config.flag(&["use_sliding_window"], false)?;
    let every_other = |until: usize| (0..n_layers).map(|l| l % 2 == 0 && l < until).collect::<Vec<_>>();
    let (size, slides) = match window {
        WindowRule::None => (None, Vec::new()),
        WindowRule::All => (size, vec![true; n_layers]),
        // transformers' default where the key is missing but used.
        WindowRule::IfUsed => (size.or(Some(4096)), vec![used; n_layers]),
        WindowRule::LayerTypes { default } => {
            (size.or(Some(default)), layer_types(config, n_layers)?.unwrap_or_else(|| every_other(n_layers)))
        }
        WindowRule::LayerTypesIfUsed => {
            let until = config.uint_opt(&["max_window_layers"], 0, LAYERS_MAX)?.unwrap_or(28);
            let listed = layer_types(config, n_layers)?.unwrap_or_else(|| every_other(until));
            (size.or(Some(4096)).filter(|_| used), listed)
        }
    };
    let size = size.filter(|_| !unused);
    Ok((0..n_layers).map(|l| size.filter(|_| slides.get(l).copied().unwrap_or(false))).collect())
}

/// Which layers `layer_types` makes sliding.
fn layer_types(config: &Config, n_layers: usize) -> Result<Option<Vec<bool>>> {
    let Some(types) = config.strings_opt(&["layer_types"], n_layers)? else { return Ok(None) };
    let one = |t: &&str| match *t {
        "sliding_attention" => Ok(true),
        "full_attention" => Ok(false),
        other => Err(config.error(format!(
            "layer_types has {other:?}, expected \"full_attention\" or \"sliding_attention\""
        ))),
    };
    types.iter().map(one).collect::<Result<_>>().map(Some)
}

/// Which layers have experts.
fn moe_layers(rule: MoeLayers, config: &Config, n_layers: usize) -> Result<Vec<bool>> {
    let layers = match rule {
        MoeLayers::All => vec![true; n_layers],
        MoeLayers::From(key, default) => {
            let first = match config.find(&[key]) {
                None => default,
                Some((_, v)) => {
                    v.as_u64()
                        .and_then(|n| usize::try_from(n).ok())
                        .filter(|&n| n <= n_layers)
                        .ok_or_else(|| config.bad(key, v, &format!("an integer from 0 to {n_layers}")))?
                }
            };
            (0..n_layers).map(|l| l >= first).collect()
        }
        MoeLayers::Sparse => {
            let step = config.uint_opt(&["decoder_sparse_step"], 1, LAYERS_MAX)?.unwrap_or(1);
            let dense = config.uints_opt(&["mlp_only_layers"], LAYERS_MAX)?.unwrap_or_default();
            (0..n_layers).map(|l| (l + 1) % step == 0 && !dense.contains(&l)).collect()
        }
    };
    if layers.iter().any(|&m| m) {
        return Ok(layers);
    }
    Err(config
        .error(format!("none of {n_layers} layers has experts"))
        .hint("moepack packs Mixture-of-Experts models"))
}

fn dense(family: &Family, config: &Config) -> Result<Mlp> {
    let activation = activation(family.moe.activation, config)?;
    Ok(Mlp::Dense { inter: config.uint(family.dense_inter, 1, INTER_MAX)?, activation })
}

fn moe(family: &Family, config: &Config) -> Result<Moe> {
    let rule = &family.moe;
    let n_experts = config.uint(rule.n_experts, 1, EXPERTS_MAX)?;
    let n_experts_used = config.uint(rule.n_experts_used, 1, EXPERTS_MAX)?;
    if n_experts_used > n_experts {
        return Err(config.error(format!("a token uses {n_experts_used} experts, but there are {n_experts}")));
    }
    let inter = config.uint(rule.inter, 1, INTER_MAX)?;
    Ok(Moe {
        n_experts,
        n_experts_used,
        inter,
        activation: activation(rule.activation, config)?,
        bias: rule.bias,
        router: router(&rule.router, config, n_experts, n_experts_used)?,
        shared: shared(rule.shared, config, inter)?,
    })
}

fn activation(rule: ActivationRule, config: &Config) -> Result<Activation> {
    Ok(match rule {
        ActivationRule::Silu => Activation::Silu,
        ActivationRule::ClampedSwish { alpha, limit } => Activation::ClampedSwish {
            alpha: positive(config, "swiglu_alpha")?.unwrap_or(alpha as f32),
            limit: positive(config, "swiglu_limit")?.unwrap_or(limit as f32),
        },
    })
}

fn router(rule: &RouterRule, config: &Config, n_experts: usize, n_used: usize) -> Result<Router> {
    let scale = match rule.scale {
        Some((key, default)) => positive(config, key)?.unwrap_or(default as f32),
        None => 1.0,
    };
    let groups = match rule.groups {
        Some(score) => groups(config, n_experts, n_used)?.map(|(n_groups, n_groups_used)| Groups {
            n_groups,
            n_groups_used,
            score,
        }),
        None => None,
    };
    Ok(Router {
        bias: rule.bias,
        score: rule.score,
        correction: rule.correction,
        groups,
        weights: rule.weights,
        renorm: switch(config, rule.renorm)?.then_some(rule.renorm_eps),
        scale,
    })
}

/// Number of groups and of those kept; `None` where all experts compete with each other.
fn groups(config: &Config, n_experts: usize, n_used: usize) -> Result<Option<(usize, usize)>> {
    const COUNT: Keys = &["n_group"];
    const USED: Keys = &["topk_group"];
    let n = config.uint_opt(COUNT, 1, EXPERTS_MAX)?.unwrap_or(1);
    let used = config.uint_opt(USED, 1, EXPERTS_MAX)?.unwrap_or(1);
    if used > n {
        return Err(config.error(format!("topk_group is {used}, but n_group is {n}")));
    }
    if !n_experts.is_multiple_of(n) {
        return Err(config.error(format!("{n_experts} experts do not divide into {n} groups")));
    }
    if n_experts / n * used < n_used {
        let left = n_experts / n * used;
        return Err(
            config.error(format!("a token uses {n_used} experts, but {used} of {n} groups hold {left}"))
        );
    }
    // The score of a group is the sum of its two best.
    if n > 1 && n_experts / n < 2 {
        return Err(config.error(format!("{n} groups of {n_experts} experts leave fewer than 2 in a group")));
    }
    Ok((used < n).then_some((n, used)))
}

fn shared(rule: SharedRule, config: &Config, inter: usize) -> Result<Option<Shared>> {
    match rule {
        SharedRule::None => Ok(None),
        SharedRule::Count(key, default) => {
            let keys = [key];
            let n = match config.find(&keys) {
                None => default,
                Some((_, v)) => v
                    .as_u64()
                    .and_then(|n| usize::try_from(n).ok())
                    .filter(|&n| n <= SHARED_MAX)
                    .ok_or_else(|| config.bad(key, v, &format!("an integer from 0 to {SHARED_MAX}")))?,
            };
            Ok((n > 0).then_some(Shared { inter: n * inter, gated: false }))
        }
        SharedRule::Gated(keys) => Ok(Some(Shared { inter: config.uint(keys, 1, INTER_MAX)?, gated: true })),
    }
}

/// Rows and columns of FP8 blocks, where config.json says them.
///
/// # Errors
/// `BadData` for anything but two sizes.
pub fn fp8_block(config: &Config) -> Result<BlockSize> {
    const KEY: &str = "weight_block_size";
    let Some(section) = config.object_opt(&["quantization_config"])? else { return Ok(None) };
    let Some(value) = section.find(&[KEY]) else { return Ok(None) };
    let sides = value.as_array().map(|a| a.iter().filter_map(serde_json::Value::as_u64).collect::<Vec<_>>());
    match sides.as_deref() {
        Some(&[r, c]) if (1..=BLOCK_SIDE_MAX).contains(&r) && (1..=BLOCK_SIDE_MAX).contains(&c) => {
            Ok(Some([r, c]))
        }
        _ => {
            Err(section.error(KEY, &format!("is {value}, expected two integers from 1 to {BLOCK_SIDE_MAX}")))
        }
    }
}

#[cfg(test)]
mod tests;
