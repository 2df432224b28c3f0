//! A model to read from: a checkpoint or a bundle behind one face.
//!
//! The trunk is handed out decoded, or raw for copying; experts one at a time in the codec they are stored in. Only the
//! bytes asked for are read. Everything here may be called from many threads at once.

use std::ops::Range;
use std::path::Path;

use moepack_format::{Error, Result};
use moepack_quant::Isa;

use crate::catalog::{Catalog, LayerExperts, NONE, PieceTensors, Source, TrunkTensor, matrix, piece_dims};
use crate::checkpoint::{Checkpoint, SideFile, SourceFile, SourceTensor, length};
use crate::coded::{CodedExpert, CodedPart, check_finite};
use crate::describe::{describe, fp8_block};
use crate::encoding::{BlockSize, check_scales, encoding};
use crate::family::{Family, Holds, Mtp, Piece, Split};
use crate::hparams::Config;
use crate::layout::{Columns, split_rows, transpose_columns};
use crate::limits::CONFIG_BYTES_MAX;
use crate::spec::{Mlp, ModelSpec, Part, Role};
use crate::tensor::Tensor;

/// Bytes read at a time where a long tensor is decoded.
const CHUNK_BYTES: usize = 4 << 20;

/// How to open a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// What is only odd is an error too.
    pub strict: bool,
}

/// An opened, validated model.
#[derive(Debug)]
pub struct Model {
    checkpoint: Checkpoint,
    family: &'static Family,
    config: Config,
    spec: ModelSpec,
    fp8_block: BlockSize,
    catalog: Catalog,
    warnings: Vec<String>,
}

