//! `mxfp4`: E2M1 levels with a power-of-two scale for every 32 columns (OCP Microscaling Formats 1.0).
//!
//! As gpt-oss and compressed-tensors store it; DeepSeek V4's FP4 experts are the same bits under other names. A row
//! must be a multiple of 32 columns. Planes of a `[rows, cols]` matrix:
//!
//! ```text
//!  blocks  U8 [rows, cols/2]      levels, two a byte, low nibble first
//!  scales  U8 [rows, cols/32]     E8M0: 2^(byte − 127), 255 is NaN
//!
//!  byte of `blocks`                nibble
//!     7     4 3     0               3  2 1  0
//!  +---------+---------+         +---+-----+---+
//!  | column 1| column 0|         | s | e e | m |     0 ½ 1 1½ 2 3 4 6 and their negatives
//!  +---------+---------+         +---+-----+---+
//!
//!  value = level × 2^(scale − 127)
//! ```
//!
//! The scale is the one of three with the least squared error: the power of two that the standard's rule takes and its
//! neighbours. Levels are rounded to nearest, ties to even, and saturate at 6.
//!
//! - Zero keeps its sign; a group of zeros has scale 2^0 and levels 0.
//! - NaN, infinity and magnitudes above 2^127 are refused when encoding. Scale 255 makes its group decode to NaN.
//! - Decoding is exact down to 2^-128; overflow gives infinity (scales above 2^125 only).
//!
//! 4.25 bits per weight.

use std::sync::Arc;

use moepack_format::{Dtype, Error, PlaneSpec, Result};

use super::columns::{StaticColumns, by_column, scale_importance};
use super::lanes::{Groups, LANES, Lanes, max_magnitude};
use super::{
    Codec, CodecFamily, ColumnCoder, ColumnPlan, Matrix, Planes, REACH_OF_FLOATS, Reach, check_input,
    check_planes, check_shape,
};
use crate::isa::Isa;
use crate::minifloat::{e2m1_to_f32, e8m0_floor, e8m0_to_f32, f32_to_e2m1, round_e2m1};
use crate::per_isa;

/// Row of the table.
pub const FAMILY: CodecFamily = CodecFamily {
    pattern: "mxfp4",
    doc: "OCP MXFP4: E2M1 levels, an E8M0 scale for every 32",
    examples: &["mxfp4"],
    parse: |name| (name == "mxfp4").then(|| Arc::new(Mxfp4) as _),
};

/// Columns that share a scale.
const GROUP: usize = 32;
/// Bits of a level.
const LEVEL_BITS: u32 = 4;
/// Exponent of E2M1's largest power of two, 4: by the standard's rule the scale is that much below the largest weight.
const LEVEL_EXPONENT: i32 = 2;
const _: () = assert!(GROUP.is_multiple_of(2) && LANES == 16);

/// MXFP4, which has no parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mxfp4;

impl Codec for Mxfp4 {
    fn name(&self) -> String {
        "mxfp4".to_owned()
    }

    fn planes(&self, rows: usize, cols: usize) -> Result<Vec<PlaneSpec>> {
        check_shape(rows, cols)?;
        if !cols.is_multiple_of(GROUP) {
            return Err(Error::plan(format!("{cols} columns, but mxfp4 needs a multiple of {GROUP}"))
                .hint("int4-g32 takes any number of columns"));
        }
        let (rows, cols) = (rows as u64, cols as u64);
        Ok(vec![
            PlaneSpec::new("blocks", Dtype::U8, &[rows, cols / 2]),
            PlaneSpec::new("scales", Dtype::U8, &[rows, cols / GROUP as u64]),
        ])
    }

    fn encode(&self, isa: Isa, w: Matrix<'_>, importance: Option<&[f32]>) -> Result<Planes> {
        self.planes(w.rows, w.cols)?;
        check_input(isa, w, importance, Reach { codec: self.name(), largest: REACH_OF_FLOATS })?;
        let groups = Groups { rows: w.rows, cols: w.cols, size: GROUP };
        let importance = importance.map(|i| groups.normalise(i));
        let mut blocks = vec![0; w.data.len() / 2];
        let mut scales = vec![0; w.data.len() / GROUP];
        encode_matrix(isa, groups, w, importance.as_deref(), &mut blocks, &mut scales);
        Ok(vec![blocks, scales])
    }

    fn columns<'a>(
        &'a self,
        isa: Isa,
        w: Matrix<'a>,
        plan: ColumnPlan<'a>,
    ) -> Result<Option<Box<dyn ColumnCoder + 'a>>> {
        let planes = self.encode(isa, w, Some(&scale_importance(plan)))?;
        let per_row = w.cols / GROUP;
        let scales = planes.get(1).map_or(&[][..], Vec::as_slice);
        let scales = by_column(w.rows, per_row, |i| scales.get(i).copied().unwrap_or_default());
        let round = move |column: usize, wanted: &[f32], codes: &mut [u8], decoded: &mut [f32]| {
            let scales = &scales[column / GROUP * wanted.len()..][..wanted.len()];
            round_column(isa, scales, wanted, codes, decoded);
        };
        Ok(Some(Box::new(StaticColumns::of_bits(isa, LEVEL_BITS, w.rows, w.cols, planes, round))))
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
        let (Some(blocks), Some(scales)) = (planes.first(), planes.get(1)) else {
            return Err(Error::bad_data("planes are missing"));
        };
        let start = first_row * cols;
        decode_groups(isa, &blocks[start / 2..], &scales[start / GROUP..], out);
        Ok(())
    }
}

