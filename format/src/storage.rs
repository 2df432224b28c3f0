//! The operating system's files, as far as this program uses them.
//!
//! Every call on a file or directory goes through here and nowhere else, so that a test can make the n-th of them fail,
//! tear or be the last thing the process does (`fault`, in debug builds only). The calls are the system's own, positioned and without
//! buffers of their own; what they mean for a user is said by the callers (`file`, `atomic`).

use std::fs::{Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags, StatVfsMountFlags};

mod fault;

use crate::error::{Error, Result};
use fault::{Call, Verdict};

/// An open file.
#[derive(Debug)]
pub struct File {
    inner: std::fs::File,
}

impl File {
    /// Opens for reading, with extra flags.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn open(path: &Path, flags: OFlags) -> io::Result<File> {
        let flags = i32::try_from(flags.bits()).unwrap_or(0);
        call(Call::Open, || OpenOptions::new().read(true).custom_flags(flags).open(path)).map(File::of)
    }

    /// Creates a file that is not there yet, for reading and writing; follows no link.
    ///
    /// # Errors
    /// What the operating system says; `AlreadyExists` if anything has this name.
    pub fn create_new(path: &Path) -> io::Result<File> {
        call(Call::Create, || OpenOptions::new().read(true).write(true).create_new(true).open(path))
            .map(File::of)
    }

    /// Opens a file for reading and writing as it is, or creates an empty one.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn open_or_create(path: &Path) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        call(Call::Create, || options.open(path)).map(File::of)
    }

    /// Opens a file that is there, for reading and writing; follows no link.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn open_again(path: &Path) -> io::Result<File> {
        let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(flags);
        call(Call::Open, || options.open(path)).map(File::of)
    }

    /// A file that has no name: nothing of it outlives the process. `path` is the name it has for a moment.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn scratch(path: &Path) -> io::Result<File> {
        let file = File::open_or_create(path)?;
        remove_file(path)?;
        file.set_len(0).map(|()| file)
    }

    fn of(inner: std::fs::File) -> File {
        File { inner }
    }

    /// Reads at `offset`; gives how many bytes.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        call(Call::Read, || self.inner.read_at(buf, offset))
    }

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// What the operating system says; some of the bytes may be written then.
    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match fault::at(Call::Write) {
            Verdict::Go => self.inner.write_all_at(bytes, offset),
            Verdict::Torn(then) => {
                let half = bytes.get(..bytes.len() / 2).unwrap_or_default();
                self.inner.write_all_at(half, offset)?;
                then.happen()
            }
            verdict => verdict.happen(),
        }
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// What the operating system says; `UnexpectedEof` if the file ends before.
    pub fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        call(Call::Read, || self.inner.read_exact_at(buf, offset))
    }

    /// Cuts or extends the file.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn set_len(&self, bytes: u64) -> io::Result<()> {
        call(Call::Write, || self.inner.set_len(bytes))
    }

    /// Makes the contents durable.
    ///
    /// # Errors
    /// What the operating system says. It is final: the kernel may have dropped the pages, so that a second try
    /// would prove nothing.
    pub fn sync(&self) -> io::Result<()> {
        call(Call::Sync, || self.inner.sync_all())
    }

    /// What the system knows of it.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn metadata(&self) -> io::Result<Metadata> {
        call(Call::Stat, || self.inner.metadata())
    }

    /// Takes the file's lock without waiting; it lasts until the file is closed. `false` if another process has it.
    ///
    /// # Errors
    /// What the operating system says, such as that this file system has no locks.
    pub fn try_lock(&self) -> io::Result<bool> {
        let locked = || rustix::fs::flock(&self.inner, FlockOperation::NonBlockingLockExclusive);
        match call(Call::Lock, || locked().map_err(io::Error::from)) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            other => other.map(|()| true),
        }
    }
}

/// What is at `path`, links followed.
///
/// # Errors
/// What the operating system says.
pub fn metadata(path: &Path) -> io::Result<Metadata> {
    call(Call::Stat, || std::fs::metadata(path))
}

/// What is at `path`, a link itself if there is one.
///
/// # Errors
/// What the operating system says.
pub fn symlink_metadata(path: &Path) -> io::Result<Metadata> {
    call(Call::Stat, || std::fs::symlink_metadata(path))
}

/// Where a link leads.
///
/// # Errors
/// What the operating system says; that it is none.
pub fn read_link(path: &Path) -> io::Result<PathBuf> {
    call(Call::Stat, || std::fs::read_link(path))
}

/// Whether anything is at `path`, links followed.
///
/// # Errors
/// That it cannot be known: something is wrong with the directory or the disk.
pub fn exists(path: &Path) -> Result<bool> {
    match call(Call::Stat, || path.try_exists()) {
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => Ok(false),
        other => other.map_err(|e| Error::io(&e, "look for", path)),
    }
}

/// Whether a directory is at `path`. One that cannot be looked at is none.
pub fn is_dir(path: &Path) -> bool {
    metadata(path).is_ok_and(|m| m.is_dir())
}

/// Whether a regular file is at `path`. One that cannot be looked at is none.
pub fn is_file(path: &Path) -> bool {
    metadata(path).is_ok_and(|m| m.is_file())
}