impl Model {
    /// Opens a checkpoint directory, a Hugging Face cache directory or a bundle.
    ///
    /// # Errors
    /// Whatever is wrong with it, before any weight is read.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Model> {
        let model = Model::of(Checkpoint::open(path)?)?;
        match model.warnings.first().filter(|_| options.strict) {
            Some(warning) => {
                Err(Error::bad_data(warning).in_file(model.root()).hint("--strict makes this an error"))
            }
            None => Ok(model),
        }
    }

    fn of(checkpoint: Checkpoint) -> Result<Model> {
        let config = read_config(&checkpoint)?;
        let family = Family::of(&config)?;
        let mut spec = describe(family, &config)?;
        let fp8_block = fp8_block(&config)?;
        let mut warnings = checkpoint.warnings().to_vec();
        let head_may_be_tied = spec.tied_head || !config.mentions(&["tie_word_embeddings"]);
        let source = Source {
            family,
            spec: &spec,
            checkpoint: &checkpoint,
            in_banks: false,
            head_may_be_tied,
            fp8_block,
        };
        let catalog = Catalog::build(source)?;
        spec.tied_head = is_tied(&checkpoint, &catalog, spec.tied_head, &mut warnings)?;
        warnings.extend(absent_mtp(family, &config, &catalog));
        Ok(Model { checkpoint, family, config, spec, fp8_block, catalog, warnings })
    }

    /// The directory; for a cache, the snapshot's.
    pub fn root(&self) -> &Path {
        self.checkpoint.place().root()
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The family it belongs to.
    pub fn family(&self) -> &'static Family {
        self.family
    }

    /// Its config.json.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Every tensor and what it is for.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// What was odd, but no reason to stop.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The weight files, with length and time of change.
    pub fn files(&self) -> &[SourceFile] {
        self.checkpoint.files()
    }

    /// The files to copy beside the weights; what is left behind is told in `notes`.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn side_files(&self, notes: &mut Vec<String>) -> Result<Vec<SideFile>> {
        self.checkpoint.place().side_files(notes)
    }

    /// Refuses a source that changed since it was opened.
    ///
    /// # Errors
    /// `BadData` for the first file that differs.
    pub fn check_unchanged(&self) -> Result<()> {
        self.checkpoint.check_unchanged()
    }

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
        let tensor = self.stored(layer, role)?;
        let rows = usize::try_from(matrix(tensor).0).unwrap_or(usize::MAX);
        let data = self.decode_rows(tensor, 0..rows)?;
        let shape = tensor.shape.iter().map(|&n| usize::try_from(n).unwrap_or(usize::MAX)).collect();
        Ok(Tensor { shape, data })
    }

    /// Some rows of a trunk matrix, decoded, such as the embeddings of a few tokens: `[rows.len(), cols]`.
    ///
    /// # Errors
    /// As [`Model::trunk`]; rows beyond the matrix.
    pub fn trunk_rows(&self, layer: Option<usize>, role: Role, rows: Range<usize>) -> Result<Tensor> {
        let tensor = self.stored(layer, role)?;
        let data = self.decode_rows(tensor, rows.clone())?;
        let shape = vec![rows.len(), data.len() / rows.len().max(1)];
        Ok(Tensor { shape, data })
    }

    /// The trunk in the order of the files, for copying.
    pub fn trunk_tensors(&self) -> &[TrunkTensor] {
        &self.catalog.trunk
    }

    /// Bytes of a trunk tensor as they are stored, from `offset`.
    ///
    /// # Errors
    /// A range beyond the tensor, or what the operating system says.
    pub fn read_raw(&self, tensor: &TrunkTensor, offset: u64, buf: &mut [u8]) -> Result<()> {
        let at = self.checkpoint.tensors().get(tensor.tensor).filter(|t| *t.name == *tensor.name);
        let source = at.ok_or_else(|| Error::bad_data("no such tensor").in_tensor(&tensor.name))?;
        self.checkpoint.read(source, offset, buf)
    }

    /// Looks at every scale of the trunk, so that a bad one is found before hours of work.
    ///
    /// # Errors
    /// The first scale that is no positive, finite, normal number.
    pub fn check_trunk_scales(&self) -> Result<()> {
        for tensor in self.catalog.trunk.iter().filter(|t| t.is_scale) {
            let Some(source) = self.checkpoint.tensors().get(tensor.tensor) else { continue };
            check_scales(source, 0, &self.checkpoint.bytes(source)?)?;
        }
        Ok(())
    }

    /// An expert in the codec it is stored in, turned into canonical orientation without rounding.
    ///
    /// # Errors
    /// No such expert; what cannot be read; scales that are no positive, finite, normal numbers.
    pub fn expert(&self, layer: usize, expert: usize) -> Result<CodedExpert> {
        let experts = self.catalog.layer(layer).filter(|l| expert < l.n_experts);
        let experts =
            experts.ok_or_else(|| Error::bad_data(format!("no expert {expert} in layer {layer}")))?;
        let mut parts = Vec::with_capacity(6);
        for piece in &experts.pieces {
            self.read_piece(layer, experts, piece, expert, &mut parts)?;
        }
        parts.sort_by_key(|p| p.part);
        Ok(CodedExpert { parts })
    }

    fn stored(&self, layer: Option<usize>, role: Role) -> Result<&SourceTensor> {
        let found = self.trunk_tensor(layer, role).and_then(|t| self.checkpoint.tensors().get(t.tensor));
        found.ok_or_else(|| {
            let place = layer.map_or(String::new(), |l| format!(" in layer {l}"));
            Error::bad_data(format!("no tensor for {role:?}{place}")).in_file(self.root())
        })
    }

    /// The scales that belong to a tensor.
    fn scales_of(&self, tensor: &SourceTensor) -> Option<&SourceTensor> {
        let at = crate::names::scale_of(&tensor.name).and_then(|name| self.checkpoint.find(&name))?;
        self.checkpoint.tensors().get(at)
    }

    /// Rows of a trunk tensor; plain numbers are read in chunks, so that only the result is long.
    fn decode_rows(&self, tensor: &SourceTensor, rows: Range<usize>) -> Result<Vec<f32>> {
        let inner = || {
            let (n_rows, cols) = matrix(tensor);
            let (n_rows, cols) = (to_usize(n_rows)?, to_usize(cols)?);
            if rows.start > rows.end || rows.end > n_rows {
                return Err(Error::bad_data(format!("rows {rows:?} of a matrix of {n_rows} rows")));
            }
            let mut out = vec![0.0; rows.len() * cols];
            let scales = self.scales_of(tensor);
            let codec = encoding(tensor, scales, None, matrix(tensor), self.fp8_block)?.codec;
            let isa = Isa::get();
            if let Some(scales) = scales {
                let numbers = self.checkpoint.bytes(tensor)?;
                let factors = self.checkpoint.bytes(scales)?;
                check_scales(scales, 0, &factors)?;
                codec.decode(isa, &[&numbers, &factors], n_rows, cols, rows.start, &mut out)?;
            } else {
                let row_bytes = length(tensor)? / n_rows.max(1);
                let n_chunk = (CHUNK_BYTES / row_bytes.max(1)).max(1);
                let mut numbers = vec![0; n_chunk.min(rows.len()) * row_bytes];
                for (i, out) in out.chunks_mut(n_chunk * cols.max(1)).enumerate() {
                    let n = out.len() / cols;
                    let numbers = numbers.get_mut(..n * row_bytes).unwrap_or_default();
                    let first = (rows.start + i * n_chunk) as u64;
                    self.checkpoint.read(tensor, first * row_bytes as u64, numbers)?;
                    codec.decode(isa, &[numbers], n, cols, 0, out)?;
                }
            }
            check_finite(isa, &out, cols)?;
            Ok(out)
        };
        inner().map_err(|e| e.in_file(self.checkpoint.path_of(tensor)).in_tensor(&*tensor.name))
    }

    /// Adds the parts that one piece holds of an expert.
    fn read_piece(
        &self,
        layer: usize,
        experts: &LayerExperts,
        tensors: &PieceTensors,
        expert: usize,
        parts: &mut Vec<CodedPart>,
    ) -> Result<()> {
        let stacked = tensors.is_stacked();
        let slot = if stacked { 0 } else { expert };
        let get = |list: &[u32]| list.get(slot).and_then(|&i| self.checkpoint.tensors().get(i as usize));
        let Some(tensor) = get(&tensors.tensors) else {
            return Err(Error::bad_data(format!("expert {expert} of layer {layer} is not there")));
        };
        let scales = get(&tensors.scales).filter(|_| tensors.scales.get(slot) != Some(&NONE));
        let Some(Mlp::Moe(moe)) = self.spec.layers.get(layer).map(|l| &l.mlp) else {
            return Err(Error::bad_data(format!("layer {layer} is dense")));
        };
        let n = stacked.then_some(experts.n_experts as u64);
        let (rows, cols, _) = piece_dims(tensors.piece, self.spec.hidden, moe.inter);
        let codec = encoding(tensor, scales, n, (rows, cols), self.fp8_block)?.codec;
        let mut planes = vec![self.slice(tensor, n, expert)?];
        if let Some(scales) = scales {
            let factors = self.slice(scales, n, expert)?;
            let first = if stacked { (factors.len() as u64) * expert as u64 } else { 0 };
            check_scales(scales, first, &factors).map_err(|e| e.in_file(self.checkpoint.path_of(scales)))?;
            planes.push(factors);
        }
        let (rows, cols) = (to_usize(rows)?, to_usize(cols)?);
        let source = if stacked { format!("{} [{expert}]", tensor.name) } else { tensor.name.to_string() };
        for (part, planes) in arrange(tensors.piece, planes, rows, cols).map_err(|e| e.in_tensor(&source))? {
            let rows = rows / if matches!(tensors.piece.holds, Holds::Two(..)) { 2 } else { 1 };
            let (rows, cols) = if part.is_matrix() { (rows, cols) } else { (1, rows) };
            parts.push(CodedPart { part, codec: codec.clone(), rows, cols, planes, source: source.clone() });
        }
        Ok(())
    }

    /// The bytes of one of `n` equal slices of a tensor, or of all of it.
    fn slice(&self, tensor: &SourceTensor, n: Option<u64>, which: usize) -> Result<Vec<u8>> {
        let Some(n) = n else { return self.checkpoint.bytes(tensor) };
        let bytes = tensor.bytes() / n.max(1);
        let mut slice = vec![0; to_usize(bytes)?];
        self.checkpoint.read(tensor, bytes * which as u64, &mut slice)?;
        Ok(slice)
    }
}

