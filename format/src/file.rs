//! Positioned reads of a file somebody else wrote.
//!
//! Only regular files are opened, every read is told its offset, and every complaint names the file.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};
use crate::handles::Handle;
use crate::storage::File;

/// Bytes read at a time when a whole file is streamed.
pub const CHUNK_BYTES: usize = 1 << 20;

/// How often a read that failed with an I/O error is tried again: flaky disks and network file systems.
const READ_RETRIES: usize = 3;

/// A regular file, open for positioned reads. Clones share the descriptor, which is closed and reopened
/// behind the scenes when a process has too many.
#[derive(Clone, Debug)]
pub struct InputFile {
    handle: Arc<Handle>,
    path: PathBuf,
    len: u64,
}

/// What a file looked like when it was opened, to notice that it changed since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Length of the file.
    pub bytes: u64,
    /// Time of the last change, nanoseconds since 1970.
    pub mtime_ns: i64,
}

impl InputFile {
    /// Opens a regular file.
    ///
    /// # Errors
    /// `Missing` if there is none, `BadData` if it is a directory, FIFO, socket or device, else what the
    /// operating system says.
    pub fn open(path: &Path) -> Result<InputFile> {
        // Without O_NONBLOCK the open of a FIFO would wait for a writer for ever.
        let (handle, meta) = Handle::open(path, OFlags::NONBLOCK)?;
        if !meta.is_file() {
            let kind = file_kind(&meta);
            return Err(Error::bad_data(format!("{kind}, expected a regular file")).in_file(path));
        }
        Ok(InputFile { handle, path: path.to_path_buf(), len: meta.len() })
    }

    /// The path it was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it had no bytes when it was opened.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `BadData` with both offsets if the file ends before; `Io` with the offset if the disk fails repeatedly.
    pub fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let wanted = buf.len();
        let got = read_at_most(&*self.handle.file()?, offset, buf)
            .map_err(|(e, at)| Error::io(&e, "read", &self.path).at_byte(at))?;
        if got == wanted {
            return Ok(());
        }
        let what = format!("file ends {got} bytes after byte {offset}, expected {wanted} more");
        Err(cut_short(Error::bad_data(what).in_file(&self.path).at_byte(offset)))
    }

    /// The file's length and time of change as they are now.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        let meta = self.handle.file()?.metadata().map_err(|e| Error::io(&e, "stat", &self.path))?;
        let mtime_ns = meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec());
        Ok(Fingerprint { bytes: meta.len(), mtime_ns })
    }

    /// SHA-256 of the whole file as 64 lower-case hex digits.
    ///
    /// # Errors
    /// A read that fails, a file that became shorter, or `Interrupted` once `stop` says true.
    pub fn sha256(&self, stop: &dyn Fn() -> bool) -> Result<String> {
        let mut hash = Sha256::new();
        self.chunks(|_, chunk| {
            hash.update(chunk);
            if stop() { Err(Error::new(Kind::Interrupted, "stopped")) } else { Ok(()) }
        })?;
        Ok(hex(&hash.finalize()))
    }

    /// Calls `each` with offset and bytes of consecutive chunks until the end of the file.
    ///
    /// # Errors
    /// A read that fails, or what `each` says.
    pub fn chunks(&self, mut each: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let mut buf = vec![0; CHUNK_BYTES.min(usize::try_from(self.len).unwrap_or(CHUNK_BYTES))];
        let mut offset = 0;
        while offset < self.len {
            let n = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
            let chunk = buf.get_mut(..n).unwrap_or_default();
            self.read_exact_at(offset, chunk)?;
            each(offset, chunk)?;
            offset = offset.saturating_add(n as u64);
        }
        Ok(())
    }
}

/// Lower-case hex digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    let digit = |n: u8| char::from_digit(n.into(), 16).unwrap_or_default();
    bytes.iter().flat_map(|b| [digit(b >> 4), digit(b & 15)]).collect()
}

