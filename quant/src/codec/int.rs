//! `int2` … `int8`: integer levels on one f16 scale a group, symmetric or with an integer zero point.
//!
//! Name: `int{2,3,4,5,6,8}[-g{32,64,128}][-asym]`; `int4` is `int4-g64`. A group is `g` neighbouring columns of a row;
//! where `cols` is no multiple of `g`, the last group of each row is shorter. Planes of a `[rows, cols]` matrix, with
//! `n = ceil(cols / g)` groups a row and `b` bits:
//!
//! ```text
//!  codes   U8  [rows, ceil(cols·b / 8)]   codes u, b bits each, a row is one stream, least significant bit first
//!  scales  F16 [rows, n]                  scale d of each group; may be negative
//!  zeros   U8  [rows, ceil(n·b / 8)]      only -asym: zero point z of each group, packed like the codes
//!
//!  symmetric   value = (u − 2^(b−1)) × d        levels −2^(b−1) … 2^(b−1)−1
//!  asymmetric  value = (u − z) × d              levels −z … 2^b−1−z
//!
//!  int4, codes of one row:
//!  byte 0                 1
//!      +-----------------+-----------------+---
//!      | u1₃₂₁₀  u0₃₂₁₀  | u3₃₂₁₀  u2₃₂₁₀  | …
//!      +-----------------+-----------------+---
//! ```
//!
//! The order of bits is that of compressed-tensors' `pack-quantized`, whose rows are filled up to 32 bits (so for
//! `cols·b` divisible by 32 the bytes are the same); see [`crate::bits`]. A symmetric group uses its extra negative
//! level on whichever side gains from it: that is what the sign of `d` is for.
//!
//! - Zero is exact in every group; a group of zeros has scale 0 and decodes to zeros. The sign of zero is lost.
//! - NaN and infinity are refused when encoding. A scale that is NaN or infinite makes its group decode to NaN.
//! - Overflow: weights beyond 65504 × 2^(b−1) are refused by name, since their scale would not fit f16. Below that, an
//!   outlier is kept or clipped, whichever costs less. Groups whose scale rounds to zero in f16 (all weights below about
//!   3e-8 × 2^(b−1)) become zero.
//! - Every product `level × d` fits f32 exactly, so decoding never rounds.
//!
//! Bits per weight: `b + 16/g`, and `b/g` more for a zero point: int4-g64 takes 4.25, int4-g64-asym 4.3125.

use std::sync::Arc;

use moepack_format::{Dtype, Error, PlaneSpec, Result};

use super::columns::{StaticColumns, by_column, scale_importance};
use super::lanes::{Groups, LANES, Lanes, MAGIC, clamp};
use super::{
    Codec, CodecFamily, ColumnCoder, ColumnPlan, Matrix, Planes, Reach, check_input, check_planes,
    check_shape,
};
use crate::bits::{self, packed_bytes};
use crate::isa::Isa;
use crate::minifloat::{F16_MAX, NAN_BITS, f16_to_f32};
use crate::per_isa;

mod fit;

/// Row of the table.
pub const FAMILY: CodecFamily = CodecFamily {
    pattern: "int{2,3,4,5,6,8}[-g{32,64,128}][-asym]",
    doc: "integer levels, one f16 scale a group of 32, 64 (if nothing is said) or 128",
    examples: &[
        "int2-g32",
        "int2-g64-asym",
        "int3-g64",
        "int3-g128-asym",
        "int4-g32",
        "int4-g64",
        "int4-g128",
        "int4-g64-asym",
        "int5-g64",
        "int5-g32-asym",
        "int6-g128",
        "int6-g64-asym",
        "int8-g64",
        "int8-g128-asym",
    ],
    parse: |name| parse(name).map(|int| Arc::new(int) as _),
};

/// Bits of a code.
pub const WIDTHS: [u32; 6] = [2, 3, 4, 5, 6, 8];
const GROUPS: [usize; 3] = [32, 64, 128];
const GROUP_MAX: usize = 128;

/// Integer levels with a scale a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Int {
    bits: u32,
    group: usize,
    asym: bool,
}

impl Int {
    /// The codec with these parameters, if there is one: 2, 3, 4, 5, 6 or 8 bits, groups of 32, 64 or 128.
    pub fn new(bits: u32, group: usize, asym: bool) -> Option<Int> {
        (WIDTHS.contains(&bits) && GROUPS.contains(&group)).then_some(Int { bits, group, asym })
    }

    /// Bits of a code.
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// Columns that share a scale.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Whether groups have a zero point.
    pub fn asym(&self) -> bool {
        self.asym
    }

    /// Zero point of symmetric groups: the code of zero.
    fn middle(&self) -> u8 {
        1 << (self.bits - 1)
    }

