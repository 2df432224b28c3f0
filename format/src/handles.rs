//! Open files, few at a time.
//!
//! A bundle has a bank for each layer and a checkpoint up to hundreds of shards, but a process may be allowed 64
//! open files. So a file that was opened once is remembered by path and identity; its descriptor is closed when
//! too many others are in use, and reopened when it is read again. If it is another file by then, that is an
//! error.

use std::collections::VecDeque;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use rustix::fs::OFlags;
use rustix::process::{Resource, getrlimit};

use crate::error::{Error, Result};
use crate::file::open_with;
use crate::storage::File;

/// A file that is opened when it is needed.
#[derive(Debug)]
pub(crate) struct Handle {
    path: PathBuf,
    flags: OFlags,
    identity: Identity,
    open: Mutex<Option<Arc<File>>>,
}

/// What tells one state of one file from every other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    mtime: (i64, i64),
}

impl Handle {
    /// Opens `path` for reading with extra flags.
    pub(crate) fn open(path: &Path, flags: OFlags) -> Result<(Arc<Handle>, Metadata)> {
        let file = open_with(path, flags)?;
        let meta = file.metadata().map_err(|e| Error::io(&e, "stat", path))?;
        let open = Mutex::new(Some(Arc::new(file)));
        let handle = Arc::new(Handle { path: path.to_path_buf(), flags, identity: identity(&meta), open });
        remember(&handle);
        Ok((handle, meta))
    }

    /// The open file; it stays open while the caller holds it.
    ///
    /// # Errors
    /// `BadData` if another file, or another state of it, is there now.
    pub(crate) fn file(self: &Arc<Self>) -> Result<Arc<File>> {
        if let Some(file) = lock(&self.open).as_ref() {
            return Ok(file.clone());
        }
        let file = Arc::new(open_with(&self.path, self.flags)?);
        let meta = file.metadata().map_err(|e| Error::io(&e, "stat", &self.path))?;
        if identity(&meta) != self.identity {
            return Err(Error::bad_data("the file changed while it was in use").in_file(&self.path));
        }
        *lock(&self.open) = Some(file.clone());
        remember(self);
        Ok(file)
    }
}

/// Puts a handle at the end of the queue of open ones, and closes those at its front that are too many.
fn remember(handle: &Arc<Handle>) {
    static OPEN: Mutex<VecDeque<Weak<Handle>>> = Mutex::new(VecDeque::new());
    let mut queue = lock(&OPEN);
    queue.retain(|h| h.strong_count() > 0);
    queue.push_back(Arc::downgrade(handle));
    while queue.len() > open_max() {
        let oldest = queue.pop_front().and_then(|h| h.upgrade());
        if let Some(oldest) = oldest {
            lock(&oldest.open).take();
        }
    }
}

/// Descriptors we keep open: a quarter of what the process may have, since others need some too.
fn open_max() -> usize {
    static MAX: OnceLock<usize> = OnceLock::new();
    *MAX.get_or_init(|| {
        let allowed = getrlimit(Resource::Nofile).current.unwrap_or(4096);
        usize::try_from(allowed / 4).unwrap_or(1024).clamp(4, 1024)
    })
}

fn identity(meta: &Metadata) -> Identity {
    let mtime = (meta.mtime(), meta.mtime_nsec());
    Identity { device: meta.dev(), inode: meta.ino(), bytes: meta.len(), mtime }
}

/// A poisoned lock protects no broken invariant here: every update is one assignment.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::InputFile;

    #[test]
    fn more_files_than_descriptors_stay_readable() {
        let dir = tempfile::tempdir().unwrap();
        let n = open_max() + 10;
        let open = |i: usize| {
            let path = dir.path().join(i.to_string());
            std::fs::write(&path, i.to_le_bytes()).unwrap();
            InputFile::open(&path).unwrap()
        };
        let files: Vec<_> = (0..n).map(open).collect();
        for (i, file) in files.iter().enumerate() {
            let mut buf = [0; 8];
            file.read_exact_at(0, &mut buf).unwrap();
            assert_eq!(buf, i.to_le_bytes());
        }
    }

    #[test]
    fn a_file_that_was_replaced_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"old").unwrap();
        let (handle, _) = Handle::open(&path, OFlags::empty()).unwrap();
        lock(&handle.open).take();
        assert!(handle.file().is_ok());
        lock(&handle.open).take();
        crate::atomic::write_file(&path, b"new").unwrap();
        assert_eq!(handle.file().unwrap_err().what(), "the file changed while it was in use");
    }
}
