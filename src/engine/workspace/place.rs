//! What may be where an output and its workspace are to be: nothing of anybody else's is ever removed.

use std::path::{Path, PathBuf};

use moepack_format::limits::MANIFEST_BYTES_MAX;
use moepack_format::manifest::{BUNDLE_FORMAT, MANIFEST};
use moepack_format::{Error, InputFile, Kind, Result, atomic, storage};
use serde_json::Value;

use super::journal::read_json;
use super::{EXPORT, EXPORT_FORMAT, GARBAGE, JOURNAL, LOCK, NOTE_SUFFIX, OUTPUT, PUBLISHED};

/// The workspace of an output.
pub(super) fn home_of(target: &Path) -> Result<PathBuf> {
    let name = target.file_name().ok_or_else(|| Error::usage("the output has no name").in_file(target))?;
    let mut name = name.to_os_string();
    name.push(".partial");
    Ok(target.with_file_name(name))
}

/// Whether the work in `home` is finished, and `target` is what came of it.
pub(super) fn is_published(home: &Path, target: &Path) -> Result<bool> {
    let noted = read_json::<String>(&home.join(format!("{PUBLISHED}{NOTE_SUFFIX}")))?;
    Ok(noted.is_some() && storage::exists(target)? && list_sha256(target).ok() == noted)
}

/// SHA-256 of what lists the files of an output, or of the file that it is.
pub(super) fn list_sha256(output: &Path) -> Result<String> {
    let mut list = output.to_path_buf();
    for name in [EXPORT, MANIFEST] {
        let inside = output.join(name);
        if storage::exists(&inside)? {
            list = inside;
        }
    }
    InputFile::open(&list)?.sha256(&|| false)
}

/// Refuses a target that exists, unless it may be overwritten and is something this program wrote.
///
/// # Errors
/// Kind `CannotCreate`.
pub fn refuse_existing(target: &Path, overwrite: bool) -> Result<()> {
    refuse_existing_as(Form::Directory, target, overwrite)
}

/// What an output is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A directory whose files are listed in one of them.
    Directory,
    /// A file.
    File,
}

/// As [`refuse_existing`], for either form.
///
/// # Errors
/// Kind `CannotCreate`.
pub fn refuse_existing_as(form: Form, target: &Path, overwrite: bool) -> Result<()> {
    let cannot =
        |what: &str, hint: &str| Err(Error::new(Kind::CannotCreate, what).in_file(target).hint(hint));
    if is_published(&home_of(target)?, target)? {
        // The same command finishes what it was killed over.
        return Ok(());
    }
    match storage::symlink_metadata(target) {
        Err(_) => Ok(()),
        Ok(_) if !overwrite => {
            sweep_finished(&home_of(target)?);
            cannot("the output exists", "choose another name, or say --overwrite")
        }
        Ok(found) if form == Form::File => match found.is_file() {
            true => Ok(()),
            false => cannot("the output is no regular file", "choose another name"),
        },
        Ok(found) if !found.is_dir() => cannot("the output is no directory", "choose another name"),
        Ok(_) => match foreign_file(target)? {
            None => Ok(()),
            Some(name) => cannot(
                &format!("the output is a directory with {name:?}, which is no part of a bundle"),
                "only a bundle is ever overwritten; choose another name",
            ),
        },
    }
}

/// Removes everything from a workspace but its lock: notes before what they are about, so that none ever promises too much,
/// and at last the journal, which says that all this is ours.
pub(super) fn clear(home: &Path) -> Result<()> {
    let removed =
        |path: &Path, done: std::io::Result<()>| done.map_err(|e| Error::output(&e, "remove", path));
    let mut paths = entries(home)?;
    paths.retain(|path| !path.ends_with(LOCK));
    paths.sort_by_key(|path| match name_of(path) {
        name if name.ends_with(NOTE_SUFFIX) => 0,
        name if [JOURNAL, GARBAGE].contains(&&*name) => 2,
        _ => 1,
    });
    paths.iter().try_for_each(|path| match path.ends_with(OUTPUT) {
        true => removed(path, storage::remove_dir_all(path)),
        false => removed(path, storage::remove_file(path)),
    })
}

