//! Q3_K: 256 numbers of three bits in groups of 16 with a scale; 3.4375 bits per weight.
//!
//! ```text
//!  byte 0            32                   96            108      110
//!      +-------------+--------------------+-------------+---------+
//!      | third bits  | low bits 64        | scales 12   | d f16   |     value = d × (scale − 32) × (u − 4)
//!      +-------------+--------------------+-------------+---------+
//!
//!  third bits: bit 4 n + j of byte l is that of number 128 n + 32 j + l
//!  low bits:   as the codes of Q2_K
//!  scales:     six bits each. Of scale g the low four are a nibble of byte g mod 8 (the high one for g ≥ 8), the
//!              upper two are bits 2 (g / 4) and on of byte 8 + g mod 4
//! ```

use super::legacy::{half, put_half};
use super::q2_k::{read_pairs, write_pairs};
use crate::codec::ggml::kinds::Parts;

/// Bytes a block.
pub const BYTES: usize = 110;

/// Takes the block apart.
#[inline(always)]
pub(in crate::codec::ggml) fn read(block: &[u8], parts: &mut Parts) {
    let Some(b) = block.first_chunk::<BYTES>() else { return };
    read_pairs(&b[32..96], &mut parts.codes);
    for (j, codes) in parts.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for l in 0..32 {
            codes[l] |= (b[l] >> j & 1) << 2;
        }
    }
    for g in 0..16 {
        let low = b[96 + g % 8] >> (4 * (g / 8)) & 15;
        let high = b[104 + g % 4] >> (2 * (g / 4)) & 3;
        parts.scales[g] = (low | high << 4) as i8 - 32;
    }
    parts.d = half(b, 108);
}

/// Puts the block together.
#[inline(always)]
pub(in crate::codec::ggml) fn write(parts: &Parts, block: &mut [u8]) {
    let Some(b) = block.first_chunk_mut::<BYTES>() else { return };
    b.fill(0);
    write_pairs(&parts.codes, &mut b[32..96]);
    for (j, codes) in parts.codes.as_chunks::<32>().0.iter().enumerate() {
        for l in 0..32 {
            b[l] |= (codes[l] >> 2 & 1) << j;
        }
    }
    for g in 0..16 {
        let scale = parts.scales[g].wrapping_add(32) as u8;
        b[96 + g % 8] |= (scale & 15) << (4 * (g / 8));
        b[104 + g % 4] |= (scale >> 4 & 3) << (2 * (g / 4));
    }
    put_half(b, 108, parts.d);
}
