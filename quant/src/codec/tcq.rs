//! `tcq8`, `tcq64`, `tcq256`: trellis-coded quantization with an entropy coder, at any rate.
//!
//! Every weight is an integer level `j` times the step of its column. Which levels are allowed depends on a state that
//! runs down the column (`trellis.rs`: even or odd, by a convolutional code of 8, 64 or 256 states), so that neighbours
//! together lie on a denser lattice than each alone; levels are coded with the probabilities of a discrete Gaussian whose
//! width the column and the row name (`tables.rs`), by rANS (`rans.rs`). Entropy-coded trellis quantization is Fischer and
//! Wang 1992 ("Entropy-constrained trellis-coded quantization", IEEE Trans. Inf. Theory 38); JPEG 2000 part 2 and VVC have
//! it. It stands .04 bit (256 states), .05 (64) or .08 (8) above the rate–distortion limit of a Gaussian source, at every rate.
//!
//! One plane, `stream`, U8, of as many bytes as it takes. Numbers are little-endian.
//!
//! ```text
//!  byte 0    log2 of the lanes, 3 … 6             4   f32: step of columns with step value 0
//!       1    unit of step values, in 1/16 octave  8   table of step values (see below)
//!       2    unit of classes, in tables           9   table of column values
//!       3    table of columns with value 0        10  table of row values
//!       11   u32: bytes of side information       15  u32: bytes of exceptions
//!       19   u32 for each segment: bytes of its stream
//!       …    side information · exceptions · streams
//!
//!  segment   rows are cut into ceil(rows / 2048) segments of ceil(rows / segments) rows, the last one shorter
//!  step      of column c = f32 at 4 × 2^(step value · unit / 16)
//!  table     of the weight at row r, column c = byte 3 + unit · (column value) + unit · (row value), cut to 0 … 64 after
//!            the first sum and again after the second
//!  weight    = level × step
//! ```
//!
//! *Side information* is one rANS stream of one lane: step values of all columns, column values, row values. A value `v` is
//! coded as the level `2v` by the table that the header names. *A stream* is the states of its lanes, u32 each, then words
//! of two bytes; its order is drawn in `stream.rs`. Lane `l` codes the columns `l`, `l + lanes`, … *Exceptions* are levels
//! that have no symbol in their table; the stream has an escape in their place, and they follow in ascending order of
//! `row · cols + col` as pairs of LEB128 numbers: how far behind the place after the one before, and the level, zigzag.
//!
//! - Zero is exact; its sign is lost. NaN, infinity and magnitudes beyond 2^126 are refused when encoding.
//! - A decoder refuses what does not end where it should: lengths must add up, every lane must end in the state in which an
//!   encoder starts, and no word may be left.
//! - Rate: `bits` a weight are an upper limit, met within .02 %, in small matrices within a few bytes;
//!   header, side information and the states of lanes are counted. What would not fit in the end is zeros in the last columns.
//!   Matrices of fewer than 32 rows, and the smallest of all, may take more than the rate says (`layout::least_bytes`).
//!   While columns are coded, `rate.rs` chooses their steps so that the bytes are filled: by what a squared error costs in
//!   each (reverse water-filling), evenly if nothing is said.
//! - Determinism: the search is in integers (`column.rs`); sums of squares and of bits are in f32, each in one order for all
//!   instruction sets, everything else in f64 of the caller's thread.
//!
//! **Why rANS and not tANS.** Both reach the entropy within a thousandth of a bit. With rANS a step of 16 lanes is one
//! gather, and words go to the lanes that need them by one permutation; a tANS decoder reads a different number of bits in each lane.
//! The form used here, static tables, 32-bit states, 16-bit words, interleaved lanes, is that of Giesen's publication of
//! February 2014 with code in the public domain (arXiv:1402.3392), on Duda's of 2009 and 2013 (arXiv:0902.0271, 1311.2540).
//! US 11234023, filed years later, is about features of rANS coders; its claims were not examined here. Nothing in this form is
//! newer than the publications of 2014, which is the reason for keeping to it, and no legal advice.

use std::sync::Arc;

use moepack_format::{Dtype, Error, PlaneSpec, Result};

use self::coder::Coder;
use self::trellis::Trellis;
use super::{
    Codec, CodecFamily, CodecRef, ColumnCoder, ColumnPlan, Matrix, Planes, Reach, check_input, check_shape,
};
use crate::isa::Isa;

mod choice;
mod coder;
mod column;
mod ending;
mod histogram;
mod lanes;
mod layout;
mod rans;
mod rate;
mod rows;
mod stream;
mod tables;
mod trellis;

/// Row of the table.
pub const FAMILY: CodecFamily = CodecFamily {
    pattern: "tcq{8,64,256}",
    doc: "entropy-coded trellis of 8, 64 or 256 states, at any number of bits (3 if nothing is said)",
    examples: &["tcq8", "tcq64", "tcq256"],
    parse: |name| {
        let states = ["8", "64", "256"].iter().find(|s| name.strip_prefix("tcq") == Some(s))?;
        Tcq::new(states.parse().ok()?, BITS_DEFAULT).map(|tcq| Arc::new(tcq) as _)
    },
};

