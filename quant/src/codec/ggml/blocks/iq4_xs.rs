//! IQ4_XS: 256 numbers of the IQ4 table in groups of 32 with a scale; 4.25 bits per weight.
//!
//! ```text
//!  byte 0        2               4               8                136
//!      +---------+---------------+---------------+-----------------+
//!      | d f16   | upper pairs   | low nibbles 4 | nibbles 128     |     value = d × (scale − 32) × table(u)
//!      +---------+---------------+---------------+-----------------+
//!
//!  scale g:  six bits; low four are a nibble of byte g / 2, the low one first; upper two are bits 2 g and on of the
//!            upper pairs (u16)
//!  nibbles:  sixteen bytes a group, as in IQ4_NL
//! ```

use super::legacy::{half, put_half, read_nibbles, write_nibbles};
use crate::codec::ggml::kinds::Parts;

/// Bytes a block.
pub const BYTES: usize = 136;

/// Takes the block apart.
#[inline(always)]
pub(in crate::codec::ggml) fn read(block: &[u8], parts: &mut Parts) {
    let Some(b) = block.first_chunk::<BYTES>() else { return };
    parts.d = half(b, 0);
    let upper = half(b, 2);
    for g in 0..8 {
        let low = b[4 + g / 2] >> (4 * (g % 2)) & 15;
        parts.scales[g] = (u16::from(low) | (upper >> (2 * g) & 3) << 4) as i8 - 32;
    }
    for (nibbles, codes) in b[8..].as_chunks::<16>().0.iter().zip(parts.codes.as_chunks_mut::<32>().0) {
        read_nibbles(nibbles, codes);
    }
}

/// Puts the block together.
#[inline(always)]
pub(in crate::codec::ggml) fn write(parts: &Parts, block: &mut [u8]) {
    let Some(b) = block.first_chunk_mut::<BYTES>() else { return };
    put_half(b, 0, parts.d);
    let mut upper = 0;
    b[4..8].fill(0);
    for g in 0..8 {
        let scale = parts.scales[g].wrapping_add(32) as u8;
        b[4 + g / 2] |= (scale & 15) << (4 * (g % 2));
        upper |= u16::from(scale >> 4 & 3) << (2 * g);
    }
    put_half(b, 2, upper);
    for (nibbles, codes) in b[8..].as_chunks_mut::<16>().0.iter_mut().zip(parts.codes.as_chunks::<32>().0) {
        write_nibbles(codes, nibbles);
    }
}
