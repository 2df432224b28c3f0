//! Files that a bundle or checkpoint names must lie inside it, also where symbolic links are followed.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::storage;

/// The directory, free of links, that files named by `dir` may lie in: `dir` itself, or the whole `models--*`
/// directory if `dir` is a snapshot in a Hugging Face cache, whose files are links into `../../blobs`.
///
/// # Errors
/// What the operating system says.
pub fn root_of(dir: &Path) -> Result<PathBuf> {
    let real = storage::canonicalize(dir).map_err(|e| Error::io(&e, "open", dir))?;
    let snapshots = real.parent().filter(|p| p.file_name().is_some_and(|n| n == "snapshots"));
    let model = snapshots
        .and_then(Path::parent)
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("models--")));
    Ok(model.map_or(real.clone(), Path::to_path_buf))
}

/// `path` free of links, if it lies inside `root`, which [`root_of`] made.
///
/// # Errors
/// `BadData` if it leads outside, else what the operating system says.
pub fn contained(root: &Path, path: &Path) -> Result<PathBuf> {
    let real = storage::canonicalize(path).map_err(|e| Error::io(&e, "open", path))?;
    if real.starts_with(root) {
        return Ok(real);
    }
    let what = format!("leads to {}, expected a file inside {}", real.display(), root.display());
    Err(Error::bad_data(what).in_file(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_stay_inside() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("bundle");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(dir.path().join("secret"), b"").unwrap();
        std::fs::write(inside.join("real"), b"").unwrap();
        symlink("real", inside.join("good")).unwrap();
        symlink("../secret", inside.join("bad")).unwrap();
        let root = root_of(&inside).unwrap();
        assert!(contained(&root, &inside.join("good")).is_ok());
        let e = contained(&root, &inside.join("bad")).unwrap_err();
        assert!(e.what().contains("expected a file inside"), "{e}");
        assert_eq!(contained(&root, &inside.join("none")).unwrap_err().kind(), crate::Kind::Missing);
    }

    #[test]
    fn a_snapshot_may_link_to_its_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("models--org--name");
        let snapshot = model.join("snapshots").join("0123");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir(model.join("blobs")).unwrap();
        std::fs::write(model.join("blobs").join("b"), b"").unwrap();
        symlink("../../blobs/b", snapshot.join("config.json")).unwrap();
        let root = root_of(&snapshot).unwrap();
        assert!(contained(&root, &snapshot.join("config.json")).is_ok());
    }
}
