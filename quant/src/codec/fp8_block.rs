//! `fp8-block`: E4M3FN numbers with one scale for every block of rows × columns.
//!
//! As DeepSeek V3, Qwen3 and others are released: 128 × 128 blocks with f32 scales, which is what the plain name means.
//! Full form `fp8-block-RxC[-bf16|-f16|-e8m0]`: other blocks, and scales in bf16, f16 or as powers of two (DeepSeek V4;
//! MXFP8 is `fp8-block-1x32-e8m0`). A block as wide as the matrix is one scale a row, one of its size a scale for all.
//! Blocks at the right and lower edge may be smaller. Planes of a `[rows, cols]` matrix:
//!
//! ```text
//!  weight     F8_E4M3                  [rows, cols]
//!  scale_inv  F32 | BF16 | F16 | F8_E8M0   [ceil(rows/R), ceil(cols/C)]
//!
//!  byte of `weight`
//!    7   6 5 4 3   2 1 0
//!  +---+---------+-------+
//!  | s | e e e e | m m m |       e = 0: m × 2^-9      else (8 + m) × 2^(e − 10)      0x7f, 0xff: NaN
//!  +---+---------+-------+
//!
//!  value = number × scale_inv[row / R, column / C]
//! ```
//!
//! The scale has its upstream name: it is what one multiplies by when decoding. Encoding tries scales over the octave
//! above maximum/448 (where in its binade a number falls decides how finely it is cut), takes the one with the least
//! squared error, and improves it by least squares.
//!
//! - Zero keeps its sign; a block of zeros has scale 1.
//! - NaN, infinity and magnitudes above 2^127 are refused when encoding. A NaN number decodes to NaN, as does a whole
//!   block whose scale is NaN or infinite. Numbers above 448 scales saturate.
//!
//! 8 bits per weight, and 32, 16 or 8 bits a block: 8.002 for 128 × 128 with f32.

use std::sync::Arc;

use moepack_format::{Dtype, Error, PlaneSpec, Result};

use super::columns::{StaticColumns, by_column, scale_importance};
use super::lanes::{LANES, Lanes};
use super::{
    Codec, CodecFamily, ColumnCoder, ColumnPlan, Matrix, Planes, REACH_OF_FLOATS, Reach, check_input,
    check_planes, check_shape,
};
use crate::isa::Isa;
use crate::minifloat::{
    E4M3_MAX, F16_MAX, NAN_BITS, bf16_to_f32, e4m3_to_f32, e8m0_floor, e8m0_to_f32, f16_to_f32, f32_to_bf16,
    f32_to_e4m3, f32_to_f16, round_e4m3,
};
use crate::per_isa;

/// Row of the table.
pub const FAMILY: CodecFamily = CodecFamily {
    pattern: "fp8-block[-RxC][-bf16|-f16|-e8m0]",
    doc: "E4M3 numbers, a scale for every block of 128 x 128 (if nothing is said)",
    examples: &[
        "fp8-block",
        "fp8-block-32x32-bf16",
        "fp8-block-e8m0",
        "fp8-block-1x32-e8m0",
        "fp8-block-3x50",
        "fp8-block-1x4096-f16",
    ],
    parse: |name| parse(name).map(|codec| Arc::new(codec) as _),
};

/// Bits of a number.
const NUMBER_BITS: u32 = 8;
const BLOCK: usize = 128;
/// Smallest positive f16, 2^-24.
const F16_MIN: f32 = f32::from_bits(103 << 23);
/// Largest block side that a name may ask for.
const BLOCK_MAX: usize = 1 << 20;

/// How scales are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleType {
    /// DeepSeek V3.
    F32,
    /// Qwen3.
    Bf16,
    /// compressed-tensors, where the model is f16.
    F16,
    /// DeepSeek V4, MXFP8.
    E8m0,
}

impl ScaleType {
    const fn dtype(self) -> Dtype {
        match self {
            ScaleType::F32 => Dtype::F32,
            ScaleType::Bf16 => Dtype::Bf16,
            ScaleType::F16 => Dtype::F16,
            ScaleType::E8m0 => Dtype::F8E8m0,
        }
    }

    /// The scale at `index` of the plane; one NaN for whatever is no finite number.
    #[inline(always)]
    fn get(self, plane: &[u8], index: usize) -> f32 {
        let scale = match self {
            ScaleType::F32 => f32::from_le_bytes(plane.as_chunks().0[index]),
            ScaleType::Bf16 => bf16_to_f32(u16::from_le_bytes(plane.as_chunks().0[index])),
            ScaleType::F16 => f16_to_f32(u16::from_le_bytes(plane.as_chunks().0[index])),
            ScaleType::E8m0 => e8m0_to_f32(plane[index]),
        };
        if scale.is_finite() { scale } else { f32::from_bits(NAN_BITS) }
    }

