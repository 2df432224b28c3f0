//! ggml's block types: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K … Q6_K, IQ4_NL and IQ4_XS, as GGUF files hold them.
//!
//! Names: ggml's in lower case, such as `q4_k`. A row is a sequence of blocks of 32 or 256 neighbouring numbers, so `cols` must
//! be a multiple of that. A `[rows, cols]` matrix has one plane, whose bytes are those of a GGUF tensor:
//!
//! ```text
//!  blocks  U8 [rows, cols / block × block_bytes]
//!
//!  block = groups of 16 or 32 numbers with a scale, and for some types a minimum, in units of the block's d and dmin
//!  value = (d × scale) × level − (dmin × minimum)          two products and a difference, each rounded to f32
//! ```
//!
//! `kinds.rs` is the table of the types; `blocks/` draws where the bits lie, a page a type; `levels.rs` what codes mean;
//! `fit.rs` how scales are found. What has no scales or minimums a group has scales of 1, and minimums of −1 where `m`
//! is added.
//!
//! - Zero is exact where there is no minimum, and nearly so where there is one; a block of zeros decodes to zeros. The
//!   sign of zero is lost.
//! - NaN and infinity are refused when encoding. Where `d` or `dmin` is NaN or infinite, values that are no numbers
//!   come out as one quiet NaN.
//! - Weights that f16 scales cannot reach are refused by name; such as are smaller than a step of 2^-24 become zero.
//! - A level of −128 in Q8_0 is decoded but not written, as in ggml.
//!
//! Bits per weight: 8.5 (q8_0), 4.5 (q4_0, iq4_nl), 5, 5.5, 6 (q4_1, q5_0, q5_1), 2.625, 3.4375, 4.5, 5.5, 6.5625
//! (q2_k … q6_k), 4.25 (iq4_xs).

use std::sync::Arc;

use moepack_format::{Dtype, Error, PlaneSpec, Result};

use super::columns::{StaticColumns, scale_importance};
use super::lanes::{Groups, LANES, Lanes};
use super::{
    Codec, CodecFamily, ColumnCoder, ColumnPlan, Matrix, Planes, Reach, check_input, check_planes,
    check_shape,
};
use crate::isa::Isa;
use crate::minifloat::{F16_MAX, NAN_BITS, f16_to_f32};
use crate::per_isa;

mod blocks;
mod fit;
pub mod kinds;
pub mod levels;
pub mod mxfp4;

use kinds::{Id, KINDS, Kind, Mins, Parts, SUPER_BLOCK};

/// Row of the table: blocks of 32.
pub const LEGACY: CodecFamily = CodecFamily {
    pattern: "q{4_0,4_1,5_0,5_1,8_0}",
    doc: "ggml's blocks of 32 with an f16 scale, and with a minimum in those that end in _1",
    examples: &["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"],
    parse: |name| parse(&LEGACY, name),
};

/// Row of the table: k-quants.
pub const K_QUANTS: CodecFamily = CodecFamily {
    pattern: "q{2,3,4,5,6}_k",
    doc: "ggml's k-quants: blocks of 256 in groups with scales, and in q2_k, q4_k, q5_k minimums, of 4 to 8 bits",
    examples: &["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"],
    parse: |name| parse(&K_QUANTS, name),
};

/// Row of the table: levels from ggml's table of sixteen.
pub const IQ4: CodecFamily = CodecFamily {
    pattern: "iq4_{nl,xs}",
    doc: "ggml's sixteen uneven levels, in blocks of 32 or with scales of 6 bits in blocks of 256",
    examples: &["iq4_nl", "iq4_xs"],
    parse: |name| parse(&IQ4, name),
};

fn parse(family: &CodecFamily, name: &str) -> Option<super::CodecRef> {
    let kind = KINDS.iter().find(|k| k.name == name && family.examples.contains(&name))?;
    Some(Arc::new(Ggml(kind)))
}

/// A block type of ggml.
#[derive(Clone, Copy, Debug)]
pub struct Ggml(&'static Kind);

impl Ggml {
    /// What is known of the type.
    pub fn kind(&self) -> &'static Kind {
        self.0
    }

    /// What `d` times scales times levels, or `dmin` times minimums, reaches on either side of zero.
    fn reach(&self) -> f32 {
        match self.0.mins {
            Mins::None => F16_MAX * self.0.levels.reach() * f32::from(self.0.scales.1),
            Mins::Block => F16_MAX,
            Mins::Groups(most) => F16_MAX * f32::from(most),
        }
    }
}

impl Codec for Ggml {
    fn name(&self) -> String {
        self.0.name.to_owned()
    }

