//! Writing the stream of a row segment: the last symbol first, since a rANS encoder works backwards.

use super::{LANES_MAX, START, Side, table_of};
use crate::codec::tcq::tables::{self, ESCAPES, PROB_BITS, SYMBOLS, Symbol};
use crate::isa::Isa;

#[cfg(target_arch = "x86_64")]
mod avx2;

/// Rows that are turned at a time: a tile that stays in the cache.
const ROWS_TURNED: usize = 64;

/// Numbers of some rows, lane by lane.
type Tile = [[i16; LANES_MAX]; ROWS_TURNED];

/// The stream of rows `rows` of `levels`, `[cols][n_rows]`, and the numbers in it that have no symbol, each with its place
/// (row · cols + col).
pub fn encode(
    isa: Isa,
    side: &Side,
    levels: &[i16],
    n_rows: usize,
    rows: std::ops::Range<usize>,
) -> (Vec<u8>, Vec<(usize, i32)>) {
    let cols = side.classes.len();
    let mut pen = Pen::new(cols * rows.len());
    let mut exceptions = Vec::new();
    let mut tile = [[0; LANES_MAX]; ROWS_TURNED];
    for first in (0..cols).step_by(side.lanes).rev() {
        let classes = &side.classes[first..cols.min(first + side.lanes)];
        for start in rows.clone().step_by(ROWS_TURNED).rev() {
            let n = ROWS_TURNED.min(rows.end - start);
            turn(isa, &levels[first * n_rows + start..], n_rows, classes.len(), n, &mut tile);
            let row_classes = &side.row_classes[start..start + n];
            let mut excepted = |row: usize, lane: usize, level| {
                exceptions.push(((start + row) * cols + first + lane, level));
            };
            put_rows(isa, &mut pen, &tile, row_classes, classes, &mut excepted);
        }
    }
    (pen.finish(side.lanes), exceptions)
}

/// States, and words from the last one on.
struct Pen {
    states: [u32; LANES_MAX],
    /// As many as there are symbols, since each leaves one at most, behind [`LANES_MAX`] that a register may touch.
    words: Vec<u16>,
    /// The first of those written so far.
    at: usize,
}

impl Pen {
    fn new(symbols: usize) -> Pen {
        // Zeros that nobody touches take no memory.
        let n = symbols + LANES_MAX;
        Pen { states: [START; LANES_MAX], words: vec![0; n], at: n }
    }

    /// Encodes a symbol that is there.
    #[inline(always)]
    fn put(&mut self, lane: usize, symbol: Symbol) {
        let x = self.states[lane];
        let full = x >> (32 - PROB_BITS) >= u32::from(symbol.freq);
        self.at -= usize::from(full);
        if full {
            self.words[self.at] = x as u16;
        }
        self.states[lane] = symbol.state_after(if full { x >> 16 } else { x });
    }

    /// The states of `lanes` lanes, then the words, little-endian.
    fn finish(self, lanes: usize) -> Vec<u8> {
        let states = self.states.iter().take(lanes).flat_map(|s| s.to_le_bytes());
        let words = self.words[self.at..].iter().flat_map(|w| w.to_le_bytes());
        let mut bytes = Vec::with_capacity(4 * lanes + 2 * (self.words.len() - self.at));
        bytes.extend(states);
        bytes.extend(words);
        bytes
    }
}

/// Turns `n` rows of `lanes` columns that lie `distance` apart.
fn turn(isa: Isa, levels: &[i16], distance: usize, lanes: usize, n: usize, tile: &mut Tile) {
    let mut first = 0;
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        first = avx2::turn(isa, levels, distance, lanes, n, tile);
    }
    let _ = isa;
    for lane in first..lanes {
        let column = &levels[lane * distance..][..n];
        tile.iter_mut().zip(column).for_each(|(row, &level)| row[lane] = level);
    }
}

/// Encodes rows of a tile, the last first.
fn put_rows(
    isa: Isa,
    pen: &mut Pen,
    tile: &Tile,
    row_classes: &[i32],
    classes: &[i32],
    excepted: &mut dyn FnMut(usize, usize, i32),
) {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        return avx2::put_rows(isa, pen, tile, row_classes, classes, excepted);
    }
    let _ = isa;
    for (row, (levels, &row_class)) in tile.iter().zip(row_classes).enumerate().rev() {
        for (lane, (&level, &class)) in levels.iter().zip(classes).enumerate().rev() {
            let (symbol, known) = symbol_of(level.into(), table_of(class, row_class));
            if !known {
                excepted(row, lane, level.into());
            }
            pen.put(lane, symbol);
        }
    }
}

/// The symbol of a number in a table, or the escape that stands for it, and whether it has one of its own.
#[inline(always)]
fn symbol_of(level: i32, table: usize) -> (Symbol, bool) {
    let of_parity = (table * 2 + (level & 1) as usize) * SYMBOLS;
    let symbols = tables::symbols();
    match tables::symbol(level).map(|s| symbols[of_parity + s]) {
        Some(symbol) if symbol.freq > 0 => (symbol, true),
        _ => (symbols[of_parity + ESCAPES[(level >> 1 & 1) as usize]], false),
    }
}
