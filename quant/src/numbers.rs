//! Slices of stored numbers to f32 and back: bf16, f16, f32, E4M3, little-endian bytes.
//!
//! The definitions are in [`crate::minifloat`]; here they run over slices, compiled for each instruction set, with
//! the same bits at every level. Lengths are the caller's business: a slice that does not fit is a mistake in the
//! program, not in a file, and panics.

use crate::minifloat::{bf16_to_f32 as bf16, e4m3_to_f32 as e4m3, f16_to_f32 as f16};
use crate::minifloat::{f32_to_bf16 as to_bf16, f32_to_e4m3 as to_e4m3, f32_to_f16 as to_f16};
use crate::per_isa;

per_isa! {
    /// bf16 bytes, two a value, to f32, exact.
    pub fn bf16_to_f32(bytes: &[u8], out: &mut [f32]) = bf16_to_f32_body;
}
per_isa! {
    /// f32 to bf16 bytes, to nearest even.
    pub fn f32_to_bf16(values: &[f32], out: &mut [u8]) = f32_to_bf16_body;
}
per_isa! {
    /// f16 bytes, two a value, to f32, exact.
    pub fn f16_to_f32(bytes: &[u8], out: &mut [f32]) = f16_to_f32_body;
}
per_isa! {
    /// f32 to f16 bytes, to nearest even; beyond 65520 infinity.
    pub fn f32_to_f16(values: &[f32], out: &mut [u8]) = f32_to_f16_body;
}
per_isa! {
    /// E4M3FN bytes to f32, exact.
    pub fn e4m3_to_f32(bytes: &[u8], out: &mut [f32]) = e4m3_to_f32_body;
}
per_isa! {
    /// f32 to E4M3FN bytes, to nearest even, saturating at ±448.
    pub fn f32_to_e4m3(values: &[f32], out: &mut [u8]) = f32_to_e4m3_body;
}
per_isa! {
    /// f32 bytes, four a value, to f32, bit for bit.
    pub fn f32_from_bytes(bytes: &[u8], out: &mut [f32]) = f32_from_bytes_body;
}
per_isa! {
    /// f32 to its bytes, bit for bit.
    pub fn f32_to_bytes(values: &[f32], out: &mut [u8]) = f32_to_bytes_body;
}
per_isa! {
    /// The largest magnitude as bits, so that NaN and infinity are above every number; 0 of nothing.
    fn max_magnitude_bits(values: &[f32]) -> u32 = max_magnitude_bits_body;
}

/// The largest magnitude in `values`; `None` if NaN or infinity is among them.
pub fn max_magnitude(isa: crate::Isa, values: &[f32]) -> Option<f32> {
    let largest = f32::from_bits(max_magnitude_bits(isa, values));
    largest.is_finite().then_some(largest)
}

#[inline(always)]
fn bf16_to_f32_body(bytes: &[u8], out: &mut [f32]) {
    decode_pairs(bytes, out, bf16);
}

#[inline(always)]
fn f16_to_f32_body(bytes: &[u8], out: &mut [f32]) {
    decode_pairs(bytes, out, f16);
}

#[inline(always)]
fn decode_pairs(bytes: &[u8], out: &mut [f32], decode: impl Fn(u16) -> f32) {
    assert_eq!(bytes.len(), out.len() * 2, "bytes of 16-bit numbers");
    for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
        *o = decode(u16::from_le_bytes(*b));
    }
}

#[inline(always)]
fn f32_to_bf16_body(values: &[f32], out: &mut [u8]) {
    encode_pairs(values, out, to_bf16);
}

#[inline(always)]
fn f32_to_f16_body(values: &[f32], out: &mut [u8]) {
    encode_pairs(values, out, to_f16);
}

#[inline(always)]
fn encode_pairs(values: &[f32], out: &mut [u8], encode: impl Fn(f32) -> u16) {
    assert_eq!(out.len(), values.len() * 2, "bytes of 16-bit numbers");
    for (o, &v) in out.as_chunks_mut().0.iter_mut().zip(values) {
        *o = encode(v).to_le_bytes();
    }
}

