//! Embeddings of n-grams: sizes and factors that follow from config.json by arithmetic.

use moepack_format::Result;

use super::Base;
use crate::hparams::Config;
use crate::limits::{
    HEADS_MAX, KERNEL_MAX, LAYERS_MAX, NGRAM_BASE_MAX, NGRAM_HEADS_MAX, NGRAM_MAX, RANK_MAX, VOCAB_MAX,
};
use crate::spec::Ngrams;

/// The embeddings of each layer that has some.
pub(super) fn ngrams(config: &Config, base: &Base, vocab: usize) -> Result<Vec<Option<Ngrams>>> {
    let mut layers = vec![None; base.n_layers];
    let mut ids = config.uints_opt(&["ple_layer_ids"], LAYERS_MAX)?.unwrap_or_default();
    ids.sort_unstable();
    ids.dedup();
    if ids.is_empty() {
        return Ok(layers);
    }
    let n_tokens = config.uint_opt(&["ngram_size"], 2, NGRAM_MAX)?.unwrap_or(3);
    let n_heads = config.uint_opt(&["heads_per_ngram"], 1, HEADS_MAX)?.unwrap_or(8) * (n_tokens - 1);
    let width = config.uint_opt(&["ple_embed_dim"], 1, RANK_MAX)?.unwrap_or(base.hidden);
    if !width.is_multiple_of(n_heads) || n_heads * ids.len() > NGRAM_HEADS_MAX {
        let what = format!("ple_embed_dim is {width} for {n_heads} heads in {} layers", ids.len());
        return Err(config.error(what));
    }
    let first = config.uint_opt(&["ngram_vocab_size_base"], 1, NGRAM_BASE_MAX)?.unwrap_or(20_000_000) as u64;
    let mut sizes = primes_from(first);
    let shape = Shape {
        multiple: config.uint_opt(&["make_ngram_vocab_size_divisible_by"], 1, VOCAB_MAX)?.unwrap_or(128)
            as u64,
        n_parts: config.uint_opt(&["split_ngram_parts"], 1, usize::from(u16::MAX))?.unwrap_or(512),
        seed: config.uint_opt(&["seed"], 0, VOCAB_MAX)?.unwrap_or(1234) as u64,
        end: end(config)?,
        kernel: config.uint_opt(&["ple_conv_kernel_size"], 1, KERNEL_MAX)?.unwrap_or(4),
    };
    for (at, id) in ids.into_iter().enumerate() {
        let Some(layer) = id.checked_sub(1).and_then(|l| layers.get_mut(l)) else {
            return Err(config.error(format!("ple_layer_ids has {id}, expected 1 to {}", base.n_layers)));
        };
        let sizes: Vec<u64> = sizes.by_ref().take(n_heads).collect();
        let n_rows = sizes.iter().sum::<u64>().next_multiple_of(shape.multiple);
        let factors = factors(vocab as u64, n_tokens, shape.seed + SEED_STEP * at as u64);
        let Shape { n_parts, end, kernel, .. } = shape;
        *layer = Some(Ngrams { factors, sizes, dim: width / n_heads, n_rows, n_parts, end, kernel });
    }
    Ok(layers)
}

/// What all layers have in common.
struct Shape {
    multiple: u64,
    n_parts: usize,
    seed: u64,
    end: u32,
    kernel: usize,
}

/// `eos_token_id`, the first where there are several.
fn end(config: &Config) -> Result<u32> {
    let Some((key, value)) = config.find(&["eos_token_id"]) else {
        return Err(config.error("eos_token_id is missing, which embeddings of n-grams need"));
    };
    let first = value.as_array().map_or(Some(value), |a| a.first());
    let id = first.and_then(serde_json::Value::as_u64).and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| config.bad(key, value, "a token id"))
}

/// From layer to layer, in the reference.
const SEED_STEP: u64 = 10_007;

/// Odd numbers below 2⁶³ / vocab, so that no product with a token id overflows.
fn factors(vocab: u64, n: usize, seed: u64) -> Vec<u64> {
    let half = (((1_u64 << 63) - 1) / vocab.max(1) / 2).max(1);
    let one = |i: u64| 2 * (splitmix64(seed.wrapping_add(GAMMA.wrapping_mul(i))) % half) + 1;
    (1..=n as u64).map(one).collect()
}

const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// One step of SplitMix64 (Steele et al. 2014).
fn splitmix64(value: u64) -> u64 {
    let value = value.wrapping_add(GAMMA);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// The primes from `first` on.
fn primes_from(first: u64) -> impl Iterator<Item = u64> {
    let has_divisor = |n: u64| (3..).step_by(2).take_while(|d| d * d <= n).any(|d| n.is_multiple_of(d));
    (first..).filter(move |&n| n == 2 || n > 2 && !n.is_multiple_of(2) && !has_divisor(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_primes_and_factors_those_of_the_reference() {
        assert_eq!(primes_from(64).take(4).collect::<Vec<_>>(), [67, 71, 73, 79]);
        assert_eq!(primes_from(1).take(3).collect::<Vec<_>>(), [2, 3, 5]);
        // _build_layer_multipliers(128, 3, 0, 1234) of transformers 5.23.0
        assert_eq!(factors(128, 3, 1234), FACTORS);
    }

    const FACTORS: [u64; 3] = [40323955908725927, 35454616657218691, 55314113489879455];
}
