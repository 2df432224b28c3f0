//! What becomes of the trunk: matrices that are coded, everything else as it was released.
//!
//! A recipe may name one codec for the matrices of attention and what stands in its place, dense MLPs and shared experts.
//! Routers, norms, biases, sinks and whatever else is small decides much and saves nothing, so it is never touched. Embedding and head are not either:
//! they are the widest matrices of a model, of which the first is a table of which a token reads one row and the second
//! makes the logits that drift is measured on. A matrix stays as it was released where the codec cannot hold its shape
//! or would take no fewer bytes, so that an FP8 trunk is not widened to int8.
//!
//! With a calibration text and a solver that works with Hessians, matrices are coded by what `learn.rs` finds out about
//! their inputs; otherwise each number is rounded to nearest.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use moepack_convert::{Model, Role, TrunkTensor};
use moepack_format::manifest::LeftOut;
use moepack_format::trunk::{Shapes, TRUNK_BYTES_DEFAULT, split_trunk, trunk_file_bytes};
use moepack_format::{Context, Dtype, Error, PlaneSpec, Result, TENSOR_ALIGN};
use moepack_quant::{CodecRef, Isa, Matrix, Planes};
use moepack_verify::tokens::Windows;

use crate::recipe::Choice;

mod learn;
pub mod rewrite;
pub mod rounded;
pub mod write;

/// What may be coded: matrices that a forward pass multiplies all tokens with. Those of one list take the same input.
const MATRICES: &[&[Role]] = &[
    &[
        Role::Q,
        Role::K,
        Role::V,
        Role::Qkv,
        Role::QA,
        Role::KvA,
        Role::Kv,
        Role::AttnGate,
        Role::DeltaQkv,
        Role::DeltaQkvz,
        Role::DeltaZ,
    ],
    &[Role::QB],
    &[Role::KvB],
    &[Role::O],
    &[Role::OA],
    &[Role::OB],
    &[Role::DeltaOut],
    &[Role::MixerIn],
    &[Role::MixerOut],
    &[Role::DenseGate, Role::DenseUp, Role::DenseGateUp],
    &[Role::DenseDown],
    &[Role::SecondQA, Role::SecondKvA],
    &[Role::SecondQB],
    &[Role::SecondKvB],
    &[Role::SecondO],
    &[Role::SecondDenseGate, Role::SecondDenseUp],
    &[Role::SecondDenseDown],
    &[Role::SharedGate, Role::SharedUp, Role::SharedGateUp],
    &[Role::SharedDown],
    &[Role::LatentDown],
    &[Role::LatentUp],
];

/// The matrices that take the same input as this one; none where it is not coded.
fn inputs(role: Role) -> &'static [Role] {
    MATRICES.iter().find(|roles| roles.contains(&role)).copied().unwrap_or_default()
}

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

/// What learning about the inputs of the trunk's matrices takes, and coding by it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Learning {
    /// Columns of the widest matrix; 0 where none is coded.
    pub cols_max: usize,
    /// Bytes of the Hessians of a layer.
    pub hessian_bytes_max: u64,
    /// Bytes of inputs that wait to be added up.
    pub row_bytes_max: u64,
    /// Bytes that a thread's solver takes beside.
    pub solving_bytes_max: u64,
    /// Weights of all matrices that are coded.
    pub n_weights: u64,
}

impl Learning {
    /// Tokens of a text that are pushed through.
    pub fn n_tokens(&self, text: &Windows) -> usize {
        learn::n_tokens(text, self.cols_max)
    }
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

    /// The matrices of a layer that are coded, and their columns.
    fn matrices(&self, layer: usize) -> Vec<(Role, usize)> {
        let of_layer = |p: &&Piece<'_>| p.tensor.layer == Some(layer);
        let coded = self.pieces.iter().filter(of_layer);
        coded.filter_map(|p| Some((p.tensor.role, p.coded.as_ref()?.cols))).collect()
    }

    /// Columns of the widest matrix that is coded; 0 where none is.
    fn cols_max(&self) -> usize {
        self.pieces.iter().filter_map(|p| Some(p.coded.as_ref()?.cols)).max().unwrap_or(0)
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

    /// What learning about the inputs of its matrices takes.
    pub fn learning(&self) -> Learning {
        let layers: BTreeSet<usize> =
            self.pieces.iter().filter(|p| p.coded.is_some()).filter_map(|p| p.tensor.layer).collect();
        let inputs = |l: usize| learn::input_cols(&self.matrices(l));
        let hessians = |l: usize| inputs(l).into_iter().map(|cols| 4 * cols * cols).sum::<u64>();
        let rows = |l: usize| inputs(l).into_iter().map(|cols| learn::ROWS_HELD * 4 * cols).sum::<u64>();
        let solving = |c: &CodedPiece| 4 * c.cols as u64 * (c.cols as u64 + 2 * c.rows as u64);
        Learning {
            cols_max: self.cols_max(),
            hessian_bytes_max: layers.iter().map(|&l| hessians(l)).max().unwrap_or(0),
            row_bytes_max: layers.iter().map(|&l| rows(l)).max().unwrap_or(0),
            solving_bytes_max: self
                .pieces
                .iter()
                .filter_map(|p| p.coded.as_ref().map(solving))
                .max()
                .unwrap_or(0),
            ..self.coding()
        }
    }

    /// The same where nothing is learnt.
    pub fn coding(&self) -> Learning {
        let coded = self.pieces.iter().filter_map(|p| p.coded.as_ref());
        let n_weights = coded.map(|c| c.rows as u64 * c.cols as u64).sum();
        Learning { n_weights, ..Learning::default() }
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

    /// Tensors of each trunk file, pads not counted.
    ///
    /// # Errors
    /// As [`Trunk::bytes`].
    pub fn file_tensors(&self) -> Result<Vec<usize>> {
        let tensors = |range| self.pieces(range).iter().map(|piece| piece.specs().len()).sum();
        Ok(self.files()?.into_iter().map(tensors).collect())
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
        self.encode_with(model, tensor, |w| self.codec.encode(Isa::get(), w, None))
    }

    /// Codes a matrix in some way.
    fn encode_with<T>(
        &self,
        model: &Model,
        tensor: &TrunkTensor,
        encode: impl FnOnce(Matrix<'_>) -> Result<T>,
    ) -> Result<T> {
        let whole = model.trunk(tensor.layer, tensor.role)?; // [rows, cols]
        encode(Matrix { rows: self.rows, cols: self.cols, data: &whole.data }).in_tensor(&tensor.name)
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
    for tensor in tensors.iter().filter(|t| !t.is_scale && !inputs(t.role).is_empty()) {
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
