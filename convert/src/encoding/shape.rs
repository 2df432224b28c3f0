//! The shape of the tensor that holds a matrix, for comparing it with config.json.

use moepack_format::Dtype;

use super::integers::{GPTQ_BITS, bits_of_words};
use super::{Hints, MX_COLS, is_qweight};
use crate::checkpoint::SourceTensor;
use crate::names::{is_blocks, is_packed};

/// Bits of packed integers where neither the tensor nor config.json says them.
pub(crate) const BITS_DEFAULT: u32 = 4;

/// Shape of the tensor that holds a matrix `[rows, cols]`, `n` of them along the first axis if `n` is given. Where
/// several are possible, the tensor's own is preferred.
pub fn stored_shape(tensor: &SourceTensor, n: Option<u64>, rows: u64, cols: u64, hints: Hints) -> Vec<u64> {
    let whole = tensor.shape.last() == Some(&cols);
    let matrix = match tensor.dtype {
        _ if is_blocks(&tensor.name) => vec![rows, cols / MX_COLS, MX_COLS / 2],
        Dtype::I32 if is_qweight(&tensor.name) => qweight(&tensor.shape, rows, cols),
        Dtype::I32 if is_packed(&tensor.name) => {
            let n_words = tensor.shape.last().copied().unwrap_or(0);
            let bits = bits_of_words(cols, n_words, hints.bits).unwrap_or(hints.bits.unwrap_or(BITS_DEFAULT));
            vec![rows, words_of(cols, bits)]
        }
        // Two FP4 numbers a byte, or an integer each.
        Dtype::I8 | Dtype::U8 if !whole || tensor.dtype == Dtype::U8 => vec![rows, cols / 2],
        _ => vec![rows, cols],
    };
    n.into_iter().chain(matrix).collect()
}

/// GPTQ packs inputs into words, AWQ outputs.
fn qweight(shape: &[u64], rows: u64, cols: u64) -> Vec<u64> {
    if shape.first() == Some(&cols) {
        return vec![cols, words_of(rows, BITS_DEFAULT)];
    }
    let of = |bits: u32| vec![words_of(cols, bits), rows];
    GPTQ_BITS.into_iter().map(of).find(|s| s == shape).unwrap_or_else(|| of(BITS_DEFAULT))
}

/// Words that `n` numbers of so many bits fill.
pub(crate) fn words_of(n: u64, bits: u32) -> u64 {
    n.saturating_mul(u64::from(bits)).div_ceil(32)
}
