//! The routed experts of a model: read from a checkpoint's tensors or a bundle's bank, turned into canonical
//! orientation without rounding.

use moepack_format::{Bank, Error, Result};
use moepack_quant::{CodecRef, Planes, codec};

use super::{Model, to_usize};
use crate::catalog::{LayerExperts, NONE, PieceTensors, piece_dims};
use crate::checkpoint::{SourceTensor, zeroed};
use crate::coded::{CodedExpert, CodedPart, Origin};
use crate::encoding::{check_scales, encoding};
use crate::family::{Holds, Piece, Split};
use crate::layout::{Columns, split_rows, transpose_columns};
use crate::spec::{Moe, Part};

/// What is stored of one part of an expert, known without reading it.
#[derive(Clone, Debug)]
pub struct StoredPart {
    /// Which.
    pub part: Part,
    /// How its numbers are encoded.
    pub codec: CodecRef,
    /// Outputs; 1 for a bias.
    pub rows: usize,
    /// Inputs; the length of a bias.
    pub cols: usize,
}

/// One tensor of a checkpoint that holds parts of an expert.
struct Stored<'a> {
    /// Stored `[in, out]`.
    transposed: bool,
    piece: &'static Piece,
    tensor: &'a SourceTensor,
    scales: Option<&'a SourceTensor>,
    /// How many experts share the tensor.
    n: Option<u64>,
    codec: CodecRef,
    /// Output rows of all parts together, and input columns; of a bias its length and 1.
    rows: usize,
    cols: usize,
}

impl Model {
    /// An expert in the codec it is stored in, in canonical orientation. From a checkpoint, only its own
    /// bytes are read; from a bundle, its record in one read, checksum compared.
    ///
    /// # Errors
    /// No such expert; what cannot be read; scales that are no positive, finite, normal numbers.
    pub fn expert(&self, layer: usize, expert: usize) -> Result<CodedExpert> {
        let (experts, moe) = self.layer_experts(layer, expert)?;
        if let Some(bundle) = &self.bundle {
            return self.expert_of_bank(bundle.bank(to_u32(layer)?)?, layer, expert);
        }
        let mut parts = Vec::with_capacity(Part::ALL.len());
        for tensors in &experts.pieces {
            let stored = self.stored_piece(experts, moe, tensors, expert)?;
            parts.extend(self.read_piece(&stored, expert)?);
        }
        parts.sort_by_key(|p| p.part);
        Ok(CodedExpert { parts })
    }

    /// An expert as a bank has it, checksum compared: a bundle's own bank, or one that was coded from this model.
    ///
    /// # Errors
    /// No such expert; a record that cannot be read, or whose parts are not those of this model.
    pub fn expert_of_bank(&self, bank: &Bank, layer: usize, expert: usize) -> Result<CodedExpert> {
        let (_, moe) = self.layer_experts(layer, expert)?;
        let record = bank.read(to_u32(expert)?, true)?;
        let mut parts = Vec::with_capacity(Part::ALL.len());
        for view in record.parts() {
            let spec = view.spec;
            let tensor = format!("layer {layer} expert {expert} {}", spec.name);
            let source = Origin { file: bank.path().to_owned(), tensor };
            let coded = self.check_part(moe, &spec.name, [spec.rows, spec.cols]);
            let coded = coded.and_then(|found| Ok((found, known_codec(&spec.codec)?)));
            let ((part, rows, cols), codec) = coded.map_err(|e| source.locate(e))?;
            let planes = view.planes.iter().map(|p| p.to_vec()).collect();
            parts.push(CodedPart { part, codec, rows, cols, planes, source });
        }
        parts.sort_by_key(|p| p.part);
        Ok(CodedExpert { parts })
    }

