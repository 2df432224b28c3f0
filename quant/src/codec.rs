//! What a codec is, and the table of all of them.
//!
//! A codec says how the numbers of a matrix are encoded: which planes there are and what they mean. It does not
//! choose levels cleverly (that is a solver's work, see [`crate::solve`]), and it knows no file.

use std::fmt::Debug;
use std::sync::Arc;

use moepack_format::{Error, PlaneSpec, Result};

use crate::isa::Isa;
use crate::numbers;

pub mod affine;
mod columns;
pub mod fp8_block;
pub mod ggml;
pub mod int;
mod lanes;
pub mod mxfp4;
pub mod nvfp4;
pub mod plain;
pub mod tcq;

#[cfg(test)]
mod laws;

/// A row of [`CODECS`]: codecs that differ in parameters only.
pub struct CodecFamily {
    /// Shape of the names, for help: `int{2,3,4,5,6,8}[-g{32,64,128}][-asym]`.
    pub pattern: &'static str,
    /// One line for help.
    pub doc: &'static str,
    /// Canonical names; the laws run over them, so together they reach every branch.
    pub examples: &'static [&'static str],
    /// The codec of that name, canonical or not; `None` if the name is not of this family.
    pub parse: fn(&str) -> Option<CodecRef>,
}

/// Every codec there is.
pub const CODECS: &[CodecFamily] = &[
    plain::BF16,
    plain::F16,
    plain::F32,
    fp8_block::FAMILY,
    mxfp4::FAMILY,
    nvfp4::FAMILY,
    int::FAMILY,
    affine::FAMILY,
    tcq::FAMILY,
    ggml::LEGACY,
    ggml::K_QUANTS,
    ggml::IQ4,
];

/// The codec that `name` says, such as `int4-g64`, `fp8-block` or `mxfp4`.
///
/// # Errors
/// An unknown name (kind `Usage`), with the patterns of the known ones.
pub fn codec(name: &str) -> Result<CodecRef> {
    CODECS.iter().find_map(|family| (family.parse)(name)).ok_or_else(|| {
        let known: Vec<_> = CODECS.iter().map(|family| family.pattern).collect();
        Error::usage(format!("unknown codec {name:?}, known are {}", known.join(" ")))
            .hint("int4-g64 is a good start; bf16 keeps everything")
    })
}

/// A row-major f32 matrix, `[rows, cols]`; rows are outputs, columns are inputs.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// Number of outputs.
    pub rows: usize,
    /// Number of inputs.
    pub cols: usize,
    /// `rows * cols` values.
    pub data: &'a [f32],
}

/// The bytes of a coded matrix, one vector a plane, in the order of [`Codec::planes`].
pub type Planes = Vec<Vec<u8>>;

/// How the numbers of a matrix are encoded. A value is one codec with all its parameters fixed.
pub trait Codec: Send + Sync + Debug {
    /// Canonical name with parameters, such as `int4-g64` or `mxfp4`; [`codec`] parses it.
    fn name(&self) -> String;

    /// The planes of a `[rows, cols]` matrix.
    ///
    /// # Errors
    /// A shape this codec cannot hold (kind `Plan`), with the nearest codec that can.
    fn planes(&self, rows: usize, cols: usize) -> Result<Vec<PlaneSpec>>;

