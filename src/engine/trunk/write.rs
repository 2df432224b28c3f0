//! Writing the trunk files.
//!
//! A file's header names the length of every plane and comes first, but some codecs know their lengths only when they are
//! done. So the matrices of a file are coded first, on all threads, into a nameless temporary file beside it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use moepack_convert::{FiniteCheck, Model, TrunkTensor};
use moepack_format::trunk::{FileSummary, TrunkWriter, trunk_name};
use moepack_format::{Error, PlaneSpec, Result};
use moepack_quant::Planes;
use moepack_verify::forward::ordered;

use super::{CodedPiece, Piece, Trunk, shapes};
use crate::engine::workspace::Workspace;
use crate::progress::Progress;
use crate::stop::Stop;

/// Bytes of a trunk tensor copied at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// The note about the trunk in a workspace.
const TRUNK_NOTE: &str = "trunk";

/// Writes the trunk of a bundle.
pub struct TrunkWork<'a> {
    /// The checkpoint.
    pub model: &'a Model,
    /// Where the files go.
    pub workspace: &'a Workspace,
    /// Told of each tensor.
    pub progress: &'a Progress,
    /// Asked before each piece of work.
    pub stop: &'a Stop,
}

impl TrunkWork<'_> {
    /// Writes every trunk tensor, in the order of the checkpoint's files; nothing where an earlier run did.
    ///
    /// # Errors
    /// What cannot be read, coded or written; a requested stop.
    pub fn write(&self, trunk: &Trunk<'_>) -> Result<Vec<FileSummary>> {
        if let Some(done) = self.workspace.note(TRUNK_NOTE)? {
            return Ok(done);
        }
        let files = trunk.files()?;
        let mut summaries = Vec::new();
        for (i, range) in files.iter().enumerate() {
            let path = self.workspace.dir().join(trunk_name(i + 1, files.len()));
            summaries.push(self.write_file(&path, trunk.pieces(range.clone()))?);
        }
        trunk.left_out.iter().for_each(|scales| self.progress.add(scales.bytes, 0));
        self.workspace.leave_note(TRUNK_NOTE, &summaries)?;
        Ok(summaries)
    }

    fn write_file(&self, path: &Path, pieces: &[Piece<'_>]) -> Result<FileSummary> {
        let (spool, lengths) = self.code(path, pieces)?;
        let mut lengths = lengths.into_iter();
        let mut specs = Vec::new();
        for piece in pieces {
            specs.push(match &piece.coded {
                None => piece.specs(),
                Some(_) => lengths.next().unwrap_or_default(),
            });
        }
        let flat: Vec<PlaneSpec> = specs.iter().flatten().cloned().collect();
        let mut writer = TrunkWriter::create_coded(path, &flat, &shapes(pieces))?;
        let mut spooled = 0;
        for (piece, specs) in pieces.iter().zip(&specs) {
            match (&piece.coded, &spool) {
                (Some(_), Some(spool)) => spooled = spool.copy(spooled, specs, &mut writer)?,
                _ => self.copy(piece.tensor, &mut writer)?,
            }
        }
        writer.finish()
    }

    /// Codes what is to be coded: the planes one behind the other, and what they are, a list for each matrix.
    fn code(&self, path: &Path, pieces: &[Piece<'_>]) -> Result<(Option<Spool>, Vec<Vec<PlaneSpec>>)> {
        let coded: Vec<(&Piece<'_>, &CodedPiece)> =
            pieces.iter().filter_map(|p| Some((p, p.coded.as_ref()?))).collect();
        if coded.is_empty() {
            return Ok((None, Vec::new()));
        }
        let mut spool = Spool::create(path)?;
        let mut lengths = Vec::with_capacity(coded.len());
        let work = |i: usize| {
            self.stop.check()?;
            let (piece, coded) = coded.get(i).ok_or_else(|| Error::bad_data("no such matrix"))?;
            let planes = coded.encode(self.model, piece.tensor)?;
            let specs = coded.codec.planes_of(coded.rows, coded.cols, &planes)?;
            let specs: Vec<PlaneSpec> = specs.iter().map(|spec| piece.named(spec)).collect();
            Ok((specs, planes, piece.tensor.bytes))
        };
        ordered(coded.len(), work, |_, (specs, planes, bytes): (Vec<PlaneSpec>, Planes, u64)| {
            planes.iter().try_for_each(|plane| spool.append(plane))?;
            lengths.push(specs);
            self.progress.add(bytes, 0);
            Ok(())
        })?;
        Ok((Some(spool), lengths))
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

/// Coded planes that wait for the header of their file. The file has no name, so nothing of it outlives the run.
struct Spool {
    file: File,
    path: std::path::PathBuf,
    end: u64,
}

impl Spool {
    /// A file in the directory of `beside`.
    fn create(beside: &Path) -> Result<Spool> {
        let path = beside.with_extension("spool.note.json");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.map_err(|e| Error::output(&e, "create", &path))?;
        std::fs::remove_file(&path).map_err(|e| Error::output(&e, "remove", &path))?;
        Ok(Spool { file, path, end: 0 })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, self.end).map_err(|e| Error::output(&e, "write", &self.path))?;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Copies the planes `specs`, which start at `at`, into a trunk file; gives where they end.
    fn copy(&self, mut at: u64, specs: &[PlaneSpec], writer: &mut TrunkWriter) -> Result<u64> {
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
        Ok(at)
    }
}
