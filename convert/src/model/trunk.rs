//! The trunk of a model: decoded for the forward pass, raw for copying.

use std::ops::Range;

use moepack_format::{Dtype, Error, Result};
use moepack_quant::{Isa, Planes};

use super::{Model, to_usize};
use crate::catalog::{TrunkTensor, carried_matrix, matrix};
use crate::checkpoint::{CodedTensor, SourceTensor, length, zeroed};
use crate::coded::check_finite;
use crate::encoding::{Encoded, Holding, encoding, not_integers};
use crate::spec::Role;
use crate::tensor::Tensor;

/// Bytes read at a time where a long tensor is decoded.
const CHUNK_BYTES: usize = 4 << 20;

impl Model {
    /// Whether the trunk has a tensor with this role; a tied head is the embedding.
    pub fn has(&self, layer: Option<usize>, role: Role) -> bool {
        self.trunk_tensor(layer, role).is_some()
    }

    /// The trunk tensor with this role; a tied head is the embedding.
    pub fn trunk_tensor(&self, layer: Option<usize>, role: Role) -> Option<&TrunkTensor> {
        let role = if role == Role::LmHead && self.spec.tied_head { Role::Embed } else { role };
        self.catalog.find(layer, role)
    }

    /// A trunk tensor, decoded.
    ///
    /// # Errors
    /// No such tensor; what cannot be read; scales or weights that are no finite numbers.
    pub fn trunk(&self, layer: Option<usize>, role: Role) -> Result<Tensor> {
        let (entry, tensor) = self.stored(layer, role)?;
        let shape = &entry.decoded;
        let data = self.decode_rows(tensor, shape, 0..to_usize(matrix(shape).0)?)?;
        let shape = shape.iter().map(|&n| to_usize(n)).collect::<Result<_>>()?;
        Ok(Tensor { shape, data })
    }

    /// Some rows of a trunk matrix, decoded, such as the embeddings of a few tokens: `[rows.len(), cols]`.
    ///
    /// # Errors
    /// As [`Model::trunk`]; rows beyond the matrix.
    pub fn trunk_rows(&self, layer: Option<usize>, role: Role, rows: Range<usize>) -> Result<Tensor> {
        let (entry, tensor) = self.stored(layer, role)?;
        let data = self.decode_rows(tensor, &entry.decoded, rows.clone())?;
        Ok(Tensor { shape: vec![rows.len(), data.len() / rows.len().max(1)], data })
    }

    /// A trunk tensor of integers, such as the experts of each token id.
    ///
    /// # Errors
    /// As [`Model::trunk_integers`]; numbers that are negative or beyond 32 bits.
    pub fn trunk_table(&self, layer: Option<usize>, role: Role) -> Result<Vec<u32>> {
        let one = |(at, n): (usize, i64)| {
            u32::try_from(n).map_err(|_| Error::bad_data(format!("number {at} is {n}, expected 0 or more")))
        };
        let numbers = self.trunk_integers(layer, role)?;
        let (_, tensor) = self.stored(layer, role)?;
        let table = numbers.into_iter().enumerate().map(one).collect::<Result<_>>();
        table.map_err(|e: Error| e.in_file(self.checkpoint.path_of(tensor)).in_tensor(&*tensor.name))
    }

    /// A trunk tensor of integers of any size.
    ///
    /// # Errors
    /// No such tensor; what cannot be read; numbers that are no integers.
    pub fn trunk_integers(&self, layer: Option<usize>, role: Role) -> Result<Vec<i64>> {
        let (_, tensor) = self.stored(layer, role)?;
        let inner = || {
            let bytes = self.checkpoint.bytes(tensor)?;
            match tensor.dtype {
                Dtype::I64 => Ok(bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()),
                Dtype::I32 => Ok(bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect()),
                other => Err(not_integers(other)),
            }
        };
        inner().map_err(|e: Error| e.in_file(self.checkpoint.path_of(tensor)).in_tensor(&*tensor.name))
    }

    /// The trunk in the order of the files, for copying.
    pub fn trunk_tensors(&self) -> &[TrunkTensor] {
        &self.catalog.trunk
    }

    /// Numbers in the trunk, scales not counted.
    pub fn trunk_weights(&self) -> u64 {
        let n = |t: &TrunkTensor| t.decoded.iter().fold(1, |n: u64, &d| n.saturating_mul(d));
        self.catalog.trunk.iter().filter(|t| !t.is_scale).map(n).sum()
    }