    fn planes(&self, rows: usize, cols: usize) -> Result<Vec<PlaneSpec>> {
        check_shape(rows, cols)?;
        let (name, block) = (self.0.name, self.0.block);
        if !cols.is_multiple_of(block) {
            let hint = match block {
                SUPER_BLOCK if cols.is_multiple_of(32) => "q4_0, q5_0, q8_0 and iq4_nl take multiples of 32",
                _ => {
                    "int4-g32 takes any number of columns; ggml has no type for such rows but f16, bf16 and f32"
                }
            };
            return Err(
                Error::plan(format!("{cols} columns, but {name} needs a multiple of {block}")).hint(hint)
            );
        }
        let row_bytes = cols / block * self.0.block_bytes;
        Ok(vec![PlaneSpec::new("blocks", Dtype::U8, &[rows as u64, row_bytes as u64])])
    }

    fn encode(&self, isa: Isa, w: Matrix<'_>, importance: Option<&[f32]>) -> Result<Planes> {
        let bytes = self.planes(w.rows, w.cols)?.iter().map(PlaneSpec::bytes).sum::<Result<u64>>()?;
        check_input(isa, w, importance, Reach { codec: self.name(), largest: self.reach() })?;
        let importance =
            importance.map(|i| normalise(i, self.0.block)).filter(|i| i.iter().any(|&v| v != 1.0));
        let mut plane = vec![0; bytes as usize];
        let importance = importance.as_deref();
        if fit::alike::takes(self.0, importance.is_some()) {
            encode_alike(isa, isa, self.0, w.data, importance, &mut plane);
        } else {
            encode_matrix(isa, self.0, w, importance, &mut plane);
        }
        Ok(vec![plane])
    }

    fn columns<'a>(
        &'a self,
        isa: Isa,
        w: Matrix<'a>,
        plan: ColumnPlan<'a>,
    ) -> Result<Option<Box<dyn ColumnCoder + 'a>>> {
        let planes = self.encode(isa, w, Some(&scale_importance(plan)))?;
        let kind = self.0;
        let plane = planes.first().map_or(&[][..], Vec::as_slice);
        let (scales, mins) = by_column(kind, w, plane);
        let round = move |column: usize, wanted: &[f32], codes: &mut [u8], decoded: &mut [f32]| {
            let first = column / kind.group * wanted.len();
            let (scales, mins) = (&scales[first..][..wanted.len()], &mins[first..][..wanted.len()]);
            round_column(isa, kind, scales, mins, wanted, codes, decoded);
        };
        let pack = move |codes: &[u8], row: &mut [u8]| replace_codes(kind, codes, row);
        Ok(Some(Box::new(StaticColumns::packed_by(isa, w.rows, w.cols, planes, round, pack))))
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
        let skip = first_row * (cols / self.0.block) * self.0.block_bytes;
        let blocks = planes.first().and_then(|p| p.get(skip..)).unwrap_or_default();
        decode_blocks(isa, self.0, blocks, out);
        Ok(())
    }
}

/// Importance with the largest of each block of columns made 1. Nothing counts less than a ten-millionth of that, which
/// keeps every sum a number; a block without importance counts all alike.
fn normalise(importance: &[f32], block: usize) -> Vec<f32> {
    const LEAST: f32 = 1e-7;
    let mut out = Groups { rows: 1, cols: importance.len(), size: block }.normalise(importance);
    out.iter_mut().for_each(|v| *v = v.max(LEAST));
    out
}

