//! Whether an output fits the file system it is to be written to, asked before any work is done.

use std::path::Path;

use moepack_format::storage::{self, Space};
use moepack_format::{Error, Kind, Result};

use crate::engine::workspace::kept_bytes;
use crate::size::human;

/// Refuses an output of `bytes`, the largest of whose files has `largest`, where the file system of `target` cannot hold it.
/// What an earlier run left of it counts as written.
///
/// # Errors
/// `Temporary` with what is needed and what is free; `CannotCreate` where more space would not help.
pub fn check_space(target: &Path, bytes: u64, largest: u64) -> Result<()> {
    let dir = target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Where the system does not tell, the run finds out.
    let Ok(space) = storage::space(dir) else { return Ok(()) };
    fits(space, bytes.saturating_sub(kept_bytes(target)), largest).map_err(|e| e.in_file(dir))
}

/// The same for files in a directory that nobody began.
///
/// # Errors
/// As [`check_space`].
pub fn check_free(dir: &Path, bytes: u64) -> Result<()> {
    let Ok(space) = storage::space(dir) else { return Ok(()) };
    fits(space, bytes, 0).map_err(|e| e.in_file(dir))
}

fn fits(space: Space, bytes: u64, largest: u64) -> Result<()> {
    let cannot = |what: String| Err(Error::new(Kind::CannotCreate, what));
    if space.read_only {
        return cannot("the file system is read-only".to_owned());
    }
    if let Some(max) = space.file_bytes_max.filter(|&max| max < largest) {
        let (max, largest) = (human(max), human(largest));
        return cannot(format!(
            "files of {max} at most fit this file system, one of the output takes {largest}"
        ))
        .map_err(|e: Error| e.hint("this is FAT32; write to a file system of another kind"));
    }
    if space.free_bytes < bytes {
        let what = format!("the output takes about {}, {} are free", human(bytes), human(space.free_bytes));
        return Err(Error::new(Kind::Temporary, what).hint("free some space, or write elsewhere"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_with_the_numbers() {
        let space = Space { free_bytes: 10 << 30, read_only: false, file_bytes_max: None };
        assert_eq!(fits(space, 10 << 30, 9 << 30), Ok(()));
        let e = fits(space, 11 << 30, 9 << 30).unwrap_err();
        assert_eq!(e.kind().exit_code(), 75);
        assert_eq!(e.what(), "the output takes about 11.00 GiB, 10.00 GiB are free");
        let fat = Space { file_bytes_max: Some(u64::from(u32::MAX)), ..space };
        assert_eq!(fits(fat, 9 << 30, 3 << 30), Ok(()));
        let e = fits(fat, 9 << 30, 5 << 30).unwrap_err();
        assert_eq!(e.kind().exit_code(), 73);
        assert!(e.what().contains("4.00 GiB"), "{e}");
        let e = fits(Space { read_only: true, ..space }, 1, 1).unwrap_err();
        assert_eq!(e.kind().exit_code(), 73);
    }
}
