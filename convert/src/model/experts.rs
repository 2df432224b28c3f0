//! The routed experts of a model: read from a checkpoint's tensors or a bundle's bank, turned into canonical
//! orientation without rounding.

use moepack_format::{Bank, Error, Result};
use moepack_quant::{CodecRef, Planes, codec};

use super::{Model, to_usize};
use crate::catalog::{LayerExperts, NONE, PieceTensors};
use crate::checkpoint::SourceTensor;
use crate::coded::{CodedExpert, CodedPart, Origin};
use crate::encoding::{Encoded, Encoding, Holding, encoding};
use crate::family::{Holds, Piece, Split};
use crate::layout::{Columns, split_rows, transpose_columns};
use crate::spec::{Moe, Part};

mod back;

pub use back::ReleasedPiece;

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

/// One tensor of a checkpoint that holds parts of an expert, and what belongs to it.
struct Stored<'a> {
    piece: &'static Piece,
    encoded: Encoded<'a>,
    encoding: Encoding<'a>,
    /// Output rows of all parts together, and input columns; of a bias its length and 1.
    holding: Holding,
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
                    parts.push(StoredPart { part, codec: stored.encoding.codec.clone(), rows, cols });
                }
            }
        }
        parts.sort_by_key(|p| p.part);
        Ok(parts)
    }

    fn layer_experts(&self, layer: usize, expert: usize) -> Result<(&LayerExperts, &Moe)> {
        let experts = self.catalog.layer(layer).filter(|l| expert < l.n_experts);
        let moe = self.spec.moe(layer);
        experts.zip(moe).ok_or_else(|| {
            Error::bad_data(format!("no expert {expert} in layer {layer}")).in_file(self.root())
        })
    }

    /// A part of a record is one that the model has, in the shape that config.json says.
    fn check_part(&self, moe: &Moe, name: &str, shape: [u64; 2]) -> Result<(Part, usize, usize)> {
        let has = |p: &Part| if p.is_matrix() { moe.matrices().contains(p) } else { moe.bias };
        let part = Part::ALL.into_iter().find(|p| p.name() == name && has(p));
        let part = part.ok_or_else(|| Error::bad_data(format!("the model has no part {name:?}")))?;
        let (hidden, inter) = (moe.width(self.spec.hidden), moe.inter);
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
        let slot = if tensors.is_stacked() { 0 } else { expert };
        let tensor = tensors.tensors.get(slot).filter(|&&i| i != NONE);
        let tensor = tensor.and_then(|&i| self.checkpoint.tensors().get(i as usize));
        let tensor = tensor.ok_or_else(|| Error::bad_data(format!("expert {expert} is not there")))?;
        let n = tensors.piece.n_stacked(experts.n_experts);
        let (rows, cols) = tensors.piece.dims(moe, self.spec.hidden);
        let transposed = self.is_transposed(experts, moe, tensors.piece, tensor);
        let holding = Holding { n, rows, cols, transposed };
        let encoded = Encoded::of(&self.checkpoint, tensor);
        let encoding = encoding(&encoded, holding, self.hints)?;
        let (rows, cols) = (to_usize(rows)?, to_usize(cols)?);
        Ok(Stored { piece: tensors.piece, encoded, encoding, holding, rows, cols })
    }

    /// Whether a tensor is stored `[in, out]`. A square one that may be either lies as the others of its layer do.
    fn is_transposed(&self, experts: &LayerExperts, moe: &Moe, piece: &Piece, tensor: &SourceTensor) -> bool {
        let (rows, cols) = piece.dims(moe, self.spec.hidden);
        if !piece.either || rows != cols {
            return piece.is_transposed(rows, cols, &tensor.shape);
        }
        let shows = |other: &PieceTensors| {
            let (rows, cols) = other.piece.dims(moe, self.spec.hidden);
            let tensor = other.tensors.first().and_then(|&i| self.checkpoint.tensors().get(i as usize))?;
            let is_clear = other.piece.either && rows != cols;
            is_clear.then(|| other.piece.is_transposed(rows, cols, &tensor.shape))
        };
        experts.pieces.iter().find_map(shows).unwrap_or(false)
    }

    /// The parts of an expert that one tensor holds.
    fn read_piece(&self, stored: &Stored<'_>, expert: usize) -> Result<Vec<CodedPart>> {
        let (tensor, n) = (stored.encoded.tensor, stored.holding.n);
        let file = self.checkpoint.path_of(tensor).to_owned();
        let name = if n.is_some() { format!("{} [{expert}]", tensor.name) } else { tensor.name.to_string() };
        let origin = Origin { file, tensor: name };
        let which = if n.is_some() { expert } else { 0 };
        let planes = self.planes(&stored.encoded, &stored.encoding, stored.holding, which);
        let planes = planes.map_err(|e| if e.tensor().is_some() { e } else { origin.locate(e) })?;
        let arranged = stored.arrange(planes).map_err(|e| origin.locate(e))?;
        let part = |(part, planes)| {
            let (rows, cols) = stored.shape_of(part);
            let codec = stored.encoding.codec.clone();
            CodedPart { part, codec, rows, cols, planes, source: origin.clone() }
        };
        Ok(arranged.into_iter().map(part).collect())
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
        match self.piece.holds {
            Holds::One(part) if !self.holding.transposed => Ok(vec![(part, planes)]),
            Holds::One(part) => {
                let turned = planes.iter().enumerate().map(|(i, plane)| {
                    let (shape, element_bytes) = self.plane(i, plane)?;
                    let all = Columns { first: 0, step: 1, n: shape[0] };
                    transpose_columns(plane, [shape[1], shape[0]], element_bytes, all)
                });
                Ok(vec![(part, turned.collect::<Result<_>>()?)])
            }
            Holds::Two(a, b, split) => {
                let (mut first, mut second) = (Planes::new(), Planes::new());
                for (i, plane) in planes.iter().enumerate() {
                    let [x, y] = self.halves(i, plane, split)?;
                    first.push(x);
                    second.push(y);
                }
                Ok(vec![(a, first), (b, second)])
            }
        }
    }

    /// One plane of two matrices that share their rows, as a plane of each.
    fn halves(&self, i: usize, plane: &[u8], split: Split) -> Result<[Vec<u8>; 2]> {
        let (shape, element_bytes) = self.plane(i, plane)?;
        let half_rows = self.holding.rows / 2;
        let block_rows = self.encoding.block_rows;
        // What all rows share belongs to both.
        if i > 0 && (block_rows >= self.holding.rows || shape[0] * shape[1] == 1) {
            return Ok([plane.to_vec(), plane.to_vec()]);
        }
        let parted = half_rows.is_multiple_of(block_rows) && (split == Split::Halves || block_rows == 1);
        if i > 0 && !parted {
            let what =
                format!("scales of {block_rows} rows each, which two matrices of {half_rows} rows share");
            return Err(Error::bad_data(what).hint("start from a release in which they are stored apart"));
        }
        if !self.holding.transposed {
            return split_rows(plane, shape[1] * element_bytes, split);
        }
        let half = |which| {
            let columns = Columns::half(split, which, shape[0]);
            transpose_columns(plane, [shape[1], shape[0]], element_bytes, columns)
        };
        Ok([half(0)?, half(1)?])
    }

    /// Rows and columns of a plane in canonical order, and the bytes of an element.
    fn plane(&self, i: usize, plane: &[u8]) -> Result<([usize; 2], usize)> {
        if !self.piece.holds_matrix() {
            return Ok(([self.rows, 1], plane.len() / self.rows.max(1)));
        }
        let specs = self.encoding.codec.planes(self.rows, self.cols)?;
        let shape = specs.get(i).map(|s| s.shape.clone()).unwrap_or_default();
        let [rows, cols] = match *shape {
            [rows, cols] => [to_usize(rows)?, to_usize(cols)?],
            _ => [1, to_usize(shape.iter().product())?],
        };
        Ok(([rows, cols], plane.len() / (rows * cols).max(1)))
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
