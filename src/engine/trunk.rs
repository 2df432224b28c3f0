//! What becomes of the trunk: matrices that are coded, everything else as it was released.
//!
//! A recipe may name one codec for the matrices of attention, dense MLPs and shared experts. Routers, norms, biases, sinks
//! and whatever else is small decides much and saves nothing, so it is never touched. Embedding and head are not either:
//! they are the widest matrices of a model, of which the first is a table of which a token reads one row and the second
//! makes the logits that drift is measured on. A matrix stays as it was released where the codec cannot hold its shape
//! or would take no fewer bytes, so that an FP8 trunk is not widened to int8.

use std::collections::BTreeMap;
use std::ops::Range;

use moepack_convert::{Model, Role, TrunkTensor};
use moepack_format::manifest::LeftOut;
use moepack_format::trunk::{Shapes, TRUNK_BYTES_DEFAULT, split_trunk, trunk_file_bytes};
use moepack_format::{Context, Dtype, Error, PlaneSpec, Result, TENSOR_ALIGN};
use moepack_quant::{CodecRef, Isa, Matrix, Planes};

use crate::recipe::Choice;

pub mod write;

/// What may be coded: matrices that a forward pass multiplies all tokens with.
const MATRICES: &[Role] = &[
    Role::Q,
    Role::K,
    Role::V,
    Role::O,
    Role::QA,
    Role::QB,
    Role::KvA,
    Role::KvB,
    Role::DenseGate,
    Role::DenseUp,
    Role::DenseDown,
    Role::SecondQA,
    Role::SecondQB,
    Role::SecondKvA,
    Role::SecondKvB,
    Role::SecondO,
    Role::SecondDenseGate,
    Role::SecondDenseUp,
    Role::SecondDenseDown,
    Role::SharedGate,
    Role::SharedUp,
    Role::SharedDown,
];

/// Rows and columns of a matrix that is worth coding.
const SIDE_MIN: u64 = 32;

/// Why the scales of a coded matrix are not in the bundle.
const SCALES_LEFT_OUT: &str = "scales of a matrix that is coded anew";

/// The trunk as a bundle will have it.
#[derive(Debug)]
pub struct Trunk<'a> {
    /// In the order of the checkpoint's files.
    pieces: Vec<Piece<'a>>,
    /// Scales of what is coded.
    left_out: Vec<&'a TrunkTensor>,
}

/// One tensor of the checkpoint.
#[derive(Clone, Debug)]
struct Piece<'a> {
    tensor: &'a TrunkTensor,
    coded: Option<CodedPiece>,
}

/// What a tensor becomes that is coded.
#[derive(Clone, Debug)]
struct CodedPiece {
    codec: CodecRef,
    rows: usize,
    cols: usize,
    /// With the lengths that they have at most.
    planes: Vec<PlaneSpec>,
}

impl<'a> Trunk<'a> {
    /// Works out which matrices `choice` codes.
    ///
    /// # Errors
    /// A size beyond 64 bits.
    pub fn of(model: &'a Model, choice: &Choice) -> Result<Trunk<'a>> {
        let (mut pieces, mut left_out) = (Vec::new(), Vec::new());
        let tensors = model.trunk_tensors();
        let coded = match choice {
            Choice::Native => BTreeMap::new(),
            Choice::Codec(codec) => coded_pieces(tensors, codec)?,
        };
        for tensor in tensors {
            match coded.get(&(tensor.layer, tensor.role)) {
                Some(_) if tensor.is_scale => left_out.push(tensor),
                found => pieces.push(Piece { tensor, coded: found.cloned() }),
            }
        }
        Ok(Trunk { pieces, left_out })
    }

    /// Codec by name of what is coded, as the manifest has it.
    pub fn codecs(&self) -> BTreeMap<String, String> {
        let coded = self.pieces.iter().filter_map(|p| Some((p.tensor, p.coded.as_ref()?)));
        coded.map(|(tensor, coded)| (tensor.name.clone(), coded.codec.name())).collect()
    }

    /// What the bundle does not have because of that.
    pub fn left_out(&self) -> Vec<LeftOut> {
        let reason = || SCALES_LEFT_OUT.to_owned();
        self.left_out.iter().map(|t| LeftOut { name: t.name.clone(), reason: reason() }).collect()
    }

    /// Whether a tensor of the checkpoint is one of those.
    pub fn leaves_out(&self, name: &str) -> bool {
        self.left_out.iter().any(|t| t.name == name)
    }

    /// The planes of a matrix, coded from the checkpoint; `None` if it is kept as released.
    ///
    /// # Errors
    /// A matrix that cannot be read or coded.
    pub fn encoded(&self, model: &Model, tensor: &TrunkTensor) -> Result<Option<Planes>> {
        let piece = self.pieces.iter().find(|p| p.tensor.name == tensor.name);
        let coded = piece.and_then(|p| p.coded.as_ref());
        coded.map(|coded| coded.encode(model, tensor)).transpose()
    }

    /// Bytes of all tensors and planes, at most.
    ///
    /// # Errors
    /// A size beyond 64 bits.
    pub fn bytes(&self) -> Result<u64> {
        self.pieces.iter().flat_map(Piece::specs).map(|spec| spec.bytes()).sum()
    }

    /// Bytes that coding the largest matrix takes: in f32, as released and as planes, and what the codec holds beside
    /// them. 0 where none is coded.
    pub fn coding_bytes_max(&self) -> u64 {
        let of =
            |c: &CodedPiece| 6 * (c.rows as u64) * (c.cols as u64) + c.codec.coding_bytes(c.rows, c.cols);
        let bytes = |p: &Piece<'_>| p.coded.as_ref().map(of);
        self.pieces.iter().filter_map(bytes).max().unwrap_or(0)
    }

    /// Bytes of each trunk file, at most.
    ///
    /// # Errors
    /// As [`Trunk::bytes`].
    pub fn file_bytes(&self) -> Result<Vec<u64>> {
        let of_file = |range| {
            let pieces = self.pieces(range);
            let specs: Vec<PlaneSpec> = pieces.iter().flat_map(Piece::specs).collect();
            trunk_file_bytes(&specs, &shapes(pieces))
        };
        self.files()?.into_iter().map(of_file).collect()
    }

    /// Which pieces go to which file: the planes of a matrix stay together.
    fn files(&self) -> Result<Vec<Range<usize>>> {
        let whole = |piece: &Piece<'_>| {
            let bytes = |spec: PlaneSpec| Ok(spec.bytes()?.next_multiple_of(TENSOR_ALIGN)) as Result<u64>;
            let bytes = piece.specs().into_iter().map(bytes).sum::<Result<u64>>()?;
            Ok(PlaneSpec::new(&piece.tensor.name, Dtype::U8, &[bytes])) as Result<PlaneSpec>
        };
        let wholes = self.pieces.iter().map(whole).collect::<Result<Vec<_>>>()?;
        split_trunk(&wholes, TRUNK_BYTES_DEFAULT)
    }

