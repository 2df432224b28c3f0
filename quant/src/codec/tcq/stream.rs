//! The stream of one row segment: all its numbers, `lanes` columns side by side, decoded to floats.
//!
//! ```text
//!  for each group of `lanes` columns, left to right
//!      every lane's trellis starts in state 0
//!      for each row of the segment, downwards
//!          for each lane, left to right:  a symbol, unless its column is beyond the last
//! ```
//!
//! Lane `l` of the entropy coder decodes column `l` of every group. So the outputs of a step are neighbours in a row.

use moepack_format::Result;

use super::rans::{LANES_MAX, START, damaged, step};
use super::tables::{self, SLOTS, SYMBOL_OF_ZERO, TABLES};
use super::trellis::Trellis;
use crate::isa::Isa;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod writer;

pub use writer::encode;

/// Fewest lanes: a register of AVX2.
pub const LANES_MIN: usize = 8;

/// What decoder and encoder know of a matrix before they see its numbers.
#[derive(Debug)]
pub struct Side {
    /// Lanes of every stream: a power of two from [`LANES_MIN`] to [`LANES_MAX`].
    pub lanes: usize,
    /// What a number of each column is multiplied by. `[cols]`
    pub steps: Vec<f32>,
    /// Table of each column, before the row's class is added; never negative. `[cols]`
    pub classes: Vec<i32>,
    /// What each row adds to the table. `[rows]`
    pub row_classes: Vec<i32>,
}

/// The table of a column's class and a row's.
#[inline(always)]
pub fn table_of(class: i32, row_class: i32) -> usize {
    (class + row_class).clamp(0, TABLES as i32 - 1) as usize
}

/// Decodes the stream of the rows `first_row ..` into `out`, `[rows][cols]`.
///
/// # Errors
/// A stream that no encoder wrote.
pub fn decode(
    isa: Isa,
    trellis: Trellis,
    side: &Side,
    first_row: usize,
    bytes: &[u8],
    out: &mut [f32],
) -> Result<()> {
    let (states, words) =
        bytes.split_at_checked(4 * side.lanes).ok_or_else(|| damaged("a stream without states"))?;
    let mut state = [START; LANES_MAX];
    for (state, bytes) in state.iter_mut().zip(states.as_chunks::<4>().0) {
        *state = u32::from_le_bytes(*bytes);
    }
    // Kernels read a register of words at once, wanted or not.
    let mut padded = Vec::with_capacity(words.len() + 4 * LANES_MAX);
    padded.extend_from_slice(words);
    padded.resize(words.len() + 4 * LANES_MAX, 0);
    let n_rows = out.len() / side.classes.len().max(1);
    let row_classes = side.row_classes.get(first_row..first_row + n_rows).unwrap_or_default();
    let mut job = Job { trellis, side, row_classes, words: &padded, n_bytes: words.len(), at: 0, state, out };
    let whole = job.run(isa);
    let lanes = job.state.get(..side.lanes).unwrap_or_default();
    if whole && job.at == job.n_bytes && lanes.iter().all(|&s| s == START) {
        return Ok(());
    }
    Err(damaged("a stream that does not end where it should"))
}

/// A stream being decoded.
struct Job<'a> {
    trellis: Trellis,
    side: &'a Side,
    row_classes: &'a [i32],
    /// Words, and [`LANES_MAX`] more.
    words: &'a [u8],
    n_bytes: usize,
    /// Byte of the next word; at most `n_bytes` between rows.
    at: usize,
    state: [u32; LANES_MAX],
    /// `[rows][cols]`
    out: &'a mut [f32],
}