    /// The codec of a trunk matrix that a bundle does not store as the checkpoint has it.
    pub fn trunk_codec(&self, tensor: &TrunkTensor) -> Option<String> {
        self.checkpoint.coded(&tensor.name).map(|coded| coded.codec.name())
    }

    /// The planes of a trunk matrix that a bundle has coded.
    ///
    /// # Errors
    /// A tensor that is not coded; what cannot be read.
    pub fn trunk_planes(&self, tensor: &TrunkTensor) -> Result<Planes> {
        let coded = self.checkpoint.coded(&tensor.name);
        let coded = coded.ok_or_else(|| Error::bad_data("has no planes").in_tensor(&tensor.name))?;
        coded.planes.iter().map(|plane| self.checkpoint.bytes(plane)).collect()
    }

    /// Rows and columns of a trunk tensor that must be decoded to be plain numbers: one that is coded, or has scales.
    pub fn trunk_encoded(&self, tensor: &TrunkTensor) -> Option<[u64; 2]> {
        let source = self.checkpoint.tensors().get(tensor.tensor).filter(|_| !tensor.is_scale)?;
        let encoded = Encoded::of(&self.checkpoint, source);
        if self.checkpoint.coded(&tensor.name).is_none() && encoded.companions().is_empty() {
            return None;
        }
        matrix_of(tensor, &encoded).map(|(rows, cols)| [rows, cols])
    }

    /// How the numbers of such a tensor are encoded; `None` of a plain one.
    ///
    /// # Errors
    /// Scales that give its numbers no meaning.
    pub fn trunk_encoding(&self, tensor: &TrunkTensor) -> Result<Option<String>> {
        let source = self.checkpoint.tensors().get(tensor.tensor);
        let (Some(source), Some(shape)) = (source, self.trunk_encoded(tensor)) else { return Ok(None) };
        if let Some(codec) = self.trunk_codec(tensor) {
            return Ok(Some(codec));
        }
        let found =
            encoding(&Encoded::of(&self.checkpoint, source), Holding::plain(shape.into()), self.hints);
        found.map(|e| Some(e.codec.name())).map_err(|e| self.at_trunk(tensor, e))
    }

    /// Rows of such a tensor, decoded: `[rows.len(), cols]`.
    ///
    /// # Errors
    /// As [`Model::trunk_rows`]; a tensor that is none.
    pub fn decode_trunk(&self, tensor: &TrunkTensor, rows: Range<usize>) -> Result<Vec<f32>> {
        let source = self.checkpoint.tensors().get(tensor.tensor);
        let found = source.zip(self.trunk_encoded(tensor));
        let (source, shape) = found.ok_or_else(|| Error::bad_data("is plain").in_tensor(&tensor.name))?;
        self.decode_rows(source, &shape, rows)
    }

    /// Bytes of a trunk tensor as they are stored, from `offset`.
    ///
    /// # Errors
    /// A tensor that is coded, a range beyond the tensor, or what the operating system says.
    pub fn read_raw(&self, tensor: &TrunkTensor, offset: u64, buf: &mut [u8]) -> Result<()> {
        let at = self.checkpoint.tensors().get(tensor.tensor).filter(|t| *t.name == *tensor.name);
        let source = at.ok_or_else(|| Error::bad_data("no such tensor").in_tensor(&tensor.name))?;
        self.checkpoint.read(source, offset, buf)
    }

    /// Says of an error that it is about this tensor.
    pub fn at_trunk(&self, tensor: &TrunkTensor, error: Error) -> Error {
        let source = self.checkpoint.tensors().get(tensor.tensor);
        let error = error.in_tensor(&*tensor.name);
        source.map_or(error.clone(), |s| error.in_file(self.checkpoint.path_of(s)))
    }

    /// Looks at every scale of the trunk, so that a bad one is found before hours of work.
    ///
    /// # Errors
    /// The first scale that is no positive, finite, normal number.
    pub fn check_trunk_scales(&self) -> Result<()> {
        for tensor in self.catalog.trunk.iter().filter(|t| !t.is_scale) {
            let Some(source) = self.checkpoint.tensors().get(tensor.tensor) else { continue };
            let encoded = Encoded::of(&self.checkpoint, source);
            if encoded.companions().is_empty() {
                continue;
            }
            let holding = matrix_of(tensor, &encoded).map(Holding::plain);
            let encoding = holding.map(|h| encoding(&encoded, h, self.hints)).transpose()?;
            self.check_companions(&encoded, encoding.as_ref().zip(holding), 0)?;
        }
        Ok(())
    }