    /// Encodes with the scales that minimise the squared error weighted by `importance` (one weight a column;
    /// `None` counts all alike).
    ///
    /// # Errors
    /// A shape this codec cannot hold, NaN or infinity, a value beyond what the codec reaches.
    fn encode(&self, isa: Isa, w: Matrix<'_>, importance: Option<&[f32]>) -> Result<Planes>;

    /// Decodes rows `first_row ..` into `out`, whose length is a multiple of `cols`. `planes` are the whole planes.
    /// Never panics on any bytes; plane lengths are compared with [`Codec::planes`] first.
    ///
    /// # Errors
    /// Planes of the wrong number or length; a scale that makes no number where the codec forbids it.
    fn decode(
        &self,
        isa: Isa,
        planes: &[&[u8]],
        rows: usize,
        cols: usize,
        first_row: usize,
        out: &mut [f32],
    ) -> Result<()>;

    /// The planes of a matrix that was coded: those of [`Codec::planes`], with the lengths that they came out with.
    ///
    /// # Errors
    /// A shape this codec cannot hold.
    fn planes_of(&self, rows: usize, cols: usize, _coded: &Planes) -> Result<Vec<PlaneSpec>> {
        self.planes(rows, cols)
    }

    /// The same codec, writing at most `bits` a weight, all planes counted, and hardly less. `None` where the codec has
    /// one rate only.
    fn at_rate(&self, _bits: f64) -> Option<CodecRef> {
        None
    }

    /// Begins to code a matrix column by column. `None` where the codec does not work so.
    ///
    /// # Errors
    /// Those of [`Codec::encode`].
    fn columns<'a>(
        &'a self,
        _isa: Isa,
        _w: Matrix<'a>,
        _plan: ColumnPlan<'a>,
    ) -> Result<Option<Box<dyn ColumnCoder + 'a>>> {
        Ok(None)
    }

    /// Bytes that [`Codec::encode`] takes at most beside the matrix and what it returns, and that a decoded part of
    /// [`Codec::rows_at_once`] rows takes, where that is much.
    fn coding_bytes(&self, _rows: usize, _cols: usize) -> u64 {
        0
    }

    /// Rows that are decoded together: a decoder asked for fewer does the work of this many.
    fn rows_at_once(&self, _rows: usize) -> usize {
        1
    }

    /// Bits per weight of a `[rows, cols]` matrix, every scale and table counted; at most so many where the lengths of
    /// planes depend on the numbers.
    ///
    /// # Errors
    /// A shape this codec cannot hold.
    fn bits_per_weight(&self, rows: usize, cols: usize) -> Result<f64> {
        let mut bytes = 0;
        for plane in self.planes(rows, cols)? {
            bytes += plane.bytes()?;
        }
        Ok(bytes as f64 * 8.0 / (rows as f64 * cols as f64))
    }
}

/// A codec, shared.
pub type CodecRef = Arc<dyn Codec>;

/// What a solver says before it has a matrix coded column by column.
#[derive(Clone, Copy, Debug)]
pub struct ColumnPlan<'a> {
    /// The columns in the order in which they will come; each once.
    pub order: &'a [usize],
    /// What a squared error in each column costs while all later columns can still make up for it (the diagonal
    /// `d_j²` of GPTQ's factor), `[cols]`, by column and not by order. Steps may be chosen by it.
    pub cost: &'a [f32],
    /// What a squared error costs without feedback (the diagonal of the Hessian), `[cols]`. Scales that several columns
    /// share are fitted by it.
    pub importance: &'a [f32],
}

/// Codes a matrix one column after the other, so that a solver can make later columns correct the errors of earlier
/// ones.
pub trait ColumnCoder {
    /// Codes column `column`: `wanted` are the values that would be best, `decoded` becomes what was coded. Both are
    /// `[rows]`.
    ///
    /// # Errors
    /// A value that this codec cannot hold.
    fn code(&mut self, column: usize, wanted: &[f32], decoded: &mut [f32]) -> Result<()>;

    /// The planes, after the last column.
    ///
    /// # Errors
    /// A column is missing.
    fn finish(self: Box<Self>) -> Result<Planes>;
}

