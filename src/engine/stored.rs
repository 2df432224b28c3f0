//! A residual stream between two layers as a file, so that another run, or another process, goes on with it.
//!
//! A line says whose it is, then come the stream's bytes, then 64 hex digits: the SHA-256 of all before.

use std::io::{self, ErrorKind, Read, Write};
use std::path::Path;

use moepack_convert::ModelSpec;
use moepack_format::file::hex;
use moepack_format::{AtomicFile, Context, Error, InputFile, Kind, Result};
use moepack_verify::forward::Stream;
use moepack_verify::tokens::Windows;
use sha2::{Digest, Sha256};

/// Digits of a SHA-256.
const DIGITS: usize = 64;

/// Stores a stream under a name, whole or not at all. `head` is a line that says whose it is.
///
/// # Errors
/// A failed write.
pub fn store(path: &Path, head: &str, stream: &Stream) -> Result<()> {
    let mut to = Hashing { file: AtomicFile::create(path)?, hash: Sha256::new() };
    let written = to.write_all(head.as_bytes()).and_then(|()| stream.write_to(&mut to));
    written.map_err(|e| Error::output(&e, "write", path))?;
    let Hashing { mut file, hash } = to;
    file.append(hex(&hash.finalize()).as_bytes())?;
    file.commit()
}

/// Loads a stream that [`store`] stored for these windows of this model.
///
/// # Errors
/// `BadData` if it is damaged or says another `head`; a failed read.
pub fn load(path: &Path, head: &str, spec: &ModelSpec, windows: &Windows) -> Result<Stream> {
    let file = InputFile::open(path)?;
    let mut from = Checked { file: &file, at: 0, hash: Sha256::new() };
    let read = read(&mut from, head, spec.width(), windows.tokens.len(), windows.lens.len());
    read.map_err(|e| match e.kind() {
        ErrorKind::Other => Error::new(Kind::Io, e.to_string()),
        _ => Error::bad_data(format!("stored activations are damaged: {e}"))
            .hint("remove the file; the same command makes it again"),
    })
    .in_file(path)
}

fn read(
    from: &mut Checked<'_>,
    head: &str,
    width: usize,
    n_tokens: usize,
    n_windows: usize,
) -> io::Result<Stream> {
    let invalid = |what: &str| io::Error::new(ErrorKind::InvalidData, what.to_owned());
    let mut found = vec![0; head.len()];
    from.read_exact(&mut found)?;
    if found != head.as_bytes() {
        return Err(invalid("they belong to other work"));
    }
    let stream = Stream::read_from(from, width, n_tokens, n_windows)?;
    let expected = hex(&std::mem::take(&mut from.hash).finalize());
    let mut digits = vec![0; DIGITS];
    from.read_exact(&mut digits)?;
    match digits == expected.as_bytes() && from.at == from.file.len() {
        true => Ok(stream),
        false => Err(invalid("their checksum is another")),
    }
}

/// A file that is hashed while it is written.
struct Hashing {
    file: AtomicFile,
    hash: Sha256,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hash.update(bytes.get(..n).unwrap_or_default());
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that is hashed while it is read.
struct Checked<'a> {
    file: &'a InputFile,
    at: u64,
    hash: Sha256,
}

impl Read for Checked<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.file.len().saturating_sub(self.at);
        let n = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        let part = bytes.get_mut(..n).unwrap_or_default();
        self.file.read_exact_at(self.at, part).map_err(|e| io::Error::other(e.to_string()))?;
        self.hash.update(&*part);
        self.at += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_comes_back_or_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        store(&path, "mine\n", &Stream::new(2, vec![1.0, 2.0, 3.0, 4.0])).unwrap();
        let load = |head: &str, n_tokens| {
            let file = InputFile::open(&path).unwrap();
            read(&mut Checked { file: &file, at: 0, hash: Sha256::new() }, head, 2, n_tokens, 1)
        };
        assert_eq!(load("mine\n", 2).unwrap().hidden, [1.0, 2.0, 3.0, 4.0]);
        assert!(load("your\n", 2).is_err() && load("mine\n", 3).is_err());
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 4;
            std::fs::write(&path, &bad).unwrap();
            assert!(load("mine\n", 2).is_err(), "byte {at}");
        }
        std::fs::write(&path, &good[..good.len() - 1]).unwrap();
        assert!(load("mine\n", 2).is_err());
    }
}
