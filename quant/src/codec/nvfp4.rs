//! `nvfp4`: E2M1 levels, an E4M3 scale for every 16 columns, one f32 scale for the matrix (NVIDIA). `nvfp4-div` is the same
//! with the reciprocal of the matrix's scale.
//!
//! A row must be a multiple of 16 columns. Planes of a `[rows, cols]` matrix:
//!
//! ```text
//!  blocks        U8       [rows, cols/2]    levels, two a byte, low nibble first
//!  scales        F8_E4M3  [rows, cols/16]
//!  global_scale  F32      [1]
//!
//!  byte of `blocks`                nibble
//!     7     4 3     0               3  2 1  0
//!  +---------+---------+         +---+-----+---+
//!  | column 1| column 0|         | s | e e | m |     0 ½ 1 1½ 2 3 4 6 and their negatives
//!  +---------+---------+         +---+-----+---+
//!
//!  nvfp4      value = level × (scale × global_scale)   product in brackets and value rounded to f32
//!  nvfp4-div  value = level × (scale / global_scale)   quotient and value rounded to f32
//! ```
//!
//! The global scale multiplies, as in ModelOpt (`weight_scale_2`); compressed-tensors stores its reciprocal and divides
//! (`weight_global_scale`), which `nvfp4-div` does too, since a reciprocal would round. Encoding
//! takes global_scale = largest magnitude / (6 × 256), which leaves room above for the largest group to choose a scale
//! up to 448/256 as large: mapping its maximum to 4 instead of 6 often costs less. Of the E4M3 numbers around
//! maximum/6 each group takes the one with the least squared error.
//!
//! - Zero keeps its sign. A group of zeros has scale 0; a matrix of zeros global scale 1.
//! - NaN, infinity and magnitudes above 2^127 are refused when encoding. A NaN scale makes its group decode to NaN,
//!   and so does a global scale that is NaN or infinite.
//! - Weights below 3e-7 of the matrix's largest become zero, since E4M3 ends at 2^-9; groups below 6e-5 of it have
//!   coarser scales.
//!
//! 4.5 bits per weight, and 32 bits a matrix.

use std::sync::Arc;

use moepack_format::{Dtype, Error, PlaneSpec, Result};

use super::columns::{StaticColumns, by_column, scale_importance};
use super::lanes::{Groups, LANES, Lanes, max_magnitude};
use super::{
    Codec, CodecFamily, ColumnCoder, ColumnPlan, Matrix, Planes, REACH_OF_FLOATS, Reach, check_input,
    check_planes, check_shape,
};
use crate::isa::Isa;
use crate::minifloat::{E2M1_MAX, NAN_BITS, e2m1_to_f32, e4m3_to_f32, f32_to_e2m1, f32_to_e4m3, round_e2m1};
use crate::per_isa;

/// Row of the table.
pub const FAMILY: CodecFamily = CodecFamily {
    pattern: "nvfp4[-div]",
    doc: "NVFP4: E2M1 levels, an E4M3 scale for every 16 and one f32 scale (its reciprocal with -div)",
    examples: &["nvfp4", "nvfp4-div"],
    parse: |name| {
        let codec =
            [Nvfp4 { divides: false }, Nvfp4 { divides: true }].into_iter().find(|c| c.name() == name);
        codec.map(|c| Arc::new(c) as _)
    },
};

/// Columns that share a scale.
const GROUP: usize = 16;
/// Bits of a level.
const LEVEL_BITS: u32 = 4;
/// The E4M3 scale that maps the matrix's largest magnitude to 6.
const LARGEST_SCALE: f32 = 256.0;
/// E4M3 codes that are tried, relative to the one that maps a group's maximum to 6; eight codes are an octave.
const OFFSETS: [i32; 8] = [0, -2, -1, 1, 2, 3, 4, 5];

/// NVFP4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nvfp4 {
    /// The stored global scale divides, as in compressed-tensors.
    pub divides: bool,
}

impl Codec for Nvfp4 {
    fn name(&self) -> String {
        if self.divides { "nvfp4-div".to_owned() } else { "nvfp4".to_owned() }
    }

