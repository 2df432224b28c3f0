//! The bytes of a coded matrix around its streams: header, side information, exceptions. See `tcq.rs` for the picture.

use std::ops::Range;

use moepack_format::Result;

use super::rans::{Decoder, Encoder, LANES_MAX, damaged};
use super::stream::{LANES_MIN, Side};
use super::tables::{self, SYMBOL_OF_ZERO, SYMBOLS, TABLES};

/// Rows of a segment at most.
pub const SEGMENT_ROWS: usize = 2048;
/// Bytes of the header in front of the lengths of streams.
pub const HEADER_BYTES: usize = 19;
/// The largest value of side information, either way: the widest table has a symbol for it.
pub const SIDE_MAX: i32 = 120;
/// Rows below which steps and tables of single columns would take more than they give.
pub const ROWS_OF_STEPS: usize = 32;
/// Weights a lane of the entropy coder has at least, so that its state costs next to nothing.
const WEIGHTS_A_LANE: usize = 8192;
/// Fractions of an octave that a step's unit counts.
pub const STEP_OCTAVE: f64 = 16.0;

/// Segments of a matrix: as equal as can be, at most [`SEGMENT_ROWS`] each.
pub fn segments(rows: usize) -> impl ExactSizeIterator<Item = Range<usize>> + DoubleEndedIterator {
    let n = rows.div_ceil(SEGMENT_ROWS).max(1);
    let each = rows.div_ceil(n);
    (0..n).map(move |i| (i * each).min(rows)..((i + 1) * each).min(rows))
}

/// Side information as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// log2 of the lanes.
    pub lanes_log2: u8,
    /// Unit of the columns' steps, in 1/16 octave.
    pub step_unit: u8,
    /// Unit of classes, in tables.
    pub class_unit: u8,
    /// Table of columns of class 0.
    pub class_base: u8,
    /// Step of columns with step value 0.
    pub scale: f32,
    /// `[cols]`
    pub steps: Vec<i8>,
    /// `[cols]`
    pub classes: Vec<i8>,
    /// `[rows]`
    pub rows: Vec<i8>,
}

/// A coded matrix taken apart.
#[derive(Debug)]
pub struct Parts<'a> {
    /// Side information, ready to be used.
    pub side: Side,
    /// Place (row · cols + col) and number of every exception, ascending.
    pub exceptions: Vec<(usize, i32)>,
    /// One for each segment.
    pub streams: Vec<&'a [u8]>,
}

impl Stored {
    /// Ready to be used.
    ///
    /// # Errors
    /// Values that no encoder writes.
    pub fn side(&self) -> Result<Side> {
        let lanes = 1usize.checked_shl(self.lanes_log2.into()).unwrap_or(0);
        let units = matches!(self.step_unit, 1 | 2 | 4) && matches!(self.class_unit, 1 | 2);
        let tables = usize::from(self.class_base) < TABLES;
        let scale = self.scale.is_normal() && self.scale > 0.0;
        if !((LANES_MIN..=LANES_MAX).contains(&lanes) && units && tables && scale) {
            return Err(damaged("an impossible header"));
        }
        let unit = i32::from(self.class_unit);
        let class = |&v: &i8| (i32::from(self.class_base) + i32::from(v) * unit).clamp(0, TABLES as i32 - 1);
        Ok(Side {
            lanes,
            steps: self.steps.iter().map(|&v| step(self.scale, self.step_unit, v)).collect(),
            classes: self.classes.iter().map(class).collect(),
            row_classes: self.rows.iter().map(|&v| i32::from(v) * unit).collect(),
        })
    }

    /// Header and side information, exceptions, streams.
    pub fn assemble(&self, exceptions: &[(usize, i32)], streams: &[Vec<u8>]) -> Vec<u8> {
        let lists = [&self.steps, &self.classes, &self.rows];
        let chosen = lists.map(|list| best_table(list));
        let mut encoder = Encoder::new();
        for (list, q) in lists.iter().zip(chosen).rev() {
            let symbols = &tables::symbols()[usize::from(q) * 2 * SYMBOLS..];
            list.iter().rev().for_each(|&v| encoder.put(symbols[(i32::from(v) + SYMBOL_OF_ZERO) as usize]));
        }
        let side = encoder.finish();
        let exceptions = exception_bytes(exceptions);
        let mut out = vec![self.lanes_log2, self.step_unit, self.class_unit, self.class_base];
        out.extend(self.scale.to_le_bytes());
        out.extend(chosen);
        out.extend((side.len() as u32).to_le_bytes());
        out.extend((exceptions.len() as u32).to_le_bytes());
        streams.iter().for_each(|s| out.extend((s.len() as u32).to_le_bytes()));
        out.extend(side);
        out.extend(exceptions);
        streams.iter().for_each(|s| out.extend(s));
        out
    }
}

