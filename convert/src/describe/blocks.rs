//! Which layers mix tokens by attention, which by a state, and which are an MLP alone.

use moepack_format::Result;
use serde_json::Value;

use crate::family::MixedLayers;
use crate::hparams::{Config, Keys};
use crate::limits::LAYERS_MAX;

/// What a layer is, or what mixes its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Block {
    /// A state.
    Mixer,
    /// Attention.
    Full,
    /// Routed experts alone.
    Moe,
    /// A dense MLP alone.
    Dense,
}

/// The layers of a model each of which is one block.
pub(super) fn blocks(config: &Config) -> Result<Vec<Block>> {
    const LISTS: Keys = &["layers_block_type", "layer_types"];
    if let Some((key, list)) = config.find(LISTS) {
        let n = list.as_array().map_or(0, Vec::len);
        if !(1..=LAYERS_MAX).contains(&n) {
            return Err(config.bad(key, list, &format!("a list of 1 to {LAYERS_MAX} strings")));
        }
        let list = config.strings_opt(LISTS, n)?.unwrap_or_default();
        return list.into_iter().map(|name| block(config, key, name)).collect();
    }
    const PATTERN: &str = "hybrid_override_pattern";
    let Some((_, value)) = config.find(&[PATTERN]) else {
        return Err(config.error(format!("layers_block_type is missing (nor {PATTERN})")));
    };
    let expected = format!("1 to {LAYERS_MAX} letters of M, E, * and -");
    let letters = value.as_str().filter(|s| (1..=LAYERS_MAX).contains(&s.len()));
    let letter = |c: char| match c {
        'M' => Ok(Block::Mixer),
        '*' => Ok(Block::Full),
        'E' => Ok(Block::Moe),
        '-' => Ok(Block::Dense),
        _ => Err(config.bad(PATTERN, value, &expected)),
    };
    letters.ok_or_else(|| config.bad(PATTERN, value, &expected))?.chars().map(letter).collect()
}

/// What mixes the tokens of each of `n_layers` layers.
pub(super) fn mixers(rule: MixedLayers, config: &Config, n_layers: usize) -> Result<Vec<Block>> {
    let is_full = |full: bool| if full { Block::Full } else { Block::Mixer };
    let listed = || -> Result<Option<Vec<Block>>> {
        let Some(list) = config.strings_opt(&["layer_types"], n_layers)? else { return Ok(None) };
        let one = |name: &str| match block(config, "layer_types", name)? {
            Block::Moe | Block::Dense => Err(unknown(config, "layer_types", name)),
            mixer => Ok(mixer),
        };
        list.into_iter().map(one).collect::<Result<_>>().map(Some)
    };
    match rule {
        MixedLayers::Blocks => blocks(config),
        MixedLayers::Listed => Ok(listed()?.unwrap_or_else(|| vec![Block::Mixer; n_layers])),
        MixedLayers::ListedElseOdd => {
            if let Some(listed) = listed()? {
                return Ok(listed);
            }
            let kinds = config.uints_opt(&["attn_type_list"], 2)?;
            match kinds {
                Some(kinds) if kinds.len() != n_layers => {
                    let what = format!("attn_type_list has {} entries for {n_layers} layers", kinds.len());
                    Err(config.error(what))
                }
                Some(kinds) => Ok(kinds.into_iter().map(|k| is_full(k == 1)).collect()),
                None => Ok((0..n_layers).map(|l| is_full(l % 2 == 0)).collect()),
            }
        }
        MixedLayers::Period(period, offset) => {
            let every = periodic(config, ["attn_layer_period", "attn_layer_offset"], [period, offset])?;
            Ok((0..n_layers).map(|l| is_full(every(l))).collect())
        }
    }
}

/// Whether a layer is one of each `period`-th from `offset`; keys of both, and transformers' defaults.
pub(super) fn periodic(
    config: &Config,
    [period_key, offset_key]: [&'static str; 2],
    [period, offset]: [usize; 2],
) -> Result<impl Fn(usize) -> bool + use<>> {
    let period = config.uint_opt(&[period_key], 1, LAYERS_MAX)?.unwrap_or(period);
    let offset = config.uint_opt(&[offset_key], 0, LAYERS_MAX)?.unwrap_or(offset);
    if offset >= period {
        return Err(
            config.error(format!("{offset_key} is {offset}, expected less than {period_key}, {period}"))
        );
    }
    Ok(move |l: usize| l % period == offset)
}

fn block(config: &Config, key: &str, name: &str) -> Result<Block> {
    match name {
        "linear_attention" | "mamba" | "conv" => Ok(Block::Mixer),
        "full_attention" | "attention" => Ok(Block::Full),
        "moe" => Ok(Block::Moe),
        "mlp" => Ok(Block::Dense),
        other => Err(unknown(config, key, other)),
    }
}

fn unknown(config: &Config, key: &str, name: &str) -> moepack_format::Error {
    config.bad(key, &Value::from(name), "names of known kinds of layers")
}
