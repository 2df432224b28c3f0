//! Output files that appear whole under their name, or not at all.
//!
//! Bytes go to a temporary file beside the target. `commit` makes them durable (fsync), renames, and makes the
//! name durable (fsync of the directory). Dropped without `commit`, the temporary file is removed; one that a
//! killed process left is removed by [`sweep`].

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};
use crate::file::{self, CHUNK_BYTES};
use crate::handles::lock;

/// The temporary files of this process.
static UNFINISHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// A file that is being written and has no name yet.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    temp_path: PathBuf,
    final_path: PathBuf,
    end: u64,
    committed: bool,
}

impl AtomicFile {
    /// Starts a file that will appear as `final_path`, replacing what may be there.
    ///
    /// # Errors
    /// `CannotCreate` if the directory is missing or read-only or a device is there, else what the operating system
    /// says.
    pub fn create(final_path: &Path) -> Result<AtomicFile> {
        refuse_special(final_path)?;
        let (file, temp_path) = create_temp(final_path)?;
        Ok(AtomicFile { file, temp_path, final_path: final_path.to_path_buf(), end: 0, committed: false })
    }

    /// The name it will have.
    pub fn path(&self) -> &Path {
        &self.final_path
    }

    /// Where the next `write` goes: the end of what was appended so far.
    pub fn position(&self) -> u64 {
        self.end
    }

    /// Appends.
    ///
    /// # Errors
    /// `Temporary` if the disk is full, else what the operating system says.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_at(self.end, bytes)?;
        self.end = self.end.saturating_add(bytes.len() as u64);
        Ok(())
    }

    /// Writes at `offset`; where `append` goes next does not change.
    ///
    /// # Errors
    /// As [`AtomicFile::append`].
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let written = self.file.write_all_at(bytes, offset);
        written.map_err(|e| Error::output(&e, "write", &self.final_path).at_byte(offset))
    }

    /// Appends `bytes` zeros.
    ///
    /// # Errors
    /// As [`AtomicFile::append`].
    pub fn append_zeros(&mut self, mut bytes: u64) -> Result<()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while bytes > 0 {
            let chunk = ZEROS.get(..usize::try_from(bytes).unwrap_or(usize::MAX)).unwrap_or(&ZEROS);
            self.append(chunk)?;
            bytes = bytes.saturating_sub(chunk.len() as u64);
        }
        Ok(())
    }

    /// Leaves `bytes` free for a later `write_at`; `append` continues behind them.
    pub fn skip(&mut self, bytes: u64) {
        self.end = self.end.saturating_add(bytes);
    }

    /// SHA-256 of everything written so far, read back.
    ///
    /// # Errors
    /// A read that fails.
    pub fn sha256(&self) -> Result<String> {
        let mut hash = Sha256::new();
        self.read_back(0, |chunk| {
            hash.update(chunk);
            Ok(())
        })?;
        Ok(file::hex(&hash.finalize()))
    }

    /// Calls `each` with consecutive chunks of what was written, from `offset` on.
    ///
    /// # Errors
    /// A read that fails, or what `each` says.
    pub fn read_back(&self, offset: u64, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut buf = vec![0; CHUNK_BYTES];
        let mut at = offset;
        loop {
            let n = file::read_at_most(&self.file, at, &mut buf)
                .map_err(|(e, at)| Error::io(&e, "read back", &self.final_path).at_byte(at))?;
            match buf.get(..n) {
                Some(chunk) if n > 0 => each(chunk)?,
                _ => return Ok(()),
            }
            at = at.saturating_add(n as u64);
        }
    }

    /// Makes the bytes durable and gives them their name.
    ///
    /// # Errors
    /// What the operating system says; the temporary file is removed then. A failed fsync is final: the kernel
    /// may have dropped the pages, so trying again would prove nothing.
    pub fn commit(mut self) -> Result<()> {
        let path = &self.final_path;
        self.file.sync_all().map_err(|e| Error::output(&e, "fsync", path))?;
        std::fs::rename(&self.temp_path, path).map_err(|e| Error::output(&e, "rename", path))?;
        self.committed = true;
        sync_dir(path)
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write_at(bytes, self.end)?;
        self.end = self.end.saturating_add(n as u64);
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        lock(&UNFINISHED).remove(&self.temp_path);
        if !self.committed {
            // Nothing can be told to anyone here; `sweep` of the next run removes what is left.
            let _ = std::fs::remove_file(&self.temp_path);
        }
    }
}

/// Writes a whole small file atomically.
///
/// # Errors
/// As [`AtomicFile::create`] and [`AtomicFile::commit`].
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.append(bytes)?;
    file.commit()
}

/// Removes every temporary file of this process, for one that ends without dropping what its threads hold.
pub fn abandon_all() {
    for path in std::mem::take(&mut *lock(&UNFINISHED)) {
        // The process ends; nobody is left who could be told.
        let _ = std::fs::remove_file(path);
    }
}

