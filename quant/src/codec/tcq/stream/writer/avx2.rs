//! Encoding on AVX2: 8 lanes to a register. The words that lanes give off are packed by a permutation from a table.
#![allow(
    unsafe_code,
    reason = "gathers, and loads and stores of whole registers; every place is bounded above them"
)]

use std::arch::x86_64::*;

use super::{Pen, ROWS_TURNED, Tile, symbol_of};
use crate::codec::tcq::rans::LANES_MAX;
use crate::codec::tcq::stream::table_of;
use crate::codec::tcq::tables::{self, LEVEL_MAX, PROB_BITS, SYMBOL_OF_ZERO, SYMBOLS, Symbol, TABLES};
use crate::isa::Isa;

/// For each set of lanes that give a word off, which lane each place takes, so that words end at the last place.
static PACK: [[u32; 8]; 256] = {
    let mut all = [[0; 8]; 256];
    let mut mask = 0usize;
    while mask < 256 {
        let (mut lane, mut place) = (0, 8 - mask.count_ones() as usize);
        while lane < 8 {
            if mask >> lane & 1 == 1 {
                all[mask][place] = lane as u32;
                place += 1;
            }
            lane += 1;
        }
        mask += 1;
    }
    all
};

const _: () =
    assert!(size_of::<Symbol>() == 8 && PROB_BITS == 12 && SYMBOLS == 256 && ROWS_TURNED.is_multiple_of(8));

/// See [`super::put_rows`].
pub(super) fn put_rows(
    isa: Isa,
    pen: &mut Pen,
    tile: &Tile,
    row_classes: &[i32],
    classes: &[i32],
    excepted: &mut dyn FnMut(usize, usize, i32),
) {
    assert!(isa.has_avx2() && classes.len() <= LANES_MAX, "not on this CPU, or too many lanes");
    assert!(
        pen.at <= pen.words.len() && pen.at >= LANES_MAX + row_classes.len() * classes.len(),
        "a place for every word"
    );
    // SAFETY: the level was proven by `isa`.
    unsafe {
        match classes.len().div_ceil(8) {
            1 => rows::<1>(pen, tile, row_classes, classes, excepted),
            2 => rows::<2>(pen, tile, row_classes, classes, excepted),
            4 => rows::<4>(pen, tile, row_classes, classes, excepted),
            8 => rows::<8>(pen, tile, row_classes, classes, excepted),
            n => rows_of(n, pen, tile, row_classes, classes, excepted),
        }
    }
}

/// Columns in `V` registers.
#[target_feature(enable = "avx2")]
fn rows<const V: usize>(
    pen: &mut Pen,
    tile: &Tile,
    row_classes: &[i32],
    classes: &[i32],
    excepted: &mut dyn FnMut(usize, usize, i32),
) {
    rows_of(V, pen, tile, row_classes, classes, excepted);
}

