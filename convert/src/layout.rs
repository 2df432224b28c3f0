//! Moves between layouts: the same numbers in another order, never rounded. Each move has its inverse.
//!
//! They work on bytes, so that packed levels, scales and plain numbers move alike; an element is whatever the
//! caller says it is. Lengths are checked, a slice that does not fit gives an error, not a panic.

use moepack_format::{Error, Result};

use crate::family::Split;

/// Square of elements that is moved at once, so that reads and writes of a transposition both stay in cache.
const TILE: usize = 32;

/// Two matrices that share their rows, as two planes; `row_bytes` is the length of one row.
///
/// # Errors
/// A plane that is not an even number of rows.
pub fn split_rows(plane: &[u8], row_bytes: usize, split: Split) -> Result<[Vec<u8>; 2]> {
    let n_rows = rows_of(plane, row_bytes)?;
    if !n_rows.is_multiple_of(2) {
        return Err(Error::bad_data(format!("{n_rows} rows do not hold two matrices")));
    }
    match split {
        Split::Halves => {
            let (a, b) = plane.split_at(plane.len() / 2);
            Ok([a.to_vec(), b.to_vec()])
        }
        Split::Interleaved => {
            let half = plane.len() / 2;
            let (mut a, mut b) = (Vec::with_capacity(half), Vec::with_capacity(half));
            for pair in plane.chunks_exact(row_bytes * 2) {
                let (even, odd) = pair.split_at(row_bytes);
                a.extend_from_slice(even);
                b.extend_from_slice(odd);
            }
            Ok([a, b])
        }
    }
}

/// The inverse of [`split_rows`].
///
/// # Errors
/// Planes of different lengths, or not of whole rows.
pub fn join_rows(a: &[u8], b: &[u8], row_bytes: usize, split: Split) -> Result<Vec<u8>> {
    if a.len() != b.len() {
        return Err(Error::bad_data(format!("planes of {} and {} bytes do not pair", a.len(), b.len())));
    }
    rows_of(a, row_bytes)?;
    match split {
        Split::Halves => Ok([a, b].concat()),
        Split::Interleaved => {
            let pairs = a.chunks_exact(row_bytes).zip(b.chunks_exact(row_bytes));
            Ok(pairs.flat_map(|(a, b)| [a, b]).flatten().copied().collect())
        }
    }
}

/// `[rows, cols]` as `[cols, rows]`, elements of `element_bytes`. Its inverse is itself with rows and columns
/// swapped.
///
/// # Errors
/// A plane of another length.
pub fn transpose(plane: &[u8], rows: usize, cols: usize, element_bytes: usize) -> Result<Vec<u8>> {
    transpose_columns(plane, [rows, cols], element_bytes, Columns { first: 0, step: 1, n: cols })
}

/// Which columns to take: `first`, `first + step`, … `n` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    /// The first.
    pub first: usize,
    /// From one to the next.
    pub step: usize,
    /// How many.
    pub n: usize,
}

impl Columns {
    /// The columns of the first (`which` = 0) or second of two matrices that share `cols` columns.
    pub fn half(split: Split, which: usize, cols: usize) -> Columns {
        let n = cols / 2;
        match split {
            Split::Halves => Columns { first: which * n, step: 1, n },
            Split::Interleaved => Columns { first: which, step: 2, n },
        }
    }
}

/// Some columns of a `[rows, cols]` plane as the rows of a new one, `[columns.n, rows]`: what [`transpose`]
/// and [`split_rows`] would give one after the other, in one pass.
///
/// # Errors
/// A plane of another length, or columns beyond it.
pub fn transpose_columns(
    plane: &[u8],
    [rows, cols]: [usize; 2],
    element_bytes: usize,
    columns: Columns,
) -> Result<Vec<u8>> {
    let Columns { first, step, n } = columns;
    let last = n.checked_sub(1).and_then(|n| n.checked_mul(step)?.checked_add(first));
    if last.is_some_and(|last| last >= cols) || rows_of(plane, cols * element_bytes)? != rows {
        let what = format!("{} bytes are no [{rows}, {cols}] of {element_bytes} bytes each", plane.len());
        return Err(Error::bad_data(what));
    }
    match element_bytes {
        1 => Ok(transpose_elements::<1>(plane, cols, rows, columns)),
        2 => Ok(transpose_elements::<2>(plane, cols, rows, columns)),
        4 => Ok(transpose_elements::<4>(plane, cols, rows, columns)),
        other => Err(Error::bad_data(format!("elements of {other} bytes cannot be transposed"))),
    }
}