    /// Stores a positive scale and returns what was stored.
    #[inline(always)]
    fn put(self, plane: &mut [u8], index: usize, scale: f32) -> f32 {
        match self {
            ScaleType::F32 => plane.as_chunks_mut().0[index] = scale.to_le_bytes(),
            ScaleType::Bf16 => plane.as_chunks_mut().0[index] = f32_to_bf16(scale).to_le_bytes(),
            ScaleType::F16 => {
                let scale = scale.clamp(F16_MIN, F16_MAX);
                plane.as_chunks_mut().0[index] = f32_to_f16(scale).to_le_bytes();
            }
            ScaleType::E8m0 => plane[index] = e8m0_floor(scale),
        }
        self.get(plane, index)
    }
}

/// E4M3 numbers with a scale a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fp8Block {
    block_rows: usize,
    block_cols: usize,
    scale: ScaleType,
}

impl Fp8Block {
    /// The codec with these blocks, if both sides are 1 … 2^20.
    pub fn new(block_rows: usize, block_cols: usize, scale: ScaleType) -> Option<Fp8Block> {
        let fits = |n| (1..=BLOCK_MAX).contains(&n);
        (fits(block_rows) && fits(block_cols)).then_some(Fp8Block { block_rows, block_cols, scale })
    }
}

fn parse(name: &str) -> Option<Fp8Block> {
    let mut rest = name.strip_prefix("fp8-block")?;
    let mut scale = ScaleType::F32;
    for (suffix, kind) in [
        ("-f32", ScaleType::F32),
        ("-bf16", ScaleType::Bf16),
        ("-f16", ScaleType::F16),
        ("-e8m0", ScaleType::E8m0),
    ] {
        if let Some(before) = rest.strip_suffix(suffix) {
            (rest, scale) = (before, kind);
            break;
        }
    }
    let (rows, cols) = match rest {
        "" => (BLOCK, BLOCK),
        _ => rest.strip_prefix('-')?.split_once('x').and_then(|(r, c)| Some((side(r)?, side(c)?)))?,
    };
    Fp8Block::new(rows, cols, scale)
}

/// A positive number without sign or leading zero, so that each codec has one canonical name.
fn side(text: &str) -> Option<usize> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    if plain { text.parse().ok() } else { None }
}

impl Codec for Fp8Block {
    fn name(&self) -> String {
        let block = match (self.block_rows, self.block_cols) {
            (BLOCK, BLOCK) => String::new(),
            (r, c) => format!("-{r}x{c}"),
        };
        let scale = match self.scale {
            ScaleType::F32 => "",
            ScaleType::Bf16 => "-bf16",
            ScaleType::F16 => "-f16",
            ScaleType::E8m0 => "-e8m0",
        };
        format!("fp8-block{block}{scale}")
    }

    fn planes(&self, rows: usize, cols: usize) -> Result<Vec<PlaneSpec>> {
        check_shape(rows, cols)?;
        let grid = [rows.div_ceil(self.block_rows) as u64, cols.div_ceil(self.block_cols) as u64];
        Ok(vec![
            PlaneSpec::new("weight", Dtype::F8E4m3, &[rows as u64, cols as u64]),
            PlaneSpec::new("scale_inv", self.scale.dtype(), &grid),
        ])
    }

    fn encode(&self, isa: Isa, w: Matrix<'_>, importance: Option<&[f32]>) -> Result<Planes> {
        let largest = if self.scale == ScaleType::F16 { E4M3_MAX * F16_MAX } else { REACH_OF_FLOATS };
        check_input(isa, w, importance, Reach { codec: self.name(), largest })?;
        let importance = importance.map(|i| normalise(i, self.block_cols));
        let mut planes = Vec::new();
        for spec in self.planes(w.rows, w.cols)? {
            planes.push(vec![0; spec.bytes()? as usize]);
        }
        if let [weight, scales] = &mut planes[..] {
            encode_matrix(isa, self, w, importance.as_deref(), weight, scales);
        }
        Ok(planes)
    }

    fn columns<'a>(
        &'a self,
        isa: Isa,
        w: Matrix<'a>,
        plan: ColumnPlan<'a>,
    ) -> Result<Option<Box<dyn ColumnCoder + 'a>>> {
        let planes = self.encode(isa, w, Some(&scale_importance(plan)))?;
        let n_across = w.cols.div_ceil(self.block_cols);
        let plane = planes.get(1).map_or(&[][..], Vec::as_slice);
        let scale =
            |i: usize| self.scale.get(plane, i / n_across / self.block_rows * n_across + i % n_across);
        let scales = by_column(w.rows, n_across, scale);
        let round = move |column: usize, wanted: &[f32], codes: &mut [u8], decoded: &mut [f32]| {
            let scales = &scales[column / self.block_cols * wanted.len()..][..wanted.len()];
            round_column(isa, scales, wanted, codes, decoded);
        };
        Ok(Some(Box::new(StaticColumns::of_bits(isa, NUMBER_BITS, w.rows, w.cols, planes, round))))
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
        check_planes(&self.planes(rows, cols)?, planes, rows, cols, first_row, out)?;
        let (Some(weight), Some(scales)) = (planes.first(), planes.get(1)) else {
            return Err(Error::bad_data("planes are missing"));
        };
        decode_rows(isa, self, &weight[first_row * cols..], scales, cols, first_row, out);
        Ok(())
    }
}

