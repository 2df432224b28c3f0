//! From a family and a config.json to the model's description.
//!
//! Every number is bounded before it is used. The rules that hold between numbers (heads divide into groups,
//! no more experts chosen than there are …) are checked here too, because the forward pass relies on them.

mod attention;
mod blocks;
mod compressed;
mod delta;
mod heads;
mod indexed;
mod moe;
mod ngrams;
mod recurrent;
mod storage;

use moepack_format::Result;

use crate::family::{Factor, Family, Fixed, MoeLayers, NormRule, ResidualRule, Switch};
use crate::hparams::{Config, Keys};
use crate::limits::{
    HEADS_MAX, HIDDEN_MAX, LAYERS_MAX, POSITIONS_MAX, RANK_MAX, SINKHORN_MAX, STREAMS_MAX, VOCAB_MAX,
};
pub(crate) use compressed::COMPRESS_THETA;
pub use storage::{hints, storage};

use crate::spec::{Across, Attention, Hyper, LayerSpec, Mlp, ModelSpec, Norm, Residual};

/// The model that config.json describes. `tied_head` is what config.json says; whether there is a head of its
/// own is for the tensors to decide.
///
/// # Errors
/// `BadData` for a missing key, a value out of range, or values that contradict each other.
pub fn describe(family: &'static Family, config: &Config) -> Result<ModelSpec> {
    check_fixed(family, config)?;
    let kimi = config.find(&["model_max_length"]).is_some();
    let positions = if kimi { "model_max_length" } else { "max_seq_len" };
    let base = Base {
        hidden: size(config, ["hidden_size", "d_model"], HIDDEN_MAX)?,
        positions: size(config, ["max_position_embeddings", positions], POSITIONS_MAX)?,
        n_heads: size(config, ["num_attention_heads", "n_heads"], HEADS_MAX)?,
        n_layers: match family.moe_layers {
            MoeLayers::Blocks => blocks::blocks(config)?.len(),
            _ => {
                let of_double_layers = config.find(&["num_layers"]).is_some() && family.shortcut;
                let key = if of_double_layers { "num_layers" } else { "n_layers" };
                size(config, ["num_hidden_layers", key], LAYERS_MAX)?
            }
        },
    };
    let residuals = [residual(family, config, &base, false)?, residual(family, config, &base, true)?];
    let mlps = moe::mlps(family, config, base.n_layers)?;
    let attentions = attention::attentions(family, config, &base, &mlps)?;
    let vocab = config.uint(&["vocab_size"], 1, VOCAB_MAX)?;
    let ngrams = match family.ngrams {
        true => ngrams::ngrams(config, &base, vocab)?,
        false => vec![None; base.n_layers],
    };
    let scaled = family.layer_scale;
    let shortcut = if family.shortcut { Some(moe::shortcut(family, config)?) } else { None };
    let [with_attention, without] = residuals;
    let layer = |((attention, mlp), ngrams): ((Attention, Mlp), _)| {
        let residual = if matches!(attention, Attention::Gqa(_)) { with_attention } else { without };
        LayerSpec { ngrams, attention, mlp, residual, scaled, shortcut }
    };
    Ok(ModelSpec {
        family: family.name(),
        hidden: base.hidden,
        vocab,
        norm: norm(family, config)?,
        final_eps: match family.norm {
            NormRule::RmsButLast(default) => Some(eps(config, "rms_norm_eps", default)?),
            _ => None,
        },
        embed_scale: factor(config, family.embed_scale, &base)?,
        logit_scale: factor(config, family.logit_scale, &base)?,
        logit_softcap: moe::softcap(family.logit_softcap, config)?,
        head_bias: switch(config, family.head_bias)?,
        tied_head: config.flag(&["tie_embedding", "tie_word_embeddings"], family.tied_head)?,
        hyper: if let Residual::Hyper(hyper) = without { Some(hyper) } else { None },
        max_positions: base.positions,
        layers: attentions.into_iter().zip(mlps).zip(ngrams).map(layer).collect(),
    })
}

struct Base {
    hidden: usize,
    positions: usize,
    n_heads: usize,
    n_layers: usize,
}