/// The parts of a piece with their planes in canonical order of rows.
fn arrange(
    piece: &Piece,
    planes: Vec<Vec<u8>>,
    rows: usize,
    cols: usize,
) -> Result<Vec<(Part, Vec<Vec<u8>>)>> {
    match (piece.holds, piece.transposed) {
        (Holds::One(part), false) => Ok(vec![(part, planes)]),
        (Holds::One(part), true) => {
            let all = Columns { first: 0, step: 1, n: rows };
            let turned = planes.iter().map(|p| turn(p, rows, cols, all)).collect::<Result<_>>()?;
            Ok(vec![(part, turned)])
        }
        (Holds::Two(a, b, split), transposed) => {
            let mut halves = [Vec::new(), Vec::new()];
            for plane in &planes {
                let [first, second] = if transposed {
                    let half = |which| turn(plane, rows, cols, Columns::half(split, which, rows));
                    [half(0)?, half(1)?]
                } else {
                    split_in_two(plane, rows, split)?
                };
                halves[0].push(first);
                halves[1].push(second);
            }
            let [first, second] = halves;
            Ok(vec![(a, first), (b, second)])
        }
    }
}

/// Some columns of a plane that is stored `[in, out]`, as rows.
fn turn(plane: &[u8], rows: usize, cols: usize, columns: Columns) -> Result<Vec<u8>> {
    let element_bytes = plane.len() / (rows * cols).max(1);
    transpose_columns(plane, [cols, rows], element_bytes, columns)
}