/// The bytes that hex digits stand for; `None` if they are none.
pub fn from_hex(digits: &str) -> Option<Vec<u8>> {
    let digit = |b: &u8| char::from(*b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let (pairs, odd) = digits.as_bytes().as_chunks::<2>();
    let byte = |[high, low]: &[u8; 2]| Some(digit(high)? << 4 | digit(low)?);
    odd.is_empty().then(|| pairs.iter().map(byte).collect()).flatten()
}

/// Refuses a file made anew that is not what it was.
pub(crate) fn check_sha256(found: &str, expected: Option<&str>) -> Result<()> {
    match expected.filter(|expected| *expected != found) {
        None => Ok(()),
        Some(expected) => {
            let what = format!("made anew its sha256 is {found}, the manifest says {expected}");
            Err(Error::bad_data(what).hint(
                "the file stays as it was; was it made from this checkpoint, by this version of moepack?",
            ))
        }
    }
}

/// Adds the usual advice for a file with too few bytes.
pub(crate) fn cut_short(error: Error) -> Error {
    error.hint("the download may be cut short; fetch this file again and compare its sha256")
}

/// Opens for reading with extra flags.
pub(crate) fn open_with(path: &Path, flags: OFlags) -> Result<File> {
    File::open(path, flags).map_err(|e| Error::io(&e, "open", path))
}

/// Reads until `buf` is full or the file ends; returns the number of bytes, or the error and where it came.
pub(crate) fn read_at_most(
    file: &File,
    offset: u64,
    buf: &mut [u8],
) -> std::result::Result<usize, (std::io::Error, u64)> {
    let mut done = 0;
    let mut retries = READ_RETRIES;
    while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let at = offset.saturating_add(done as u64);
        match file.read_at(rest, at) {
            Ok(0) => break,
            Ok(n) => done = done.saturating_add(n),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if retries > 0 && e.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                retries = retries.saturating_sub(1);
            }
            Err(e) => return Err((e, at)),
        }
    }
    Ok(done)
}

/// What an error message calls something that is no regular file.
fn file_kind(meta: &std::fs::Metadata) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    let kind = meta.file_type();
    match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_socket() => "a socket",
        () => "a device",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_where_it_is_told_and_says_where_the_file_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"0123456789").unwrap();
        let file = InputFile::open(&path).unwrap();
        let mut buf = [0; 4];
        file.read_exact_at(3, &mut buf).unwrap();
        assert_eq!(&buf, b"3456");
        let e = file.read_exact_at(8, &mut buf).unwrap_err();
        assert_eq!(e.what(), "file ends 2 bytes after byte 8, expected 4 more");
        assert_eq!((e.kind(), e.byte()), (Kind::BadData, Some(8)));
        assert!(file.read_exact_at(u64::MAX, &mut buf).is_err());
    }

    #[test]
    fn only_regular_files_open() {
        let dir = tempfile::tempdir().unwrap();
        let e = InputFile::open(dir.path()).unwrap_err();
        assert_eq!((e.kind(), e.what()), (Kind::BadData, "a directory, expected a regular file"));
        let e = InputFile::open(Path::new("/dev/null")).unwrap_err();
        assert_eq!((e.kind(), e.what()), (Kind::BadData, "a device, expected a regular file"));
        let fifo = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
        let e = InputFile::open(&fifo).unwrap_err();
        assert_eq!((e.kind(), e.what()), (Kind::BadData, "a FIFO, expected a regular file"));
        let e = InputFile::open(&dir.path().join("none")).unwrap_err();
        assert_eq!(e.kind(), Kind::Missing);
    }

    #[test]
    fn hex_goes_back_and_forth() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&hex(&bytes)), Some(bytes));
        assert_eq!((from_hex("0"), from_hex("0g"), from_hex("")), (None, None, Some(Vec::new())));
    }

    #[test]
    fn sha256_is_the_published_one_and_stops_when_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"abc").unwrap();
        let file = InputFile::open(&path).unwrap();
        // FIPS 180-2, appendix B.1.
        let want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(file.sha256(&|| false).unwrap(), want);
        assert_eq!(file.sha256(&|| true).unwrap_err().kind(), Kind::Interrupted);
    }
}