/// A column's step: `scale · 2^(value · unit / 16)`, the power being an exact scaling of one of sixteen rounded roots.
pub fn step(scale: f32, unit: u8, value: i8) -> f32 {
    /// `2^(i / 16)`.
    const ROOTS: [f32; 16] = [
        1.0,
        1.044_273_8,
        1.090_507_7,
        1.138_788_6,
        1.189_207_1,
        1.241_857_8,
        1.296_839_6,
        1.354_255_5,
        std::f32::consts::SQRT_2,
        1.476_826_1,
        1.542_210_8,
        1.610_490_3,
        1.681_792_9,
        1.756_252_2,
        1.834_008,
        1.915_206_6,
    ];
    let sixteenths = i32::from(value) * i32::from(unit);
    let power = f32::from_bits(((127 + sixteenths.div_euclid(16)) as u32) << 23);
    scale * ROOTS[sixteenths.rem_euclid(16) as usize] * power
}

/// The table by whose even numbers a list takes the fewest bits: value `v` is the number `2v`. Values that the table lacks rule it out.
pub fn best_table(list: &[i8]) -> u8 {
    let mut histogram = [0u32; 256];
    list.iter().for_each(|&v| histogram[(i32::from(v) + SYMBOL_OF_ZERO) as usize] += 1);
    let there: Vec<(usize, u32)> = histogram.into_iter().enumerate().filter(|(_, n)| *n > 0).collect();
    let cost = |q: usize| {
        let parity = &tables::tables()[q].parity[0];
        let of = |&(s, n): &(usize, u32)| match parity.freq[s] {
            0 => f64::INFINITY,
            _ => f64::from(n) * f64::from(parity.bits[s]),
        };
        there.iter().map(of).sum::<f64>()
    };
    let best = (0..TABLES).map(|q| (cost(q), q)).min_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or(TABLES as u8 - 1, |(_, q)| q as u8)
}

/// Bits of a list in side information, if `list` is typical of one of length `n`.
pub fn list_bits(list: &[i8], n: usize) -> f64 {
    if list.is_empty() {
        return 0.0;
    }
    let parity = &tables::tables()[usize::from(best_table(list))].parity[0];
    let bits: f32 = list.iter().map(|&v| parity.bits[(i32::from(v) + SYMBOL_OF_ZERO) as usize]).sum();
    f64::from(bits) * n as f64 / list.len() as f64
}

/// Bytes in which any matrix of this shape can be coded, if only as zeros.
pub fn least_bytes(rows: usize, cols: usize) -> u64 {
    let (weights, n_segments) = (rows * cols, segments(rows).len());
    let fixed = HEADER_BYTES + 4 + n_segments * (4 + 4 * lanes(weights));
    // Zeros take 1/400 bit, values of side information at most a byte or so; a few rows are not worth the trouble.
    let numbers = if rows < ROWS_OF_STEPS { weights } else { weights / 512 };
    (fixed + 2 * cols + rows + numbers + 8) as u64
}

/// Lanes of the entropy coder for so many weights.
pub fn lanes(weights: usize) -> usize {
    (weights / WEIGHTS_A_LANE).clamp(1, LANES_MAX).next_power_of_two().clamp(LANES_MIN, LANES_MAX)
}

/// Sixteenths of an octave that a unit of the steps counts. Finer steps fit better, and take more bits a column; where all columns
/// cost alike, they take next to none.
pub fn step_unit(rows: usize, cost: &[f32]) -> u8 {
    let alike = cost.windows(2).all(|w| w[0] == w[1]);
    if alike || rows >= 4096 {
        1
    } else if rows >= 1024 {
        2
    } else {
        4
    }
}

/// Takes a matrix apart.
///
/// # Errors
/// Bytes that no encoder wrote.
pub fn parse(bytes: &[u8], rows: usize, cols: usize) -> Result<Parts<'_>> {
    let (header, rest) =
        bytes.split_first_chunk::<HEADER_BYTES>().ok_or_else(|| damaged("a header cut short"))?;
    let &[
        lanes_log2,
        step_unit,
        class_unit,
        class_base,
        s0,
        s1,
        s2,
        s3,
        q_step,
        q_class,
        q_row,
        ref lengths @ ..,
    ] = header;
    let word = |at: usize| {
        lengths.get(at..at + 4).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b) as usize)
    };
    let (side_bytes, exception_bytes) = (word(0), word(4));
    let n_segments = segments(rows).len();
    let (lengths, rest) =
        rest.split_at_checked(4 * n_segments).ok_or_else(|| damaged("lengths cut short"))?;
    let (side, rest) =
        rest.split_at_checked(side_bytes).ok_or_else(|| damaged("side information cut short"))?;
    let (exceptions, mut rest) =
        rest.split_at_checked(exception_bytes).ok_or_else(|| damaged("exceptions cut short"))?;
    let mut decoder = Decoder::new(side)?;
    let mut list = |q: u8, n: usize| -> Result<Vec<i8>> {
        // Every value takes bits, but they can be few: 2^-12 or so a value.
        (0..n).map(|_| decoder.next(q).map(|symbol| (i32::from(symbol) - SYMBOL_OF_ZERO) as i8)).collect()
    };
    let (steps, classes, row_values) = (list(q_step, cols)?, list(q_class, cols)?, list(q_row, rows)?);
    decoder.finish()?;
    let scale = f32::from_le_bytes([s0, s1, s2, s3]);
    let stored =
        Stored { lanes_log2, step_unit, class_unit, class_base, scale, steps, classes, rows: row_values };
    let mut streams = Vec::with_capacity(n_segments);
    for length in lengths.as_chunks::<4>().0 {
        let (stream, more) = rest
            .split_at_checked(u32::from_le_bytes(*length) as usize)
            .ok_or_else(|| damaged("a stream cut short"))?;
        streams.push(stream);
        rest = more;
    }
    if !rest.is_empty() {
        return Err(damaged("bytes behind the last stream"));
    }
    let exceptions = parse_exceptions(exceptions, rows.saturating_mul(cols))?;
    Ok(Parts { side: stored.side()?, exceptions, streams })
}