/// A size under its usual key, or under another where only that is there.
fn size(config: &Config, [key, other]: [&'static str; 2], max: usize) -> Result<usize> {
    let key = if config.find(&[key]).is_none() && config.find(&[other]).is_some() { other } else { key };
    config.uint(&[key], 1, max)
}

/// Refuses a model that only looks like the family.
fn check_fixed(family: &Family, config: &Config) -> Result<()> {
    for &(key, want) in family.fixed {
        let Some((_, value)) = config.find(&[key]) else { continue };
        let (same, expected) = match want {
            Fixed::Text(t) => (value.as_str() == Some(t), format!("{t:?}")),
            Fixed::Int(n) => (value.as_f64() == Some(n as f64), n.to_string()),
            Fixed::NotText(t) => (value.as_str() != Some(t), format!("anything but {t:?}")),
            Fixed::Bool(b) => (value.as_bool() == Some(b), b.to_string()),
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

fn norm(family: &Family, config: &Config) -> Result<Norm> {
    let rms = |default| eps(config, "rms_norm_eps", default);
    Ok(match family.norm {
        NormRule::Rms(default) => Norm::Rms { eps: rms(default)? },
        NormRule::RmsButLast(fixed) => Norm::Rms { eps: fixed as f32 },
        NormRule::RmsOf(key, default) => Norm::Rms { eps: eps(config, key, default)? },
        NormRule::RmsPlusOne(default) => Norm::RmsPlusOne { eps: rms(default)? },
        NormRule::Layer(default) => Norm::Layer { eps: rms(default)?, bias: true },
        NormRule::LayerWithoutBias(fixed) => Norm::Layer { eps: fixed as f32, bias: false },
        NormRule::LayerUnlessRms(default) if config.find(&["rms_norm_eps"]).is_some() => {
            Norm::Rms { eps: rms(default)? }
        }
        NormRule::LayerUnlessRms(default) => {
            Norm::Layer { eps: eps(config, "layer_norm_eps", default)?, bias: false }
        }
    })
}

fn eps(config: &Config, key: &'static str, default: f64) -> Result<f32> {
    let eps = config.number_opt(&[key])?.unwrap_or(default) as f32;
    if (0.0..1.0).contains(&eps) {
        return Ok(eps);
    }
    Err(config.error(format!("{key} is {eps}, expected 0 or more and less than 1")))
}

/// How sublayers of a layer join the stream; `mixes` says that something else stands in the place of attention.
fn residual(family: &Family, config: &Config, base: &Base, mixes: bool) -> Result<Residual> {
    let one = |keys| Ok(positive(config, keys)?.unwrap_or(1.0)) as Result<f32>;
    let two = |[a, b]: [Keys; 2]| Ok([one(a)?, one(b)?]) as Result<[f32; 2]>;
    Ok(match family.residual {
        ResidualRule::Plain => Residual::Plain,
        ResidualRule::Scaled(rule) => Residual::Scaled(factor(config, rule, base)?),
        ResidualRule::Parallel => Residual::Parallel,
        ResidualRule::Single => Residual::Single,
        ResidualRule::OfNormed { full, mixer, mlp } => {
            Residual::OfNormed { attention: two(if mixes { mixer } else { full })?, mlp: two(mlp)? }
        }
        ResidualRule::Post => Residual::Post,
        ResidualRule::Sandwich => Residual::Sandwich,
        ResidualRule::HyperGated => Residual::Hyper(Hyper {
            n_streams: config.uint_opt(&["hc_count"], 1, STREAMS_MAX)?.unwrap_or(4),
            across: Across::Gated(config.uint_opt(&["hc_lowrank"], 1, RANK_MAX)?.unwrap_or(320)),
            eps: 0.0,
            mean_head: false,
        }),
        ResidualRule::Hyper | ResidualRule::HyperMean | ResidualRule::HyperAlone => {
            Residual::Hyper(hyper(family.residual, config)?)
        }
    })
}

fn hyper(rule: ResidualRule, config: &Config) -> Result<Hyper> {
    Ok(Hyper {
        n_streams: config.uint_opt(&["hc_mult"], 1, STREAMS_MAX)?.unwrap_or(4),
        across: match rule {
            ResidualRule::HyperAlone => Across::Alone(positive(config, &["hc_magnitude"])?.unwrap_or(2.0)),
            _ => Across::Sinkhorn(config.uint_opt(&["hc_sinkhorn_iters"], 1, SINKHORN_MAX)?.unwrap_or(20)),
        },
        eps: eps(config, "hc_eps", 1e-6)?,
        mean_head: rule == ResidualRule::HyperMean,
    })
}

fn switch(config: &Config, switch: Switch) -> Result<bool> {
    match switch {
        Switch::Always => Ok(true),
        Switch::Never => Ok(false),
        Switch::Key(key, default) => config.flag(&[key], default),
        Switch::UnlessNull(key) => Ok(config.find(&[key]).is_some() || !config.mentions(&[key])),
    }
}

fn factor(config: &Config, factor: Factor, base: &Base) -> Result<f32> {
    Ok(match factor {
        Factor::One => 1.0,
        Factor::Key(key, default) => positive(config, &[key])?.unwrap_or(default as f32),
        Factor::Inverse(key, default) => 1.0 / positive(config, &[key])?.unwrap_or(default as f32),
        Factor::RootOfHidden => (base.hidden as f64).sqrt() as f32,
        Factor::RootOfHiddenIf(key) if config.flag(&[key], false)? => (base.hidden as f64).sqrt() as f32,
        Factor::RootOfHiddenIf(_) => 1.0,
    })
}

/// A number above zero, if the key is there.
fn positive(config: &Config, keys: &[&'static str]) -> Result<Option<f32>> {
    let Some((key, value)) = config.find(keys) else { return Ok(None) };
    match value.as_f64().map(|n| n as f32) {
        Some(n) if n > 0.0 && n.is_finite() => Ok(Some(n)),
        _ => Err(config.bad(key, value, "a number above 0")),
    }
}

#[cfg(test)]
mod tests;
