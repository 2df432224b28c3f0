//! Writing the trunk files.
//!
//! A file's header names the length of every plane and comes first, but some codecs know their lengths only when they are
//! done. So matrices are coded first, on all threads, into a nameless temporary file beside it: those of a file, or, where a
//! text tells what their inputs are like, all of them, since the text goes through the model but once.

use std::collections::BTreeMap;
use std::path::Path;

use moepack_convert::{FiniteCheck, Model, Part, TrunkTensor};
use moepack_format::storage::File;
use moepack_format::trunk::{FileSummary, TrunkWriter, trunk_name};
use moepack_format::{Error, PlaneSpec, Result};
use moepack_quant::Planes;
use moepack_verify::forward::ordered;
use moepack_verify::tokens::Windows;

use super::learn::{LayerEvidence, Learner};
use super::{CodedPiece, Piece, Trunk, shapes};
use crate::engine::coder::{Coder, MatrixNote};
use crate::engine::heldout::loss;
use crate::progress::Progress;
use crate::stop::Stop;

/// Bytes of a trunk tensor copied at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// What coded matrices wait in is called after this.
/// The name that the file of coded matrices has for a moment.
const SPOOL: &str = "trunk.spool.note.json";

/// Writes the trunk of a bundle.
pub struct TrunkWork<'a> {
    /// The checkpoint.
    pub model: &'a Model,
    /// Where the files go.
    pub dir: &'a Path,
    /// Where coded matrices wait for the headers of their files.
    pub scratch: &'a Path,
    /// How matrices are coded of whose inputs something is known.
    pub coder: Coder<'a>,
    /// Text that tells what inputs are like.
    pub text: Option<&'a Windows>,
    /// Told of each tensor.
    pub progress: &'a Progress,
    /// Asked before each piece of work.
    pub stop: &'a Stop,
}

/// What is known of a finished trunk.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct TrunkNote {
    /// The files.
    pub files: Vec<FileSummary>,
    /// Relative squared error by name of what calibration decided how to code.
    pub errors: BTreeMap<String, f64>,
    /// How many of them rounding to nearest coded better.
    pub n_fell_back: usize,
}