/// Tile by tile; the lengths have been checked, so every element is found.
fn transpose_elements<const B: usize>(plane: &[u8], cols: usize, rows: usize, columns: Columns) -> Vec<u8> {
    let source = plane.as_chunks::<B>().0;
    let mut out = vec![0; columns.n * rows * B];
    let target = out.as_chunks_mut::<B>().0;
    for row_tile in (0..rows).step_by(TILE) {
        for col_tile in (0..columns.n).step_by(TILE) {
            for c in col_tile..(col_tile + TILE).min(columns.n) {
                let from =
                    source.iter().skip(row_tile * cols + columns.first + c * columns.step).step_by(cols);
                let to = target.iter_mut().skip(c * rows + row_tile);
                for (to, from) in to.zip(from).take(TILE.min(rows - row_tile)) {
                    *to = *from;
                }
            }
        }
    }
    out
}

fn rows_of(plane: &[u8], row_bytes: usize) -> Result<usize> {
    if row_bytes > 0 && plane.len().is_multiple_of(row_bytes) {
        return Ok(plane.len() / row_bytes);
    }
    Err(Error::bad_data(format!("{} bytes are not whole rows of {row_bytes}", plane.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that differ from their neighbours, from a small generator.
    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        let next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    #[test]
    fn splitting_and_joining_are_inverse() {
        for (seed, split) in (0..200).zip([Split::Halves, Split::Interleaved].into_iter().cycle()) {
            let (rows, row_bytes) = (2 * (seed as usize % 7 + 1), seed as usize % 13 + 1);
            let plane = noise(rows * row_bytes, seed);
            let [a, b] = split_rows(&plane, row_bytes, split).unwrap();
            assert_eq!(join_rows(&a, &b, row_bytes, split).unwrap(), plane, "{split:?} {rows} {row_bytes}");
        }
    }

    #[test]
    fn interleaved_rows_come_apart_as_even_and_odd() {
        let [gate, up] = split_rows(b"aaAAbbBBccCC", 2, Split::Interleaved).unwrap();
        assert_eq!((&gate[..], &up[..]), (&b"aabbcc"[..], &b"AABBCC"[..]));
        let [gate, up] = split_rows(b"aabbccAABBCC", 2, Split::Halves).unwrap();
        assert_eq!((&gate[..], &up[..]), (&b"aabbcc"[..], &b"AABBCC"[..]));
    }

    #[test]
    fn transposing_twice_gives_the_same() {
        for seed in 0..120u64 {
            let (rows, cols) = (seed as usize % 71 + 1, seed as usize * 7 % 67 + 1);
            let bytes = [1, 2, 4][seed as usize % 3];
            let plane = noise(rows * cols * bytes, seed);
            let there = transpose(&plane, rows, cols, bytes).unwrap();
            for (r, c) in [(0, 0), (rows - 1, 0), (rows - 1, cols - 1), (rows / 2, cols / 2)] {
                let (from, to) = ((r * cols + c) * bytes, (c * rows + r) * bytes);
                assert_eq!(
                    plane[from..from + bytes],
                    there[to..to + bytes],
                    "{rows}x{cols}x{bytes} at {r} {c}"
                );
            }
            assert_eq!(transpose(&there, cols, rows, bytes).unwrap(), plane, "{rows}x{cols}x{bytes}");
        }
    }

    #[test]
    fn one_pass_equals_transposing_then_splitting() {
        for (seed, split) in (0..60).zip([Split::Halves, Split::Interleaved].into_iter().cycle()) {
            let (rows, half) = (seed as usize % 37 + 1, seed as usize % 41 + 1);
            let (cols, bytes) = (half * 2, [2, 4][seed as usize % 2]);
            let plane = noise(rows * cols * bytes, seed);
            let turned = transpose(&plane, rows, cols, bytes).unwrap();
            let both = split_rows(&turned, rows * bytes, split).unwrap();
            for (which, expected) in both.iter().enumerate() {
                let columns = Columns::half(split, which, cols);
                let got = transpose_columns(&plane, [rows, cols], bytes, columns).unwrap();
                assert_eq!(got, *expected, "{split:?} {rows} {cols} {which}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(split_rows(b"abc", 1, Split::Halves).is_err());
        assert!(split_rows(b"abc", 2, Split::Halves).is_err());
        assert!(split_rows(b"", 0, Split::Halves).is_err());
        assert!(join_rows(b"ab", b"abc", 1, Split::Halves).is_err());
        assert!(transpose(b"abc", 2, 2, 1).is_err());
        let beyond = Columns { first: 1, step: 2, n: 2 };
        assert!(transpose_columns(b"abcdef", [2, 3], 1, beyond).is_err());
    }
}
