//! The lock that keeps two runs from one workspace.
//!
//! It is the system's lock on an open file: it ends with the process that has it, so it is never stale. Where a file system has
//! no locks, what the file says counts instead: a process of this host that is gone holds nothing, one of another host may.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use moepack_format::storage::{self, File};
use moepack_format::{Error, Kind, Result};
use rustix::process::{Pid, test_kill_process};

/// How often a lock is tried whose file another run removes at the same time.
const TRIES: usize = 10;

/// Takes the lock, which lasts as long as the file.
///
/// # Errors
/// `Temporary` with its holder if another run has it, else what the operating system says.
pub(super) fn lock(path: &Path) -> Result<File> {
    for _ in 0..TRIES {
        let file = File::open_or_create(path).map_err(|e| Error::output(&e, "create the lock", path))?;
        let is_ours = match file.try_lock() {
            Err(e) if has_no_locks(&e) => may_take(&holder(&file)),
            other => other.map_err(|e| Error::output(&e, "lock", path))?,
        };
        if !is_ours {
            return Err(held(&holder(&file), path));
        }
        // Whoever had it may have finished and removed it just now; a lock on a file without a name is none.
        if !is_still(&file, path) {
            continue;
        }
        let about = format!("process {} on {}\n", std::process::id(), host());
        let written = file.set_len(0).and_then(|()| file.write_all_at(about.as_bytes(), 0));
        return written.map(|()| file).map_err(|e| Error::output(&e, "write the lock", path));
    }
    Err(held("", path))
}

fn held(holder: &str, path: &Path) -> Error {
    let what = format!("another run writes here ({holder})");
    let hint = "wait until it is done, then run the same command again; if that process is gone and its file system has no \
                locks, remove this file";
    Error::new(Kind::Temporary, what).in_file(path).hint(hint)
}

/// What the holder of a lock wrote into it.
fn holder(lock: &File) -> String {
    let mut text = [0; 200];
    let n = lock.read_at(&mut text, 0).unwrap_or(0);
    String::from_utf8_lossy(text.get(..n).unwrap_or_default()).trim().to_owned()
}

fn has_no_locks(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let none = [Errno::NOLCK, Errno::OPNOTSUPP, Errno::NOSYS];
    none.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Whether a lock without the system's help may be taken from who is written in it.
fn may_take(holder: &str) -> bool {
    let words = holder.strip_prefix("process ").and_then(|rest| rest.split_once(" on "));
    let Some((pid, its_host)) = words else { return holder.is_empty() };
    let pid = pid.parse().ok().and_then(Pid::from_raw);
    its_host == host() && pid.is_none_or(|pid| test_kill_process(pid).is_err())
}

fn is_still(file: &File, path: &Path) -> bool {
    let same = |a: std::fs::Metadata, b: std::fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    file.metadata().ok().zip(storage::metadata(path).ok()).is_some_and(|(a, b)| same(a, b))
}

/// The name of this machine.
pub(crate) fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_locks_a_dead_process_of_this_host_holds_nothing() {
        let of = |pid: u32, host: &str| may_take(&format!("process {pid} on {host}"));
        assert!(may_take("") && of(i32::MAX as u32, &host()));
        assert!(!of(std::process::id(), &host()), "alive");
        assert!(!of(i32::MAX as u32, "elsewhere"), "cannot be known");
        assert!(!may_take("somebody else"));
    }

    #[test]
    fn the_lock_names_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = lock(&path).unwrap();
        let e = lock(&path).unwrap_err();
        assert_eq!(e.kind().exit_code(), 75);
        assert!(e.what().contains(&format!("process {} on ", std::process::id())), "{e}");
        drop(held);
        lock(&path).unwrap();
    }
}
