//! Blocks of 32 with one scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL.
//!
//! ```text
//!  Q4_0    d f16 | nibbles 16                     value = d × (u − 8)           4.5  bits per weight
//!  Q4_1    d f16 | m f16 | nibbles 16             value = d × u + m             5
//!  Q5_0    d f16 | fifth bits u32 | nibbles 16    value = d × (u − 16)          5.5
//!  Q5_1    d f16 | m f16 | fifth bits | nibbles   value = d × u + m             6
//!  Q8_0    d f16 | i8 × 32                        value = d × i8                8.5
//!  IQ4_NL  d f16 | nibbles 16                     value = d × table(u)          4.5
//!
//!  byte i of the nibbles             bit i of the fifth bits is that of number i
//!     7      4 3      0
//!  +----------+----------+
//!  | i + 16   | i        |
//!  +----------+----------+
//! ```

use crate::codec::ggml::kinds::{Id, Parts};

/// Takes the block apart.
#[inline(always)]
pub(in crate::codec::ggml) fn read(id: Id, block: &[u8], parts: &mut Parts) {
    let (head, nibbles) = block.split_at(head_bytes(id).min(block.len()));
    parts.d = half(head, 0);
    match id {
        Id::Q8_0 => read_bytes(nibbles, parts),
        _ => read_nibbles(nibbles, &mut parts.codes),
    }
    if matches!(id, Id::Q4_1 | Id::Q5_1) {
        (parts.dmin, parts.mins[0]) = (half(head, 2), -1);
    }
    if matches!(id, Id::Q5_0 | Id::Q5_1) {
        let fifth = head.last_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        for (i, code) in parts.codes[..32].iter_mut().enumerate() {
            *code |= ((fifth >> i & 1) << 4) as u8;
        }
    }
}

/// Puts the block together.
#[inline(always)]
pub(in crate::codec::ggml) fn write(id: Id, parts: &Parts, block: &mut [u8]) {
    let (head, nibbles) = block.split_at_mut(head_bytes(id).min(block.len()));
    put_half(head, 0, parts.d);
    match id {
        Id::Q8_0 => write_bytes(parts, nibbles),
        _ => write_nibbles(&parts.codes, nibbles),
    }
    if matches!(id, Id::Q4_1 | Id::Q5_1) {
        put_half(head, 2, parts.dmin);
    }
    if matches!(id, Id::Q5_0 | Id::Q5_1)
        && let Some(last) = head.last_chunk_mut::<4>()
    {
        let eights = parts.codes.as_chunks::<8>().0;
        last.iter_mut().zip(eights).for_each(|(last, codes)| *last = fifth_bits(*codes));
    }
}

/// Bit 4 of eight codes.
#[inline(always)]
fn fifth_bits(codes: [u8; 8]) -> u8 {
    const LOW: u64 = 0x0101_0101_0101_0101;
    // The product moves bit 8 i to bit 56 + i; no two of its terms meet.
    const GATHER: u64 = 0x0102_0408_1020_4080;
    ((u64::from_le_bytes(codes) >> 4 & LOW).wrapping_mul(GATHER) >> 56) as u8
}

#[inline(always)]
fn head_bytes(id: Id) -> usize {
    match id {
        Id::Q4_1 => 4,
        Id::Q5_0 => 6,
        Id::Q5_1 => 8,
        _ => 2,
    }
}

/// The f16 at byte `at`.
#[inline(always)]
pub(super) fn half(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b))
}

#[inline(always)]
pub(super) fn put_half(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(place) = bytes.get_mut(at..).and_then(|b| b.first_chunk_mut()) {
        *place = value.to_le_bytes();
    }
}

/// Sixteen bytes to 32 codes, those of the low nibbles first.
#[inline(always)]
pub(super) fn read_nibbles(nibbles: &[u8], codes: &mut [u8]) {
    if let (Some(n), Some(codes)) = (nibbles.first_chunk::<16>(), codes.first_chunk_mut::<32>()) {
        for i in 0..16 {
            codes[i] = n[i] & 15;
            codes[i + 16] = n[i] >> 4;
        }
    }
}

#[inline(always)]
pub(super) fn write_nibbles(codes: &[u8], nibbles: &mut [u8]) {
    if let (Some(n), Some(codes)) = (nibbles.first_chunk_mut::<16>(), codes.first_chunk::<32>()) {
        for i in 0..16 {
            n[i] = codes[i] & 15 | codes[i + 16] << 4;
        }
    }
}

/// Codes of Q8_0 count from −128.
#[inline(always)]
fn read_bytes(bytes: &[u8], parts: &mut Parts) {
    for (code, &b) in parts.codes[..32].iter_mut().zip(bytes) {
        *code = b.wrapping_add(128);
    }
}

#[inline(always)]
fn write_bytes(parts: &Parts, bytes: &mut [u8]) {
    for (b, code) in bytes.iter_mut().zip(&parts.codes[..32]) {
        *b = code.wrapping_sub(128);
    }
}
