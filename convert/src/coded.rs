//! A routed expert as it is stored: canonical orientation, native codec, not yet decoded.

use std::path::PathBuf;

use moepack_format::{Error, Result};
use moepack_quant::{CodecRef, Isa, Planes};

use crate::checkpoint::zeroed;
use crate::spec::Part;
use crate::tensor::Expert;

/// One matrix or bias of an expert.
#[derive(Clone, Debug)]
pub struct CodedPart {
    /// Which.
    pub part: Part,
    /// How its numbers are encoded.
    pub codec: CodecRef,
    /// Outputs; 1 for a bias.
    pub rows: usize,
    /// Inputs; the length of a bias.
    pub cols: usize,
    /// The codec's planes.
    pub planes: Planes,
    /// Where it came from, for messages.
    pub source: Origin,
}

/// The tensor or record that something was read from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub file: PathBuf,
    /// Name of the tensor or record.
    pub tensor: String,
}

impl Origin {
    /// Adds the place to an error.
    pub fn locate(&self, error: Error) -> Error {
        let error = if self.tensor.is_empty() { error } else { error.in_tensor(&self.tensor) };
        if self.file.as_os_str().is_empty() { error } else { error.in_file(&self.file) }
    }
}

impl CodedPart {
    /// The numbers, `[rows, cols]`.
    ///
    /// # Errors
    /// Planes that do not fit the codec; NaN or infinity among the numbers, with their count and the first
    /// place.
    pub fn decode(&self, isa: Isa) -> Result<Vec<f32>> {
        let planes: Vec<&[u8]> = self.planes.iter().map(Vec::as_slice).collect();
        let mut out = zeroed(self.rows.saturating_mul(self.cols)).map_err(|e| self.source.locate(e))?;
        self.codec
            .decode(isa, &planes, self.rows, self.cols, 0, &mut out)
            .and_then(|()| check_finite(isa, &out, self.cols))
            .map_err(|e| self.source.locate(e))?;
        Ok(out)
    }

    /// Bytes of all planes.
    pub fn bytes(&self) -> usize {
        self.planes.iter().map(Vec::len).sum()
    }
}

/// All matrices and biases of an expert, in the order of [`Part::ALL`].
#[derive(Clone, Debug)]
pub struct CodedExpert {
    /// Gate, where there is one, up and down; then biases, where there are any.
    pub parts: Vec<CodedPart>,
}

impl CodedExpert {
    /// One part.
    pub fn part(&self, part: Part) -> Option<&CodedPart> {
        self.parts.iter().find(|p| p.part == part)
    }

    /// All parts as numbers.
    ///
    /// # Errors
    /// As [`CodedPart::decode`]; a matrix that is missing.
    pub fn decode(&self, isa: Isa) -> Result<Expert> {
        let decoded = |part| self.part(part).map(|p| p.decode(isa)).transpose();
        let matrix = |part: Part| {
            decoded(part)?.ok_or_else(|| Error::bad_data(format!("an expert without {}", part.name())))
        };
        Ok(Expert {
            gate: decoded(Part::Gate)?,
            up: matrix(Part::Up)?,
            down: matrix(Part::Down)?,
            gate_bias: decoded(Part::GateBias)?,
            up_bias: decoded(Part::UpBias)?,
            down_bias: decoded(Part::DownBias)?,
        })
    }

    /// Bytes of all planes.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(CodedPart::bytes).sum()
    }
}

/// Refuses NaN and infinity, which no codec can hold and which spoil every sum they enter.
pub(crate) fn check_finite(isa: Isa, values: &[f32], cols: usize) -> Result<()> {
    if moepack_quant::numbers::max_magnitude(isa, values).is_some() {
        return Ok(());
    }
    let mut odd = values.iter().enumerate().filter(|(_, v)| !v.is_finite());
    let Some((first, value)) = odd.next() else { return Ok(()) };
    let (row, col, n) = (first / cols.max(1), first % cols.max(1), odd.count().saturating_add(1));
    let what = format!("{n} weights are NaN or infinite, the first is {value} at row {row}, column {col}");
    Err(Error::bad_data(what)
        .hint(
            "the file is damaged or was trained so: compare its sha256 with the release; --nan-policy zero reads them as 0",
        ))
}
