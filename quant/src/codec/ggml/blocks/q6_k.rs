//! Q6_K: 256 numbers of six bits in groups of 16 with a scale; 6.5625 bits per weight.
//!
//! ```text
//!  byte 0                 128              192           208      210
//!      +------------------+----------------+-------------+---------+
//!      | low nibbles 128  | high pairs 64  | scales i8   | d f16   |     value = d × scale × (u − 32)
//!      +------------------+----------------+-------------+---------+
//!
//!  numbers l, 32 + l, 64 + l, 96 + l (l < 32) of half n:
//!  low nibbles:  bytes 64 n + l and 64 n + 32 + l, their low halves first
//!  high pairs:   byte 32 n + l, lowest bits first
//! ```

use super::legacy::{half, put_half};
use crate::codec::ggml::kinds::Parts;

/// Bytes a block.
pub const BYTES: usize = 210;

/// Takes the block apart.
#[inline(always)]
pub(in crate::codec::ggml) fn read(block: &[u8], parts: &mut Parts) {
    let Some(b) = block.first_chunk::<BYTES>() else { return };
    let low = b[..128].as_chunks::<64>().0;
    let high = b[128..192].as_chunks::<32>().0;
    for ((low, high), c) in low.iter().zip(high).zip(parts.codes.as_chunks_mut::<128>().0) {
        for l in 0..32 {
            c[l] = low[l] & 15 | (high[l] & 3) << 4;
            c[l + 32] = low[l + 32] & 15 | (high[l] >> 2 & 3) << 4;
            c[l + 64] = low[l] >> 4 | (high[l] >> 4 & 3) << 4;
            c[l + 96] = low[l + 32] >> 4 | high[l] >> 6 << 4;
        }
    }
    for (scale, &byte) in parts.scales.iter_mut().zip(&b[192..208]) {
        *scale = byte as i8;
    }
    parts.d = half(b, 208);
}

/// Puts the block together.
#[inline(always)]
pub(in crate::codec::ggml) fn write(parts: &Parts, block: &mut [u8]) {
    let Some(b) = block.first_chunk_mut::<BYTES>() else { return };
    for (low, c) in b[..128].as_chunks_mut::<64>().0.iter_mut().zip(parts.codes.as_chunks::<128>().0) {
        for l in 0..64 {
            low[l] = c[l] & 15 | c[l + 64] << 4;
        }
    }
    for (high, c) in b[128..192].as_chunks_mut::<32>().0.iter_mut().zip(parts.codes.as_chunks::<128>().0) {
        for l in 0..32 {
            high[l] = c[l] >> 4 | c[l + 32] >> 4 << 2 | c[l + 64] >> 4 << 4 | c[l + 96] >> 4 << 6;
        }
    }
    for (byte, &scale) in b[192..208].iter_mut().zip(&parts.scales) {
        *byte = scale as u8;
    }
    put_half(b, 208, parts.d);
}