impl Job<'_> {
    /// Decodes everything; false if the words ended early.
    fn run(&mut self, isa: Isa) -> bool {
        let cols = self.side.classes.len();
        (0..cols).step_by(self.side.lanes).all(|first| {
            #[cfg(target_arch = "x86_64")]
            {
                if isa.has_avx512() && self.side.lanes >= 16 {
                    return avx512::group(isa, self, first);
                }
                if isa.has_avx2() {
                    return avx2::group(isa, self, first);
                }
            }
            let _ = isa;
            self.group(first)
        })
    }

    /// One group of columns.
    fn group(&mut self, first: usize) -> bool {
        let (side, cols) = (self.side, self.side.classes.len());
        let n = side.lanes.min(cols - first);
        let mut place = [0u16; LANES_MAX];
        let slots = tables::slots();
        for (row, &row_class) in self.row_classes.iter().enumerate() {
            for l in 0..n {
                let odd = u32::from(place[l] & 1);
                let table = table_of(side.classes[first + l], row_class) * 2 + odd as usize;
                let entry = slots[table * SLOTS + (self.state[l] as usize & (SLOTS - 1))];
                let mut x = step(self.state[l], entry);
                if x < START {
                    let word = [self.words[self.at], self.words[self.at + 1]];
                    x = x << 16 | u32::from(u16::from_le_bytes(word));
                    self.at += 2;
                }
                self.state[l] = x;
                let level = 2 * ((entry >> 24) as i32 - SYMBOL_OF_ZERO) + odd as i32;
                self.out[row * cols + first + l] = level as f32 * side.steps[first + l];
                place[l] = self.trellis.next(place[l], level);
            }
            if self.at > self.n_bytes {
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of a path that the trellis allows in each column. `[cols][rows]`
    fn levels(trellis: Trellis, rows: usize, cols: usize) -> Vec<i16> {
        let mut seed = (rows * 1000 + cols) as u32;
        let mut levels = Vec::new();
        for _ in 0..cols {
            let mut state = 0;
            for _ in 0..rows {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let level = 2 * ((seed >> 29) as i32 - 4) + i32::from(state & 1);
                state = trellis.next(state, level);
                levels.push(level as i16);
            }
        }
        levels
    }

    fn side(lanes: usize, rows: usize, cols: usize) -> Side {
        Side {
            lanes,
            steps: (0..cols).map(|c| 0.01 * (c as f32 + 1.0)).collect(),
            classes: (0..cols).map(|c| (c * 5 % (TABLES + 9)) as i32).collect(),
            row_classes: (0..rows).map(|r| (r % 7) as i32 - 3).collect(),
        }
    }

    /// Calls `check` with streams of every number of lanes: a single group, full ones, and a last one of few columns.
    fn for_all(check: impl Fn(&str, Trellis, &Side, &[i16], usize)) {
        let trellises = [8, 64, 256].map(|states| Trellis::of(states).unwrap());
        for lanes in [8, 16, 32, 64] {
            for cols in [1, lanes - 3, lanes, lanes + 17, 3 * lanes + 1] {
                for (rows, trellis) in [1, 29, 150].into_iter().zip(trellises) {
                    let what = format!("{lanes} lanes, [{rows}, {cols}], {} states", trellis.states);
                    check(&what, trellis, &side(lanes, rows, cols), &levels(trellis, rows, cols), rows);
                }
            }
        }
    }

    #[test]
    fn every_level_writes_the_same() {
        for_all(|what, _, side, levels, rows| {
            let mut levels = levels.to_vec();
            // Numbers without a symbol, in one table or in any.
            levels.iter_mut().step_by(37).for_each(|l| *l += 40);
            levels.iter_mut().step_by(97).for_each(|l| *l -= 700);
            for rows in [0..rows, rows / 2..rows] {
                let expected =
                    encode(Isa::SCALAR, side, &levels, levels.len() / side.classes.len(), rows.clone());
                assert!(!expected.1.is_empty() || levels.len() < 37, "{what}");
                for isa in Isa::available() {
                    let found = encode(isa, side, &levels, levels.len() / side.classes.len(), rows.clone());
                    assert!(found == expected, "{what}, {}", isa.name());
                }
            }
        });
    }

    #[test]
    fn every_level_decodes_what_was_encoded() {
        for_all(|what, trellis, side, levels, rows| {
            let cols = side.classes.len();
            let (bytes, exceptions) = encode(Isa::get(), side, levels, rows, 0..rows);
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; rows * cols];
                decode(isa, trellis, side, 0, &bytes, &mut out).unwrap();
                for (i, &found) in out.iter().enumerate() {
                    let (row, col) = (i / cols, i % cols);
                    let expected = f32::from(levels[col * rows + row]) * side.steps[col];
                    let excepted = exceptions.iter().any(|&(place, _)| place == i);
                    assert!(
                        excepted || found == expected,
                        "{what}, {}: {found} instead of {expected} in [{row}, {col}]",
                        isa.name()
                    );
                }
            }
        });
    }

    #[test]
    fn damaged_streams_decode_alike_at_every_level() {
        for_all(|what, trellis, side, levels, rows| {
            let (mut bytes, _) = encode(Isa::get(), side, levels, rows, 0..rows);
            for i in (0..bytes.len()).step_by(bytes.len() / 5 + 1) {
                bytes[i] ^= 0x5a;
                let decoded = |isa| {
                    let mut out = vec![f32::NAN; rows * side.classes.len()];
                    let whole = decode(isa, trellis, side, 0, &bytes, &mut out).is_ok();
                    (whole, out.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
                };
                let expected = decoded(Isa::SCALAR);
                for isa in Isa::available() {
                    let found = decoded(isa);
                    assert_eq!(found.0, expected.0, "{what}, byte {i}, {}", isa.name());
                    assert!(!found.0 || found.1 == expected.1, "{what}, byte {i}, {}", isa.name());
                }
            }
        });
    }
}