/// Removes what a run left that was killed while it cleaned up behind a finished output. Whether that works is of no matter to
/// the caller, who is about to say that the output exists.
fn sweep_finished(home: &Path) {
    let is_garbage = storage::is_file(&home.join(GARBAGE));
    if is_garbage && super::lock::lock(&home.join(LOCK)).is_ok() && clear(home).is_ok() {
        let _ = storage::remove_file(&home.join(LOCK));
        let _ = storage::remove_dir(home);
    }
}

/// Refuses a `.partial` that some other program or a person made: going on would remove what is in it.
pub(super) fn refuse_foreign(dir: &Path) -> Result<()> {
    let what = match storage::symlink_metadata(dir) {
        Err(_) => return Ok(()),
        Ok(found) if !found.is_dir() => "no directory is in the way of unfinished work".to_owned(),
        Ok(_) if storage::exists(&dir.join(JOURNAL))? || storage::exists(&dir.join(GARBAGE))? => {
            return Ok(());
        }
        Ok(_) => match foreign_file(dir)? {
            None => return Ok(()),
            Some(name) => format!("a directory with {name:?}, which moepack did not write, is in the way"),
        },
    };
    Err(Error::new(Kind::CannotCreate, what)
        .in_file(dir)
        .hint("move it away, or choose another name for the output"))
}

/// The first thing in `dir` that neither a bundle nor a run of this program has there; what is lost with it would not
/// come back.
fn foreign_file(dir: &Path) -> Result<Option<String>> {
    let listed = listed_files(dir);
    let ours = |name: &str| {
        listed.iter().any(|l| l == name)
            || [MANIFEST, EXPORT].contains(&name) && !listed.is_empty()
            || is_note(name)
            || atomic::is_temp_name(name)
    };
    let mut names: Vec<String> = entries(dir)?.iter().map(|path| name_of(path)).collect();
    names.sort();
    let is_theirs = |name: &String| storage::is_dir(&dir.join(name)) || !ours(name);
    Ok(names.into_iter().find(is_theirs))
}

/// The files that a manifest or an export's list names, damaged or of another version as it may be; none if it is not ours.
fn listed_files(dir: &Path) -> Vec<String> {
    let of = |(name, format): (&str, &str)| {
        let text = crate::text::read(&dir.join(name), MANIFEST_BYTES_MAX).unwrap_or_default();
        let list: Value = serde_json::from_slice(&text).unwrap_or_default();
        let files = list.get("files").and_then(Value::as_array).cloned();
        files.filter(|_| list.get("format") == Some(&format.into())).unwrap_or_default()
    };
    let files = [(MANIFEST, BUNDLE_FORMAT), (EXPORT, EXPORT_FORMAT)].into_iter().flat_map(of);
    files.filter_map(|f| Some(f.get("path")?.as_str()?.to_owned())).collect()
}

/// Whether a run keeps something of its own under this name, which is no part of the bundle.
fn is_note(name: &str) -> bool {
    name.ends_with(NOTE_SUFFIX) || [JOURNAL, GARBAGE, LOCK].contains(&name)
}

/// Bytes that an earlier run wrote of an output.
pub fn kept_bytes(target: &Path) -> u64 {
    let Ok(home) = home_of(target) else { return 0 };
    let paths = storage::list(&home.join(OUTPUT), usize::MAX).unwrap_or_default();
    paths.iter().filter_map(|path| storage::metadata(path).ok()).map(|found| found.len()).sum()
}

pub(super) fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

pub(super) fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    storage::list(dir, usize::MAX).map_err(|e| Error::io(&e, "list", dir))
}