#[inline(always)]
fn e4m3_to_f32_body(bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len(), "bytes of E4M3");
    for (o, &b) in out.iter_mut().zip(bytes) {
        *o = e4m3(b);
    }
}

#[inline(always)]
fn f32_to_e4m3_body(values: &[f32], out: &mut [u8]) {
    assert_eq!(out.len(), values.len(), "bytes of E4M3");
    for (o, &v) in out.iter_mut().zip(values) {
        *o = to_e4m3(v);
    }
}

#[inline(always)]
fn f32_from_bytes_body(bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * 4, "bytes of f32");
    for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
        *o = f32::from_le_bytes(*b);
    }
}

#[inline(always)]
fn f32_to_bytes_body(values: &[f32], out: &mut [u8]) {
    assert_eq!(out.len(), values.len() * 4, "bytes of f32");
    for (o, v) in out.as_chunks_mut().0.iter_mut().zip(values) {
        *o = v.to_le_bytes();
    }
}

#[inline(always)]
fn max_magnitude_bits_body(values: &[f32]) -> u32 {
    values.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::minifloat;

    /// Every 16-bit code, and f32 values of every exponent with odd mantissas.
    fn inputs() -> (Vec<u8>, Vec<f32>) {
        let codes = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let values =
            (0..1u32 << 17).map(|i| f32::from_bits(i << 15 | i.wrapping_mul(40_503) & 0x7fff)).collect();
        (codes, values)
    }

    #[test]
    fn slices_equal_single_numbers_at_every_level() {
        let (codes, values) = inputs();
        let pairs: Vec<u16> = (0..=u16::MAX).collect();
        for isa in Isa::available() {
            let mut out = vec![0.0; pairs.len()];
            bf16_to_f32(isa, &codes, &mut out);
            assert_bits(isa, &out, pairs.iter().map(|&c| minifloat::bf16_to_f32(c)));
            f16_to_f32(isa, &codes, &mut out);
            assert_bits(isa, &out, pairs.iter().map(|&c| minifloat::f16_to_f32(c)));
            let mut out = vec![0.0; codes.len()];
            e4m3_to_f32(isa, &codes, &mut out);
            assert_bits(isa, &out, codes.iter().map(|&c| minifloat::e4m3_to_f32(c)));

            let mut out = vec![0; values.len() * 2];
            f32_to_bf16(isa, &values, &mut out);
            assert_eq!(
                out,
                values.iter().flat_map(|&v| minifloat::f32_to_bf16(v).to_le_bytes()).collect::<Vec<_>>()
            );
            f32_to_f16(isa, &values, &mut out);
            assert_eq!(
                out,
                values.iter().flat_map(|&v| minifloat::f32_to_f16(v).to_le_bytes()).collect::<Vec<_>>()
            );
            let mut out = vec![0; values.len()];
            f32_to_e4m3(isa, &values, &mut out);
            assert_eq!(out, values.iter().map(|&v| minifloat::f32_to_e4m3(v)).collect::<Vec<_>>());

            let mut bytes = vec![0; values.len() * 4];
            f32_to_bytes(isa, &values, &mut bytes);
            let mut back = vec![0.0; values.len()];
            f32_from_bytes(isa, &bytes, &mut back);
            assert_bits(isa, &back, values.iter().copied());
        }
    }

    fn assert_bits(isa: Isa, found: &[f32], expected: impl Iterator<Item = f32>) {
        for (i, (f, e)) in found.iter().zip(expected).enumerate() {
            assert_eq!(f.to_bits(), e.to_bits(), "{} element {i}: {f} instead of {e}", isa.name());
        }
    }

    #[test]
    fn a_number_that_is_none_is_seen() {
        for isa in Isa::available() {
            assert_eq!(max_magnitude(isa, &[1.0, -3.0, 2.0]), Some(3.0));
            assert_eq!(max_magnitude(isa, &[]), Some(0.0));
            assert_eq!(max_magnitude(isa, &[1.0, f32::NAN]), None);
            assert_eq!(max_magnitude(isa, &[f32::NEG_INFINITY, 1.0]), None);
        }
    }
}
