//! Hashes of the source files, made beside the real work: the file is read from front to back once, which also brings
//! it into the page cache ahead of the experts. Where a download left the hub's hash behind, they are compared.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Scope, ScopedJoinHandle};

use moepack_convert::checkpoint::recorded_sha256;
use moepack_format::{Error, InputFile, Kind, Result};

use crate::stop::Stop;

/// Hashes under way. Dropped before they are finished, they are given up: work that failed does not wait for them.
#[derive(Debug)]
pub struct Hashes<'scope> {
    thread: Option<ScopedJoinHandle<'scope, Result<Vec<String>>>>,
    given_up: Arc<AtomicBool>,
}

impl<'scope> Hashes<'scope> {
    /// Starts to hash `paths` on a thread of its own.
    pub fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        paths: Vec<PathBuf>,
        stop: Stop,
    ) -> Hashes<'scope> {
        let given_up = Arc::new(AtomicBool::new(false));
        let seen = given_up.clone();
        let thread = scope.spawn(move || {
            let ended = || stop.requested() || seen.load(Ordering::Relaxed);
            paths.iter().map(|path| compared(path, InputFile::open(path)?.sha256(&ended)?)).collect()
        });
        Hashes { thread: Some(thread), given_up }
    }

    /// The SHA-256 of each file in hexadecimal, in the order given.
    ///
    /// # Errors
    /// A file that cannot be read, or is not what the hub has.
    pub fn finish(mut self) -> Result<Vec<String>> {
        let died = || Error::new(Kind::Io, "the thread that hashes the source files died");
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_else(|| Err(died()))
    }
}

/// The hash of a file, unless the download left another behind.
fn compared(path: &Path, found: String) -> Result<String> {
    match recorded_sha256(path)?.filter(|recorded| *recorded != found) {
        None => Ok(found),
        Some(recorded) => {
            let what = format!("sha256 is {found}, the hub's when it was downloaded {recorded}");
            Err(Error::bad_data(what)
                .in_file(path)
                .hint("the download is damaged or was changed; fetch this file again"))
        }
    }
}

impl Drop for Hashes<'_> {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn hashes_are_those_of_the_files_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("a"), "abc").unwrap();
        std::fs::write(path("b"), "").unwrap();
        let paths = vec![path("a"), path("b")];
        let found = std::thread::scope(|scope| Hashes::start(scope, paths, Stop::default()).finish());
        let starts: Vec<String> = found.unwrap().iter().map(|h| h[..8].to_owned()).collect();
        assert_eq!(starts, ["ba7816bf", "e3b0c442"]);
    }

    #[test]
    fn work_that_failed_does_not_wait_for_hashes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sparse");
        // Hours of hashing, but no bytes on the disk.
        std::fs::File::create(&path).unwrap().set_len(1 << 43).unwrap();
        let started = Instant::now();
        std::thread::scope(|scope| drop(Hashes::start(scope, vec![path], Stop::default())));
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    }
}