/// Removes temporary files that a killed run left in `dir`. Only for one who holds the lock on it.
///
/// # Errors
/// What the operating system says.
pub fn sweep(dir: &Path) -> Result<()> {
    let entries = std::fs::read_dir(dir).map_err(|e| Error::io(&e, "list", dir))?;
    for entry in entries {
        let entry = entry.map_err(|e| Error::io(&e, "list", dir))?;
        if entry.file_name().to_str().is_some_and(is_temp_name) {
            std::fs::remove_file(entry.path()).map_err(|e| Error::output(&e, "remove", &entry.path()))?;
        }
    }
    Ok(())
}

/// Whether `name` is one that [`AtomicFile`] gives its temporary files: `.NAME.tmp-PID-N`.
pub fn is_temp_name(name: &str) -> bool {
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    let tail = name.strip_prefix('.').and_then(|rest| rest.rsplit_once(".tmp-"));
    let numbers = tail.and_then(|(_, tail)| tail.split_once('-'));
    numbers.is_some_and(|(pid, n)| digits(pid) && digits(n))
}

/// Refuses to put a file in place of a device, FIFO or socket, such as /dev/null.
fn refuse_special(path: &Path) -> Result<()> {
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() && !found.is_dir() => Err(Error::new(
            Kind::CannotCreate,
            "the output is a device, FIFO or socket, expected a file or nothing",
        )
        .in_file(path)),
        _ => Ok(()),
    }
}

fn create_temp(final_path: &Path) -> Result<(File, PathBuf)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = final_path
        .file_name()
        .and_then(|n| n.to_str())
        .ok_or_else(|| Error::usage("an output needs a file name in UTF-8").in_file(final_path))?;
    loop {
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temp_path = final_path.with_file_name(format!(".{name}.tmp-{}-{n}", std::process::id()));
        // `create_new` follows no link that somebody put there.
        match OpenOptions::new().read(true).write(true).create_new(true).open(&temp_path) {
            Ok(file) => {
                lock(&UNFINISHED).insert(temp_path.clone());
                return Ok((file, temp_path));
            }
            // Left by an earlier process of this id: containers start at 1 again.
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Error::output(&e, "create", final_path)),
        }
    }
}

/// Makes the directory entry of `path` durable.
fn sync_dir(path: &Path) -> Result<()> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let synced = File::open(dir).and_then(|d| d.sync_all());
    match synced {
        // Some file systems cannot sync a directory; their renames are as durable as they get.
        Err(e) if e.kind() == ErrorKind::InvalidInput => Ok(()),
        other => other.map_err(|e| Error::output(&e, "fsync the directory of", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn appears_whole_on_commit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut file = AtomicFile::create(&path).unwrap();
        file.skip(4);
        file.append(b"tail").unwrap();
        file.write_at(0, b"head").unwrap();
        assert!(!path.exists());
        assert_eq!(file.position(), 8);
        file.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"headtail");
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn zeros_of_any_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut file = AtomicFile::create(&path).unwrap();
        file.append(b"x").unwrap();
        file.append_zeros(10_000).unwrap();
        file.append_zeros(0).unwrap();
        file.commit().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((bytes.len(), bytes[0]), (10_001, b'x'));
        assert!(bytes[1..].iter().all(|&b| b == 0));
    }

    #[test]
    fn leaves_nothing_when_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = AtomicFile::create(&dir.path().join("out")).unwrap();
        file.append(b"half").unwrap();
        assert_eq!(names(dir.path()).len(), 1);
        drop(file);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn a_device_is_not_replaced() {
        let e = AtomicFile::create(Path::new("/dev/null")).unwrap_err();
        assert_eq!(e.kind(), Kind::CannotCreate);
    }

    #[test]
    fn a_missing_directory_cannot_be_written_to() {
        let e = AtomicFile::create(Path::new("/nowhere/at/all/out")).unwrap_err();
        assert_eq!(e.kind(), Kind::CannotCreate);
        assert_eq!(e.file(), Some(Path::new("/nowhere/at/all/out")));
        let e = AtomicFile::create(Path::new("/dev/null/out")).unwrap_err();
        assert_eq!(e.kind(), Kind::CannotCreate);
    }

    #[test]
    fn a_directory_in_place_of_the_target_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        std::fs::create_dir(&path).unwrap();
        let file = AtomicFile::create(&path).unwrap();
        assert_eq!(file.commit().unwrap_err().kind(), Kind::CannotCreate);
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn sweep_takes_only_its_own() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".a.safetensors.tmp-12-0", ".gitignore", ".a.tmp-x-1", "a.tmp-1-1"] {
            std::fs::write(dir.path().join(name), b"").unwrap();
        }
        sweep(dir.path()).unwrap();
        let mut left = names(dir.path());
        left.sort();
        assert_eq!(left, [".a.tmp-x-1", ".gitignore", "a.tmp-1-1"]);
    }

    #[test]
    fn what_is_read_back_is_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = AtomicFile::create(&dir.path().join("out")).unwrap();
        file.append(b"abc").unwrap();
        assert_eq!(file.path(), dir.path().join("out"));
        let want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(file.sha256().unwrap(), want);
    }
}