    fn pieces(&self, range: Range<usize>) -> &[Piece<'a>] {
        self.pieces.get(range).unwrap_or_default()
    }
}

impl CodedPiece {
    /// Codes a matrix, each number rounded to nearest with the scales that make the squared error least.
    fn encode(&self, model: &Model, tensor: &TrunkTensor) -> Result<Planes> {
        let whole = model.trunk(tensor.layer, tensor.role)?; // [rows, cols]
        let w = Matrix { rows: self.rows, cols: self.cols, data: &whole.data };
        self.codec.encode(Isa::get(), w, None).in_tensor(&tensor.name)
    }
}

impl Piece<'_> {
    /// The tensors that it becomes.
    fn specs(&self) -> Vec<PlaneSpec> {
        let tensor = self.tensor;
        match &self.coded {
            None => vec![PlaneSpec::new(&tensor.name, tensor.dtype, &tensor.shape)],
            Some(coded) => coded.planes.iter().map(|plane| self.named(plane)).collect(),
        }
    }

    /// A plane under the name that it has in the file.
    fn named(&self, plane: &PlaneSpec) -> PlaneSpec {
        PlaneSpec::new(&plane_name(self.tensor, &plane.name), plane.dtype, &plane.shape)
    }
}

/// The name of a plane of a trunk tensor in a bundle.
fn plane_name(tensor: &TrunkTensor, plane: &str) -> String {
    format!("{}.{plane}", tensor.name)
}

/// Shapes of what is coded, as the file's string table has them.
fn shapes(pieces: &[Piece<'_>]) -> Shapes {
    let coded = pieces.iter().filter_map(|p| Some((p.tensor, p.coded.as_ref()?)));
    coded.map(|(tensor, c)| (tensor.name.clone(), [c.rows as u64, c.cols as u64])).collect()
}

/// The matrices that are coded, by what they are for.
fn coded_pieces(
    tensors: &[TrunkTensor],
    codec: &CodecRef,
) -> Result<BTreeMap<(Option<usize>, Role), CodedPiece>> {
    let mut coded = BTreeMap::new();
    for tensor in tensors.iter().filter(|t| !t.is_scale && MATRICES.contains(&t.role)) {
        let [rows, cols] = *tensor.decoded else { continue };
        if rows.min(cols) < SIDE_MIN {
            continue;
        }
        let too_large = |_| Error::bad_data("larger than memory can be").in_tensor(&tensor.name);
        let (rows, cols) =
            (usize::try_from(rows).map_err(too_large)?, usize::try_from(cols).map_err(too_large)?);
        let Ok(planes) = codec.planes(rows, cols) else { continue };
        let bytes = planes.iter().map(PlaneSpec::bytes).sum::<Result<u64>>()?;
        let of_it = |t: &&TrunkTensor| (t.layer, t.role) == (tensor.layer, tensor.role);
        let released: u64 = tensors.iter().filter(of_it).map(|t| t.bytes).sum();
        if bytes < released {
            let piece = CodedPiece { codec: codec.clone(), rows, cols, planes };
            coded.insert((tensor.layer, tensor.role), piece);
        }
    }
    Ok(coded)
}