    /// How an expert is stored, from headers alone.
    ///
    /// # Errors
    /// No such expert, or a bank that cannot be opened.
    pub fn expert_parts(&self, layer: usize, expert: usize) -> Result<Vec<StoredPart>> {
        let (experts, moe) = self.layer_experts(layer, expert)?;
        let mut parts = Vec::with_capacity(Part::ALL.len());
        if let Some(bundle) = &self.bundle {
            for info in bundle.bank(to_u32(layer)?)?.parts(to_u32(expert)?)? {
                let (part, rows, cols) =
                    self.check_part(moe, &info.spec.name, [info.spec.rows, info.spec.cols])?;
                parts.push(StoredPart { part, codec: known_codec(&info.spec.codec)?, rows, cols });
            }
        } else {
            for tensors in &experts.pieces {
                let stored = self.stored_piece(experts, moe, tensors, expert)?;
                for part in stored.parts() {
                    let (rows, cols) = stored.shape_of(part);
                    parts.push(StoredPart { part, codec: stored.codec.clone(), rows, cols });
                }
            }
        }
        parts.sort_by_key(|p| p.part);
        Ok(parts)
    }

    fn layer_experts(&self, layer: usize, expert: usize) -> Result<(&LayerExperts, &Moe)> {
        let experts = self.catalog.layer(layer).filter(|l| expert < l.n_experts);
        let moe = self.spec.layers.get(layer).and_then(|l| l.mlp.moe());
        experts.zip(moe).ok_or_else(|| {
            Error::bad_data(format!("no expert {expert} in layer {layer}")).in_file(self.root())
        })
    }

    /// A part of a record is one that the model has, in the shape that config.json says.
    fn check_part(&self, moe: &Moe, name: &str, shape: [u64; 2]) -> Result<(Part, usize, usize)> {
        let part = Part::ALL.into_iter().find(|p| p.name() == name && (moe.bias || p.is_matrix()));
        let part = part.ok_or_else(|| Error::bad_data(format!("the model has no part {name:?}")))?;
        let (hidden, inter) = (self.spec.hidden, moe.inter);
        let (rows, cols) = match part {
            Part::Gate | Part::Up => (inter, hidden),
            Part::Down => (hidden, inter),
            Part::GateBias | Part::UpBias => (1, inter),
            Part::DownBias => (1, hidden),
        };
        if shape == [rows as u64, cols as u64] {
            return Ok((part, rows, cols));
        }
        Err(Error::bad_data(format!("{name} is {shape:?}, config.json says [{rows}, {cols}]")))
    }

    /// The tensors that one piece means for this expert.
    fn stored_piece<'a>(
        &'a self,
        experts: &LayerExperts,
        moe: &Moe,
        tensors: &PieceTensors,
        expert: usize,
    ) -> Result<Stored<'a>> {
        let stacked = tensors.is_stacked();
        let slot = if stacked { 0 } else { expert };
        let get = |list: &[u32]| {
            list.get(slot).filter(|&&i| i != NONE).and_then(|&i| self.checkpoint.tensors().get(i as usize))
        };
        let tensor = get(&tensors.tensors);
        let tensor = tensor.ok_or_else(|| Error::bad_data(format!("expert {expert} is not there")))?;
        let scales = get(&tensors.scales);
        let n = stacked.then_some(experts.n_experts as u64);
        let (rows, cols, _) = piece_dims(tensors.piece, self.spec.hidden, moe.inter);
        let codec = encoding(tensor, scales, n, (rows, cols), self.fp8_block)?.codec;
        let transposed = self.is_transposed(experts, moe, tensors.piece, tensor);
        let (rows, cols) = (to_usize(rows)?, to_usize(cols)?);
        Ok(Stored { piece: tensors.piece, transposed, tensor, scales, n, codec, rows, cols })
    }

    /// Whether a tensor is stored `[in, out]`. A square one that may be either lies as the others of its layer do.
    fn is_transposed(&self, experts: &LayerExperts, moe: &Moe, piece: &Piece, tensor: &SourceTensor) -> bool {
        let (rows, cols, _) = piece_dims(piece, self.spec.hidden, moe.inter);
        if !piece.either || rows != cols {
            return piece.is_transposed(rows, cols, &tensor.shape);
        }
        let shows = |other: &PieceTensors| {
            let (rows, cols, _) = piece_dims(other.piece, self.spec.hidden, moe.inter);
            let tensor = other.tensors.first().and_then(|&i| self.checkpoint.tensors().get(i as usize))?;
            let is_clear = other.piece.either && rows != cols;
            is_clear.then(|| other.piece.is_transposed(rows, cols, &tensor.shape))
        };
        experts.pieces.iter().find_map(shows).unwrap_or(false)
    }

    /// The parts of an expert that one tensor holds.
    fn read_piece(&self, stored: &Stored<'_>, expert: usize) -> Result<Vec<CodedPart>> {
        let (tensor, n) = (stored.tensor, stored.n);
        let file = self.checkpoint.path_of(tensor).to_owned();
        let name = if n.is_some() { format!("{} [{expert}]", tensor.name) } else { tensor.name.to_string() };
        let origin = Origin { file, tensor: name };
        let mut planes = vec![self.slice(tensor, n, expert)?];
        if let Some(scales) = stored.scales {
            let factors = self.slice(scales, n, expert)?;
            let width = (scales.dtype.bits() / 8).max(1);
            let first = if n.is_some() { factors.len() as u64 / width * expert as u64 } else { 0 };
            check_scales(scales, first, &factors).map_err(|e| e.in_file(self.checkpoint.path_of(scales)))?;
            planes.push(factors);
        }
        let arranged = stored.arrange(planes).map_err(|e| origin.locate(e))?;
        let part = |(part, planes)| {
            let (rows, cols) = stored.shape_of(part);
            CodedPart { part, codec: stored.codec.clone(), rows, cols, planes, source: origin.clone() }
        };
        Ok(arranged.into_iter().map(part).collect())
    }

    /// The bytes of one of `n` equal slices of a tensor, or of all of it.
    fn slice(&self, tensor: &SourceTensor, n: Option<u64>, which: usize) -> Result<Vec<u8>> {
        let Some(n) = n else { return self.checkpoint.bytes(tensor) };
        let bytes = tensor.bytes() / n.max(1);
        let mut slice = zeroed(to_usize(bytes)?).map_err(|e| e.in_tensor(&*tensor.name))?;
        self.checkpoint.read(tensor, bytes * which as u64, &mut slice)?;
        Ok(slice)
    }
}