/// Each exception: how far behind the place after the one before, then the number zigzag, both as LEB128.
fn exception_bytes(exceptions: &[(usize, i32)]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut next = 0;
    for &(place, level) in exceptions {
        put_varint(&mut out, (place - next) as u64);
        put_varint(&mut out, u64::from((level << 1 ^ level >> 31) as u32));
        next = place + 1;
    }
    out
}

fn parse_exceptions(mut bytes: &[u8], n: usize) -> Result<Vec<(usize, i32)>> {
    let mut all = Vec::new();
    let mut next = 0usize;
    while !bytes.is_empty() {
        let distance = take_varint(&mut bytes)?;
        let place = usize::try_from(distance).ok().and_then(|d| next.checked_add(d)).filter(|&p| p < n);
        let place = place.ok_or_else(|| damaged("an exception beyond the matrix"))?;
        let zigzag =
            u32::try_from(take_varint(&mut bytes)?).map_err(|_| damaged("an impossible exception"))?;
        all.push((place, (zigzag >> 1) as i32 ^ -((zigzag & 1) as i32)));
        next = place + 1;
    }
    Ok(all)
}

fn put_varint(out: &mut Vec<u8>, mut v: u64) {
    while v > 127 {
        out.push(v as u8 | 128);
        v >>= 7;
    }
    out.push(v as u8);
}

fn take_varint(bytes: &mut &[u8]) -> Result<u64> {
    let mut v = 0;
    for shift in (0..63).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or_else(|| damaged("an exception cut short"))?;
        *bytes = rest;
        v |= u64::from(byte & 127) << shift;
        if byte & 128 == 0 {
            return Ok(v);
        }
    }
    Err(damaged("an endless number in an exception"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored() -> Stored {
        Stored {
            lanes_log2: 3,
            step_unit: 4,
            class_unit: 2,
            class_base: 30,
            scale: 0.01,
            steps: vec![0, 1, -3, 4, 120],
            classes: vec![0, 0, 0, 1, -1],
            rows: vec![2, -2, 0],
        }
    }

    #[test]
    fn what_is_assembled_comes_apart() {
        let (stored, exceptions) = (stored(), vec![(0, -256), (1, 7), (14, i32::MAX)]);
        let bytes = stored.assemble(&exceptions, &[vec![1, 2, 3]]);
        let parts = parse(&bytes, 3, 5).unwrap();
        assert_eq!((parts.exceptions, parts.streams), (exceptions, vec![&[1, 2, 3][..]]));
        assert_eq!(parts.side.row_classes, [4, -4, 0]);
        assert_eq!(parts.side.classes, [30, 30, 30, 32, 28]);
        assert_eq!(parts.side.steps[0], 0.01);
        assert!((parts.side.steps[1] / 0.01 - 2f32.powf(0.25)).abs() < 1e-6);
        for n in 0..bytes.len() {
            assert!(parse(&bytes[..n], 3, 5).is_err(), "{n} bytes");
        }
        assert!(parse(&[&bytes[..], &[0]].concat(), 3, 5).is_err());
    }

    #[test]
    fn impossible_headers_are_refused() {
        for change in [(0, 2u8), (0, 7), (0, 255), (1, 3), (2, 0), (3, 65), (7, 0xff), (8, 65), (8, 255)] {
            let mut bytes = stored().assemble(&[], &[vec![]]);
            bytes[change.0] = change.1;
            assert!(parse(&bytes, 3, 5).is_err(), "{change:?}");
        }
    }

    #[test]
    fn segments_cover_all_rows() {
        for rows in [1, 2047, 2048, 2049, 7168, 10_000] {
            let all: Vec<_> = segments(rows).collect();
            assert_eq!((all[0].start, all[all.len() - 1].end), (0, rows));
            assert!(
                all.windows(2).all(|w| w[0].end == w[1].start) && all.iter().all(|r| r.len() <= SEGMENT_ROWS)
            );
        }
    }
}