    fn planes(&self, rows: usize, cols: usize) -> Result<Vec<PlaneSpec>> {
        check_shape(rows, cols)?;
        if !cols.is_multiple_of(GROUP) {
            return Err(Error::plan(format!("{cols} columns, but nvfp4 needs a multiple of {GROUP}"))
                .hint("int4-g32 takes any number of columns"));
        }
        let (rows, cols) = (rows as u64, cols as u64);
        Ok(vec![
            PlaneSpec::new("blocks", Dtype::U8, &[rows, cols / 2]),
            PlaneSpec::new("scales", Dtype::F8E4m3, &[rows, cols / GROUP as u64]),
            PlaneSpec::new("global_scale", Dtype::F32, &[1]),
        ])
    }

    fn encode(&self, isa: Isa, w: Matrix<'_>, importance: Option<&[f32]>) -> Result<Planes> {
        self.planes(w.rows, w.cols)?;
        let reach = Reach { codec: self.name(), largest: REACH_OF_FLOATS };
        let largest = check_input(isa, w, importance, reach)?;
        let groups = Groups { rows: w.rows, cols: w.cols, size: GROUP };
        let importance = importance.map(|i| groups.normalise(i));
        let global = self.global_scale(largest);
        let mut blocks = vec![0; w.data.len() / 2];
        let mut scales = vec![0; w.data.len() / GROUP];
        encode_matrix(isa, groups, w, importance.as_deref(), global, &mut blocks, &mut scales);
        Ok(vec![blocks, scales, global.value.to_le_bytes().to_vec()])
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
        let global = self.global_of(planes.get(2));
        let scale = |i: usize| global.times(scales.get(i).copied().unwrap_or_default());
        let scales = by_column(w.rows, per_row, scale);
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
        let global = self.global_of(planes.get(2));
        let start = first_row * cols;
        decode_groups(isa, &blocks[start / 2..], &scales[start / GROUP..], global, out);
        Ok(())
    }
}

impl Nvfp4 {
    fn global_scale(self, largest: f32) -> Global {
        // A normal number, so that its reciprocal is finite.
        let least = (largest / (E2M1_MAX * LARGEST_SCALE)).max(f32::MIN_POSITIVE);
        let value = if largest == 0.0 { 1.0 } else { least };
        Global { value: if self.divides { 1.0 / value } else { value }, divides: self.divides }
    }

    /// The global scale in its plane; one NaN for whatever gives no finite number.
    fn global_of(self, plane: Option<&impl AsRef<[u8]>>) -> Global {
        let value = plane.and_then(|p| p.as_ref().first_chunk()).map(|b| f32::from_le_bytes(*b));
        let sound = |v: &f32| v.is_finite() && !(self.divides && *v == 0.0);
        let value = value.filter(sound).unwrap_or(f32::from_bits(NAN_BITS));
        Global { value, divides: self.divides }
    }
}

/// The scale of the matrix, as it is stored.
#[derive(Clone, Copy, Debug)]
struct Global {
    value: f32,
    divides: bool,
}

impl Global {
    /// What a group's levels are multiplied by, from the code of its scale.
    #[inline(always)]
    fn times(self, code: u8) -> f32 {
        let scale = e4m3_to_f32(code);
        if self.divides { scale / self.value } else { scale * self.value }
    }

    /// As a factor, for choosing scales.
    #[inline(always)]
    fn factor(self) -> f32 {
        if self.divides { 1.0 / self.value } else { self.value }
    }
}

per_isa! {
    fn encode_matrix(
        groups: Groups,
        w: Matrix<'_>,
        importance: Option<&[f32]>,
        global: Global,
        blocks: &mut [u8],
        scales: &mut [u8],
    ) = encode_matrix_body;
}
per_isa! {
    fn round_column(scales: &[f32], wanted: &[f32], codes: &mut [u8], decoded: &mut [f32]) = round_column_body;
}
per_isa! {
    fn decode_groups(blocks: &[u8], scales: &[u8], global: Global, out: &mut [f32]) = decode_groups_body;
}

