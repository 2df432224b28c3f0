//! The search of the lanes on AVX2: 16 costs to a register, so that those of all eight states stay in registers; backwards, 32
//! states of four bits each, whose predecessors a byte shuffle looks up.
#![allow(
    unsafe_code,
    reason = "intrinsics; the level is proven by the Isa, and nothing is read or written through a pointer but arrays"
)]

use std::arch::x86_64::*;

use super::{Decisions, LANES, Metrics, before};
use crate::codec::tcq::trellis::RENORMALIZE;
use crate::isa::Isa;

/// Costs in a register.
const WIDTH: usize = 16;
const _: () = assert!(LANES == 2 * WIDTH);

/// See [`super::forward`].
pub(super) fn forward(
    isa: Isa,
    metrics: &[Metrics],
    decisions: &mut [Decisions],
    cost: &mut [[u16; LANES]; 8],
) {
    assert!(isa.has_avx2(), "not on this CPU");
    for half in 0..LANES / WIDTH {
        // SAFETY: the level was proven by `isa`.
        unsafe { forward_half(metrics, decisions, cost, half * WIDTH) };
    }
}

/// Lanes `first ..`.
#[target_feature(enable = "avx2")]
fn forward_half(
    metrics: &[Metrics],
    decisions: &mut [Decisions],
    cost: &mut [[u16; LANES]; 8],
    first: usize,
) {
    let mut c = [_mm256_setzero_si256(); 8];
    for (c, cost) in c.iter_mut().zip(cost.iter()) {
        *c = load(cost, first);
    }
    for (i, (m, decisions)) in metrics.iter().zip(decisions.iter_mut()).enumerate() {
        let m = [load(&m[0], first), load(&m[1], first), load(&m[2], first), load(&m[3], first)];
        let old = c;
        let mut bits = _mm256_setzero_si256();
        macro_rules! state {
            ($($d:literal)*) => {$({
                const BEFORE: [usize; 2] = before($d);
                let stay = _mm256_adds_epu16(old[BEFORE[0]], m[$d / 4]);
                let turn = _mm256_adds_epu16(old[BEFORE[1]], m[$d / 4 + 2]);
                c[$d] = _mm256_min_epu16(stay, turn);
                let stays = _mm256_cmpeq_epi16(c[$d], stay);
                bits = _mm256_or_si256(bits, _mm256_andnot_si256(stays, _mm256_set1_epi16(1 << $d)));
            })*};
        }
        state!(0 1 2 3 4 5 6 7);
        let bytes = _mm256_permute4x64_epi64::<0b00_00_10_00>(_mm256_packus_epi16(bits, bits));
        let to: &mut [u8] = &mut decisions[first..first + WIDTH];
        // SAFETY: 16 bytes.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), _mm256_castsi256_si128(bytes)) };
        if i % RENORMALIZE == RENORMALIZE - 1 {
            let least = c.into_iter().fold(c[0], |a, b| _mm256_min_epu16(a, b));
            for c in &mut c {
                *c = _mm256_sub_epi16(*c, least);
            }
        }
    }
    for (cost, c) in cost.iter_mut().zip(c) {
        let to: &mut [u16] = &mut cost[first..first + WIDTH];
        // SAFETY: 16 values of two bytes.
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), c) };
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load(values: &[u16; LANES], first: usize) -> __m256i {
    let values: &[u16] = &values[first..first + WIDTH];
    // SAFETY: 16 values of two bytes.
    unsafe { _mm256_loadu_si256(values.as_ptr().cast()) }
}

/// See [`super::backward`].
pub(super) fn backward(isa: Isa, state: [u8; LANES], decisions: &[Decisions], subsets: &mut [[u8; LANES]]) {
    assert!(isa.has_avx2(), "not on this CPU");
    // SAFETY: the level was proven by `isa`.
    unsafe { backward_body(state, decisions, subsets) };
}

#[target_feature(enable = "avx2")]
fn backward_body(state: [u8; LANES], decisions: &[Decisions], subsets: &mut [[u8; LANES]]) {
    /// By state, and 8 more where `z1` is 1.
    const BEFORE: [u8; 16] = by_index(true);
    const SUBSET: [u8; 16] = by_index(false);
    const BIT: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 0, 0, 0, 0, 0, 0, 0, 0];
    let (before, subset, bit) = (twice(BEFORE), twice(SUBSET), twice(BIT));
    let turned = _mm256_set1_epi8(8);
    // SAFETY: arrays of 32 bytes, here and below.
    let mut state = unsafe { _mm256_loadu_si256(state.as_ptr().cast()) };
    for (decisions, subsets) in decisions.iter().zip(subsets.iter_mut()).rev() {
        // SAFETY: see above.
        let decisions = unsafe { _mm256_loadu_si256(decisions.as_ptr().cast()) };
        let bit = _mm256_shuffle_epi8(bit, state);
        let z1 = _mm256_cmpeq_epi8(_mm256_and_si256(decisions, bit), bit);
        let index = _mm256_or_si256(state, _mm256_and_si256(z1, turned));
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(subsets.as_mut_ptr().cast(), _mm256_shuffle_epi8(subset, index)) };
        state = _mm256_shuffle_epi8(before, index);
    }
}

/// States before, or subsets.
const fn by_index(states: bool) -> [u8; 16] {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 16 {
        let (d, z1) = (i % 8, i / 8);
        table[i] = if states { before(d)[z1] as u8 } else { (2 * z1 + d / 4) as u8 };
        i += 1;
    }
    table
}

#[target_feature(enable = "avx2")]
fn twice(table: [u8; 16]) -> __m256i {
    // SAFETY: 16 bytes.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) })
}