impl Stored<'_> {
    fn parts(&self) -> Vec<Part> {
        match self.piece.holds {
            Holds::One(a) => vec![a],
            Holds::Two(a, b, _) => vec![a, b],
        }
    }

    /// Shape of one part; a bias is one row.
    fn shape_of(&self, part: Part) -> (usize, usize) {
        let rows = self.rows / self.parts().len();
        if part.is_matrix() { (rows, self.cols) } else { (1, rows) }
    }

    /// The parts with their planes, rows in canonical order.
    fn arrange(&self, planes: Planes) -> Result<Vec<(Part, Planes)>> {
        match (self.piece.holds, self.transposed) {
            (Holds::One(part), false) => Ok(vec![(part, planes)]),
            (Holds::One(part), true) => {
                let all = Columns { first: 0, step: 1, n: self.rows };
                let turned = planes.iter().map(|p| self.turn(p, all)).collect::<Result<_>>()?;
                Ok(vec![(part, turned)])
            }
            (Holds::Two(a, b, split), transposed) => {
                let (mut first, mut second) = (Planes::new(), Planes::new());
                for plane in &planes {
                    let half = |which| self.turn(plane, Columns::half(split, which, self.rows));
                    let [x, y] = if transposed { [half(0)?, half(1)?] } else { self.split(plane, split)? };
                    first.push(x);
                    second.push(y);
                }
                Ok(vec![(a, first), (b, second)])
            }
        }
    }

    /// Some columns of a plane that is stored `[in, out]`, as rows.
    fn turn(&self, plane: &[u8], columns: Columns) -> Result<Vec<u8>> {
        let element_bytes = plane.len() / (self.rows * self.cols).max(1);
        transpose_columns(plane, [self.cols, self.rows], element_bytes, columns)
    }

    fn split(&self, plane: &[u8], split: Split) -> Result<[Vec<u8>; 2]> {
        if !plane.len().is_multiple_of(self.rows.max(1)) {
            let what = format!("a plane of {} bytes has no {} equal rows", plane.len(), self.rows);
            return Err(Error::bad_data(what));
        }
        split_rows(plane, plane.len() / self.rows.max(1), split)
    }
}

/// The codec that a bank names. An unknown name is a fault of the file, not of the user.
fn known_codec(name: &str) -> Result<CodecRef> {
    codec(name)
        .map_err(|e| Error::bad_data(e.what()).hint("a later version of moepack may have written this"))
}

fn to_u32(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::bad_data(format!("{n} is beyond 32 bits")))
}
