//! Q4_K and Q5_K: 256 numbers of four or five bits in groups of 32 with scale and minimum; 4.5 and 5.5 bits per weight.
//!
//! ```text
//!  Q4_K  d f16 | dmin f16 | groups 12 | nibbles 128
//!  Q5_K  d f16 | dmin f16 | groups 12 | fifth bits 32 | nibbles 128
//!
//!  value = d × scale × u − dmin × minimum
//!
//!  groups:      eight scales s and minimums m of six bits
//!               byte g      (0 … 3)   s(g + 4)₅₄   s(g)₅ … ₀
//!               byte 4 + g            m(g + 4)₅₄   m(g)₅ … ₀
//!               byte 8 + g            m(g + 4)₃ … ₀   s(g + 4)₃ … ₀
//!  nibbles:     byte 32 c + l: low nibble number 64 c + l, high nibble number 64 c + 32 + l
//!  fifth bits:  bit j of byte l is that of number 32 j + l
//! ```

use super::legacy::{half, put_half};
use crate::codec::ggml::kinds::Parts;

/// Bytes a block of Q4_K.
pub const Q4_BYTES: usize = 144;
/// Bytes a block of Q5_K.
pub const Q5_BYTES: usize = 176;

/// Takes a block of Q4_K apart.
#[inline(always)]
pub(in crate::codec::ggml) fn read(block: &[u8], parts: &mut Parts) {
    let Some(b) = block.first_chunk::<Q4_BYTES>() else { return };
    read_head(b, parts);
    read_nibbles(&b[16..], &mut parts.codes);
}

/// Puts a block of Q4_K together.
#[inline(always)]
pub(in crate::codec::ggml) fn write(parts: &Parts, block: &mut [u8]) {
    let Some(b) = block.first_chunk_mut::<Q4_BYTES>() else { return };
    write_head(parts, b);
    write_nibbles(&parts.codes, &mut b[16..]);
}

/// Takes a block of Q5_K apart.
#[inline(always)]
pub(in crate::codec::ggml) fn read5(block: &[u8], parts: &mut Parts) {
    let Some(b) = block.first_chunk::<Q5_BYTES>() else { return };
    read_head(b, parts);
    read_nibbles(&b[48..], &mut parts.codes);
    for (j, codes) in parts.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for l in 0..32 {
            codes[l] |= (b[16 + l] >> j & 1) << 4;
        }
    }
}

/// Puts a block of Q5_K together.
#[inline(always)]
pub(in crate::codec::ggml) fn write5(parts: &Parts, block: &mut [u8]) {
    let Some(b) = block.first_chunk_mut::<Q5_BYTES>() else { return };
    write_head(parts, b);
    write_nibbles(&parts.codes, &mut b[48..]);
    b[16..48].fill(0);
    for (j, codes) in parts.codes.as_chunks::<32>().0.iter().enumerate() {
        for l in 0..32 {
            b[16 + l] |= (codes[l] >> 4 & 1) << j;
        }
    }
}

#[inline(always)]
fn read_head(b: &[u8], parts: &mut Parts) {
    let Some(b) = b.first_chunk::<16>() else { return };
    parts.d = half(b, 0);
    parts.dmin = half(b, 2);
    for g in 0..4 {
        let (s, m, low) = (b[4 + g], b[8 + g], b[12 + g]);
        parts.scales[g] = (s & 63) as i8;
        parts.mins[g] = (m & 63) as i8;
        parts.scales[g + 4] = (low & 15 | s >> 6 << 4) as i8;
        parts.mins[g + 4] = (low >> 4 | m >> 6 << 4) as i8;
    }
}

#[inline(always)]
fn write_head(parts: &Parts, b: &mut [u8]) {
    let Some(b) = b.first_chunk_mut::<16>() else { return };
    put_half(b, 0, parts.d);
    put_half(b, 2, parts.dmin);
    for g in 0..4 {
        let (s, m) = (parts.scales[g] as u8, parts.mins[g] as u8);
        let (s4, m4) = (parts.scales[g + 4] as u8, parts.mins[g + 4] as u8);
        b[4 + g] = s & 63 | s4 >> 4 << 6;
        b[8 + g] = m & 63 | m4 >> 4 << 6;
        b[12 + g] = s4 & 15 | m4 << 4;
    }
}

#[inline(always)]
fn read_nibbles(bytes: &[u8], codes: &mut [u8; 256]) {
    for (bytes, codes) in bytes.as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<64>().0) {
        for l in 0..32 {
            codes[l] = bytes[l] & 15;
            codes[l + 32] = bytes[l] >> 4;
        }
    }
}

#[inline(always)]
fn write_nibbles(codes: &[u8; 256], bytes: &mut [u8]) {
    for (bytes, codes) in bytes.as_chunks_mut::<32>().0.iter_mut().zip(codes.as_chunks::<64>().0) {
        for l in 0..32 {
            bytes[l] = codes[l] & 15 | codes[l + 32] << 4;
        }
    }
}
