//! Finished files get their final name by a link that fails where somebody was first; whoever is second compares.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use moepack_format::{Error, InputFile, Result, atomic};
use rustix::fs::RenameFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::cluster::claim::Who;
use crate::cluster::folder::PlanFolder;
use crate::engine::workspace::{read_json, sync_dir, write_json};

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
            match fs::create_dir(&path) {
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
        if link(&source, target)? {
            sync_parent(target)?;
        } else {
            let found = InputFile::open(target)?.sha256(&|| false)?;
            if found != sha256 {
                return Err(other_bytes(target, &found, sha256));
            }
        }
        fs::remove_file(&source).map_err(|e| Error::output(&e, "remove", &source))
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
        let first = link(&source, target)?;
        if first {
            sync_parent(target)?;
        } else if read_json::<T>(target)?.is_none_or(|found| found != *report) {
            return Err(other_bytes(target, "another report", "the same"));
        }
        fs::remove_file(&source).map_err(|e| Error::output(&e, "remove", &source))?;
        Ok(first)
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        // Merging removes what is left.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes what earlier attempts at this shard left here whose processes are gone.
pub fn sweep(folder: &PlanFolder, shard: usize, who: &Who) {
    let ours = format!("shard-{shard}.{}-", who.machine());
    let entries = fs::read_dir(folder.attempts()).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(&ours).and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| pid != who.pid.to_string() && !Path::new("/proc").join(pid).exists()) {
            // What stays is removed by merging.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn other_bytes(target: &Path, found: &str, own: &str) -> Error {
    Error::bad_data(format!("another attempt at this shard wrote {found}, this one {own}"))
        .in_file(target)
        .hint("one of the machines computes wrongly, or programs differ; find out which, remove the file and its report, and run the shard again")
}

/// Gives `source` a second name, unless something has it already; says whether it did.
fn link(source: &Path, target: &Path) -> Result<bool> {
    match fs::hard_link(source, target) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
        // Some file systems have no links.
        Err(e) if matches!(e.kind(), ErrorKind::Unsupported | ErrorKind::PermissionDenied) => {
            copy(source, target)
        }
        Err(e) => Err(Error::output(&e, "publish", target)),
    }
}

/// The same by a copy that is renamed.
fn copy(source: &Path, target: &Path) -> Result<bool> {
    let second = source.with_extension("copy");
    fs::copy(source, &second).map_err(|e| Error::output(&e, "copy", &second))?;
    let cwd = rustix::fs::CWD;
    let done = match rustix::fs::renameat_with(cwd, &second, cwd, target, RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(true),
        Err(rustix::io::Errno::EXIST) => Ok(false),
        // Whoever is second then replaces equal bytes by equal bytes.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if !target.exists() => {
            return fs::rename(&second, target)
                .map(|()| true)
                .map_err(|e| Error::output(&e, "publish", target));
        }
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => Ok(false),
        Err(e) => Err(Error::output(&e.into(), "publish", target)),
    };
    fs::remove_file(&second).map_err(|e| Error::output(&e, "remove", &second))?;
    done
}

fn sync_parent(target: &Path) -> Result<()> {
    sync_dir(target.parent().unwrap_or(Path::new(".")))
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
    let first = link(&source, path);
    fs::remove_file(&source).map_err(|e| Error::output(&e, "remove", &source))?;
    first
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

    #[test]
    fn where_there_are_no_links_a_copy_is_renamed() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::write(at("a"), "abc").unwrap();
        assert_eq!(copy(&at("a"), &at("b")), Ok(true));
        assert_eq!(copy(&at("a"), &at("b")), Ok(false));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
    }
}
