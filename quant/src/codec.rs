//! What a codec is, and the table of all of them.
//!
//! A codec says how the numbers of a matrix are encoded: which planes there are and what they mean. It does not
//! choose levels cleverly (that is a solver's work, see [`crate::solve`]), and it knows no file.

use std::fmt::Debug;
use std::sync::Arc;

use moepack_format::{PlaneSpec, Result};

use crate::isa::Isa;

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

    /// Bits per weight of a `[rows, cols]` matrix, every scale and table counted.
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