    fn groups(&self, rows: usize, cols: usize) -> Groups {
        Groups { rows, cols, size: self.group }
    }

    /// Scales and zero points of planes that [`Codec::encode`] made of `w`, `[groups, rows]`.
    fn by_column(&self, w: Matrix<'_>, planes: &Planes) -> (Vec<f32>, Vec<u8>) {
        let per_row = self.groups(1, w.cols).per_row();
        let mut zeros = vec![self.middle(); w.rows * per_row];
        if let Some(plane) = planes.get(2) {
            let packed = plane.chunks_exact(packed_bytes(self.bits, per_row));
            zeros
                .chunks_mut(per_row)
                .zip(packed)
                .for_each(|(z, p)| bits::unpack(Isa::SCALAR, self.bits, p, z));
        }
        let scales = planes.get(1).map_or(&[][..], |plane| plane.as_chunks().0);
        let scale = |i: usize| scales.get(i).map_or(0.0, |b| f16_to_f32(u16::from_le_bytes(*b)));
        (by_column(w.rows, per_row, scale), by_column(w.rows, per_row, |i| zeros[i]))
    }
}

fn parse(name: &str) -> Option<Int> {
    let mut words = name.strip_prefix("int")?.split('-');
    let bits = match words.next()? {
        digit if digit.len() == 1 => digit.parse().ok()?,
        _ => return None,
    };
    let mut words = words.peekable();
    let group = match words.next_if(|w| w.starts_with('g')) {
        Some(word) => *GROUPS.iter().find(|g| word == format!("g{g}"))?,
        None => 64,
    };
    let asym = match words.next() {
        None | Some("sym") => false,
        Some("asym") => true,
        Some(_) => return None,
    };
    if words.next().is_some() { None } else { Int::new(bits, group, asym) }
}

impl Codec for Int {
    fn name(&self) -> String {
        let asym = if self.asym { "-asym" } else { "" };
        format!("int{}-g{}{asym}", self.bits, self.group)
    }

    fn planes(&self, rows: usize, cols: usize) -> Result<Vec<PlaneSpec>> {
        check_shape(rows, cols)?;
        let groups = self.groups(rows, cols).per_row();
        let packed = |n| packed_bytes(self.bits, n) as u64;
        let rows = rows as u64;
        let mut planes = vec![
            PlaneSpec::new("codes", Dtype::U8, &[rows, packed(cols)]),
            PlaneSpec::new("scales", Dtype::F16, &[rows, groups as u64]),
        ];
        if self.asym {
            planes.push(PlaneSpec::new("zeros", Dtype::U8, &[rows, packed(groups)]));
        }
        Ok(planes)
    }