#[target_feature(enable = "avx2")]
#[inline]
fn rows_of(
    registers: usize,
    pen: &mut Pen,
    tile: &Tile,
    row_classes: &[i32],
    classes: &[i32],
    excepted: &mut dyn FnMut(usize, usize, i32),
) {
    let mut x = [_mm256_setzero_si256(); LANES_MAX / 8];
    let (mut class, mut there) = (x, x);
    let (mut of_lane, mut present) = ([0i32; LANES_MAX], [0i32; LANES_MAX]);
    for (lane, &c) in classes.iter().enumerate() {
        (of_lane[lane], present[lane]) = (c, -1);
    }
    for v in 0..registers {
        // SAFETY: arrays of LANES_MAX values, 8 to a register.
        unsafe {
            x[v] = _mm256_loadu_si256(pen.states.as_ptr().add(8 * v).cast());
            class[v] = _mm256_loadu_si256(of_lane.as_ptr().add(8 * v).cast());
            there[v] = _mm256_loadu_si256(present.as_ptr().add(8 * v).cast());
        }
    }
    let mut at = pen.at;
    for (row, (levels, &row_class)) in tile.iter().zip(row_classes).enumerate().rev() {
        for v in (0..registers).rev() {
            let eight: [i16; 8] = std::array::from_fn(|l| levels[8 * v + l]);
            // SAFETY: 8 values of two bytes.
            let level = _mm256_cvtepi16_epi32(unsafe { _mm_loadu_si128(eight.as_ptr().cast()) });
            let (mut reciprocal, mut symbol) = symbols(level, class[v], row_class);
            let low = _mm256_set1_epi32(0xffff);
            let none = _mm256_cmpeq_epi32(_mm256_and_si256(symbol, low), _mm256_setzero_si256());
            if _mm256_testz_si256(none, there[v]) == 0 {
                let lanes = 8 * v..classes.len().min(8 * v + 8);
                let (mut reciprocals, mut rest) = ([0u32; 8], [0u32; 8]);
                for lane in lanes.rev() {
                    let level = i32::from(levels[lane]);
                    let (symbol, known) = symbol_of(level, table_of(classes[lane], row_class));
                    if !known {
                        excepted(row, lane, level);
                    }
                    (reciprocals[lane % 8], rest[lane % 8]) = symbol.words();
                }
                // SAFETY: two arrays of 32 bytes.
                unsafe {
                    reciprocal = _mm256_loadu_si256(reciprocals.as_ptr().cast());
                    symbol = _mm256_loadu_si256(rest.as_ptr().cast());
                }
            }
            let freq = _mm256_and_si256(symbol, low);
            let full = _mm256_cmpgt_epi32(freq, _mm256_srli_epi32::<20>(x[v]));
            let full = _mm256_andnot_si256(full, there[v]);
            let mask = _mm256_movemask_ps(_mm256_castsi256_ps(full)) as usize & 255;
            // SAFETY: a row of PACK has 32 bytes. `at` is at least LANES_MAX, as was asserted of a word for each symbol, so the
            // 8 words before it are within `words`.
            unsafe {
                let pack = _mm256_loadu_si256(PACK[mask].as_ptr().cast());
                let words = _mm256_and_si256(x[v], low);
                let words = _mm256_permutevar8x32_epi32(words, pack);
                let words = _mm256_permute4x64_epi64::<0b00_00_10_00>(_mm256_packus_epi32(words, words));
                let to = pen.words.as_mut_ptr().add(at - 8);
                _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(words));
            }
            at -= mask.count_ones() as usize;
            let less = _mm256_blendv_epi8(x[v], _mm256_srli_epi32::<16>(x[v]), full);
            let after = after(less, reciprocal, freq, _mm256_srli_epi32::<16>(symbol));
            x[v] = _mm256_blendv_epi8(x[v], after, there[v]);
        }
    }
    pen.at = at;
    for (v, x) in x.into_iter().enumerate().take(registers) {
        // SAFETY: `states` has LANES_MAX values.
        unsafe { _mm256_storeu_si256(pen.states.as_mut_ptr().add(8 * v).cast(), x) };
    }
}

/// Reciprocal, and frequency and start, of the symbols of 8 numbers; zeros where one has none.
#[target_feature(enable = "avx2")]
#[inline]
fn symbols(level: __m256i, class: __m256i, row_class: i32) -> (__m256i, __m256i) {
    let symbols = tables::symbols();
    assert!(symbols.len() == TABLES * 2 * SYMBOLS, "tables too short");
    let table = _mm256_add_epi32(class, _mm256_set1_epi32(row_class));
    let table = _mm256_max_epi32(table, _mm256_setzero_si256());
    let table = _mm256_min_epi32(table, _mm256_set1_epi32(TABLES as i32 - 1));
    let odd = _mm256_and_si256(level, _mm256_set1_epi32(1));
    let beyond = _mm256_cmpgt_epi32(_mm256_abs_epi32(level), _mm256_set1_epi32(LEVEL_MAX));
    let symbol = _mm256_add_epi32(_mm256_srai_epi32::<1>(level), _mm256_set1_epi32(SYMBOL_OF_ZERO));
    // Symbol 1 is that of -254 and -253, which no table has.
    let symbol = _mm256_blendv_epi8(symbol, _mm256_set1_epi32(1), beyond);
    let index = _mm256_or_si256(_mm256_slli_epi32::<1>(table), odd);
    let index = _mm256_or_si256(_mm256_slli_epi32::<8>(index), symbol);
    let base = symbols.as_ptr().cast::<i32>();
    // SAFETY: a table is below TABLES, a symbol below SYMBOLS, so an index is below the length that was asserted, and each
    // entry is two values of four bytes.
    unsafe {
        let reciprocal = _mm256_i32gather_epi32::<8>(base, index);
        let rest = _mm256_i32gather_epi32::<8>(base.add(1), index);
        (reciprocal, rest)
    }
}