per_isa! {
    fn encode_matrix(kind: &Kind, w: Matrix<'_>, importance: Option<&[f32]>, plane: &mut [u8]) = encode_matrix_body;
}
per_isa! {
    fn encode_alike(
        level: Isa,
        kind: &Kind,
        data: &[f32],
        importance: Option<&[f32]>,
        plane: &mut [u8],
    ) = fit::alike::encode;
}
per_isa! {
    fn decode_blocks(kind: &Kind, blocks: &[u8], out: &mut [f32]) = decode_blocks_body;
}
per_isa! {
    /// Rounds a column with a scale and a minimum a row.
    fn round_column(
        kind: &Kind,
        scales: &[f32],
        mins: &[f32],
        wanted: &[f32],
        codes: &mut [u8],
        decoded: &mut [f32],
    ) = round_column_body;
}

#[inline(always)]
fn encode_matrix_body(kind: &Kind, w: Matrix<'_>, importance: Option<&[f32]>, plane: &mut [u8]) {
    match kind.id {
        // The types that ggml is fastest at: here the compiler may know how many groups there are, and what is not.
        Id::Q2K => encode_as(const { Kind::of(Id::Q2K) }, w, importance, plane),
        Id::Q3K => encode_as(const { Kind::of(Id::Q3K) }, w, importance, plane),
        _ => encode_as(kind, w, importance, plane),
    }
}

/// Sixteen groups at a time: one block of sixteen groups, two of eight, or sixteen of one.
#[inline(always)]
fn encode_as(kind: &Kind, w: Matrix<'_>, importance: Option<&[f32]>, plane: &mut [u8]) {
    let groups = Groups { rows: w.rows, cols: w.cols, size: kind.group };
    let mut x = [Lanes::ZERO; 32];
    let mut weights = [Lanes::splat(1.0); 32];
    let (x, weights) = (&mut x[..kind.group], &mut weights[..kind.group]);
    let mut parts = Parts::EMPTY;
    let n_blocks = LANES / kind.n_groups();
    let data = w.data.chunks(n_blocks * kind.block);
    let planes = plane.chunks_mut(n_blocks * kind.block_bytes);
    for (first, (data, plane)) in (0..).step_by(LANES).zip(data.zip(planes)) {
        groups.load(w, first, x);
        let fit = match importance {
            None => fit::fit::<true>(kind, x, weights),
            Some(importance) => {
                groups.load_importance(importance, first, weights);
                fit::fit::<false>(kind, x, weights)
            }
        };
        let (by, low) = fit.inverse_factors();
        let blocks = data.chunks_exact(kind.block).zip(plane.chunks_exact_mut(kind.block_bytes));
        for (lane, (numbers, block)) in (0..).step_by(kind.n_groups()).zip(blocks) {
            (parts.d, parts.dmin) = fit.block(lane);
            for g in 0..kind.n_groups() {
                (parts.scales[g], parts.mins[g]) = fit.group(lane + g);
                let (by, low) = (by.0[lane + g], low.0[lane + g]);
                let codes = &mut parts.codes[g * kind.group..][..kind.group];
                for (code, &v) in codes.iter_mut().zip(&numbers[g * kind.group..][..kind.group]) {
                    *code = kind.levels.code((v + low) * by);
                }
            }
            parts.write(kind, block);
        }
    }
}

#[inline(always)]
fn decode_blocks_body(kind: &Kind, blocks: &[u8], out: &mut [f32]) {
    let mut parts = Parts::EMPTY;
    for (block, out) in blocks.chunks_exact(kind.block_bytes).zip(out.chunks_exact_mut(kind.block)) {
        parts.read(kind, block);
        for g in 0..kind.n_groups() {
            let (scale, min) = parts.factors(g);
            let codes = &parts.codes[g * kind.group..][..kind.group];
            for (o, &code) in out[g * kind.group..][..kind.group].iter_mut().zip(codes) {
                *o = scale * kind.levels.level(code) - min;
            }
        }
        if !(f16_to_f32(parts.d).is_finite() && f16_to_f32(parts.dmin).is_finite()) {
            out.iter_mut().filter(|v| v.is_nan()).for_each(|v| *v = f32::from_bits(NAN_BITS));
        }
    }
}

#[inline(always)]
fn round_column_body(
    kind: &Kind,
    scales: &[f32],
    mins: &[f32],
    wanted: &[f32],
    codes: &mut [u8],
    decoded: &mut [f32],
) {
    let factors = scales.iter().zip(mins);
    let outs = codes.iter_mut().zip(decoded);
    for (((&scale, &min), &v), (code, decoded)) in factors.zip(wanted).zip(outs) {
        *code = kind.levels.code((v + min) * fit::inverse(scale));
        *decoded = scale * kind.levels.level(*code) - min;
    }
}

/// Scales and minimums of the groups of a coded matrix, each `[groups, rows]`.
fn by_column(kind: &Kind, w: Matrix<'_>, plane: &[u8]) -> (Vec<f32>, Vec<f32>) {
    let per_row = w.cols / kind.group;
    let (mut scales, mut mins) = (vec![0.0; w.rows * per_row], vec![0.0; w.rows * per_row]);
    let mut parts = Parts::EMPTY;
    for (b, block) in plane.chunks_exact(kind.block_bytes).enumerate() {
        parts.read(kind, block);
        for g in 0..kind.n_groups() {
            let group = b * kind.n_groups() + g;
            let place = group % per_row * w.rows + group / per_row;
            (scales[place], mins[place]) = parts.factors(g);
        }
    }
    (scales, mins)
}

/// Writes other codes into a row of blocks.
fn replace_codes(kind: &Kind, codes: &[u8], row: &mut [u8]) {
    let mut parts = Parts::EMPTY;
    for (codes, block) in codes.chunks_exact(kind.block).zip(row.chunks_exact_mut(kind.block_bytes)) {
        parts.read(kind, block);
        parts.codes[..kind.block].copy_from_slice(codes);
        parts.write(kind, block);
    }
}

impl Parts {
    /// `d × scale` and `dmin × minimum` of a group; the products fit f32 exactly.
    #[inline(always)]
    fn factors(&self, group: usize) -> (f32, f32) {
        let min = f16_to_f32(self.dmin) * f32::from(self.mins[group]);
        (f16_to_f32(self.d) * f32::from(self.scales[group]), min)
    }
}
