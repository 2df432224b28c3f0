//! Codes of 2 to 8 bits packed into one stream of bits, least significant bit first.
//!
//! Code `j` of `b` bits occupies bits `[j·b, j·b + b)` of the stream; bit `k` of the stream is bit `k mod 8` of byte
//! `k div 8`. The last byte is filled up with zeros. Three bits a code:
//!
//! ```text
//!  byte 0                    1                    2
//!      +--------------------+--------------------+--------------------+
//!      | c2₁₀   c1₂₁₀ c0₂₁₀ | c5₀ c4₂₁₀ c3₂₁₀ c2₂| c7₂₁₀  c6₂₁₀  c5₂₁ |    most significant bit on the left
//!      +--------------------+--------------------+--------------------+
//! ```
//!
//! It is the order of compressed-tensors' `pack-quantized` (whose rows are filled up to 32 bits instead of 8), and
//! for 4 bits that of MXFP4 and NVFP4: low nibble first. Eight codes fill exactly `b` bytes, so eight are moved at a
//! time, as eight bytes of one u64.

use crate::per_isa;

/// The widths that [`pack`] and [`unpack`] know.
pub const WIDTHS: [u32; 7] = [2, 3, 4, 5, 6, 7, 8];

/// Bytes that `n` codes of `bits` bits take, rounded up.
pub const fn packed_bytes(bits: u32, n: usize) -> usize {
    (n / 8) * bits as usize + ((n % 8) * bits as usize).div_ceil(8)
}

per_isa! {
    /// Packs `codes`, each below `2^bits`, into `out`, which holds [`packed_bytes`] of them.
    pub fn pack(bits: u32, codes: &[u8], out: &mut [u8]) = pack_body;
}
per_isa! {
    /// Unpacks the first `out.len()` codes of `packed`, which holds at least [`packed_bytes`] of them.
    pub fn unpack(bits: u32, packed: &[u8], out: &mut [u8]) = unpack_body;
}

#[inline(always)]
pub(crate) fn pack_body(bits: u32, codes: &[u8], out: &mut [u8]) {
    match bits {
        2 => pack_width::<2>(codes, out),
        3 => pack_width::<3>(codes, out),
        4 => pack_width::<4>(codes, out),
        5 => pack_width::<5>(codes, out),
        6 => pack_width::<6>(codes, out),
        7 => pack_width::<7>(codes, out),
        _ => out.copy_from_slice(codes),
    }
}

#[inline(always)]
pub(crate) fn unpack_body(bits: u32, packed: &[u8], out: &mut [u8]) {
    match bits {
        2 => unpack_width::<2>(packed, out),
        3 => unpack_width::<3>(packed, out),
        4 => unpack_width::<4>(packed, out),
        5 => unpack_width::<5>(packed, out),
        6 => unpack_width::<6>(packed, out),
        7 => unpack_width::<7>(packed, out),
        _ => out.copy_from_slice(&packed[..out.len()]),
    }
}

#[inline(always)]
fn pack_width<const B: usize>(codes: &[u8], out: &mut [u8]) {
    assert_eq!(out.len(), packed_bytes(B as u32, codes.len()), "bytes of {B}-bit codes");
    let (eights, rest) = codes.as_chunks::<8>();
    let (full, tail) = out.split_at_mut(eights.len() * B);
    for (o, &c) in full.as_chunks_mut::<B>().0.iter_mut().zip(eights) {
        let word = squeeze::<B>(u64::from_le_bytes(c)).to_le_bytes();
        o.copy_from_slice(&word[..B]);
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    tail.copy_from_slice(&squeeze::<B>(u64::from_le_bytes(last)).to_le_bytes()[..tail.len()]);
}

#[inline(always)]
fn unpack_width<const B: usize>(packed: &[u8], out: &mut [u8]) {
    let packed = &packed[..packed_bytes(B as u32, out.len())];
    let (eights, rest) = out.as_chunks_mut::<8>();
    let (full, tail) = packed.split_at(eights.len() * B);
    for (o, p) in eights.iter_mut().zip(full.as_chunks::<B>().0) {
        let mut word = [0; 8];
        word[..B].copy_from_slice(p);
        *o = spread::<B>(u64::from_le_bytes(word)).to_le_bytes();
    }
    let mut last = [0; 8];
    last[..tail.len()].copy_from_slice(tail);
    rest.copy_from_slice(&spread::<B>(u64::from_le_bytes(last)).to_le_bytes()[..rest.len()]);
}

/// Eight bytes of `B` bits each to `8 B` contiguous bits: pairs, then pairs of pairs, then both halves.
#[inline(always)]
fn squeeze<const B: usize>(v: u64) -> u64 {
    let v = v & 0x00ff_00ff_00ff_00ff | (v >> 8 & 0x00ff_00ff_00ff_00ff) << B;
    let v = v & 0x0000_ffff_0000_ffff | (v >> 16 & 0x0000_ffff_0000_ffff) << (2 * B);
    v & 0xffff_ffff | v >> 32 << (4 * B)
}

/// `8 B` contiguous bits to eight bytes: the inverse of [`squeeze`].
#[inline(always)]
fn spread<const B: usize>(v: u64) -> u64 {
    let half = (1u64 << (4 * B)) - 1;
    let v = v & half | (v >> (4 * B) & half) << 32;
    let quarter = ((1u64 << (2 * B)) - 1) * 0x0000_0001_0000_0001;
    let v = v & quarter | (v >> (2 * B) & quarter) << 16;
    let eighth = ((1u64 << B) - 1) * 0x0001_0001_0001_0001;
    v & eighth | (v >> B & eighth) << 8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    /// One bit after the other: the definition.
    fn packed_by_the_book(bits: u32, codes: &[u8]) -> Vec<u8> {
        let mut out = vec![0; packed_bytes(bits, codes.len())];
        for (j, &c) in codes.iter().enumerate() {
            for k in 0..bits as usize {
                let at = j * bits as usize + k;
                out[at / 8] |= (c >> k & 1) << (at % 8);
            }
        }
        out
    }

    #[test]
    fn packing_is_the_stream_of_bits_and_unpacking_its_inverse() {
        for isa in Isa::available() {
            for bits in WIDTHS {
                for n in (0..70).chain([256, 1001]) {
                    let mask = (1u32 << bits) - 1;
                    let codes: Vec<u8> =
                        (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11 & mask) as u8).collect();
                    let mut packed = vec![0xaa; packed_bytes(bits, n)];
                    pack(isa, bits, &codes, &mut packed);
                    assert_eq!(
                        packed,
                        packed_by_the_book(bits, &codes),
                        "{} {bits} bits, {n} codes",
                        isa.name()
                    );
                    let mut back = vec![0xaa; n];
                    unpack(isa, bits, &packed, &mut back);
                    assert_eq!(back, codes, "{} {bits} bits, {n} codes", isa.name());
                }
            }
        }
    }

    #[test]
    fn the_diagram_of_three_bits_holds() {
        let mut packed = [0; 3];
        pack(Isa::SCALAR, 3, &[1, 2, 3, 4, 5, 6, 7, 0], &mut packed);
        assert_eq!(packed, [0b1101_0001, 0b0101_1000, 0b0001_1111]);
    }
}
