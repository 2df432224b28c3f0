//! The decoder on AVX-512: 16 lanes to a register, one gather a register and row.
#![allow(
    unsafe_code,
    reason = "gathers, and stores of part of a register; every place is bounded above them"
)]

use std::arch::x86_64::*;

use super::{Job, LANES_MAX};
use crate::codec::tcq::rans::START;
use crate::codec::tcq::tables::{self, SLOTS, SYMBOL_OF_ZERO, TABLES};
use crate::isa::Isa;

pub(super) fn group(isa: Isa, job: &mut Job<'_>, first: usize) -> bool {
    assert!(
        isa.has_avx512() && job.words.len() >= job.n_bytes + 4 * LANES_MAX,
        "not on this CPU, or no padding"
    );
    // SAFETY: the level was proven by `isa`.
    unsafe {
        match (job.side.lanes, job.side.classes.len() - first >= job.side.lanes) {
            (16, true) => rows::<1, true>(job, first),
            (16, false) => rows::<1, false>(job, first),
            (32, true) => rows::<2, true>(job, first),
            (32, false) => rows::<2, false>(job, first),
            (_, true) => rows::<4, true>(job, first),
            (_, false) => rows::<4, false>(job, first),
        }
    }
}

/// All rows of the columns `first ..`, in `V` registers; `FULL` if there is a column for every lane.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn rows<const V: usize, const FULL: bool>(job: &mut Job<'_>, first: usize) -> bool {
    let cols = job.side.classes.len();
    let n = (16 * V).min(cols - first);
    let zero = _mm512_setzero_si512();
    let (mut x, mut place, mut class) = ([zero; V], [zero; V], [zero; V]);
    let mut steps = [_mm512_setzero_ps(); V];
    let mut there = [0u16; V];
    for v in 0..V {
        let (mut classes, mut factors) = ([0i32; 16], [0f32; 16]);
        for l in 16 * v..n.min(16 * v + 16) {
            (classes[l % 16], factors[l % 16]) = (job.side.classes[first + l], job.side.steps[first + l]);
            there[v] |= 1 << (l % 16);
        }
        let states: [u32; 16] = std::array::from_fn(|l| job.state[16 * v + l]);
        // SAFETY: three arrays of 64 bytes.
        unsafe {
            x[v] = _mm512_loadu_si512(states.as_ptr().cast());
            class[v] = _mm512_loadu_si512(classes.as_ptr().cast());
            steps[v] = _mm512_loadu_ps(factors.as_ptr());
        }
    }
    let slots = tables::slots();
    assert!(
        slots.len() == TABLES * 2 * SLOTS && job.out.len() >= job.row_classes.len() * cols,
        "tables or output too short"
    );
    let (low, one) = (_mm512_set1_epi32(SLOTS as i32 - 1), _mm512_set1_epi32(1));
    let (last, start) = (_mm512_set1_epi32(TABLES as i32 - 1), _mm512_set1_epi32(START as i32));
    let (h0, h1) = (_mm512_set1_epi32(job.trellis.h0.into()), _mm512_set1_epi32(job.trellis.h1.into()));
    let middle = _mm512_set1_epi32(SYMBOL_OF_ZERO);
    let mut at = job.at;
    for (row, &row_class) in job.row_classes.iter().enumerate() {
        let row_class = _mm512_set1_epi32(row_class);
        for v in 0..V {
            let odd = _mm512_and_si512(place[v], one);
            let table = _mm512_min_epi32(_mm512_max_epi32(_mm512_add_epi32(class[v], row_class), zero), last);
            let table = _mm512_or_si512(_mm512_slli_epi32::<1>(table), odd);
            let index = _mm512_or_si512(_mm512_slli_epi32::<12>(table), _mm512_and_si512(x[v], low));
            // SAFETY: a table is below TABLES, so an index is below the length that was asserted.
            let entry = unsafe { _mm512_i32gather_epi32::<4>(index, slots.as_ptr().cast()) };
            let freq = _mm512_add_epi32(_mm512_and_si512(entry, low), one);
            let within = _mm512_and_si512(_mm512_srli_epi32::<12>(entry), low);
            let next = _mm512_add_epi32(_mm512_mullo_epi32(freq, _mm512_srli_epi32::<12>(x[v])), within);
            let symbol = _mm512_srli_epi32::<24>(entry);
            let level = _mm512_or_si512(_mm512_slli_epi32::<1>(_mm512_sub_epi32(symbol, middle)), odd);
            let value = _mm512_mul_ps(_mm512_cvtepi32_ps(level), steps[v]);
            // SAFETY: the mask has the columns that are there, all of them if FULL, and the output its rows.
            unsafe {
                let to = job.out.as_mut_ptr().add(row * cols + first + 16 * v);
                if FULL { _mm512_storeu_ps(to, value) } else { _mm512_mask_storeu_ps(to, there[v], value) }
            }
            let mut to = _mm512_srli_epi32::<1>(place[v]);
            to = _mm512_mask_xor_epi32(to, _mm512_test_epi32_mask(odd, one), to, h0);
            to = _mm512_mask_xor_epi32(to, _mm512_test_epi32_mask(symbol, one), to, h1);
            place[v] = to;
            let here = if FULL { u16::MAX } else { there[v] };
            let need = _mm512_mask_cmplt_epu32_mask(here, next, start);
            // SAFETY: `at` is at most `n_bytes` when a row begins, a row takes at most LANES_MAX words, and behind the words there
            // are as many and a register's more.
            let words = unsafe { _mm256_loadu_si256(job.words.as_ptr().add(at).cast()) };
            let words = _mm512_maskz_expand_epi32(need, _mm512_cvtepu16_epi32(words));
            let next = _mm512_mask_or_epi32(next, need, _mm512_slli_epi32::<16>(next), words);
            x[v] = _mm512_mask_mov_epi32(x[v], here, next);
            at += 2 * need.count_ones() as usize;
        }
        if at > job.n_bytes {
            return false;
        }
    }
    job.at = at;
    for (v, x) in x.into_iter().enumerate() {
        // SAFETY: `state` has LANES_MAX values, 16 · V at most.
        unsafe { _mm512_storeu_si512(job.state.as_mut_ptr().add(16 * v).cast(), x) };
    }
    true
}
