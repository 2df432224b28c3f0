//! The search on AVX2: all states of one path side by side, 16 to a register.
//!
//! As in `avx512.rs`, but a permutation of 16-bit values takes steps: even and odd states are parted once a register pair,
//! and `⊕ c` on a register is a byte shuffle (lower three bits of `c`) and a swap of halves (bit 3).
#![allow(
    unsafe_code,
    reason = "intrinsics; the level is proven by the Isa, and nothing is read through a pointer but arrays"
)]

use std::arch::x86_64::*;

use super::{Metrics, RENORMALIZE, Trellis, UNREACHED, cheapest};
use crate::isa::Isa;

pub(super) fn forward(isa: Isa, trellis: Trellis, metrics: &[Metrics], decisions: &mut [u64]) -> u16 {
    assert!(isa.has_avx2(), "not on this CPU");
    // SAFETY: the level was proven by `isa`.
    unsafe {
        match trellis.states {
            64 => steps::<4, 2, 64>(metrics, decisions),
            _ => steps::<16, 8, 256>(metrics, decisions),
        }
    }
}

/// `R` registers of 16 of the `N` states, `H` of them in each half.
#[target_feature(enable = "avx2")]
fn steps<const R: usize, const H: usize, const N: usize>(metrics: &[Metrics], decisions: &mut [u64]) -> u16 {
    let t = const { Trellis::known(N) };
    let mut cost = [_mm256_set1_epi16(UNREACHED as i16); R];
    cost[0] = _mm256_insert_epi16::<0>(cost[0], 0);
    let turns = [t.h1, t.h0, t.h0 ^ t.h1];
    let shuffles = [shuffle(turns[0] & 7), shuffle(turns[1] & 7), shuffle(turns[2] & 7)];
    for (i, (m, bits)) in metrics.iter().zip(decisions.chunks_exact_mut(R / 4)).enumerate() {
        let (m0, m1) = (_mm256_set1_epi16(m[0] as i16), _mm256_set1_epi16(m[1] as i16));
        let (m2, m3) = (_mm256_set1_epi16(m[2] as i16), _mm256_set1_epi16(m[3] as i16));
        let (mut even, mut odd) = ([cost[0]; H], [cost[0]; H]);
        for b in 0..H {
            (even[b], odd[b]) = part(cost[2 * b], cost[2 * b + 1]);
        }
        let mut masks = [_mm256_setzero_si256(); R];
        for b in 0..H {
            let stay = _mm256_adds_epu16(even[b], m0);
            let turn = _mm256_adds_epu16(turned(&even, b, turns[0], shuffles[0]), m2);
            cost[b] = _mm256_min_epu16(stay, turn);
            masks[b] = _mm256_cmpeq_epi16(cost[b], stay);
            let stay = _mm256_adds_epu16(turned(&odd, b, turns[1], shuffles[1]), m1);
            let turn = _mm256_adds_epu16(turned(&odd, b, turns[2], shuffles[2]), m3);
            cost[H + b] = _mm256_min_epu16(stay, turn);
            masks[H + b] = _mm256_cmpeq_epi16(cost[H + b], stay);
        }
        for (bits, four) in bits.iter_mut().zip(masks.chunks_exact(4)) {
            let (low, high) = (mask(four[0], four[1]), mask(four[2], four[3]));
            *bits = !(u64::from(low) | u64::from(high) << 32);
        }
        if i % RENORMALIZE == RENORMALIZE - 1 {
            let mut least = cost[0];
            for c in cost {
                least = _mm256_min_epu16(least, c);
            }
            let least = _mm256_set1_epi16(smallest(least) as i16);
            for c in &mut cost {
                *c = _mm256_sub_epi16(*c, least);
            }
        }
    }
    let mut all = [0u16; super::STATES_MAX];
    for (to, &from) in all.chunks_exact_mut(16).zip(&cost) {
        // SAFETY: 16 values of two bytes are 32 bytes.
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), from) };
    }
    cheapest(&all[..N])
}

/// Register `b` of the values `[i ⊕ turn]`.
#[target_feature(enable = "avx2")]
#[inline]
fn turned<const H: usize>(values: &[__m256i; H], b: usize, turn: u16, shuffle: __m256i) -> __m256i {
    let v = _mm256_shuffle_epi8(values[(b ^ (usize::from(turn) / 16)) % H], shuffle);
    if turn & 8 == 0 { v } else { _mm256_permute4x64_epi64::<0b01_00_11_10>(v) }
}

/// Even and odd values of 32 in two registers.
#[target_feature(enable = "avx2")]
#[inline]
fn part(a: __m256i, b: __m256i) -> (__m256i, __m256i) {
    let apart = _mm256_setr_epi8(
        0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11,
        14, 15,
    );
    let (a, b) = (_mm256_shuffle_epi8(a, apart), _mm256_shuffle_epi8(b, apart));
    let (even, odd) = (_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    (_mm256_permute4x64_epi64::<0b11_01_10_00>(even), _mm256_permute4x64_epi64::<0b11_01_10_00>(odd))
}

/// Takes value `i ⊕ low` to place `i` within each half.
#[target_feature(enable = "avx2")]
fn shuffle(low: u16) -> __m256i {
    let bytes: [u8; 32] = std::array::from_fn(|i| (i as u8 & 15) ^ (2 * low as u8));
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// One bit for each of 32 values that are all ones or all zeros.
#[target_feature(enable = "avx2")]
#[inline]
fn mask(a: __m256i, b: __m256i) -> u32 {
    let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi16(a, b));
    _mm256_movemask_epi8(bytes) as u32
}

#[target_feature(enable = "avx2")]
fn smallest(v: __m256i) -> u16 {
    let v = _mm_min_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    _mm_extract_epi16::<0>(_mm_minpos_epu16(v)) as u16
}
