//! An expert back into the tensors of a checkpoint: the inverse of reading it. Either in the encoding of the release, every
//! byte as it was, or decoded to BF16 under the names that plain numbers have.

use moepack_format::{Dtype, Error, PlaneSpec, Result};
use moepack_quant::minifloat::f32_to_bf16;
use moepack_quant::{Isa, Planes};

use super::Stored;
use crate::catalog::{NONE, PieceTensors};
use crate::checkpoint::SourceTensor;
use crate::coded::CodedExpert;
use crate::family::{Holds, Piece, Split};
use crate::layout::{join_rows, transpose};
use crate::model::{Model, to_usize};
use crate::names::{self, Companion};
use crate::packing::{Packing, Wanted};
use crate::spec::Part;

/// A tensor of a checkpoint that holds parts of experts, with those beside it.
#[derive(Clone, Debug)]
pub struct ReleasedPiece {
    /// The numbers first, then what gives them meaning.
    pub tensors: Vec<PlaneSpec>,
    /// One tensor holds all experts, along the first axis.
    pub is_stacked: bool,
    /// What it holds of each expert.
    pub parts: Vec<Part>,
}

impl Model {
    /// How many tensors hold an expert of this layer, scales and the like not counted.
    ///
    /// # Errors
    /// A layer without experts.
    pub fn n_pieces(&self, layer: usize) -> Result<usize> {
        Ok(self.layer_experts(layer, 0)?.0.pieces.len())
    }

    /// The tensors of one of them as they were released.
    ///
    /// # Errors
    /// No such expert or piece; a bundle, whose banks have no such tensors.
    pub fn released_piece(&self, layer: usize, expert: usize, piece: usize) -> Result<ReleasedPiece> {
        let (pieces, stored) = self.stored_at(layer, expert, piece)?;
        let spec = |t: &SourceTensor| PlaneSpec::new(&t.name, t.dtype, &t.shape);
        let companions = stored.encoded.companions().iter().map(|(_, t)| spec(t));
        let tensors = std::iter::once(spec(stored.encoded.tensor)).chain(companions).collect();
        Ok(ReleasedPiece { tensors, is_stacked: pieces.is_stacked(), parts: stored.parts() })
    }

    /// The same decoded to BF16; a piece of biases stays as it was.
    ///
    /// # Errors
    /// As [`Model::released_piece`].
    pub fn plain_piece(&self, layer: usize, expert: usize, piece: usize) -> Result<ReleasedPiece> {
        let (_, stored) = self.stored_at(layer, expert, piece)?;
        let mut released = self.released_piece(layer, expert, piece)?;
        if !stored.piece.holds_matrix() {
            return Ok(released);
        }
        let turned = stored.plain_is_turned(self.plain_form(stored.piece));
        let lengths = stored.piece.lengths((stored.holding.rows, stored.holding.cols), turned);
        let shape = stored.piece.stacked(stored.holding.n, &lengths);
        let name = names::plain(&stored.encoded.tensor.name);
        released.tensors = vec![PlaneSpec::new(&name, Dtype::Bf16, &shape)];
        Ok(released)
    }

    /// The bytes of the tensors of [`Model::released_piece`]; of this expert's share where they hold all. `coded` is the
    /// expert in the encoding of the release.
    ///
    /// # Errors
    /// Planes of another encoding.
    pub fn released_bytes(
        &self,
        layer: usize,
        expert: usize,
        piece: usize,
        coded: &CodedExpert,
    ) -> Result<Vec<Vec<u8>>> {
        let (_, stored) = self.stored_at(layer, expert, piece)?;
        let raw = stored.raw(&stored.gather(coded)?)?;
        let mut sources: Vec<(&SourceTensor, Vec<u8>)> =
            stored.encoding.sources.iter().copied().zip(raw).collect();
        let mut take = |name: &str| {
            let at = sources.iter().position(|(t, _)| *t.name == *name);
            at.map(|at| sources.swap_remove(at).1)
        };
        let numbers = take(&stored.encoded.tensor.name).ok_or_else(|| Error::bad_data("no numbers"))?;
        let beside = stored.encoded.companions().iter().map(|(companion, t)| match companion {
            Companion::Shape => Ok(shape_bytes(t, [stored.rows as u64, stored.cols as u64])),
            _ => take(&t.name).ok_or_else(|| Error::bad_data("is of no use").in_tensor(&*t.name)),
        });
        std::iter::once(Ok(numbers)).chain(beside).collect()
    }

    /// The bytes of the tensors of [`Model::plain_piece`].
    ///
    /// # Errors
    /// What cannot be decoded.
    pub fn plain_bytes(
        &self,
        layer: usize,
        expert: usize,
        piece: usize,
        coded: &CodedExpert,
    ) -> Result<Vec<Vec<u8>>> {
        let (_, stored) = self.stored_at(layer, expert, piece)?;
        if !stored.piece.holds_matrix() {
            return self.released_bytes(layer, expert, piece, coded);
        }
        let numbers = |part: Part| -> Result<Vec<u8>> {
            let decoded = coded.part(part).ok_or_else(|| missing(part))?.decode(Isa::get())?;
            Ok(decoded.iter().flat_map(|v| f32_to_bf16(*v).to_le_bytes()).collect())
        };
        let joined = match stored.piece.holds {
            Holds::One(part) => numbers(part)?,
            Holds::Two(a, b, split) => join_rows(&numbers(a)?, &numbers(b)?, stored.cols * 2, split)?,
        };
        if stored.plain_is_turned(self.plain_form(stored.piece)) {
            return Ok(vec![transpose(&joined, stored.rows, stored.cols, 2)?]);
        }
        Ok(vec![joined])
    }