/// [`Symbol::state_after`] of 8 states.
#[target_feature(enable = "avx2")]
#[inline]
fn after(x: __m256i, reciprocal: __m256i, freq: __m256i, start: __m256i) -> __m256i {
    let even = _mm256_srli_epi64::<32>(_mm256_mul_epu32(x, reciprocal));
    let odd = _mm256_mul_epu32(_mm256_srli_epi64::<32>(x), _mm256_srli_epi64::<32>(reciprocal));
    let quotient = _mm256_blend_epi32::<0b1010_1010>(even, odd);
    let rest = _mm256_sub_epi32(x, _mm256_mullo_epi32(quotient, freq));
    let enough = _mm256_cmpgt_epi32(freq, rest);
    let rest = _mm256_sub_epi32(rest, _mm256_andnot_si256(enough, freq));
    let quotient = _mm256_add_epi32(quotient, _mm256_andnot_si256(enough, _mm256_set1_epi32(1)));
    _mm256_add_epi32(_mm256_slli_epi32::<12>(quotient), _mm256_add_epi32(rest, start))
}

/// Turns whole squares of 8 by 8; gives the lanes that are done.
pub(super) fn turn(
    isa: Isa,
    levels: &[i16],
    distance: usize,
    lanes: usize,
    n: usize,
    tile: &mut Tile,
) -> usize {
    let lanes = lanes / 8 * 8;
    assert!(isa.has_avx2() && lanes <= LANES_MAX && n <= ROWS_TURNED, "not on this CPU, or too large");
    let whole = if lanes == 0 { 0 } else { n / 8 * 8 };
    assert!(whole == 0 || levels.len() >= (lanes - 1) * distance + n, "columns cut short");
    for lane in (0..lanes).step_by(8) {
        for row in (0..whole).step_by(8) {
            // SAFETY: the level was proven by `isa`; the last of the 8 columns ends within `levels`, as was asserted.
            unsafe {
                turn_square(
                    levels.as_ptr().add(lane * distance + row),
                    distance,
                    &mut tile[row..row + 8],
                    lane,
                )
            };
        }
        for l in lane..lane + 8 {
            for row in whole..n {
                tile[row][l] = levels[l * distance + row];
            }
        }
    }
    lanes
}

/// # Safety
/// 8 values can be read from `from` and from each `distance` behind it, seven times.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn turn_square(from: *const i16, distance: usize, rows: &mut [[i16; LANES_MAX]], lane: usize) {
    let mut c = [_mm_setzero_si128(); 8];
    for (l, c) in c.iter_mut().enumerate() {
        // SAFETY: by the caller.
        *c = unsafe { _mm_loadu_si128(from.add(l * distance).cast()) };
    }
    for _ in 0..3 {
        c = [
            _mm_unpacklo_epi16(c[0], c[4]),
            _mm_unpackhi_epi16(c[0], c[4]),
            _mm_unpacklo_epi16(c[1], c[5]),
            _mm_unpackhi_epi16(c[1], c[5]),
            _mm_unpacklo_epi16(c[2], c[6]),
            _mm_unpackhi_epi16(c[2], c[6]),
            _mm_unpacklo_epi16(c[3], c[7]),
            _mm_unpackhi_epi16(c[3], c[7]),
        ];
    }
    for (row, c) in rows.iter_mut().zip(c) {
        let to: &mut [i16] = &mut row[lane..lane + 8];
        // SAFETY: 8 values of two bytes.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), c) };
    }
}
