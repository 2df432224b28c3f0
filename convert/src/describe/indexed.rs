//! Which keys a query sees, where an indexer chooses them.

use moepack_format::Result;

use super::attention::layer_types;
use super::{Base, norm};
use crate::family::{Family, GqaRule, IndexerRule, MlaRule};
use crate::hparams::Config;
use crate::limits::{HEAD_DIM_MAX, HEADS_MAX, LAYERS_MAX, POSITIONS_MAX};
use crate::rope::{Source, rope};
use crate::spec::{Attention, Blocks, Gqa, Indexer, KeyChoice, Pools};

/// `eps` of the norm of an indexer's keys, in the reference.
const KEY_NORM_EPS: f32 = 1e-6;

/// Which layers see blocks of keys, and how.
pub(super) fn blocks_of_layers(rule: &GqaRule, config: &Config, base: &Base) -> Result<Vec<Option<Blocks>>> {
    let n_layers = base.n_layers;
    let Some(name) = rule.blocks else { return Ok(vec![None; n_layers]) };
    let flags = config.uints_opt(&["sparse_attention_config.sparse_attention_freq"], 2)?;
    let sparse = match (layer_types(config, n_layers, name)?, flags) {
        (Some(listed), _) => listed,
        (None, Some(flags)) => (0..n_layers).map(|l| flags.get(l) == Some(&1)).collect(),
        (None, None) => vec![false; n_layers],
    };
    if !sparse.contains(&true) {
        return Ok(vec![None; n_layers]);
    }
    let uint = |keys, min, max, default| Ok(config.uint_opt(keys, min, max)?.unwrap_or(default));
    let blocks = Blocks {
        n_heads: uint(&["sparse_attention_config.sparse_num_index_heads", "index_n_heads"], 1, HEADS_MAX, 4)?,
        head_dim: uint(
            &["sparse_attention_config.sparse_index_dim", "index_head_dim"],
            1,
            HEAD_DIM_MAX,
            128,
        )?,
        size: uint(
            &["sparse_attention_config.sparse_block_size", "index_block_size"],
            1,
            POSITIONS_MAX,
            128,
        )?,
        n_used: uint(
            &["sparse_attention_config.sparse_topk_blocks", "index_topk_blocks"],
            1,
            POSITIONS_MAX,
            16,
        )?,
        n_local: uint(
            &["sparse_attention_config.sparse_local_block", "index_local_blocks"],
            0,
            POSITIONS_MAX,
            1,
        )?,
    };
    Ok(sparse.into_iter().map(|s| s.then_some(blocks)).collect())
}

pub(super) fn with_blocks(config: &Config, gqa: Gqa, blocks: Option<Blocks>) -> Result<Gqa> {
    let rotary = 2 * gqa.rope.inv_freq.len();
    match blocks {
        Some(b) if !gqa.n_heads.is_multiple_of(b.n_heads) => {
            let what =
                format!("{} attention heads do not divide among {} of the indexer", gqa.n_heads, b.n_heads);
            Err(config.error(what))
        }
        Some(b) if b.head_dim < rotary => {
            let what = format!("the indexer's heads have {} dimensions, but {rotary} rotate", b.head_dim);
            Err(config.error(what))
        }
        blocks => Ok(Gqa { blocks, ..gqa }),
    }
}

pub(super) fn with_pools(config: &Config, gqa: Gqa) -> Result<Gqa> {
    if config.uint_opt(&["indexer_kv_heads"], 1, HEADS_MAX)?.is_some_and(|n| n != 1) {
        return Err(config.error("indexer_kv_heads is not 1, and several keys are not supported"));
    }
    let size = config.uint(&["indexer_compress_ratio"], 1, POSITIONS_MAX)?;
    let budget = config.uint(&["indexer_budget"], 1, POSITIONS_MAX)?;
    if !budget.is_multiple_of(size) {
        let what = format!("indexer_budget is {budget}, which is no multiple of pools of {size}");
        return Err(config.error(what));
    }
    let rotary = 2 * gqa.rope.inv_freq.len();
    let pools = Pools {
        n_heads: config.uint(&["indexer_n_heads"], 1, HEADS_MAX)?,
        head_dim: config.uint(&["indexer_head_dim"], rotary.max(1), HEAD_DIM_MAX)?,
        size,
        n_used: budget / size,
    };
    Ok(Gqa { pools: Some(pools), ..gqa })
}

