//! The passes over the numbers on AVX2: chains of eight blocks are added up at once, and 32 numbers become bytes by packing.
//!
//! Each sum has the order of the scalar code. Of two zeros the least or the largest may be one of another sign than there,
//! which nothing tells apart afterwards.
#![allow(
    unsafe_code,
    reason = "intrinsics; the level is proven by the Isa, and nothing is read or written through a pointer but arrays"
)]

use std::arch::x86_64::*;

use super::{BLOCK, Block, CHAINS, Op, Weights};
use crate::codec::ggml::levels::Linear;
use crate::codec::lanes::{LANES, Lanes, MAGIC};
use crate::isa::Isa;

/// See [`super::extremes`].
pub(super) fn extremes(isa: Isa, blocks: &[Block]) -> [Lanes; 2] {
    assert!(isa.has_avx2(), "not on this CPU");
    // SAFETY: the level was proven by `isa`.
    unsafe { extremes_body(blocks) }
}

#[target_feature(enable = "avx2,fma")]
fn extremes_body(blocks: &[Block]) -> [Lanes; 2] {
    over_blocks(blocks, [Op::Least, Op::Most], |_, block| {
        let [a, b, c, d] = load(block);
        let least = _mm256_min_ps(_mm256_min_ps(a, b), _mm256_min_ps(c, d));
        [least, _mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d))]
    })
}

/// See [`super::products`].
pub(super) fn products(isa: Isa, blocks: &[Block], hi: f32, by: Lanes) -> [Lanes; 2] {
    assert!(isa.has_avx2(), "not on this CPU");
    // SAFETY: the level was proven by `isa`.
    unsafe { products_body(blocks, hi, by) }
}

#[target_feature(enable = "avx2,fma")]
fn products_body(blocks: &[Block], hi: f32, by: Lanes) -> [Lanes; 2] {
    let hi = _mm256_set1_ps(hi);
    over_blocks(blocks, [Op::Sum; 2], |l, block| {
        let by = _mm256_set1_ps(by.0[l]);
        let (mut qq, mut xq) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for x in load(block) {
            let q = round(_mm256_min_ps(_mm256_mul_ps(x, by), hi));
            qq = _mm256_fmadd_ps(q, q, qq);
            xq = _mm256_fmadd_ps(q, x, xq);
        }
        [qq, xq]
    })
}

/// See [`super::weighted_products`].
pub(super) fn weighted_products(isa: Isa, blocks: &[Block], weights: Weights<'_>, by: Lanes) -> [Lanes; 2] {
    assert!(isa.has_avx2(), "not on this CPU");
    // SAFETY: the level was proven by `isa`.
    unsafe { weighted_products_body(blocks, weights, by) }
}

#[target_feature(enable = "avx2,fma")]
fn weighted_products_body(blocks: &[Block], weights: Weights<'_>, by: Lanes) -> [Lanes; 2] {
    over_blocks(blocks, [Op::Sum; 2], |l, block| {
        let by = _mm256_set1_ps(by.0[l]);
        let (mut qq, mut xq) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for (x, w) in load(block).into_iter().zip(load(weights.of(l))) {
            let q = round(_mm256_mul_ps(x, by));
            let wq = _mm256_mul_ps(w, q);
            qq = _mm256_fmadd_ps(wq, q, qq);
            xq = _mm256_fmadd_ps(wq, x, xq);
        }
        [qq, xq]
    })
}

/// See [`super::sums`].
pub(super) fn sums(isa: Isa, blocks: &[Block], by: Lanes, low: Lanes) -> [Lanes; 4] {
    assert!(isa.has_avx2(), "not on this CPU");
    // SAFETY: the level was proven by `isa`.
    unsafe { sums_body(blocks, by, low) }
}

#[target_feature(enable = "avx2,fma")]
fn sums_body(blocks: &[Block], by: Lanes, low: Lanes) -> [Lanes; 4] {
    over_blocks(blocks, [Op::Sum; 4], |l, block| {
        let (by, low) = (_mm256_set1_ps(by.0[l]), _mm256_set1_ps(low.0[l]));
        let mut s = [_mm256_setzero_ps(); 4];
        for x in load(block) {
            let y = _mm256_add_ps(x, low);
            let q = round(_mm256_mul_ps(y, by));
            s[0] = _mm256_add_ps(s[0], y);
            s[1] = _mm256_add_ps(s[1], q);
            s[2] = _mm256_fmadd_ps(q, q, s[2]);
            s[3] = _mm256_fmadd_ps(q, y, s[3]);
        }
        s
    })
}