/// Compares `w` and `importance` with what every codec can take: a matrix with numbers in it, none of them NaN or
/// infinite and none beyond `reach`, and one finite weight ≥ 0 a column. Returns the largest magnitude.
pub(crate) fn check_input(isa: Isa, w: Matrix<'_>, importance: Option<&[f32]>, reach: Reach) -> Result<f32> {
    check_shape(w.rows, w.cols)?;
    if w.rows.checked_mul(w.cols) != Some(w.data.len()) {
        return Err(Error::bad_data(format!(
            "{} values for a matrix [{}, {}]",
            w.data.len(),
            w.rows,
            w.cols
        )));
    }
    if let Some(weights) = importance {
        check_importance(isa, weights, w.cols)?;
    }
    let place = |i: usize| format!("at row {}, column {}", i / w.cols, i % w.cols);
    let Some(largest) = numbers::max_magnitude(isa, w.data) else {
        let i = w.data.iter().position(|v| !v.is_finite()).unwrap_or(0);
        let value = w.data.get(i).copied().unwrap_or(f32::NAN);
        return Err(Error::bad_data(format!("weight {value} {}, expected finite numbers", place(i)))
            .hint("the checkpoint is damaged, or was trained to overflow; compare its sha256"));
    };
    if largest > reach.largest {
        let i = w.data.iter().position(|v| v.abs() > reach.largest).unwrap_or(0);
        let value = w.data.get(i).copied().unwrap_or(largest);
        let what = format!(
            "weight {value:e} {} is beyond the {:e} that {} reaches",
            place(i),
            reach.largest,
            reach.codec
        );
        return Err(Error::plan(what).hint("choose bf16 or f32 for this tensor in the recipe"));
    }
    Ok(largest)
}

/// Reach of the codecs with float scales: levels are rounded up by less than a factor of two, so that nothing within it
/// decodes to infinity.
pub(crate) const REACH_OF_FLOATS: f32 = f32::from_bits(254 << 23);

/// The largest magnitude a codec can encode, and its name for the complaint.
pub(crate) struct Reach {
    pub codec: String,
    pub largest: f32,
}

fn check_importance(isa: Isa, weights: &[f32], cols: usize) -> Result<()> {
    if weights.len() != cols {
        return Err(Error::bad_data(format!("{} importances for {cols} columns", weights.len())));
    }
    let sound = |v: f32| v.is_finite() && v >= 0.0;
    if numbers::max_magnitude(isa, weights).is_none() || weights.iter().any(|&v| v < 0.0) {
        let i = weights.iter().position(|&v| !sound(v)).unwrap_or(0);
        let value = weights.get(i).copied().unwrap_or(f32::NAN);
        return Err(Error::bad_data(format!(
            "importance {value} of column {i}, expected a finite number ≥ 0"
        )));
    }
    Ok(())
}

/// Refuses a matrix without numbers or with more than a slice can hold.
pub(crate) fn check_shape(rows: usize, cols: usize) -> Result<()> {
    match rows.checked_mul(cols) {
        Some(0) => Err(Error::plan(format!("a matrix [{rows}, {cols}] has no numbers to encode"))),
        Some(n) if n <= isize::MAX as usize / 16 => Ok(()),
        _ => Err(Error::plan(format!("a matrix [{rows}, {cols}] is larger than memory can be"))),
    }
}

/// Compares planes and the wanted rows with `specs`, as every decoder must before it looks at a byte.
pub(crate) fn check_planes(
    specs: &[PlaneSpec],
    planes: &[&[u8]],
    rows: usize,
    cols: usize,
    first_row: usize,
    out: &[f32],
) -> Result<()> {
    if planes.len() != specs.len() {
        return Err(Error::bad_data(format!("{} planes, expected {}", planes.len(), specs.len())));
    }
    for (spec, plane) in specs.iter().zip(planes) {
        if spec.bytes()? != plane.len() as u64 {
            let (found, name, bytes) = (plane.len(), &spec.name, spec.bytes()?);
            return Err(Error::bad_data(format!(
                "{found} bytes in plane {name}, but shape {:?} of {} takes {bytes}",
                spec.shape,
                spec.dtype.name()
            )));
        }
    }
    check_rows(rows, cols, first_row, out)
}

/// Compares the wanted rows with those of the matrix.
pub(crate) fn check_rows(rows: usize, cols: usize, first_row: usize, out: &[f32]) -> Result<()> {
    let end = first_row.checked_add(out.len() / cols);
    if !out.len().is_multiple_of(cols) || end.is_none_or(|end| end > rows) {
        let n = out.len();
        return Err(Error::bad_data(format!(
            "{n} values from row {first_row} on, of a matrix [{rows}, {cols}]"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use moepack_format::Kind;

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let e = codec("int7").unwrap_err();
        assert_eq!(e.kind(), Kind::Usage);
        for family in CODECS {
            assert!(e.what().contains(family.pattern), "{e}");
        }
    }
}