/// Importance with the largest of each block of columns made 1; all 1 where it is all 0.
fn normalise(importance: &[f32], block_cols: usize) -> Vec<f32> {
    super::lanes::Groups { rows: 1, cols: importance.len(), size: block_cols }.normalise(importance)
}

per_isa! {
    fn encode_matrix(
        codec: &Fp8Block,
        w: Matrix<'_>,
        importance: Option<&[f32]>,
        weight: &mut [u8],
        scales: &mut [u8],
    ) = encode_matrix_body;
}
per_isa! {
    fn round_column(scales: &[f32], wanted: &[f32], codes: &mut [u8], decoded: &mut [f32]) = round_column_body;
}
per_isa! {
    fn decode_rows(
        codec: &Fp8Block,
        weight: &[u8],
        scales: &[u8],
        cols: usize,
        first_row: usize,
        out: &mut [f32],
    ) = decode_rows_body;
}

#[inline(always)]
fn encode_matrix_body(
    codec: &Fp8Block,
    w: Matrix<'_>,
    importance: Option<&[f32]>,
    weight: &mut [u8],
    scales: &mut [u8],
) {
    let n_across = w.cols.div_ceil(codec.block_cols);
    for row in (0..w.rows).step_by(codec.block_rows) {
        for col in (0..w.cols).step_by(codec.block_cols) {
            let block = Block {
                w,
                importance,
                rows: row..w.rows.min(row + codec.block_rows),
                cols: col..w.cols.min(col + codec.block_cols),
            };
            let index = row / codec.block_rows * n_across + col / codec.block_cols;
            let scale = codec.scale.put(scales, index, block.fit(codec.scale));
            for r in block.rows.clone() {
                let at = r * w.cols + block.cols.start..r * w.cols + block.cols.end;
                for (o, &v) in weight[at.clone()].iter_mut().zip(&w.data[at]) {
                    *o = f32_to_e4m3(v / scale);
                }
            }
        }
    }
}

/// A block of the matrix: the numbers that share a scale.
struct Block<'a> {
    w: Matrix<'a>,
    importance: Option<&'a [f32]>,
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
}

/// Scales that are tried, in units of maximum/448; an octave is enough since E4M3 is a float.
const TRIALS: [[f32; 4]; 2] = [[1.0, 1.09, 1.19, 1.3], [1.41, 1.54, 1.68, 1.83]];
/// Powers of two that are tried, in units of the one at or below maximum/448.
const POWERS: [[f32; 4]; 1] = [[2.0, 1.0, 4.0, 8.0]];

impl Block<'_> {
    /// The scale with the least squared error.
    #[inline(always)]
    fn fit(&self, kind: ScaleType) -> f32 {
        let largest = self.max_magnitude();
        if largest == 0.0 {
            return 1.0;
        }
        // A normal number, so that its reciprocal is finite.
        let unit = (largest / E4M3_MAX).max(f32::MIN_POSITIVE);
        let (unit, trials) = match kind {
            ScaleType::E8m0 => (e8m0_to_f32(e8m0_floor(unit)), &POWERS[..]),
            _ => (unit, &TRIALS[..]),
        };
        let (mut best, mut most, mut scale) = (1.0, f32::NEG_INFINITY, unit);
        for trials in trials {
            let (a, b) = self.sums(trials.map(|t| 1.0 / (unit * t)));
            for k in 0..trials.len() {
                // What the error is smaller than Σ w x², in units of unit².
                let worth = (2.0 * a[k] - b[k]) * (trials[k] * trials[k]);
                if worth > most {
                    (most, best) = (worth, trials[k]);
                    scale = unit * trials[k] * if b[k] > 0.0 { a[k] / b[k] } else { 1.0 };
                }
            }
        }
        if kind == ScaleType::E8m0 { unit * best } else { scale }
    }

    #[inline(always)]
    fn max_magnitude(&self) -> f32 {
        let mut largest = 0;
        for r in self.rows.clone() {
            for v in &self.w.data[r * self.w.cols..][self.cols.clone()] {
                largest = (v.to_bits() & 0x7fff_ffff).max(largest);
            }
        }
        f32::from_bits(largest)
    }

    /// `Σ w y q` and `Σ w q²` for `y = x × inverse` and its rounding `q`: sixteen partial sums over columns modulo 16,
    /// row after row, added up as a tree.
    #[inline(always)]
    fn sums<const K: usize>(&self, inverses: [f32; K]) -> ([f32; K], [f32; K]) {
        let (mut a, mut b) = ([Lanes::ZERO; K], [Lanes::ZERO; K]);
        for r in self.rows.clone() {
            let row = &self.w.data[r * self.w.cols..][self.cols.clone()];
            for (i, x) in row.chunks(LANES).enumerate() {
                let x = padded(x);
                let w = match self.importance {
                    Some(w) => padded(&w[self.cols.clone()][i * LANES..][..LANES.min(row.len() - i * LANES)]),
                    None => Lanes::splat(1.0),
                };
                for k in 0..K {
                    for l in 0..LANES {
                        let y = x.0[l] * inverses[k];
                        let q = round_e4m3(y);
                        let wq = w.0[l] * q;
                        a[k].0[l] += y * wq;
                        b[k].0[l] += q * wq;
                    }
                }
            }
        }
        (a.map(tree_sum), b.map(tree_sum))
    }
}