/// Bits a weight where none are asked for.
const BITS_DEFAULT: f64 = 3.0;
/// Bits a weight at least and at most.
const BITS_MIN: f64 = 0.5;
const BITS_MAX: f64 = 9.0;

/// A trellis and a rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tcq {
    trellis: Trellis,
    bits: f64,
}

impl Tcq {
    /// The codec with 8, 64 or 256 states that writes at most so many bits a weight.
    pub fn new(states: usize, bits: f64) -> Option<Tcq> {
        let trellis = Trellis::of(states)?;
        (BITS_MIN..=BITS_MAX).contains(&bits).then_some(Tcq { trellis, bits })
    }

    /// Bytes that a matrix may take: what the rate says, or what zeros would take where that is more.
    fn limit(&self, rows: usize, cols: usize) -> u64 {
        let by_rate = (self.bits * rows as f64 * cols as f64 / 8.0) as u64;
        by_rate.max(layout::least_bytes(rows, cols))
    }

    fn check(&self, isa: Isa, w: Matrix<'_>, importance: Option<&[f32]>) -> Result<f32> {
        check_input(isa, w, importance, Reach { codec: self.name(), largest: f32::MAX / 4.0 })
    }
}

impl Codec for Tcq {
    fn name(&self) -> String {
        format!("tcq{}", self.trellis.states)
    }

    fn planes(&self, rows: usize, cols: usize) -> Result<Vec<PlaneSpec>> {
        check_shape(rows, cols)?;
        Ok(vec![PlaneSpec::new("stream", Dtype::U8, &[self.limit(rows, cols)])])
    }

    fn planes_of(&self, rows: usize, cols: usize, coded: &Planes) -> Result<Vec<PlaneSpec>> {
        check_shape(rows, cols)?;
        Ok(coded.iter().map(|p| PlaneSpec::new("stream", Dtype::U8, &[p.len() as u64])).collect())
    }

    fn at_rate(&self, bits: f64) -> Option<CodecRef> {
        Tcq::new(self.trellis.states, bits).map(|tcq| Arc::new(tcq) as _)
    }

    fn encode(&self, isa: Isa, w: Matrix<'_>, importance: Option<&[f32]>) -> Result<Planes> {
        self.check(isa, w, importance)?;
        let order: Vec<usize> = (0..w.cols).collect();
        let ones = vec![1.0; w.cols];
        let cost = importance.unwrap_or(&ones);
        let mut coder = Coder::new(isa, *self, w, self.limit(w.rows, w.cols), &order, cost);
        coder.code_all();
        coder.into_planes()
    }

    fn columns<'a>(
        &'a self,
        isa: Isa,
        w: Matrix<'a>,
        plan: ColumnPlan<'a>,
    ) -> Result<Option<Box<dyn ColumnCoder + 'a>>> {
        self.check(isa, w, Some(plan.importance))?;
        let limit = self.limit(w.rows, w.cols);
        let coder = Coder::new(isa, *self, w, limit, plan.order, plan.cost);
        Ok(Some(Box::new(coder)))
    }

    fn coding_bytes(&self, rows: usize, cols: usize) -> u64 {
        // Numbers of 16 bits, words of a stream beside the stream, and a segment of floats.
        let n = (rows as u64).saturating_mul(cols as u64);
        let segment = (self.rows_at_once(rows) as u64).saturating_mul(cols as u64);
        n.saturating_mul(2).saturating_add(self.limit(rows, cols)).saturating_add(segment.saturating_mul(4))
    }

    fn rows_at_once(&self, rows: usize) -> usize {
        layout::segments(rows).next().map_or(1, |s| s.len())
    }

    fn decode(
        &self,
        isa: Isa,
        planes: &[&[u8]],
        rows: usize,
        cols: usize,
        first_row: usize,
        out: &mut [f32],
    ) -> Result<()> {
        check_shape(rows, cols)?;
        let [plane] = planes else {
            return Err(Error::bad_data(format!("{} planes, expected 1", planes.len())));
        };
        super::check_rows(rows, cols, first_row, out)?;
        let parts = layout::parse(plane, rows, cols)?;
        let end = first_row + out.len() / cols;
        for (segment, stream) in layout::segments(rows).zip(parts.streams) {
            if segment.end <= first_row || segment.start >= end {
                continue;
            }
            let within = first_row.max(segment.start)..end.min(segment.end);
            if within == segment {
                let part = &mut out[(within.start - first_row) * cols..(within.end - first_row) * cols];
                stream::decode(isa, self.trellis, &parts.side, segment.start, stream, part)?;
            } else {
                let mut whole = vec![0.0; segment.len() * cols];
                stream::decode(isa, self.trellis, &parts.side, segment.start, stream, &mut whole)?;
                let part = &whole[(within.start - segment.start) * cols..(within.end - segment.start) * cols];
                out[(within.start - first_row) * cols..][..part.len()].copy_from_slice(part);
            }
        }
        for (place, level) in parts.exceptions {
            let (row, col) = (place / cols, place % cols);
            if (first_row..end).contains(&row) {
                out[(row - first_row) * cols + col] = level as f32 * parts.side.steps[col];
            }
        }
        Ok(())
    }
}
