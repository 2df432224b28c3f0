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

use super::rans::{Encoder, LANES_MAX, START, damaged, step};
use super::tables::{self, ESCAPES, SLOTS, SYMBOL_OF_ZERO, SYMBOLS, Symbol, TABLES};
use super::trellis::Trellis;
use crate::isa::Isa;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

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

/// The stream of rows `rows` of `levels`, `[cols][n_rows]`, and the numbers in it that have no symbol, each with its place
/// (row · cols + col).
pub fn encode(
    side: &Side,
    levels: &[i16],
    n_rows: usize,
    rows: std::ops::Range<usize>,
) -> (Vec<u8>, Vec<(usize, i32)>) {
    let (cols, symbols) = (side.classes.len(), tables::symbols());
    let mut encoder = Encoder::new(side.lanes);
    let mut exceptions = Vec::new();
    let mut turned = [[0i16; LANES_MAX]; ROWS_TURNED];
    for first in (0..cols).step_by(side.lanes).rev() {
        let classes = &side.classes[first..cols.min(first + side.lanes)];
        for start in rows.clone().step_by(ROWS_TURNED).rev() {
            let n = ROWS_TURNED.min(rows.end - start);
            for lane in 0..classes.len() {
                let column = &levels[(first + lane) * n_rows + start..][..n];
                turned.iter_mut().zip(column).for_each(|(row, &level)| row[lane] = level);
            }
            for (row, turned) in turned.iter().enumerate().take(n).rev() {
                let row_class = side.row_classes[start + row];
                for (lane, &class) in classes.iter().enumerate().rev() {
                    let level = i32::from(turned[lane]);
                    let of_parity = (table_of(class, row_class) * 2 + (level & 1) as usize) * SYMBOLS;
                    let mut symbol = tables::symbol(level).map_or(&Symbol::NONE, |s| &symbols[of_parity + s]);
                    if symbol.freq == 0 {
                        exceptions.push(((start + row) * cols + first + lane, level));
                        symbol = &symbols[of_parity + ESCAPES[(level >> 1 & 1) as usize]];
                    }
                    encoder.put(lane, symbol);
                }
            }
        }
    }
    (encoder.finish(), exceptions)
}

/// Rows that are turned at a time: a tile that stays in the cache.
const ROWS_TURNED: usize = 64;

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