/// See [`super::over_blocks`].
#[target_feature(enable = "avx2,fma")]
#[inline]
fn over_blocks<const N: usize>(
    blocks: &[Block],
    ops: [Op; N],
    chains: impl Fn(usize, &Block) -> [__m256; N],
) -> [Lanes; N] {
    let mut out = [Lanes::ZERO; N];
    for (half, blocks) in blocks.chunks(CHAINS).take(LANES / CHAINS).enumerate() {
        let mut eight = [[_mm256_setzero_ps(); 8]; N];
        for (l, block) in blocks.iter().enumerate() {
            for (eight, chains) in eight.iter_mut().zip(chains(half * 8 + l, block)) {
                eight[l] = chains;
            }
        }
        for ((out, op), eight) in out.iter_mut().zip(ops).zip(&eight) {
            let place = &mut out.0.as_chunks_mut::<8>().0[half];
            // SAFETY: 8 values of four bytes.
            unsafe { _mm256_storeu_ps(place.as_mut_ptr(), trees(eight, op)) };
        }
    }
    out
}

/// Halves onto halves, two, four and eight blocks to a register.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn trees(chains: &[__m256; 8], op: Op) -> __m256 {
    let f = |a, b| match op {
        Op::Sum => _mm256_add_ps(a, b),
        Op::Least => _mm256_min_ps(a, b),
        Op::Most => _mm256_max_ps(a, b),
    };
    let four = |i: usize| {
        let (a, b) = (chains[i], chains[i + 4]);
        f(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
    };
    let two = |a, b| {
        let (a, b) = (_mm256_castps_pd(a), _mm256_castps_pd(b));
        f(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)))
    };
    let (a, b) = (two(four(0), four(1)), two(four(2), four(3)));
    f(_mm256_shuffle_ps::<0b10_00_10_00>(a, b), _mm256_shuffle_ps::<0b11_01_11_01>(a, b))
}

/// See [`super::codes`].
#[inline(always)]
pub(super) fn codes(isa: Isa, levels: Linear, block: &Block, by: f32, low: f32) -> [u8; BLOCK] {
    assert!(isa.has_avx2(), "not on this CPU");
    // SAFETY: the level was proven by `isa`.
    unsafe { codes_body(levels, block, by, low) }
}

/// Levels become i32, i16 and i8; packing mixes up the quarters, and one permutation puts them in order again.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn codes_body(levels: Linear, block: &Block, by: f32, low: f32) -> [u8; BLOCK] {
    let (lo, hi) = (_mm256_set1_ps(levels.lo), _mm256_set1_ps(levels.hi));
    let (by, low) = (_mm256_set1_ps(by), _mm256_set1_ps(low));
    let level = |x| {
        let y = _mm256_mul_ps(_mm256_add_ps(x, low), by);
        _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(y, hi), lo))
    };
    let [a, b, c, d] = load(block);
    let first = _mm256_packs_epi32(level(a), level(b));
    let second = _mm256_packs_epi32(level(c), level(d));
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let levels_i8 = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second), order);
    let codes = _mm256_add_epi8(levels_i8, _mm256_set1_epi8(levels.code_of_zero as i8));
    let mut out = [0; BLOCK];
    // SAFETY: 32 bytes.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), codes) };
    out
}

/// See [`crate::codec::lanes::round`].
#[target_feature(enable = "avx2,fma")]
#[inline]
fn round(v: __m256) -> __m256 {
    let magic = _mm256_set1_ps(MAGIC);
    _mm256_sub_ps(_mm256_add_ps(v, magic), magic)
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn load(block: &Block) -> [__m256; 4] {
    let (eights, _) = block.as_chunks::<8>();
    // SAFETY: 8 values of four bytes each.
    std::array::from_fn(|i| unsafe { _mm256_loadu_ps(eights[i].as_ptr()) })
}
