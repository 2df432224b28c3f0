//! `affine2` … `affine8`: integer codes as other people's quantizers release them, held without rounding anew.
//!
//! Name: `affine{2-8}-g{N}[-bf16|-f32][-asym][-idx]`; scales are f16 where nothing is said. It is what compressed-tensors'
//! `pack-quantized` and `int-quantized`, GPTQ and AWQ checkpoints mean once their order of bytes is undone
//! (`packing.rs` of `convert`): any group, a scale type of the release's choice, and GPTQ's act-order, whose columns
//! say themselves which group they belong to. What is quantized here takes `int`, which fits scales better. Planes of
//! a `[rows, cols]` matrix, with `n = ceil(cols / g)` groups a row and `b` bits:
//!
//! ```text
//!  codes   U8              [rows, ceil(cols·b / 8)]   codes u, b bits each, a row is one stream as in `int`
//!  scales  F16 | BF16 | F32  [rows, n]                scale d of each group
//!  zeros   U8              [rows, ceil(n·b / 8)]      only -asym: zero point z of each group, packed like the codes
//!  g_idx   I32             [cols]                     only -idx: group of each column; else column / g
//!
//!  symmetric   value = (u − 2^(b−1)) × d
//!  asymmetric  value = (u − z) × d
//! ```
//!
//! - Encoding takes the scale that maps the group's ends to the outermost levels, as compressed-tensors' min-max
//!   observer does; importance changes nothing.
//! - NaN and infinity are refused when encoding; so is what f16 scales do not reach. A scale that is NaN or infinite
//!   makes its group decode to NaN, and so does a column whose group does not exist.
//! - With f16 and bf16 scales every product fits f32 exactly, so decoding never rounds; with f32 it rounds once.
//!
//! Bits per weight: `b + 16/g` (`b + 32/g` with f32), `b/g` more for a zero point, `32/rows` more for `-idx`.

use std::sync::Arc;

use moepack_format::{Dtype, Error, PlaneSpec, Result};

use super::{
    Codec, CodecFamily, Matrix, Planes, REACH_OF_FLOATS, Reach, check_input, check_planes, check_shape,
};
use crate::bits::{self, packed_bytes};
use crate::isa::Isa;
use crate::minifloat::{F16_MAX, NAN_BITS, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::per_isa;

/// Row of the table.
pub const FAMILY: CodecFamily = CodecFamily {
    pattern: "affine{2-8}-g{N}[-bf16|-f32][-asym][-idx]",
    doc: "integer levels as GPTQ, AWQ and compressed-tensors release them",
    examples: &[
        "affine2-g16-asym",
        "affine3-g64-bf16",
        "affine4-g32-bf16",
        "affine4-g128-asym-idx",
        "affine4-g100-f32-idx",
        "affine5-g32-f32-asym",
        "affine6-g48-bf16-asym",
        "affine7-g64",
        "affine8-g2048-bf16",
        "affine8-g32-f32-asym",
    ],
    parse: |name| parse(name).map(|codec| Arc::new(codec) as _),
};

/// Widths of codes.
pub const BITS: std::ops::RangeInclusive<u32> = 2..=8;
/// Largest group that a name may ask for.
const GROUP_MAX: usize = 1 << 20;

/// How scales are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// GPTQ, AWQ.
    F16,
    /// compressed-tensors.
    Bf16,
    /// Sometimes either.
    F32,
}

impl Scales {
    const fn dtype(self) -> Dtype {
        match self {
            Scales::F16 => Dtype::F16,
            Scales::Bf16 => Dtype::Bf16,
            Scales::F32 => Dtype::F32,
        }
    }

    const fn bytes(self) -> usize {
        if matches!(self, Scales::F32) { 4 } else { 2 }
    }

    /// The scale at `index` of the plane; one NaN for whatever is no finite number.
    #[inline(always)]
    fn get(self, plane: &[u8], index: usize) -> f32 {
        let scale = match self {
            Scales::F16 => f16_to_f32(u16::from_le_bytes(plane.as_chunks().0[index])),
            Scales::Bf16 => bf16_to_f32(u16::from_le_bytes(plane.as_chunks().0[index])),
            Scales::F32 => f32::from_le_bytes(plane.as_chunks().0[index]),
        };
        if scale.is_finite() { scale } else { f32::from_bits(NAN_BITS) }
    }

    /// Appends a scale and returns what was stored.
    fn put(self, plane: &mut Vec<u8>, scale: f32) -> f32 {
        match self {
            Scales::F16 => {
                let code = f32_to_f16(scale);
                plane.extend(code.to_le_bytes());
                f16_to_f32(code)
            }
            Scales::Bf16 => {
                let code = f32_to_bf16(scale);
                plane.extend(code.to_le_bytes());
                bf16_to_f32(code)
            }
            Scales::F32 => {
                plane.extend(scale.to_le_bytes());
                scale
            }
        }
    }
}

/// Integer codes with a scale a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Affine {
    /// Bits of a code, [`BITS`].
    pub bits: u32,
    /// Columns that share a scale.
    pub group: usize,
    /// How scales are stored.
    pub scales: Scales,
    /// Groups have a zero point.
    pub asym: bool,
    /// Columns say which group they belong to.
    pub indexed: bool,
}

