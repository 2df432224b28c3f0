//! DeepSeek V4's attention, layer by layer.

use moepack_format::Result;

use super::Base;
use crate::family::{CompressedRule, Family};
use crate::hparams::Config;
use crate::limits::{HEAD_DIM_MAX, HEADS_MAX, POSITIONS_MAX, RANK_MAX};
use crate::rope::{Source, rope};
use crate::spec::{Compressed, Compression, Indexer, Pairing, Rope};

/// `compress_rope_theta` where config.json has none.
pub(crate) const COMPRESS_THETA: f64 = 1.6e5;

/// The attention of each layer.
pub(super) fn compressed(
    family: &Family,
    rule: &CompressedRule,
    config: &Config,
    base: &Base,
) -> Result<Vec<Compressed>> {
    let kinds = compressed_layers(rule, config, base.n_layers)?;
    kinds.into_iter().map(|kind| layer(family, config, base, kind)).collect()
}

/// How a layer of DeepSeek V4 compresses, if it does.
#[derive(Clone, Copy)]
enum Compressing {
    No,
    /// Entries of so many tokens, which overlap and of which an indexer chooses.
    Sparse(usize),
    /// Entries of so many tokens, all of them.
    Heavy(usize),
}

/// `layer_types` with `compress_rates` (transformers 5), or `compress_ratios` (as released).
fn compressed_layers(rule: &CompressedRule, config: &Config, n_layers: usize) -> Result<Vec<Compressing>> {
    let [sparse, heavy] = rule.ratios;
    let rate = |new, old, default| -> Result<usize> {
        Ok(config.uint_opt(&[old, new], 1, POSITIONS_MAX)?.unwrap_or(default))
    };
    let sparse_rate = rate("compress_rates.compressed_sparse_attention", "compress_rate_csa", sparse)?;
    let heavy_rate = rate("compress_rates.heavily_compressed_attention", "compress_rate_hca", heavy)?;
    if let Some(types) = config.strings_opt(&["layer_types"], n_layers)? {
        let one = |t: &&str| match *t {
            "sliding_attention" => Ok(Compressing::No),
            "compressed_sparse_attention" => Ok(Compressing::Sparse(sparse_rate)),
            "heavily_compressed_attention" => Ok(Compressing::Heavy(heavy_rate)),
            other => Err(config.error(format!("layer_types has {other:?}, which is no attention of V4"))),
        };
        return types.iter().map(one).collect();
    }
    let Some(ratios) = config.uints_opt(&["compress_ratios"], POSITIONS_MAX)? else {
        return Err(config.error("compress_ratios is missing (nor layer_types)"));
    };
    // MTP layers have an entry too.
    if ratios.len() < n_layers {
        return Err(
            config.error(format!("compress_ratios has {} entries for {n_layers} layers", ratios.len()))
        );
    }
    let one = |&ratio: &usize| match ratio {
        0 => Ok(Compressing::No),
        r if r == sparse => Ok(Compressing::Sparse(sparse_rate)),
        r if r == heavy => Ok(Compressing::Heavy(heavy_rate)),
        other => Err(config.error(format!("compress_ratios has {other}, expected 0, {sparse} or {heavy}"))),
    };
    ratios.iter().take(n_layers).map(one).collect()
}

fn layer(family: &Family, config: &Config, base: &Base, kind: Compressing) -> Result<Compressed> {
    let head_dim = config.uint(&["head_dim"], 1, HEAD_DIM_MAX)?;
    let is_plain = matches!(kind, Compressing::No);
    let rope = compressed_rope(family, config, base, head_dim, is_plain)?;
    let rope_dim = 2 * rope.inv_freq.len();
    let indexer = || -> Result<Indexer> {
        let index_dim = config.uint(&["index_head_dim"], 1, HEAD_DIM_MAX)?;
        if index_dim < rope_dim {
            let what = format!("index_head_dim is {index_dim}, but {rope_dim} dimensions rotate");
            return Err(config.error(what));
        }
        Ok(Indexer {
            n_heads: config.uint(&["index_n_heads"], 1, HEADS_MAX)?,
            head_dim: index_dim,
            n_used: config.uint(&["index_topk"], 1, POSITIONS_MAX)?,
            key_eps: 0.0,
            pool: None,
            rotates_last: true,
            rope: rope.clone(),
        })
    };
    let compression = match kind {
        Compressing::No => None,
        Compressing::Sparse(ratio) => Some(Compression { ratio, overlap: true, indexer: Some(indexer()?) }),
        Compressing::Heavy(ratio) => Some(Compression { ratio, overlap: false, indexer: None }),
    };
    let n_groups = config.uint(&["o_groups"], 1, HEADS_MAX)?;
    if !(base.n_heads * head_dim).is_multiple_of(n_groups) {
        let what = format!("{} heads of {head_dim} do not divide into {n_groups} groups", base.n_heads);
        return Err(config.error(what));
    }
    Ok(Compressed {
        n_heads: base.n_heads,
        head_dim,
        q_lora: config.uint(&["q_lora_rank"], 1, RANK_MAX)?,
        n_groups,
        o_lora: config.uint(&["o_lora_rank"], 1, RANK_MAX)?,
        window: config.uint(&["sliding_window"], 1, POSITIONS_MAX)?,
        scale: (1.0 / (head_dim as f64).sqrt()) as f32,
        rope,
        compression,
    })
}

/// Layers without entries rotate by `rope_theta` alone, the others by `compress_rope_theta` with scaling.
fn compressed_rope(
    family: &Family,
    config: &Config,
    base: &Base,
    head_dim: usize,
    is_plain: bool,
) -> Result<Rope> {
    let label = if is_plain { "main" } else { "compress" };
    let source = Source::new(config, label)?;
    let inner = source.is_part(label);
    let dim = source.rotary_dim(family.rope, "qk_rope_head_dim", head_dim)?;
    let (source, theta) = match (inner, is_plain) {
        (true, _) => (source, None),
        (false, true) => (Source { section: None, ..source }, config.number_opt(&["rope_theta"])?),
        (false, false) => {
            (source, Some(config.number_opt(&["compress_rope_theta"])?.unwrap_or(COMPRESS_THETA)))
        }
    };
    Ok(rope(source, family.rope, theta, Pairing::Adjacent, dim, base.positions)?.rope)
}