    fn encode(&self, isa: Isa, w: Matrix<'_>, importance: Option<&[f32]>) -> Result<Planes> {
        let largest = F16_MAX * f32::from(self.middle());
        check_input(isa, w, importance, Reach { codec: self.name(), largest })?;
        let groups = self.groups(w.rows, w.cols);
        let importance = importance.map(|i| groups.normalise(i));
        let mut codes = vec![0; w.rows * packed_bytes(self.bits, w.cols)];
        let mut scales = vec![0; groups.count() * 2];
        let zero_bytes = if self.asym { packed_bytes(self.bits, groups.per_row()) } else { 0 };
        let mut zeros = vec![0; w.rows * zero_bytes];
        encode_matrix(isa, self, w, importance.as_deref(), &mut codes, &mut scales, &mut zeros);
        let mut planes = vec![codes, scales];
        if self.asym {
            planes.push(zeros);
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
        let (scales, zeros) = self.by_column(w, &planes);
        let (rows, int) = (w.rows, *self);
        let round = move |column: usize, wanted: &[f32], codes: &mut [u8], decoded: &mut [f32]| {
            let first = column / int.group * rows;
            let (scales, zeros) = (&scales[first..first + rows], &zeros[first..first + rows]);
            round_column(isa, int.bits, scales, zeros, wanted, codes, decoded);
        };
        Ok(Some(Box::new(StaticColumns::of_bits(isa, self.bits, w.rows, w.cols, planes, round))))
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
        let (Some(codes), Some(scales)) = (planes.first(), planes.get(1)) else {
            return Err(Error::bad_data("planes are missing"));
        };
        let zeros = planes.get(2).copied().unwrap_or_default();
        decode_rows(isa, self, codes, scales, zeros, cols, first_row, out);
        Ok(())
    }
}

per_isa! {
    /// Writes codes, scales and, if the codec has them, zero points of a whole matrix.
    fn encode_matrix(
        int: &Int,
        w: Matrix<'_>,
        importance: Option<&[f32]>,
        codes: &mut [u8],
        scales: &mut [u8],
        zeros: &mut [u8],
    ) = encode_matrix_body;
}
per_isa! {
    /// Rounds a column with one scale and zero point a row.
    fn round_column(
        bits: u32,
        scales: &[f32],
        zeros: &[u8],
        wanted: &[f32],
        codes: &mut [u8],
        decoded: &mut [f32],
    ) = round_column_body;
}
per_isa! {
    /// Decodes rows from `first_row` on; lengths are already checked.
    fn decode_rows(
        int: &Int,
        codes: &[u8],
        scales: &[u8],
        zeros: &[u8],
        cols: usize,
        first_row: usize,
        out: &mut [f32],
    ) = decode_rows_body;
}

/// Sixteen groups at a time, over as few rows as give whole sixteens.
#[inline(always)]
fn encode_matrix_body(
    int: &Int,
    w: Matrix<'_>,
    importance: Option<&[f32]>,
    codes: &mut [u8],
    scales: &mut [u8],
    zeros: &mut [u8],
) {
    let all = int.groups(w.rows, w.cols);
    let per_row = all.per_row();
    let (code_bytes, zero_bytes) = (packed_bytes(int.bits, w.cols), packed_bytes(int.bits, per_row));
    let step = if per_row.is_multiple_of(LANES) { 1 } else { LANES };
    let mut levels = vec![0; step * w.cols];
    let mut zero_points = vec![0; step * per_row];
    for first in (0..w.rows).step_by(step) {
        let rows = step.min(w.rows - first);
        let part = Matrix { rows, cols: w.cols, data: &w.data[first * w.cols..(first + rows) * w.cols] };
        let part_scales = &mut scales[first * per_row * 2..(first + rows) * per_row * 2];
        encode_part(int, part, importance, &mut levels, part_scales, &mut zero_points);
        for r in 0..rows {
            let row = &mut codes[(first + r) * code_bytes..(first + r + 1) * code_bytes];
            bits::pack_body(int.bits, &levels[r * w.cols..(r + 1) * w.cols], row);
            if int.asym {
                let row = &mut zeros[(first + r) * zero_bytes..(first + r + 1) * zero_bytes];
                bits::pack_body(int.bits, &zero_points[r * per_row..(r + 1) * per_row], row);
            }
        }
    }
}

#[inline(always)]
fn encode_part(
    int: &Int,
    w: Matrix<'_>,
    importance: Option<&[f32]>,
    levels: &mut [u8],
    scales: &mut [u8],
    zero_points: &mut [u8],
) {
    let groups = int.groups(w.rows, w.cols);
    let mut x = [Lanes::ZERO; GROUP_MAX];
    let mut weights = [Lanes::ZERO; GROUP_MAX];
    let (x, weights) = (&mut x[..int.group], &mut weights[..int.group]);
    for first in (0..groups.count()).step_by(LANES) {
        groups.load(w, first, x);
        if let Some(importance) = importance {
            groups.load_importance(importance, first, weights);
        }
        let fit = fit::fit(int.bits, int.asym, x, importance.map(|_| &*weights));
        for l in 0..LANES.min(groups.count() - first) {
            let (scale, zero) = (fit.scale[l], fit.zero[l]);
            scales[(first + l) * 2..][..2].copy_from_slice(&scale.to_le_bytes());
            zero_points[first + l] = zero;
            let (start, len) = groups.span(first + l);
            quantize(int.bits, f16_to_f32(scale), zero, &w.data[start..][..len], &mut levels[start..][..len]);
        }
    }
}

/// The nearest level to each weight: the step from numbers to codes.
#[inline(always)]
fn quantize(bits: u32, scale: f32, zero: u8, values: &[f32], codes: &mut [u8]) {
    let inverse = inverse_of(scale);
    for (c, &v) in codes.iter_mut().zip(values) {
        *c = code_of(bits, inverse, zero, v);
    }
}

#[inline(always)]
fn inverse_of(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The code of the nearest level. Added to [`MAGIC`], a level is the low bits of a float, which saves the conversion.
#[inline(always)]
fn code_of(bits: u32, inverse: f32, zero: u8, value: f32) -> u8 {
    let lo = MAGIC - f32::from(zero);
    let hi = lo + ((1u32 << bits) - 1) as f32;
    let level = clamp(value * inverse + MAGIC, lo, hi);
    (level.to_bits() as u8).wrapping_add(zero)
}

/// The number of a code.
#[inline(always)]
fn value_of(scale: f32, zero: u8, code: u8) -> f32 {
    (i32::from(code) - i32::from(zero)) as f32 * scale
}

#[inline(always)]
fn round_column_body(
    bits: u32,
    scales: &[f32],
    zeros: &[u8],
    wanted: &[f32],
    codes: &mut [u8],
    decoded: &mut [f32],
) {
    let outputs = codes.iter_mut().zip(decoded);
    for (((code, decoded), &v), (&scale, &zero)) in outputs.zip(wanted).zip(scales.iter().zip(zeros)) {
        *code = code_of(bits, inverse_of(scale), zero, v);
        *decoded = value_of(scale, zero, *code);
    }
}

#[inline(always)]
fn decode_rows_body(
    int: &Int,
    codes: &[u8],
    scales: &[u8],
    zeros: &[u8],
    cols: usize,
    first_row: usize,
    out: &mut [f32],
) {
    let per_row = int.groups(1, cols).per_row();
    let (code_bytes, zero_bytes) = (packed_bytes(int.bits, cols), packed_bytes(int.bits, per_row));
    let group_bytes = packed_bytes(int.bits, int.group);
    let mut levels = [0; GROUP_MAX];
    let mut zero_points = vec![int.middle(); per_row];
    for (r, row) in (first_row..).zip(out.chunks_mut(cols)) {
        let codes = &codes[r * code_bytes..(r + 1) * code_bytes];
        if int.asym {
            bits::unpack_body(int.bits, &zeros[r * zero_bytes..(r + 1) * zero_bytes], &mut zero_points);
        }
        let scales = scales[r * per_row * 2..(r + 1) * per_row * 2].as_chunks().0;
        let groups = row.chunks_mut(int.group).zip(codes.chunks(group_bytes));
        for ((out, codes), (scale, zero)) in groups.zip(scales.iter().zip(&zero_points)) {
            let levels = &mut levels[..out.len()];
            bits::unpack_body(int.bits, codes, levels);
            dequantize(f16_to_f32(u16::from_le_bytes(*scale)), *zero, levels, out);
        }
    }
}

/// From codes to numbers.
#[inline(always)]
fn dequantize(scale: f32, zero: u8, codes: &[u8], out: &mut [f32]) {
    let scale = if scale.is_finite() { scale } else { f32::from_bits(NAN_BITS) };
    for (o, &c) in out.iter_mut().zip(codes) {
        *o = value_of(scale, zero, c);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(name: &str, data: &[f32]) -> Planes {
        let codec = parse(name).unwrap();
        codec.encode(Isa::get(), Matrix { rows: 1, cols: data.len(), data }, None).unwrap()
    }

    /// −8 … 7 twice, times `scale`.
    fn ramp(scale: f32) -> Vec<f32> {
        (0..32).map(|i| (i % 16 - 8) as f32 * scale).collect()
    }

    #[test]
    fn the_diagram_holds_and_the_sign_of_the_scale_turns_the_range() {
        let codes = [0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe];
        let codes = [codes, codes].concat();
        assert_eq!(encode("int4-g32", &ramp(0.5)), [codes.clone(), vec![0x00, 0x38]]);
        assert_eq!(encode("int4-g32", &ramp(-0.5)), [codes, vec![0x00, 0xb8]]);
    }

    #[test]
    fn a_zero_point_is_the_code_of_zero() {
        let positive: Vec<f32> = (0..32).map(|i| (i % 16) as f32 * 0.25).collect();
        let planes = encode("int4-g32-asym", &positive);
        assert_eq!(planes[0][..3], [0x10, 0x32, 0x54]);
        assert_eq!(planes[1..], [vec![0x00, 0x34], vec![0x00]]);
        let negative: Vec<f32> = positive.iter().map(|v| v - 3.75).collect();
        assert_eq!(encode("int4-g32-asym", &negative)[2], [0x0f]);
    }

    #[test]
    fn a_short_last_group_has_its_own_scale() {
        let data = [ramp(0.5), vec![100.0, -50.0, 25.0]].concat();
        let planes = encode("int4-g32", &data);
        assert_eq!((planes[0].len(), planes[1].len()), (18, 4));
        let first = encode("int4-g32", &ramp(0.5));
        assert_eq!((&planes[0][..16], &planes[1][..2]), (&first[0][..], &first[1][..]));
    }

    #[test]
    fn a_scale_that_is_no_number_spoils_its_group_only() {
        let mut planes = encode("int4-g32", &[ramp(0.5), ramp(0.5)].concat());
        planes[1][..2].copy_from_slice(&[0x00, 0x7c]);
        let mut out = [0.0; 64];
        let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
        parse("int4-g32").unwrap().decode(Isa::get(), &planes, 1, 64, 0, &mut out).unwrap();
        assert!(out[..32].iter().all(|v| v.to_bits() == NAN_BITS));
        assert_eq!(out[32..], ramp(0.5));
    }

    #[test]
    fn bits_per_weight_count_scales_and_zero_points() {
        let bpw = |name: &str| parse(name).unwrap().bits_per_weight(64, 2048).unwrap();
        assert_eq!((bpw("int4-g64"), bpw("int4-g64-asym"), bpw("int2-g32")), (4.25, 4.3125, 2.5));
    }
}
