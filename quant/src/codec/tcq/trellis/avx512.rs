//! The search on AVX-512: all states of one path side by side, 32 to a register.
//!
//! With `E[u] = cost[2u]` and `O[u] = cost[2u + 1]` a step is
//!
//! ```text
//!  new[d]            = min(E[d]      + m0, E[d ⊕ h1]      + m2)     for d below half the states
//!  new[d], d above   = min(O[d ⊕ h0] + m1, O[d ⊕ h0 ⊕ h1] + m3)
//! ```
//!
//! A register of 32 values of `E[d ⊕ c]` comes from two neighbouring registers of costs by one permutation: `c`'s upper bits
//! choose the two, its lower five the order. So four index vectors do it all.
#![allow(
    unsafe_code,
    reason = "intrinsics; the level is proven by the Isa, and nothing is read through a pointer but arrays"
)]

use std::arch::x86_64::*;

use super::{Metrics, RENORMALIZE, Trellis, UNREACHED, cheapest};
use crate::isa::Isa;

pub(super) fn forward(isa: Isa, trellis: Trellis, metrics: &[Metrics], decisions: &mut [u64]) -> u16 {
    assert!(isa.has_avx512(), "not on this CPU");
    // SAFETY: the level was proven by `isa`.
    unsafe {
        match trellis.states {
            64 => steps::<2, 1, 64>(metrics, decisions),
            _ => steps::<8, 4, 256>(metrics, decisions),
        }
    }
}

/// `R` registers of 32 of the `N` states, `H` of them in each half: one word of decisions each two registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn steps<const R: usize, const H: usize, const N: usize>(metrics: &[Metrics], decisions: &mut [u64]) -> u16 {
    let t = const { Trellis::known(N) };
    let mut cost = [_mm512_set1_epi16(UNREACHED as i16); R];
    cost[0] = _mm512_mask_set1_epi16(cost[0], 1, 0);
    let (low0, low1) = (t.h0 & 31, t.h1 & 31);
    // Where the values E[d ⊕ c] and O[d ⊕ c] lie in two registers, for the four c.
    let order = [index(0, 0), index(low1, 0), index(low0, 1), index(low0 ^ low1, 1)];
    let turns = [0, t.h1, t.h0, t.h0 ^ t.h1];
    for (i, (m, bits)) in metrics.iter().zip(decisions.chunks_exact_mut(R / 2)).enumerate() {
        let (m0, m1) = (_mm512_set1_epi16(m[0] as i16), _mm512_set1_epi16(m[1] as i16));
        let (m2, m3) = (_mm512_set1_epi16(m[2] as i16), _mm512_set1_epi16(m[3] as i16));
        let mut new = cost;
        let mut masks = [0u32; R];
        for b in 0..H {
            let stay = _mm512_adds_epu16(turned::<R, H>(&cost, b, turns[0], order[0]), m0);
            let turn = _mm512_adds_epu16(turned::<R, H>(&cost, b, turns[1], order[1]), m2);
            new[b] = _mm512_min_epu16(stay, turn);
            masks[b] = _mm512_cmplt_epu16_mask(turn, stay);
            let stay = _mm512_adds_epu16(turned::<R, H>(&cost, b, turns[2], order[2]), m1);
            let turn = _mm512_adds_epu16(turned::<R, H>(&cost, b, turns[3], order[3]), m3);
            new[H + b] = _mm512_min_epu16(stay, turn);
            masks[H + b] = _mm512_cmplt_epu16_mask(turn, stay);
        }
        for (bits, pair) in bits.iter_mut().zip(masks.chunks_exact(2)) {
            *bits = u64::from(pair[0]) | u64::from(pair[1]) << 32;
        }
        cost = new;
        if i % RENORMALIZE == RENORMALIZE - 1 {
            let mut least = cost[0];
            for c in cost {
                least = _mm512_min_epu16(least, c);
            }
            let least = _mm512_set1_epi16(smallest(least) as i16);
            for c in &mut cost {
                *c = _mm512_sub_epi16(*c, least);
            }
        }
    }
    let mut all = [0u16; super::STATES_MAX];
    for (to, &from) in all.chunks_exact_mut(32).zip(&cost) {
        // SAFETY: 32 values of two bytes are 64 bytes.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), from) };
    }
    cheapest(&all[..N])
}

/// Register `b` of the even or odd costs `[i ⊕ turn]`, as `order` says.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn turned<const R: usize, const H: usize>(
    cost: &[__m512i; R],
    b: usize,
    turn: u16,
    order: __m512i,
) -> __m512i {
    let pair = 2 * ((b ^ (usize::from(turn) / 32)) % H);
    _mm512_permutex2var_epi16(cost[pair], order, cost[pair + 1])
}

/// Places of `cost[2 (i ⊕ low) + odd]`, `i` of 0 … 31, in two registers.
#[target_feature(enable = "avx512f,avx512bw")]
fn index(low: u16, odd: u16) -> __m512i {
    let places: [u16; 32] = std::array::from_fn(|i| 2 * (i as u16 ^ low) + odd);
    // SAFETY: the array has 64 bytes.
    unsafe { _mm512_loadu_si512(places.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn smallest(v: __m512i) -> u16 {
    let v = _mm256_min_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v));
    let v = _mm_min_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    _mm_extract_epi16::<0>(_mm_minpos_epu16(v)) as u16
}
