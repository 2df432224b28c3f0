//! The files a plan was made of, and whether they are still the same.

use std::path::Path;

use moepack_convert::Model;
use moepack_format::{Error, Fingerprint, InputFile, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::stop::Stop;

/// A file of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceFile {
    /// Name inside the checkpoint.
    pub path: String,
    /// Length.
    pub bytes: u64,
    /// Time of the last change, nanoseconds since 1970: where it is another, `sha256` decides.
    pub mtime_ns: i64,
    /// SHA-256.
    pub sha256: String,
}

/// Hashes the weight files, and the files that are copied beside them.
///
/// # Errors
/// A file that cannot be read; a requested stop.
pub fn sources(model: &Model, stop: &Stop) -> Result<(Vec<SourceFile>, Vec<SourceFile>)> {
    let of = |name: &str, path: &Path| -> Result<SourceFile> {
        let file = InputFile::open(path)?;
        let Fingerprint { bytes, mtime_ns } = file.fingerprint()?;
        let sha256 = file.sha256(&|| stop.requested()).map_err(|e| stop.check().err().unwrap_or(e))?;
        Ok(SourceFile { path: name.to_owned(), bytes, mtime_ns, sha256 })
    };
    let weights = model.files().par_iter().map(|f| of(&f.name, &f.path)).collect::<Result<_>>()?;
    let side = model.side_files(&mut Vec::new())?;
    Ok((weights, side.par_iter().map(|f| of(&f.name, &f.path)).collect::<Result<_>>()?))
}

/// Refuses a checkpoint that changed since it was planned for. A file of another time but the same length is hashed.
///
/// # Errors
/// `BadData` for the first file that differs.
pub fn check_unchanged(model: &Model, planned: &[SourceFile], stop: &Stop) -> Result<()> {
    let files: Vec<(&str, &Path)> =
        model.files().iter().map(|f| (f.name.as_str(), f.path.as_path())).collect();
    check_files(&files, planned, stop)
}

/// The same for the files that are copied.
///
/// # Errors
/// As [`check_unchanged`].
pub fn check_side_unchanged(model: &Model, planned: &[SourceFile], stop: &Stop) -> Result<()> {
    let side = model.side_files(&mut Vec::new())?;
    let files: Vec<(&str, &Path)> = side.iter().map(|f| (f.name.as_str(), f.path.as_path())).collect();
    check_files(&files, planned, stop)
}

fn check_files(files: &[(&str, &Path)], planned: &[SourceFile], stop: &Stop) -> Result<()> {
    let changed = |what: String, path: &Path| {
        Err(Error::bad_data(format!("source changed since plan: {what}"))
            .in_file(path)
            .hint("bring the file back as it was, or plan again"))
    };
    if let Some(gone) = planned.iter().find(|p| files.iter().all(|(name, _)| *name != p.path)) {
        return changed("it is gone".to_owned(), Path::new(&gone.path));
    }
    for (name, path) in files {
        let Some(known) = planned.iter().find(|p| p.path == *name) else {
            return changed("it is new".to_owned(), path);
        };
        let file = InputFile::open(path)?;
        let Fingerprint { bytes, mtime_ns } = file.fingerprint()?;
        if bytes != known.bytes {
            return changed(format!("{bytes} bytes, was {}", known.bytes), path);
        }
        if mtime_ns == known.mtime_ns {
            continue;
        }
        let sha256 = file.sha256(&|| stop.requested()).map_err(|e| stop.check().err().unwrap_or(e))?;
        if sha256 != known.sha256 {
            return changed(format!("sha256 {sha256}, was {}", known.sha256), path);
        }
    }
    Ok(())
}
