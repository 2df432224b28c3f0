//! Q2_K: 256 numbers of two bits in groups of 16 with scale and minimum; 2.625 bits per weight.
//!
//! ```text
//!  byte 0               16                   80        82        84
//!      +----------------+--------------------+---------+---------+
//!      | groups 16      | codes 64           | d f16   | dmin f16|
//!      +----------------+--------------------+---------+---------+
//!
//!  groups[g]:  low nibble scale, high nibble minimum        value = d × scale × u − dmin × minimum
//!  codes:      byte 32 n + l holds, from the lowest bits on, numbers l, 32 + l, 64 + l, 96 + l of half n
//! ```

use super::legacy::{half, put_half};
use crate::codec::ggml::kinds::Parts;

/// Bytes a block.
pub const BYTES: usize = 84;

/// Takes the block apart.
#[inline(always)]
pub(in crate::codec::ggml) fn read(block: &[u8], parts: &mut Parts) {
    let Some(b) = block.first_chunk::<BYTES>() else { return };
    let groups = parts.scales.iter_mut().zip(&mut parts.mins);
    for (&byte, (scale, min)) in b.iter().zip(groups) {
        (*scale, *min) = ((byte & 15) as i8, (byte >> 4) as i8);
    }
    read_pairs(&b[16..80], &mut parts.codes);
    parts.d = half(b, 80);
    parts.dmin = half(b, 82);
}

/// Puts the block together.
#[inline(always)]
pub(in crate::codec::ggml) fn write(parts: &Parts, block: &mut [u8]) {
    let Some(b) = block.first_chunk_mut::<BYTES>() else { return };
    for (byte, (&scale, &min)) in b.iter_mut().zip(parts.scales.iter().zip(&parts.mins)) {
        *byte = scale as u8 & 15 | (min as u8) << 4;
    }
    write_pairs(&parts.codes, &mut b[16..80]);
    put_half(b, 80, parts.d);
    put_half(b, 82, parts.dmin);
}

/// 64 bytes to 256 codes of two bits: each byte holds four numbers that lie 32 apart.
#[inline(always)]
pub(super) fn read_pairs(bytes: &[u8], codes: &mut [u8; 256]) {
    for (bytes, codes) in bytes.as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<128>().0) {
        for j in 0..4 {
            for l in 0..32 {
                codes[32 * j + l] = bytes[l] >> (2 * j) & 3;
            }
        }
    }
}

/// The two low bits of each code.
#[inline(always)]
pub(super) fn write_pairs(codes: &[u8; 256], bytes: &mut [u8]) {
    for (bytes, c) in bytes.as_chunks_mut::<32>().0.iter_mut().zip(codes.as_chunks::<128>().0) {
        for l in 0..32 {
            bytes[l] = c[l] & 3 | (c[l + 32] & 3) << 2 | (c[l + 64] & 3) << 4 | c[l + 96] << 6;
        }
    }
}
