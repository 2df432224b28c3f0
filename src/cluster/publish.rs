//! Finished files get their final name by a link that fails where somebody was first; whoever is second compares.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use moepack_format::{Error, InputFile, Result, atomic, storage};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::cluster::folder::PlanFolder;
use crate::cluster::who::{Who, is_here};
use crate::engine::workspace::{read_json, write_json};

/// Attempts that are looked at.
const ATTEMPTS_MAX: usize = 1 << 20;

/// A directory that one attempt at a shard writes in, removed with it.
#[derive(Debug)]
pub struct Attempt(PathBuf);

impl Attempt {
    /// Makes a directory that no other attempt has, on whatever machine.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn create(folder: &PlanFolder, shard: usize, who: &Who) -> Result<Attempt> {
        static COUNTER: AtomicUsize = AtomicUsize::new(0);
        loop {
            let n = COUNTER.fetch_add(1, Ordering::Relaxed);
            let name = format!("shard-{shard}.{}-{}-{n}", who.machine(), who.pid);
            let path = folder.attempts().join(name);
            match storage::create_dir(&path) {
                Ok(()) => return Ok(Attempt(path)),
                // Left by an earlier process of this id: containers start at 1 again.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::output(&e, "create", &path)),
            }
        }
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Publishes the file `name` of this attempt as `target`.
    ///
    /// # Errors
    /// Another attempt published other bytes (kind `BadData`), or the file system refuses.
    pub fn publish(&self, name: &str, target: &Path, sha256: &str) -> Result<()> {
        let source = self.0.join(name);
        if give_name(&source, target)? {
            return Ok(());
        }
        let found = InputFile::open(target)?.sha256(&|| false)?;
        if found != sha256 {
            return Err(other_bytes(target, &found, sha256));
        }
        remove(&source)
    }

    /// Publishes a report. Gives whether this was the first.
    ///
    /// # Errors
    /// Another attempt published another report, or the file system refuses.
    pub fn publish_report<T>(&self, report: &T, target: &Path) -> Result<bool>
    where
        T: Serialize + DeserializeOwned + PartialEq,
    {
        let name = target.file_name().unwrap_or_default();
        let source = self.0.join(name);
        write_json(&source, report)?;
        if give_name(&source, target)? {
            return Ok(true);
        }
        if read_json::<T>(target)?.is_none_or(|found| found != *report) {
            return Err(other_bytes(target, "another report", "the same"));
        }
        remove(&source).map(|()| false)
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        // Merging removes what is left.
        let _ = storage::remove_dir_all(&self.0);
    }
}

/// Removes what earlier attempts at this shard left here whose processes are gone.
pub fn sweep(folder: &PlanFolder, shard: usize, who: &Who) {
    let ours = format!("shard-{shard}.{}-", who.machine());
    for path in storage::list(&folder.attempts(), ATTEMPTS_MAX).unwrap_or_default() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let pid = name.strip_prefix(&ours).and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| pid != who.pid.to_string() && !is_here(pid)) {
            // What stays is removed by merging.
            let _ = storage::remove_dir_all(&path);
        }
    }
}

fn other_bytes(target: &Path, found: &str, own: &str) -> Error {
    Error::bad_data(format!("another attempt at this shard wrote {found}, this one {own}"))
        .in_file(target)
        .hint("one of the machines computes wrongly, or programs differ; find out which, remove the file and its report, and run the shard again")
}

/// Gives a file its final name, unless something has it already; says whether it did. `source` is gone then.
fn give_name(source: &Path, target: &Path) -> Result<bool> {
    let failed = |e: std::io::Error| Error::output(&e, "publish", target);
    match storage::hard_link(source, target) {
        Ok(()) => remove(source)?,
        Err(e) if e.kind() == ErrorKind::AlreadyExists => return Ok(false),
        // Some file systems have no links.
        Err(e) if matches!(e.kind(), ErrorKind::Unsupported | ErrorKind::PermissionDenied) => {
            match storage::rename_new(source, target) {
                Ok(()) => {}
                Err(_) if storage::exists(target)? => return Ok(false),
                Err(e) => return Err(failed(e)),
            }
        }
        Err(e) => return Err(failed(e)),
    }
    storage::sync_dir(target.parent().unwrap_or(Path::new("."))).map_err(failed)?;
    Ok(true)
}

fn remove(path: &Path) -> Result<()> {
    storage::remove_file(path).map_err(|e| Error::output(&e, "remove", path))
}

/// Creates a small file; says whether nobody did before.
///
/// # Errors
/// The file cannot be written.
pub fn create_json<T: Serialize>(path: &Path, value: &T) -> Result<bool> {
    static COUNTER: AtomicUsize = AtomicUsize::new(0);
    let n = COUNTER.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let who = Who::this();
    let source = path.with_file_name(format!(".{name}.{}-{}-{n}", who.machine(), who.pid));
    replace_json(&source, value)?;
    let first = give_name(&source, path)?;
    if !first {
        remove(&source)?;
    }
    Ok(first)
}

/// Replaces a small file that only informs.
///
/// # Errors
/// The file cannot be written.
pub fn replace_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|e| Error::bad_data(e.to_string()))?;
    atomic::write_file(path, &text)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn attempt(root: &Path) -> Attempt {
        let folder = PlanFolder::of(root);
        fs::create_dir_all(folder.attempts()).unwrap();
        Attempt::create(&folder, 3, &Who::this()).unwrap()
    }

    #[test]
    fn the_second_is_compared_with_the_first() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("bank");
        for _ in 0..2 {
            let attempt = attempt(root.path());
            fs::write(attempt.path().join("b"), "abc").unwrap();
            attempt.publish("b", &target, ABC).unwrap();
            assert!(attempt.publish_report(&7, &root.path().join("r.json")).is_ok());
        }
        let other = attempt(root.path());
        fs::write(other.path().join("b"), "abd").unwrap();
        let e = other.publish("b", &target, "0000").unwrap_err();
        assert_eq!((e.kind().exit_code(), fs::read(&target).unwrap()), (65, b"abc".to_vec()));
        assert!(other.publish_report(&8, &root.path().join("r.json")).is_err());
        drop(other);
        assert_eq!(fs::read_dir(root.path().join("attempts")).unwrap().count(), 0);
    }
}