/// `path` without links.
///
/// # Errors
/// What the operating system says.
pub fn canonicalize(path: &Path) -> io::Result<PathBuf> {
    call(Call::Stat, || std::fs::canonicalize(path))
}

/// The paths of what lies in a directory, in no order, as many as asked for.
///
/// # Errors
/// What the operating system says.
pub fn list(dir: &Path, n_max: usize) -> io::Result<Vec<PathBuf>> {
    call(Call::List, || std::fs::read_dir(dir)?.take(n_max).map(|e| Ok(e?.path())).collect())
}

/// Creates a directory.
///
/// # Errors
/// What the operating system says.
pub fn create_dir(dir: &Path) -> io::Result<()> {
    call(Call::Create, || std::fs::create_dir(dir))
}

/// Removes a file.
///
/// # Errors
/// What the operating system says.
pub fn remove_file(path: &Path) -> io::Result<()> {
    call(Call::Remove, || std::fs::remove_file(path))
}

/// Removes an empty directory.
///
/// # Errors
/// What the operating system says.
pub fn remove_dir(dir: &Path) -> io::Result<()> {
    call(Call::Remove, || std::fs::remove_dir(dir))
}

/// Removes a directory with what is in it.
///
/// # Errors
/// What the operating system says.
pub fn remove_dir_all(dir: &Path) -> io::Result<()> {
    call(Call::Remove, || std::fs::remove_dir_all(dir))
}

/// Gives a file or directory another name, replacing a file that has it.
///
/// # Errors
/// What the operating system says.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    call(Call::Rename, || std::fs::rename(from, to))
}

/// Gives a file or directory a name that nothing has.
///
/// # Errors
/// What the operating system says; `AlreadyExists` if the name is taken.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    let renamed = || rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE);
    call(Call::Rename, || match renamed() {
        // Some file systems know no flags.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if !to.try_exists()? => {
            std::fs::rename(from, to)
        }
        other => Ok(other?),
    })
}

/// Gives a file a second name that nothing has.
///
/// # Errors
/// What the operating system says; `AlreadyExists` if the name is taken.
pub fn hard_link(from: &Path, to: &Path) -> io::Result<()> {
    call(Call::Rename, || std::fs::hard_link(from, to))
}

/// Gives two files or directories each other's name in one step.
///
/// # Errors
/// What the operating system says.
pub fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    call(Call::Rename, || Ok(rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?))
}

/// Makes the names in a directory durable.
///
/// # Errors
/// What the operating system says.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    match call(Call::Sync, || std::fs::File::open(dir)?.sync_all()) {
        // Some file systems cannot sync a directory; their renames are as durable as they get.
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(()),
        other => other,
    }
}

/// What a file system has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that an ordinary user may still write.
    pub free_bytes: u64,
    /// Whether nothing may be written at all.
    pub read_only: bool,
    /// Bytes of the largest file it can hold, where that is little.
    pub file_bytes_max: Option<u64>,
}

/// What the file system of `path` has left.
///
/// # Errors
/// What the operating system says.
pub fn space(path: &Path) -> io::Result<Space> {
    let found = call(Call::Stat, || Ok(rustix::fs::statvfs(path)?))?;
    Ok(Space {
        free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
        read_only: found.f_flag.contains(StatVfsMountFlags::RDONLY),
        file_bytes_max: is_fat(path)?.then_some(u64::from(u32::MAX)),
    })
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn is_fat(path: &Path) -> io::Result<bool> {
    /// `MSDOS_SUPER_MAGIC` of Linux's magic.h.
    const FAT: i64 = 0x4d44;
    #[allow(clippy::useless_conversion, reason = "the type differs between machines")]
    let kind = call(Call::Stat, || Ok(i64::from(rustix::fs::statfs(path)?.f_type)))?;
    Ok(kind == FAT)
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn is_fat(_: &Path) -> io::Result<bool> {
    Ok(false)
}

/// Makes a call, unless a test wants something else to happen.
fn call<T>(kind: Call, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    match fault::at(kind) {
        Verdict::Go => make(),
        Verdict::After(end) => make().and_then(|_| end.happen()),
        other => other.happen(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_name_is_not_taken_again() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, "a").unwrap();
        std::fs::write(&b, "b").unwrap();
        assert_eq!(rename_new(&a, &b).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        exchange(&a, &b).unwrap();
        assert_eq!(std::fs::read(&b).unwrap(), b"a");
        rename_new(&a, &dir.path().join("c")).unwrap();
        assert_eq!((exists(&a).unwrap(), is_file(&b), is_dir(dir.path())), (false, true, true));
    }

    #[test]
    fn a_scratch_file_has_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::scratch(&dir.path().join("a")).unwrap();
        file.write_all_at(b"abc", 2).unwrap();
        let mut buf = [0; 9];
        assert_eq!(file.read_at(&mut buf, 0).unwrap(), 5);
        assert_eq!(&buf[..5], b"\0\0abc");
        assert!(list(dir.path(), 9).unwrap().is_empty());
    }

    #[test]
    fn a_lock_is_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let open = || File::open_or_create(&dir.path().join("lock")).unwrap();
        let (first, second) = (open(), open());
        assert!(first.try_lock().unwrap());
        assert!(!second.try_lock().unwrap());
        drop(first);
        assert!(second.try_lock().unwrap());
    }
}
