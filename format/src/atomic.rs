//! Output files that appear whole under their name, or not at all.
//!
//! Bytes go to a temporary file beside the target. `commit` makes them durable (fsync), renames, and makes the
//! name durable (fsync of the directory). Dropped without `commit`, the temporary file is removed; one that a
//! killed process left is removed by [`sweep`].

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};
use crate::file::{self, CHUNK_BYTES};
use crate::handles::lock;
use crate::storage::{self, File};

/// The temporary files of this process.
static UNFINISHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// A file that is being written and has no name yet.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    temp_path: PathBuf,
    final_path: PathBuf,
    end: u64,
    /// Whether the temporary file stays when this is dropped: it has its name by now, or a later run goes on with it.
    stays: bool,
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
        // For `sweep_dead`; where there are no locks, nothing is swept either.
        let _ = file.try_lock();
        Ok(AtomicFile { file, temp_path, final_path: final_path.to_path_buf(), end: 0, stays: false })
    }

    /// Starts a file that a later run can go on with: its temporary file, `.NAME.growing`, stays until it is committed
    /// or somebody removes it. Only for one who holds a lock on the directory.
    ///
    /// # Errors
    /// As [`AtomicFile::create`].
    pub fn grow(final_path: &Path) -> Result<AtomicFile> {
        let temp_path = growing(final_path)?;
        let removed = storage::remove_file(&temp_path);
        if let Some(e) = removed.err().filter(|e| e.kind() != ErrorKind::NotFound) {
            return Err(Error::output(&e, "remove", &temp_path));
        }
        let file = File::create_new(&temp_path).map_err(|e| Error::output(&e, "create", final_path))?;
        Ok(AtomicFile { file, temp_path, final_path: final_path.to_path_buf(), end: 0, stays: true })
    }

    /// Goes on with a file that [`AtomicFile::grow`] started, whose first `bytes` bytes are durable: `append` continues
    /// behind them. `None` if it is not there, or shorter.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn grow_on(final_path: &Path, bytes: u64) -> Result<Option<AtomicFile>> {
        let temp_path = growing(final_path)?;
        let file = match File::open_again(&temp_path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|e| Error::output(&e, "open", &temp_path))?,
        };
        let found = file.metadata().map_err(|e| Error::io(&e, "stat", &temp_path))?;
        let whole = found.is_file() && found.len() >= bytes;
        if whole {
            // What was written behind may be torn.
            file.set_len(bytes).map_err(|e| Error::output(&e, "cut", &temp_path))?;
        }
        let final_path = final_path.to_path_buf();
        Ok(whole.then_some(AtomicFile { file, temp_path, final_path, end: bytes, stays: true }))
    }

    /// Makes what was written so far durable, so that a later run may go on from here.
    ///
    /// # Errors
    /// What the operating system says. What was written since the last time must not be relied on then.
    pub fn checkpoint(&self) -> Result<()> {
        self.file.sync().map_err(|e| Error::output(&e, "fsync", &self.final_path))
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
        self.file.sync().map_err(|e| Error::output(&e, "fsync", path))?;
        storage::rename(&self.temp_path, path).map_err(|e| Error::output(&e, "rename", path))?;
        self.stays = true;
        sync_dir(path)
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_all_at(bytes, self.end)?;
        self.end = self.end.saturating_add(bytes.len() as u64);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        lock(&UNFINISHED).remove(&self.temp_path);
        if !self.stays {
            // Nothing can be told to anyone here; `sweep` of the next run removes what is left.
            let _ = storage::remove_file(&self.temp_path);
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
        let _ = storage::remove_file(&path);
    }
}

/// Removes temporary files that a killed run left in `dir`. Only for one who holds the lock on it.
///
/// # Errors
/// What the operating system says.
pub fn sweep(dir: &Path) -> Result<()> {
    let paths = storage::list(dir, usize::MAX).map_err(|e| Error::io(&e, "list", dir))?;
    let is_ours = |path: &&PathBuf| path.file_name().and_then(|n| n.to_str()).is_some_and(is_temp_name);
    paths
        .iter()
        .filter(is_ours)
        .try_for_each(|path| storage::remove_file(path).map_err(|e| Error::output(&e, "remove", path)))
}

/// Removes temporary files that killed runs left of the file `path`; those of a run that is at it are locked and stay. It is
/// no matter of the caller's if one cannot be removed.
pub fn sweep_dead(path: &Path) {
    let Ok(name) = plain_name(path) else { return };
    let prefix = format!(".{name}.tmp-");
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let is_left = |path: &&PathBuf| {
        let found = path.file_name().and_then(|n| n.to_str());
        found.is_some_and(|n| n.starts_with(&prefix) && is_temp_name(n))
    };
    for path in storage::list(dir, usize::MAX).unwrap_or_default().iter().filter(is_left) {
        if File::open_again(path).and_then(|file| file.try_lock()).is_ok_and(|alone| alone) {
            let _ = storage::remove_file(path);
        }
    }
}

/// The temporary file of one that grows over several runs.
fn growing(final_path: &Path) -> Result<PathBuf> {
    Ok(final_path.with_file_name(format!(".{}.growing", plain_name(final_path)?)))
}

fn plain_name(path: &Path) -> Result<&str> {
    let name = path.file_name().and_then(|n| n.to_str());
    name.ok_or_else(|| Error::usage("an output needs a file name in UTF-8").in_file(path))
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
    match storage::metadata(path) {
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
    let name = plain_name(final_path)?;
    loop {
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temp_path = final_path.with_file_name(format!(".{name}.tmp-{}-{n}", std::process::id()));
        // `create_new` follows no link that somebody put there.
        match File::create_new(&temp_path) {
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
    let dir = path.parent().unwrap_or(Path::new("."));
    storage::sync_dir(dir).map_err(|e| Error::output(&e, "fsync the directory of", path))
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
    fn what_was_durable_is_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        assert!(AtomicFile::grow_on(&path, 0).unwrap().is_none());
        let mut file = AtomicFile::grow(&path).unwrap();
        file.append(b"abcdef").unwrap();
        file.checkpoint().unwrap();
        drop(file);
        assert!(AtomicFile::grow_on(&path, 7).unwrap().is_none(), "shorter than it is said to be");
        let mut file = AtomicFile::grow_on(&path, 4).unwrap().unwrap();
        file.append(b"EF").unwrap();
        file.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"abcdEF");
        assert_eq!(names(dir.path()), ["out"]);
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
    fn a_dead_run_is_swept_away_and_a_live_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        std::fs::write(dir.path().join(".out.tmp-1-0"), b"").unwrap();
        std::fs::write(dir.path().join(".other.tmp-1-0"), b"").unwrap();
        let live = AtomicFile::create(&path).unwrap();
        sweep_dead(&path);
        assert_eq!(names(dir.path()).len(), 2);
        live.commit().unwrap();
        let mut left = names(dir.path());
        left.sort();
        assert_eq!(left, [".other.tmp-1-0", "out"]);
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