    fn stored(&self, layer: Option<usize>, role: Role) -> Result<(&TrunkTensor, &SourceTensor)> {
        let entry = self.trunk_tensor(layer, role);
        let found = entry.and_then(|t| Some((t, self.checkpoint.tensors().get(t.tensor)?)));
        found.ok_or_else(|| {
            let place = layer.map_or(String::new(), |l| format!(" in layer {l}"));
            Error::bad_data(format!("no tensor for {role:?}{place}")).in_file(self.root())
        })
    }

    /// Rows of a trunk tensor that decodes to `shape`, NaN and infinity refused.
    fn decode_rows(&self, tensor: &SourceTensor, shape: &[u64], rows: Range<usize>) -> Result<Vec<f32>> {
        let inner = || {
            let holding = Holding::plain(matrix(shape));
            let (n_rows, cols) = (to_usize(holding.rows)?, to_usize(holding.cols)?);
            if rows.start > rows.end || rows.end > n_rows {
                return Err(Error::bad_data(format!("rows {rows:?} of a matrix of {n_rows} rows")));
            }
            let mut out = zeroed(rows.len().saturating_mul(cols))?;
            let encoded = Encoded::of(&self.checkpoint, tensor);
            match self.checkpoint.coded(&tensor.name) {
                Some(coded) => self.decode_coded(coded, [n_rows, cols], rows.start, &mut out)?,
                None if encoded.companions().is_empty() => {
                    self.decode_plain(tensor, holding, rows.start, &mut out)?;
                }
                None => self.decode_scaled(&encoded, holding, rows.start, &mut out)?,
            }
            check_finite(Isa::get(), &out, cols)?;
            Ok(out)
        };
        inner().map_err(|e| {
            let e = e.in_file(self.checkpoint.path_of(tensor));
            if e.tensor().is_some() { e } else { e.in_tensor(&*tensor.name) }
        })
    }

    /// Planes of a codec: all are read whole, because one plane may belong to many rows.
    fn decode_coded(
        &self,
        coded: &CodedTensor,
        [rows, cols]: [usize; 2],
        first_row: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let planes = coded.planes.iter().map(|p| self.checkpoint.bytes(p)).collect::<Result<Planes>>()?;
        let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
        coded.codec.decode(Isa::get(), &planes, rows, cols, first_row, out)
    }

    /// Numbers with scales: both are read whole, because a scale belongs to many rows.
    fn decode_scaled(
        &self,
        encoded: &Encoded<'_>,
        holding: Holding,
        first_row: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let encoding = encoding(encoded, holding, self.hints)?;
        let planes = self.planes(encoded, &encoding, holding, 0)?;
        let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
        let (rows, cols) = (to_usize(holding.rows)?, to_usize(holding.cols)?);
        encoding.codec.decode(Isa::get(), &planes, rows, cols, first_row, out)
    }

    /// Plain numbers: read in chunks, so that only the result is long.
    fn decode_plain(
        &self,
        tensor: &SourceTensor,
        holding: Holding,
        first_row: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let (n_rows, cols) = (to_usize(holding.rows)?, to_usize(holding.cols)?);
        let codec = encoding(&Encoded::of(&self.checkpoint, tensor), holding, self.hints)?.codec;
        let row_bytes = length(tensor)? / n_rows.max(1);
        let n_chunk = (CHUNK_BYTES / row_bytes.max(1)).max(1);
        let mut numbers = Vec::new();
        let mut row = first_row;
        for out in out.chunks_mut(n_chunk * cols.max(1)) {
            let n = out.len() / cols.max(1);
            numbers.resize(n * row_bytes, 0);
            self.checkpoint.read(tensor, row as u64 * row_bytes as u64, &mut numbers)?;
            codec.decode(Isa::get(), &[&numbers], n, cols, 0, out)?;
            row += n;
        }
        Ok(())
    }
}

/// The matrix that a trunk tensor decodes to; `None` of a carried one whose shape does not tell.
fn matrix_of(tensor: &TrunkTensor, encoded: &Encoded<'_>) -> Option<(u64, u64)> {
    if tensor.role == Role::Carried { carried_matrix(encoded) } else { Some(matrix(&tensor.decoded)) }
}
