//! The decoder on AVX2: 8 lanes to a register. Words go to the lanes that need one by a permutation from a table.
#![allow(
    unsafe_code,
    reason = "gathers, and stores of part of a register; every place is bounded above them"
)]

use std::arch::x86_64::*;

use super::{Job, LANES_MAX};
use crate::codec::tcq::rans::START;
use crate::codec::tcq::tables::{self, SLOTS, SYMBOL_OF_ZERO, TABLES};
use crate::isa::Isa;

/// For each set of lanes that need a word, which of the next words each takes.
static TAKE: [[u32; 8]; 256] = {
    let mut all = [[0; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut n) = (0, 0);
        while lane < 8 {
            all[mask][lane] = n;
            n += (mask >> lane & 1) as u32;
            lane += 1;
        }
        mask += 1;
    }
    all
};

pub(super) fn group(isa: Isa, job: &mut Job<'_>, first: usize) -> bool {
    assert!(
        isa.has_avx2() && job.words.len() >= job.n_bytes + 4 * LANES_MAX,
        "not on this CPU, or no padding"
    );
    // SAFETY: the level was proven by `isa`.
    unsafe {
        match (job.side.lanes, job.side.classes.len() - first >= job.side.lanes) {
            (8, true) => rows::<1, true>(job, first),
            (8, false) => rows::<1, false>(job, first),
            (16, true) => rows::<2, true>(job, first),
            (16, false) => rows::<2, false>(job, first),
            (32, true) => rows::<4, true>(job, first),
            (32, false) => rows::<4, false>(job, first),
            (_, true) => rows::<8, true>(job, first),
            (_, false) => rows::<8, false>(job, first),
        }
    }
}

/// All rows of the columns `first ..`, in `V` registers; `FULL` if there is a column for every lane.
#[target_feature(enable = "avx2")]
fn rows<const V: usize, const FULL: bool>(job: &mut Job<'_>, first: usize) -> bool {
    let cols = job.side.classes.len();
    let n = (8 * V).min(cols - first);
    let zero = _mm256_setzero_si256();
    let (mut x, mut place, mut class) = ([zero; V], [zero; V], [zero; V]);
    let mut steps = [_mm256_setzero_ps(); V];
    let mut there = [zero; V];
    for v in 0..V {
        let (mut classes, mut factors, mut present) = ([0i32; 8], [0f32; 8], [0i32; 8]);
        for l in 8 * v..n.min(8 * v + 8) {
            (classes[l % 8], factors[l % 8]) = (job.side.classes[first + l], job.side.steps[first + l]);
            present[l % 8] = -1;
        }
        let states: [u32; 8] = std::array::from_fn(|l| job.state[8 * v + l]);
        // SAFETY: four arrays of 32 bytes.
        unsafe {
            x[v] = _mm256_loadu_si256(states.as_ptr().cast());
            class[v] = _mm256_loadu_si256(classes.as_ptr().cast());
            steps[v] = _mm256_loadu_ps(factors.as_ptr());
            there[v] = _mm256_loadu_si256(present.as_ptr().cast());
        }
    }
    let slots = tables::slots();
    assert!(
        slots.len() == TABLES * 2 * SLOTS && job.out.len() >= job.row_classes.len() * cols,
        "tables or output too short"
    );
    let (low, one) = (_mm256_set1_epi32(SLOTS as i32 - 1), _mm256_set1_epi32(1));
    let last = _mm256_set1_epi32(TABLES as i32 - 1);
    let (h0, h1) = (_mm256_set1_epi32(job.trellis.h0.into()), _mm256_set1_epi32(job.trellis.h1.into()));
    let middle = _mm256_set1_epi32(SYMBOL_OF_ZERO);
    let mut at = job.at;
    for (row, &row_class) in job.row_classes.iter().enumerate() {
        let row_class = _mm256_set1_epi32(row_class);
        for v in 0..V {
            let odd = _mm256_and_si256(place[v], one);
            let table = _mm256_min_epi32(_mm256_max_epi32(_mm256_add_epi32(class[v], row_class), zero), last);
            let table = _mm256_or_si256(_mm256_slli_epi32::<1>(table), odd);
            let index = _mm256_or_si256(_mm256_slli_epi32::<12>(table), _mm256_and_si256(x[v], low));
            // SAFETY: a table is below TABLES, so an index is below the length that was asserted.
            let entry = unsafe { _mm256_i32gather_epi32::<4>(slots.as_ptr().cast(), index) };
            let freq = _mm256_add_epi32(_mm256_and_si256(entry, low), one);
            let within = _mm256_and_si256(_mm256_srli_epi32::<12>(entry), low);
            let next = _mm256_add_epi32(_mm256_mullo_epi32(freq, _mm256_srli_epi32::<12>(x[v])), within);
            let symbol = _mm256_srli_epi32::<24>(entry);
            let level = _mm256_or_si256(_mm256_slli_epi32::<1>(_mm256_sub_epi32(symbol, middle)), odd);
            let value = _mm256_mul_ps(_mm256_cvtepi32_ps(level), steps[v]);
            // SAFETY: the mask has the columns that are there, all of them if FULL, and the output its rows.
            unsafe {
                let to = job.out.as_mut_ptr().add(row * cols + first + 8 * v);
                if FULL { _mm256_storeu_ps(to, value) } else { _mm256_maskstore_ps(to, there[v], value) }
            }
            let by_odd = _mm256_and_si256(_mm256_cmpeq_epi32(odd, one), h0);
            let by_turn = _mm256_and_si256(_mm256_cmpeq_epi32(_mm256_and_si256(symbol, one), one), h1);
            place[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi32::<1>(place[v]), by_odd), by_turn);
            // Below 2^16, so its upper half is zero.
            let mut need = _mm256_cmpeq_epi32(_mm256_srli_epi32::<16>(next), zero);
            if !FULL {
                need = _mm256_and_si256(need, there[v]);
            }
            let mask = _mm256_movemask_ps(_mm256_castsi256_ps(need)) as usize & 255;
            // SAFETY: `at` is at most `n_bytes` when a row begins, a row takes at most LANES_MAX words, and behind the words there
            // are as many and a register's more. A row of TAKE has 32 bytes.
            let (words, take) = unsafe {
                let words = _mm_loadu_si128(job.words.as_ptr().add(at).cast());
                (words, _mm256_loadu_si256(TAKE[mask].as_ptr().cast()))
            };
            let words = _mm256_permutevar8x32_epi32(_mm256_cvtepu16_epi32(words), take);
            let more = _mm256_or_si256(_mm256_slli_epi32::<16>(next), words);
            let next = _mm256_blendv_epi8(next, more, need);
            x[v] = if FULL { next } else { _mm256_blendv_epi8(x[v], next, there[v]) };
            at += 2 * mask.count_ones() as usize;
        }
        if at > job.n_bytes {
            return false;
        }
    }
    job.at = at;
    for (v, x) in x.into_iter().enumerate() {
        // SAFETY: `state` has LANES_MAX values, 8 · V at most.
        unsafe { _mm256_storeu_si256(job.state.as_mut_ptr().add(8 * v).cast(), x) };
    }
    true
}

const _: () = assert!(START == 1 << 16);