impl Affine {
    /// Whether there is such a codec.
    pub fn is_valid(&self) -> bool {
        BITS.contains(&self.bits) && (1..=GROUP_MAX).contains(&self.group)
    }

    /// Groups of a row.
    pub fn per_row(&self, cols: usize) -> usize {
        cols.div_ceil(self.group)
    }

    fn middle(&self) -> u8 {
        1 << (self.bits - 1)
    }

    fn largest_code(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// Scale and zero point whose outermost levels are the ends of `values` (and zero).
    fn fit(&self, values: &[f32]) -> (f32, u8) {
        let (low, high) = values.iter().fold((0.0f32, 0.0f32), |(l, h), &v| (l.min(v), h.max(v)));
        let n = self.largest_code();
        if !self.asym {
            return (2.0 * (high.max(-low) / n), self.middle());
        }
        let scale = high / n - low / n;
        let zero = if scale > 0.0 { (-low / scale).round_ties_even().clamp(0.0, n) } else { 0.0 };
        (scale, zero as u8)
    }

    /// The code nearest to a value.
    fn code_of(&self, scale: f32, zero: u8, value: f32) -> u8 {
        let level = if scale > 0.0 { (value / scale).round_ties_even() } else { 0.0 };
        (level + f32::from(zero)).clamp(0.0, self.largest_code()) as u8
    }
}

fn parse(name: &str) -> Option<Affine> {
    let mut words = name.strip_prefix("affine")?.split('-').peekable();
    let bits = match words.next()?.as_bytes() {
        [digit @ b'2'..=b'8'] => u32::from(digit - b'0'),
        _ => return None,
    };
    let group = words.next()?.strip_prefix('g')?;
    let plain = group.bytes().all(|b| b.is_ascii_digit()) && !group.starts_with('0');
    let group = if plain { group.parse().ok()? } else { return None };
    let scales = match words.peek() {
        Some(&"bf16") => Scales::Bf16,
        Some(&"f32") => Scales::F32,
        _ => Scales::F16,
    };
    if scales != Scales::F16 {
        words.next();
    }
    let asym = words.next_if_eq(&"asym").is_some();
    let indexed = words.next_if_eq(&"idx").is_some();
    let codec = Affine { bits, group, scales, asym, indexed };
    Some(codec).filter(|c| words.next().is_none() && c.is_valid())
}

impl Codec for Affine {
    fn name(&self) -> String {
        let scales = match self.scales {
            Scales::F16 => "",
            Scales::Bf16 => "-bf16",
            Scales::F32 => "-f32",
        };
        let asym = if self.asym { "-asym" } else { "" };
        let indexed = if self.indexed { "-idx" } else { "" };
        format!("affine{}-g{}{scales}{asym}{indexed}", self.bits, self.group)
    }

    fn planes(&self, rows: usize, cols: usize) -> Result<Vec<PlaneSpec>> {
        check_shape(rows, cols)?;
        let groups = self.per_row(cols);
        let packed = |n| packed_bytes(self.bits, n) as u64;
        let rows = rows as u64;
        let mut planes = vec![
            PlaneSpec::new("codes", Dtype::U8, &[rows, packed(cols)]),
            PlaneSpec::new("scales", self.scales.dtype(), &[rows, groups as u64]),
        ];
        if self.asym {
            planes.push(PlaneSpec::new("zeros", Dtype::U8, &[rows, packed(groups)]));
        }
        if self.indexed {
            planes.push(PlaneSpec::new("g_idx", Dtype::I32, &[cols as u64]));
        }
        Ok(planes)
    }

