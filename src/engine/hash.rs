//! Hashes of the source files, made beside the real work: the file is read from front to back once, which also brings
//! it into the page cache ahead of the experts.

use std::path::PathBuf;
use std::thread::{Scope, ScopedJoinHandle};

use moepack_format::{Error, InputFile, Kind, Result};

use crate::stop::Stop;

/// Hashes under way.
#[derive(Debug)]
pub struct Hashes<'scope>(ScopedJoinHandle<'scope, Result<Vec<String>>>);

impl<'scope> Hashes<'scope> {
    /// Starts to hash `paths` on a thread of its own.
    pub fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        paths: Vec<PathBuf>,
        stop: Stop,
    ) -> Hashes<'scope> {
        Hashes(scope.spawn(move || {
            paths.iter().map(|path| InputFile::open(path)?.sha256(&|| stop.requested())).collect()
        }))
    }

    /// The SHA-256 of each file in hexadecimal, in the order given.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn finish(self) -> Result<Vec<String>> {
        self.0
            .join()
            .unwrap_or_else(|_| Err(Error::new(Kind::Io, "the thread that hashes the source files died")))
    }
}