    /// Whether `kept`, a bundle, has this expert in the encodings of the release, whose headers `self` has.
    ///
    /// # Errors
    /// No such expert.
    pub fn keeps_released(&self, kept: &Model, layer: usize, expert: usize) -> Result<bool> {
        let (released, kept) = (self.expert_parts(layer, expert)?, kept.expert_parts(layer, expert)?);
        let mut pairs = released.iter().zip(&kept);
        let alike = pairs.all(|(a, b)| a.part == b.part && a.codec.name() == b.codec.name());
        Ok(alike && released.len() == kept.len())
    }

    fn stored_at(&self, layer: usize, expert: usize, piece: usize) -> Result<(&PieceTensors, Stored<'_>)> {
        let (experts, moe) = self.layer_experts(layer, expert)?;
        let pieces = experts.pieces.get(piece).filter(|p| p.tensors.iter().any(|t| *t != NONE));
        let pieces = pieces.ok_or_else(|| {
            Error::bad_data(format!("layer {layer} has no piece {piece}")).in_file(self.root())
        })?;
        Ok((pieces, self.stored_piece(experts, moe, pieces, expert)?))
    }

    /// The piece that holds the same as plain numbers.
    fn plain_form(&self, piece: &'static Piece) -> &'static Piece {
        let plain = names::plain(piece.name);
        let mut all = self.family.experts.iter().flat_map(|layout| layout.pieces);
        all.find(|p| p.name == plain).unwrap_or(piece)
    }
}

impl Stored<'_> {
    /// The planes of all parts that this tensor holds, rows as they are stored: the inverse of `arrange`.
    fn gather(&self, coded: &CodedExpert) -> Result<Planes> {
        match self.piece.holds {
            Holds::One(part) if !self.holding.transposed => Ok(self.planes_of(coded, part)?.clone()),
            Holds::One(part) => {
                let turned = self.planes_of(coded, part)?.iter().enumerate().map(|(i, plane)| {
                    let (shape, element_bytes) = self.plane(i, plane)?;
                    transpose(plane, shape[0], shape[1], element_bytes)
                });
                turned.collect()
            }
            Holds::Two(a, b, split) => {
                let pairs = self.planes_of(coded, a)?.iter().zip(self.planes_of(coded, b)?).enumerate();
                pairs.map(|(i, (a, b))| self.joined(i, a, b, split)).collect()
            }
        }
    }

    fn planes_of<'a>(&self, coded: &'a CodedExpert, part: Part) -> Result<&'a Planes> {
        let found = coded.part(part).ok_or_else(|| missing(part))?;
        let (is, released) = (found.codec.name(), self.encoding.codec.name());
        if is == released {
            return Ok(&found.planes);
        }
        Err(Error::bad_data(format!("{} is {is}, the release has {released}", part.name())))
    }

    /// The inverse of `halves`.
    fn joined(&self, i: usize, a: &[u8], b: &[u8], split: Split) -> Result<Vec<u8>> {
        let (shape, element_bytes) = self.plane(i, &[a, b].concat())?;
        if i > 0 && (self.encoding.block_rows >= self.holding.rows || shape[0] * shape[1] == 1) {
            return match a == b {
                true => Ok(a.to_vec()),
                false => Err(Error::bad_data("two matrices that share scales have different ones")),
            };
        }
        let joined = join_rows(a, b, shape[1] * element_bytes, split)?;
        if self.holding.transposed {
            return transpose(&joined, shape[0], shape[1], element_bytes);
        }
        Ok(joined)
    }

    /// The bytes of the encoding's sources.
    fn raw(&self, planes: &Planes) -> Result<Vec<Vec<u8>>> {
        if self.encoding.packing == Packing::AsPlanes {
            return Ok(planes.clone());
        }
        let specs = self.encoding.codec.planes(self.rows, self.cols)?;
        let n = to_usize(specs.get(1).and_then(|p| p.shape.get(1)).copied().unwrap_or(0))?;
        let bytes = |companion| self.encoded.get(companion).map_or(Ok(0), |t| to_usize(t.bytes()));
        let wanted = Wanted {
            rows: self.rows,
            cols: self.cols,
            n,
            asym: self.encoded.get(Companion::Zero).is_some(),
            scales_bytes: bytes(Companion::Scale)?,
            zeros_bytes: bytes(Companion::Zero)?,
        };
        self.encoding.packing.raw(planes, wanted)
    }

    /// Whether plain numbers are stored `[in, out]`.
    fn plain_is_turned(&self, plain: &Piece) -> bool {
        if plain.name == self.piece.name { self.holding.transposed } else { plain.transposed }
    }
}

/// Rows and columns as the integers of a tensor `weight_shape`.
fn shape_bytes(tensor: &SourceTensor, shape: [u64; 2]) -> Vec<u8> {
    match tensor.dtype {
        Dtype::I64 => shape.iter().flat_map(|n| n.to_le_bytes()).collect(),
        _ => shape.iter().flat_map(|n| u32::try_from(*n).unwrap_or(u32::MAX).to_le_bytes()).collect(),
    }
}

fn missing(part: Part) -> Error {
    Error::bad_data(format!("an expert without {}", part.name()))
}