    fn encode(&self, isa: Isa, w: Matrix<'_>, importance: Option<&[f32]>) -> Result<Planes> {
        let reach = match self.scales {
            Scales::F16 => F16_MAX * self.largest_code() / 2.0,
            _ => REACH_OF_FLOATS,
        };
        check_input(isa, w, importance, Reach { codec: self.name(), largest: reach })?;
        let (mut codes, mut scales, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
        for row in w.data.chunks_exact(w.cols) {
            let (mut levels, mut points) = (Vec::with_capacity(w.cols), Vec::new());
            for values in row.chunks(self.group) {
                let (scale, zero) = self.fit(values);
                let scale = self.scales.put(&mut scales, scale);
                points.push(zero);
                levels.extend(values.iter().map(|&v| self.code_of(scale, zero, v)));
            }
            append(isa, self.bits, &levels, &mut codes);
            append(isa, self.bits, &points, &mut zeros);
        }
        let mut planes = vec![codes, scales];
        if self.asym {
            planes.push(zeros);
        }
        if self.indexed {
            planes.push((0..w.cols).flat_map(|c| ((c / self.group) as i32).to_le_bytes()).collect());
        }
        Ok(planes)
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
        let zeros = if self.asym { planes.get(2).copied() } else { None };
        let g_idx = if self.indexed { planes.last().copied() } else { None };
        let columns = self.columns_of(cols, g_idx);
        decode_rows(isa, self, codes, scales, zeros.unwrap_or_default(), &columns, first_row, out);
        Ok(())
    }
}

impl Affine {
    /// The group of each column; one past the last stands for those that do not exist.
    fn columns_of(&self, cols: usize, g_idx: Option<&[u8]>) -> Vec<u32> {
        let n = self.per_row(cols);
        match g_idx {
            None => (0..cols).map(|c| (c / self.group) as u32).collect(),
            Some(plane) => {
                let index = |b: &[u8; 4]| u32::from_le_bytes(*b).min(u32::try_from(n).unwrap_or(u32::MAX));
                plane.as_chunks().0.iter().map(index).collect()
            }
        }
    }
}

/// Appends codes as a stream that begins with a byte of its own.
fn append(isa: Isa, width: u32, codes: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + packed_bytes(width, codes.len()), 0);
    bits::pack(isa, width, codes, &mut out[start..]);
}

per_isa! {
    /// Decodes rows from `first_row` on; lengths are already checked.
    fn decode_rows(
        affine: &Affine,
        codes: &[u8],
        scales: &[u8],
        zeros: &[u8],
        columns: &[u32],
        first_row: usize,
        out: &mut [f32],
    ) = decode_rows_body;
}

#[inline(always)]
fn decode_rows_body(
    affine: &Affine,
    codes: &[u8],
    scales: &[u8],
    zeros: &[u8],
    columns: &[u32],
    first_row: usize,
    out: &mut [f32],
) {
    let (cols, n) = (columns.len(), affine.per_row(columns.len()));
    let (code_bytes, zero_bytes) = (packed_bytes(affine.bits, cols), packed_bytes(affine.bits, n));
    let mut levels = vec![0; cols];
    let mut points = vec![affine.middle(); n];
    let mut factors = vec![f32::from_bits(NAN_BITS); n + 1];
    let mut offsets = vec![0.0; n + 1];
    for (row, out) in (first_row..).zip(out.chunks_exact_mut(cols)) {
        bits::unpack_body(affine.bits, &codes[row * code_bytes..], &mut levels);
        if affine.asym {
            bits::unpack_body(affine.bits, &zeros[row * zero_bytes..], &mut points);
        }
        let scales = &scales[row * n * affine.scales.bytes()..];
        for (g, &point) in points.iter().enumerate() {
            factors[g] = affine.scales.get(scales, g);
            offsets[g] = f32::from(point);
        }
        match affine.indexed {
            false => by_groups(affine.group, &levels, &factors, &offsets, out),
            true => by_columns(columns, &levels, &factors, &offsets, out),
        }
    }
}

#[inline(always)]
fn by_groups(group: usize, levels: &[u8], factors: &[f32], offsets: &[f32], out: &mut [f32]) {
    let groups = out.chunks_mut(group).zip(levels.chunks(group));
    for ((out, levels), (&factor, &offset)) in groups.zip(factors.iter().zip(offsets)) {
        for (o, &level) in out.iter_mut().zip(levels) {
            *o = (f32::from(level) - offset) * factor;
        }
    }
}

#[inline(always)]
fn by_columns(columns: &[u32], levels: &[u8], factors: &[f32], offsets: &[f32], out: &mut [f32]) {
    for ((o, &level), &group) in out.iter_mut().zip(levels).zip(columns) {
        *o = (f32::from(level) - offsets[group as usize]) * factors[group as usize];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(name: &str, planes: &[&[u8]], rows: usize, cols: usize) -> Vec<f32> {
        let mut out = vec![0.0; rows * cols];
        parse(name).unwrap().decode(Isa::get(), planes, rows, cols, 0, &mut out).unwrap();
        out
    }

    #[test]
    fn values_are_codes_less_zero_times_scale() {
        let two: [u8; 4] = [0x00, 0x40, 0x00, 0x3c]; // 2 and 1 in f16
        let symmetric = decode("affine4-g2", &[&[0x98, 0x0f], &two], 1, 4);
        assert_eq!(symmetric, [0.0, 2.0, 7.0, -8.0]);
        let asymmetric = decode("affine4-g2-asym", &[&[0x98, 0x0f], &two, &[0x31]], 1, 4);
        assert_eq!(asymmetric, [14.0, 16.0, 12.0, -3.0]);
    }

    #[test]
    fn columns_choose_their_group_and_a_group_that_does_not_exist_is_no_number() {
        let index: Vec<u8> = [1i32, 0, 2, -1].iter().flat_map(|i| i.to_le_bytes()).collect();
        let found = decode("affine4-g2-idx", &[&[0x98, 0x0f], &[0x00, 0x40, 0x00, 0x3c], &index], 1, 4);
        assert_eq!(found[..2], [0.0, 2.0]);
        assert!(found[2].is_nan() && found[3].is_nan());
    }

    #[test]
    fn other_names_are_none() {
        for name in
            ["affine4", "affine9-g32", "affine4-g0", "affine4-g032", "affine4-g32-idx-asym", "affine1-g8"]
        {
            assert!(parse(name).is_none(), "{name}");
        }
    }
}