#[inline(always)]
fn padded(values: &[f32]) -> Lanes {
    let mut out = Lanes::ZERO;
    match values.first_chunk() {
        Some(full) => out.0 = *full,
        None => out.0[..values.len()].copy_from_slice(values),
    }
    out
}

/// Halves added to halves.
#[inline(always)]
fn tree_sum(v: Lanes) -> f32 {
    let mut v = v.0;
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            v[l] += v[l + half];
        }
    }
    v[0]
}

#[inline(always)]
fn round_column_body(scales: &[f32], wanted: &[f32], codes: &mut [u8], decoded: &mut [f32]) {
    for (((code, decoded), &v), &scale) in codes.iter_mut().zip(decoded).zip(wanted).zip(scales) {
        *code = f32_to_e4m3(v / scale);
        *decoded = e4m3_to_f32(*code) * scale;
    }
}

#[inline(always)]
fn decode_rows_body(
    codec: &Fp8Block,
    weight: &[u8],
    scales: &[u8],
    cols: usize,
    first_row: usize,
    out: &mut [f32],
) {
    let n_across = cols.div_ceil(codec.block_cols);
    for (r, (out, row)) in out.chunks_mut(cols).zip(weight.chunks(cols)).enumerate() {
        let first = (first_row + r) / codec.block_rows * n_across;
        let blocks = out.chunks_mut(codec.block_cols).zip(row.chunks(codec.block_cols));
        for (i, (out, row)) in blocks.enumerate() {
            let scale = codec.scale.get(scales, first + i);
            for (o, &c) in out.iter_mut().zip(row) {
                *o = e4m3_to_f32(c) * scale;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_their_own_scales_at_the_edges_too() {
        let codec = parse("fp8-block-2x2").unwrap();
        let data = [448.0, 1.0, 896.0, -2.0, 0.5, 0.0, -7.0, 1.0, 0.0];
        let planes = codec.encode(Isa::get(), Matrix { rows: 3, cols: 3, data: &data }, None).unwrap();
        assert_eq!(planes[0], [0x7e, 0x38, 0x7e, 0xc0, 0x30, 0x00, 0xfe, 0x68, 0x00]);
        let scales: Vec<f32> = planes[1].as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!(scales, [1.0, 2.0, 1.0 / 64.0, 1.0]);
    }

    #[test]
    fn scales_are_stored_as_the_name_says() {
        let data = [448.0 * 3.0, 3.0, 6.0, 0.0];
        for (name, bytes, scale) in
            [("fp8-block-1x4", 4, 3.0), ("fp8-block-1x4-bf16", 2, 3.0), ("fp8-block-1x4-e8m0", 1, 4.0)]
        {
            let codec = parse(name).unwrap();
            let planes = codec.encode(Isa::get(), Matrix { rows: 1, cols: 4, data: &data }, None).unwrap();
            assert_eq!((planes[1].len(), codec.scale.get(&planes[1], 0)), (bytes, scale), "{name}");
        }
    }

    #[test]
    fn a_scale_that_is_no_number_spoils_its_block_only() {
        let codec = parse("fp8-block-1x2").unwrap();
        let scales = [f32::INFINITY.to_le_bytes(), 2f32.to_le_bytes()].concat();
        let mut out = [0.0; 4];
        codec.decode(Isa::get(), &[&[0x38, 0x00, 0x38, 0x7f], &scales], 1, 4, 0, &mut out).unwrap();
        assert_eq!(out.map(f32::to_bits), [NAN_BITS, NAN_BITS, 2f32.to_bits(), NAN_BITS]);
    }
}