/// The indexer of latent attention: the first dimensions of its heads rotate.
pub(super) fn indexer(
    family: &Family,
    config: &Config,
    base: &Base,
    rule: &IndexerRule,
    rope_dim: usize,
) -> Result<Indexer> {
    let source = Source::new(config, "")?;
    let n_used = config.uint(&["index_topk"], 1, POSITIONS_MAX)?;
    let pool = match rule.pool {
        Some((key, default)) => Some(config.uint_opt(&[key], 1, POSITIONS_MAX)?.unwrap_or(default)),
        None => None,
    };
    if pool.is_some_and(|pool| !n_used.is_multiple_of(pool)) {
        let what = format!("index_topk is {n_used}, which is no multiple of pools of {}", pool.unwrap_or(1));
        return Err(config.error(what));
    }
    Ok(Indexer {
        n_heads: config.uint(&["index_n_heads"], 1, HEADS_MAX)?,
        head_dim: config.uint(&["index_head_dim"], rope_dim.max(1), HEAD_DIM_MAX)?,
        n_used: n_used / pool.unwrap_or(1),
        pool,
        key_eps: if rule.model_eps { norm(family, config)?.eps() } else { KEY_NORM_EPS },
        rotates_last: rule.rotates_last,
        rope: rope(source, family.rope, None, rule.pairing, rope_dim, base.positions)?.rope,
    })
}

/// Which layers see the keys that an earlier layer's indexer chose: `indexer_types`, `index_topk_pattern` or
/// `index_topk_freq` (GLM-5.2).
pub(super) fn shared_choices(rule: &MlaRule, config: &Config, n_layers: usize) -> Result<Vec<bool>> {
    let Some(indexer) = rule.indexer else { return Ok(vec![false; n_layers]) };
    let bad = |what: String| Err(config.error(what));
    let shared = if let Some(types) = config.strings_opt(&["indexer_types"], n_layers)? {
        if let Some(odd) = types.iter().find(|t| **t != "full" && **t != "shared") {
            return bad(format!("indexer_types has {odd:?}, expected \"full\" or \"shared\""));
        }
        types.iter().map(|t| *t == "shared").collect()
    } else if let Some((_, value)) = config.find(&["index_topk_pattern"]) {
        let letters = value.as_str().unwrap_or_default();
        if letters.len() != n_layers || letters.bytes().any(|b| b != b'F' && b != b'S') {
            return bad(format!("index_topk_pattern is {value}, expected {n_layers} letters F or S"));
        }
        letters.bytes().map(|b| b == b'S').collect()
    } else {
        let every = config.uint_opt(&["index_topk_freq"], 0, LAYERS_MAX)?.unwrap_or(indexer.every).max(1);
        let offset = config.uint_opt(&["index_skip_topk_offset"], 0, LAYERS_MAX)?.unwrap_or(2);
        (0..n_layers).map(|l| (l + 1).saturating_sub(offset) % every != 0).collect::<Vec<_>>()
    };
    Ok(shared)
}

/// Whoever sees what was chosen before has somebody before.
pub(super) fn check_first_choice(config: &Config, layers: &[Attention]) -> Result<()> {
    let first =
        layers.iter().find_map(|l| if let Attention::Mla(mla) = l { Some(&mla.choice) } else { None });
    if first == Some(&KeyChoice::AsBefore) {
        return Err(config.error("the first layer has no indexer, and there is none before it"));
    }
    Ok(())
}