per_isa! {
    fn encode_matrix(
        groups: Groups,
        w: Matrix<'_>,
        importance: Option<&[f32]>,
        blocks: &mut [u8],
        scales: &mut [u8],
    ) = encode_matrix_body;
}
per_isa! {
    fn round_column(scales: &[u8], wanted: &[f32], codes: &mut [u8], decoded: &mut [f32]) = round_column_body;
}
per_isa! {
    fn decode_groups(blocks: &[u8], scales: &[u8], out: &mut [f32]) = decode_groups_body;
}

#[inline(always)]
fn encode_matrix_body(
    groups: Groups,
    w: Matrix<'_>,
    importance: Option<&[f32]>,
    blocks: &mut [u8],
    scales: &mut [u8],
) {
    let mut x = [Lanes::ZERO; GROUP];
    let mut weights = [Lanes::splat(1.0); GROUP];
    for first in (0..groups.count()).step_by(LANES) {
        groups.load(w, first, &mut x);
        if let Some(importance) = importance {
            groups.load_importance(importance, first, &mut weights);
        }
        let found = fit(&x, &weights);
        for (group, &code) in (first..groups.count()).zip(&found) {
            scales[group] = code;
            let values = &w.data[group * GROUP..(group + 1) * GROUP];
            quantize(code, values, &mut blocks[group * GROUP / 2..(group + 1) * GROUP / 2]);
        }
    }
}

/// The best scale code of each of sixteen groups.
#[inline(always)]
fn fit(x: &[Lanes; GROUP], weights: &[Lanes; GROUP]) -> [u8; LANES] {
    let largest = max_magnitude(x);
    let mut best = [127; LANES];
    let mut least = Lanes::splat(f32::INFINITY);
    // In units of the standard's scale, whatever that is, so that no square overflows.
    for offset in [0, 1, -1] {
        let code = largest.0.map(|m| (i32::from(e8m0_floor(m)) - LEVEL_EXPONENT + offset).max(0) as u8);
        let inverse = Lanes(code.map(inverse_of));
        let unit = f32::from_bits(((127 + offset) as u32) << 23);
        let mut error = Lanes::ZERO;
        for (x, w) in x.iter().zip(weights) {
            for l in 0..LANES {
                let y = x.0[l] * inverse.0[l];
                let e = (y - round_e2m1(y)) * unit;
                error.0[l] += w.0[l] * (e * e);
            }
        }
        for l in 0..LANES {
            let better = error.0[l] < least.0[l] && largest.0[l] > 0.0;
            least.0[l] = if better { error.0[l] } else { least.0[l] };
            best[l] = if better { code[l] } else { best[l] };
        }
    }
    best
}

/// 1 / 2^(code − 127), for codes that encoding uses: 0 … 253.
#[inline(always)]
fn inverse_of(code: u8) -> f32 {
    f32::from_bits((254 - u32::from(code)) << 23)
}

#[inline(always)]
fn quantize(code: u8, values: &[f32], out: &mut [u8]) {
    let inverse = inverse_of(code);
    for (o, v) in out.iter_mut().zip(values.as_chunks::<2>().0) {
        *o = f32_to_e2m1(v[0] * inverse) | f32_to_e2m1(v[1] * inverse) << 4;
    }
}

#[inline(always)]
fn round_column_body(scales: &[u8], wanted: &[f32], codes: &mut [u8], decoded: &mut [f32]) {
    for (((code, decoded), &v), &scale) in codes.iter_mut().zip(decoded).zip(wanted).zip(scales) {
        *code = f32_to_e2m1(v * inverse_of(scale));
        *decoded = e2m1_to_f32(*code) * e8m0_to_f32(scale);
    }
}

#[inline(always)]
fn decode_groups_body(blocks: &[u8], scales: &[u8], out: &mut [f32]) {
    let groups = out.as_chunks_mut::<GROUP>().0.iter_mut().zip(blocks.as_chunks::<{ GROUP / 2 }>().0);
    for ((out, block), &scale) in groups.zip(scales) {
        let scale = e8m0_to_f32(scale);
        for (o, &pair) in out.as_chunks_mut::<2>().0.iter_mut().zip(block) {
            *o = [e2m1_to_f32(pair & 15) * scale, e2m1_to_f32(pair >> 4) * scale];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_diagram_holds() {
        let mut data = [0.0; 32];
        data[..4].copy_from_slice(&[0.5, -6.0, 1.0, 1.5]);
        for (times, code) in [(1.0, 127), (0.25, 125), (1024.0, 137)] {
            let data = data.map(|v| v * times);
            let planes = Mxfp4.encode(Isa::get(), Matrix { rows: 1, cols: 32, data: &data }, None).unwrap();
            assert_eq!((&planes[0][..3], &planes[1][..]), (&[0xf1, 0x32, 0x00][..], &[code][..]));
        }
    }

    #[test]
    fn the_ends_of_the_range_of_scales_hold() {
        let least = f32::from_bits(1 << 21);
        for value in [least, 2.0 * least, REACH_OF_FLOATS] {
            let data = [value; 32];
            let planes = Mxfp4.encode(Isa::get(), Matrix { rows: 1, cols: 32, data: &data }, None).unwrap();
            let mut out = [0.0; 32];
            Mxfp4.decode(Isa::get(), &[&planes[0], &planes[1]], 1, 32, 0, &mut out).unwrap();
            assert_eq!(out, data, "{value:e}");
        }
    }
}