impl TrunkWork<'_> {
    /// Writes every trunk tensor, in the order of the checkpoint's files.
    ///
    /// # Errors
    /// What cannot be read, coded or written; a requested stop.
    pub fn write(&self, trunk: &Trunk<'_>) -> Result<TrunkNote> {
        let files = trunk.files()?;
        let mut note = TrunkNote::default();
        let learnt = self.learns(trunk).then(|| self.create_spool()).transpose()?;
        let learnt = learnt.map(|spool| self.code_learnt(trunk, spool, &|_| true, &mut note)).transpose()?;
        for (i, range) in files.iter().enumerate() {
            let path = self.dir.join(trunk_name(i + 1, files.len()));
            let pieces = trunk.pieces(range.clone());
            let rounded = match learnt {
                Some(_) => None,
                None => Some(self.code_rounded(pieces, self.create_spool()?, &|_| true)?),
            };
            let coded = learnt.as_ref().or(rounded.as_ref());
            note.files.push(self.write_file(&path, pieces, coded, None)?);
        }
        trunk.left_out.iter().for_each(|scales| self.progress.add(scales.bytes, 0));
        Ok(note)
    }

    /// Whether a text tells how matrices are to be coded.
    pub(super) fn learns(&self, trunk: &Trunk<'_>) -> bool {
        self.text.is_some() && self.coder.solver.needs_hessian() && trunk.cols_max() > 0
    }

    /// A place for coded matrices.
    pub(super) fn create_spool(&self) -> Result<Coded> {
        Coded::create(self.scratch)
    }

    /// Writes a file; one that is known to have this SHA-256 appears only if it has.
    pub(super) fn write_file(
        &self,
        path: &Path,
        pieces: &[Piece<'_>],
        coded: Option<&Coded>,
        sha256: Option<&str>,
    ) -> Result<FileSummary> {
        let of = |piece: &Piece<'_>| coded.and_then(|c| c.planes.get(&piece.tensor.name));
        let specs = |piece: &Piece<'_>| of(piece).map_or_else(|| piece.specs(), |(_, specs)| specs.clone());
        let flat: Vec<PlaneSpec> = pieces.iter().flat_map(specs).collect();
        let mut writer = TrunkWriter::create_coded(path, &flat, &shapes(pieces))?;
        for piece in pieces {
            match coded.zip(of(piece)) {
                Some((coded, (at, specs))) => coded.spool.copy(*at, specs, &mut writer)?,
                None => self.copy(piece.tensor, &mut writer)?,
            }
        }
        writer.finish_as(sha256)
    }

    /// Codes what is to be coded of some pieces, and `wanted`, rounding to nearest.
    pub(super) fn code_rounded(
        &self,
        pieces: &[Piece<'_>],
        mut coded: Coded,
        wanted: Wanted<'_>,
    ) -> Result<Coded> {
        let matrices = coded_of(pieces.iter().filter(|p| wanted(p)));
        let work = |i: usize| {
            self.stop.check()?;
            let (piece, matrix) = at(&matrices, i)?;
            matrix.encode(self.model, piece.tensor)
        };
        ordered(matrices.len(), work, |i, planes: Planes| {
            let (piece, matrix) = at(&matrices, i)?;
            coded.append(piece, matrix, &planes)?;
            self.progress.add(piece.tensor.bytes, 0);
            Ok(())
        })?;
        Ok(coded)
    }

    /// Codes what is to be coded of the whole trunk, and `wanted`, by what a text tells of its inputs, layer by layer.
    pub(super) fn code_learnt(
        &self,
        trunk: &Trunk<'_>,
        mut coded: Coded,
        wanted: Wanted<'_>,
        note: &mut TrunkNote,
    ) -> Result<Coded> {
        let Some(text) = self.text else { return Ok(coded) };
        let of_layer = |l| coded_of(trunk.pieces.iter().filter(|p| p.tensor.layer == Some(l) && wanted(p)));
        let n_layers = self.model.spec().layers.len();
        let n_layers = (0..n_layers).rev().find(|&l| !of_layer(l).is_empty()).map_or(0, |last| last + 1);
        let mut learner = Learner::begin(self.model, text, trunk.cols_max(), self.stop)?;
        for l in 0..n_layers {
            let matrices = of_layer(l);
            let watched = if matrices.is_empty() { Vec::new() } else { trunk.matrices(l) };
            let evidence = learner.layer(l, &watched)?;
            let work = |i: usize| {
                self.stop.check()?;
                let (piece, matrix) = at(&matrices, i)?;
                self.code_one(piece, matrix, &evidence)
            };
            ordered(matrices.len(), work, |i, (planes, error, fell_back): (Planes, f64, bool)| {
                let (piece, matrix) = at(&matrices, i)?;
                coded.append(piece, matrix, &planes)?;
                note.errors.insert(piece.tensor.name.clone(), error);
                note.n_fell_back += usize::from(fell_back);
                self.progress.add(piece.tensor.bytes, 0);
                Ok(())
            })?;
        }
        Ok(coded)
    }

    /// The planes of a matrix, its relative squared error, and whether rounding to nearest was better.
    fn code_one(
        &self,
        piece: &Piece<'_>,
        matrix: &CodedPiece,
        evidence: &LayerEvidence,
    ) -> Result<(Planes, f64, bool)> {
        let (codec, isa) = (&matrix.codec, self.coder.isa);
        matrix.encode_with(self.model, piece.tensor, |w| {
            let Some(evidence) = evidence.of(piece.tensor.role, w.cols) else {
                let planes = codec.encode(isa, w, None)?;
                let error = loss(isa, codec.as_ref(), &planes, w, None)?.weights.relative();
                return Ok((planes, error, false));
            };
            let mut note = MatrixNote::of(Part::Down);
            let (planes, loss) = self.coder.judged(w, codec, evidence, &mut note)?;
            Ok((planes, loss.weights.relative(), note.fell_back))
        })
    }

    /// Copies a tensor as it is.
    fn copy(&self, tensor: &TrunkTensor, writer: &mut TrunkWriter) -> Result<()> {
        let (mut at, mut finite) = (0, FiniteCheck::new(tensor.dtype));
        let mut chunk = vec![0; CHUNK_BYTES.min(usize::try_from(tensor.bytes).unwrap_or(CHUNK_BYTES))];
        while at < tensor.bytes {
            self.stop.check()?;
            let n = usize::try_from(tensor.bytes - at).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
            let bytes = chunk.get_mut(..n).unwrap_or_default();
            self.model.read_raw(tensor, at, bytes)?;
            finite.look(bytes);
            writer.write(&tensor.name, bytes)?;
            at += n as u64;
            self.progress.add(n as u64, 0);
        }
        finite.finish().map_err(|e| self.model.at_trunk(tensor, e))
    }
}

/// Which matrices are coded.
pub(super) type Wanted<'w> = &'w dyn Fn(&Piece<'_>) -> bool;

/// A tensor that is coded, and how.
type Matrix<'p, 'a> = (&'p Piece<'a>, &'p CodedPiece);

fn coded_of<'p, 'a>(pieces: impl Iterator<Item = &'p Piece<'a>>) -> Vec<Matrix<'p, 'a>>
where
    'a: 'p,
{
    pieces.filter_map(|p| Some((p, p.coded.as_ref()?))).collect()
}

fn at<'p, 'a>(matrices: &[Matrix<'p, 'a>], i: usize) -> Result<Matrix<'p, 'a>> {
    matrices.get(i).copied().ok_or_else(|| Error::bad_data("no such matrix"))
}

/// Matrices that are coded and wait for the header of their file.
pub(super) struct Coded {
    spool: Spool,
    /// Where the planes of a tensor begin, and what they are.
    planes: BTreeMap<String, (u64, Vec<PlaneSpec>)>,
}

impl Coded {
    /// None yet; their file is in `dir`.
    fn create(dir: &Path) -> Result<Coded> {
        Ok(Coded { spool: Spool::create(dir)?, planes: BTreeMap::new() })
    }

    pub(super) fn append(&mut self, piece: &Piece<'_>, matrix: &CodedPiece, planes: &Planes) -> Result<()> {
        let specs = matrix.codec.planes_of(matrix.rows, matrix.cols, planes)?;
        let specs = specs.iter().map(|spec| piece.named(spec)).collect();
        self.planes.insert(piece.tensor.name.clone(), (self.spool.end, specs));
        planes.iter().try_for_each(|plane| self.spool.append(plane))
    }
}

/// Coded planes, one behind the other. The file has no name, so nothing of it outlives the run.
struct Spool {
    file: File,
    path: std::path::PathBuf,
    end: u64,
}

impl Spool {
    fn create(dir: &Path) -> Result<Spool> {
        let path = dir.join(SPOOL);
        let file = File::scratch(&path).map_err(|e| Error::output(&e, "create", &path))?;
        Ok(Spool { file, path, end: 0 })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, self.end).map_err(|e| Error::output(&e, "write", &self.path))?;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Copies the planes `specs`, which start at `at`, into a trunk file.
    fn copy(&self, mut at: u64, specs: &[PlaneSpec], writer: &mut TrunkWriter) -> Result<()> {
        let mut chunk = vec![0; CHUNK_BYTES];
        for spec in specs {
            let mut left = spec.bytes()?;
            while left > 0 {
                let n = usize::try_from(left).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
                let bytes = chunk.get_mut(..n).unwrap_or_default();
                self.file.read_exact_at(bytes, at).map_err(|e| Error::io(&e, "read", &self.path))?;
                writer.write(&spec.name, bytes)?;
                (at, left) = (at + n as u64, left - n as u64);
            }
        }
        Ok(())
    }
}