#[inline(always)]
fn encode_matrix_body(
    groups: Groups,
    w: Matrix<'_>,
    importance: Option<&[f32]>,
    global: Global,
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
        let found = fit(&x, &weights, global);
        for (group, &code) in (first..groups.count()).zip(&found) {
            scales[group] = code;
            let values = &w.data[group * GROUP..(group + 1) * GROUP];
            quantize(code, global, values, &mut blocks[group * GROUP / 2..(group + 1) * GROUP / 2]);
        }
    }
}

/// The best scale code of each of sixteen groups; 0 where all weights are zero.
#[inline(always)]
fn fit(x: &[Lanes; GROUP], weights: &[Lanes; GROUP], global: Global) -> [u8; LANES] {
    let factor = global.factor();
    let largest = max_magnitude(x).map(|m| m / factor);
    let centre = largest.map(|m| m / E2M1_MAX);
    let mut best = Lanes::ZERO;
    let mut least = Lanes::splat(f32::INFINITY);
    for offset in OFFSETS {
        let scale = centre.map(|c| {
            let code = (i32::from(f32_to_e4m3(c)) + offset).clamp(1, 0x7e);
            e4m3_to_f32(code as u8)
        });
        let inverse = scale.map(|s| inverse_of(s * factor));
        let mut error = Lanes::ZERO;
        for (x, w) in x.iter().zip(weights) {
            for l in 0..LANES {
                let y = x.0[l] * inverse.0[l];
                let e = y - round_e2m1(y);
                error.0[l] += w.0[l] * (e * e);
            }
        }
        for l in 0..LANES {
            let total = error.0[l] * (scale.0[l] * scale.0[l]);
            let better = total < least.0[l] && largest.0[l] > 0.0;
            least.0[l] = if better { total } else { least.0[l] };
            best.0[l] = if better { scale.0[l] } else { best.0[l] };
        }
    }
    best.0.map(f32_to_e4m3)
}

/// What weights are multiplied by to become levels; 0 for scale 0.
#[inline(always)]
fn inverse_of(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

#[inline(always)]
fn quantize(code: u8, global: Global, values: &[f32], out: &mut [u8]) {
    let inverse = inverse_of(global.times(code));
    for (o, v) in out.iter_mut().zip(values.as_chunks::<2>().0) {
        *o = f32_to_e2m1(v[0] * inverse) | f32_to_e2m1(v[1] * inverse) << 4;
    }
}

#[inline(always)]
fn round_column_body(scales: &[f32], wanted: &[f32], codes: &mut [u8], decoded: &mut [f32]) {
    for (((code, decoded), &v), &scale) in codes.iter_mut().zip(decoded).zip(wanted).zip(scales) {
        *code = f32_to_e2m1(v * inverse_of(scale));
        *decoded = e2m1_to_f32(*code) * scale;
    }
}

#[inline(always)]
fn decode_groups_body(blocks: &[u8], scales: &[u8], global: Global, out: &mut [f32]) {
    let groups = out.as_chunks_mut::<GROUP>().0.iter_mut().zip(blocks.as_chunks::<{ GROUP / 2 }>().0);
    for ((out, block), &scale) in groups.zip(scales) {
        let scale = global.times(scale);
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
        let planes = Nvfp4 { divides: false }
            .encode(Isa::get(), Matrix { rows: 1, cols: 32, data: &data }, None)
            .unwrap();
        assert_eq!(planes[0][..3], [0xf1, 0x32, 0x00]);
        assert_eq!(planes[1], [0x78, 0x00], "256, and 0 for a group of zeros");
        assert_eq!(planes[2], (1.0f32 / 256.0).to_le_bytes());
    }

    #[test]
    fn a_global_scale_that_is_no_number_spoils_the_matrix() {
        for global in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut out = [0.0; 16];
            Nvfp4 { divides: false }
                .decode(Isa::get(), &[&[0x21; 8], &[0x38], &global.to_le_bytes()], 1, 16, 0, &mut out)
                .unwrap();
            assert!(out.iter().all(|v| v.to_bits() == NAN_BITS), "{global}");
        }
    }
}