fn split_in_two(plane: &[u8], rows: usize, split: Split) -> Result<[Vec<u8>; 2]> {
    if !plane.len().is_multiple_of(rows.max(1)) {
        return Err(Error::bad_data(format!("a plane of {} bytes has no {rows} equal rows", plane.len())));
    }
    split_rows(plane, plane.len() / rows.max(1), split)
}

fn to_usize(n: u64) -> Result<usize> {
    usize::try_from(n).map_err(|_| Error::bad_data(format!("{n} does not fit memory")))
}

fn read_config(checkpoint: &Checkpoint) -> Result<Config> {
    const NAME: &str = "config.json";
    let place = checkpoint.place();
    if !place.has(NAME) {
        return Err(Error::missing("config.json is not there")
            .in_file(place.root().join(NAME))
            .hint("fetch it with the weights; the tensors alone do not say what the model is"));
    }
    let text = place.read_small(NAME, CONFIG_BYTES_MAX)?;
    Config::parse(&place.root().join(NAME), &text)
}

/// Whether the head is the embedding. Where config.json ties them and both are there, they are tied if they are equal,
/// which is what transformers does.
fn is_tied(
    checkpoint: &Checkpoint,
    catalog: &Catalog,
    tied: bool,
    warnings: &mut Vec<String>,
) -> Result<bool> {
    let get = |role| catalog.find(None, role).and_then(|t| checkpoint.tensors().get(t.tensor));
    let (Some(embed), Some(head)) = (get(Role::Embed), get(Role::LmHead)) else { return Ok(true) };
    if !tied {
        return Ok(false);
    }
    if equal(checkpoint, embed, head)? {
        return Ok(true);
    }
    warnings
        .push(format!("config.json ties the head to the embedding, but {} differs; it is used", head.name));
    Ok(false)
}

/// Whether two tensors have the same bytes.
fn equal(checkpoint: &Checkpoint, a: &SourceTensor, b: &SourceTensor) -> Result<bool> {
    if a.dtype != b.dtype || a.bytes() != b.bytes() {
        return Ok(false);
    }
    let chunk = to_usize(a.bytes().min(CHUNK_BYTES as u64))?;
    let (mut x, mut y) = (vec![0; chunk], vec![0; chunk]);
    let mut at = 0;
    while at < a.bytes() {
        let n = to_usize((a.bytes() - at).min(chunk as u64))?;
        let (x, y) = (x.get_mut(..n).unwrap_or_default(), y.get_mut(..n).unwrap_or_default());
        checkpoint.read(a, at, x)?;
        checkpoint.read(b, at, y)?;
        if x != y {
            return Ok(false);
        }
        at += n as u64;
    }
    Ok(true)
}

/// A warning about multi-token-prediction layers that config.json announces and the files lack.
fn absent_mtp(family: &Family, config: &Config, catalog: &Catalog) -> Option<String> {
    let Mtp::ExtraLayers { .. } = family.mtp else { return None };
    let n = config.uint_opt(&["num_nextn_predict_layers"], 1, crate::limits::LAYERS_MAX).ok().flatten()?;
    let there = catalog.trunk.iter().any(|t| t.role == Role::Carried);
    (!there).then(|| format!("config.json announces {n} multi-token-prediction layers, the files have none"))
}
