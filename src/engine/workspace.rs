//! The directory that work on an output keeps: `OUT.partial` beside `OUT`.
//!
//! ```text
//! OUT.partial/lock               who is at it; ends with that process
//! OUT.partial/journal.json       what the work is: recipe, sources, version
//! OUT.partial/PIECE.note.json    a piece is finished, and what the manifest will say of it
//! OUT.partial/output/            becomes OUT when everything is there
//! ```
//!
//! A killed run leaves the directory; the same command finds it, sees from the journal that it is the same work, and goes on
//! after the last finished piece. Nobody sees `OUT` before it is whole: `output` is renamed in one step. A note says so
//! before, so that a run that is killed between that step and the end is known to be finished.

use std::path::{Path, PathBuf};

use moepack_format::storage::{self, File};
use moepack_format::{Error, Kind, Result, atomic};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

mod journal;
mod lock;
mod place;

pub use place::{Form, kept_bytes, refuse_existing, refuse_existing_as};

use journal::differences;
pub(crate) use journal::{read_json, write_json};
pub(crate) use lock::host;
use lock::lock;
use place::{entries, home_of, list_sha256, refuse_foreign};

const JOURNAL: &str = "journal.json";
/// The journal of work that has come to an end: all that is left here may go.
const GARBAGE: &str = "garbage.json";
const LOCK: &str = "lock";
const OUTPUT: &str = "output";
/// What lists the files of a model that was written for other programs.
pub const EXPORT: &str = "moepack.json";
/// What `format` says in it.
pub const EXPORT_FORMAT: &str = "moepack.export";
/// Files of the workspace that are no part of the output end with this.
const NOTE_SUFFIX: &str = ".note.json";
/// The piece that is finished when the output got its name.
const PUBLISHED: &str = "published";

/// An output in the making.
#[derive(Debug)]
pub struct Workspace {
    form: Form,
    target: PathBuf,
    home: PathBuf,
    dir: PathBuf,
    /// The output: `dir`, or a file in it.
    output: PathBuf,
    overwrite: bool,
    resumed: bool,
    _lock: File,
}

impl Workspace {
    /// Opens or resumes the workspace of a directory `target`. `work` describes the work: recipe, sources, version; a directory
    /// left by other work is refused with the difference, unless `overwrite`.
    ///
    /// # Errors
    /// The target exists (kind `CannotCreate`), other work is unfinished here (`Plan`), another process is at it
    /// (`Temporary`), or the file system refuses.
    pub fn open(target: &Path, overwrite: bool, work: &Value) -> Result<Workspace> {
        Workspace::open_as(Form::Directory, target, overwrite, work)
    }

    /// As [`Workspace::open`] for an output that is one file.
    ///
    /// # Errors
    /// As [`Workspace::open`].
    pub fn open_file(target: &Path, overwrite: bool, work: &Value) -> Result<Workspace> {
        Workspace::open_as(Form::File, target, overwrite, work)
    }

    fn open_as(form: Form, target: &Path, overwrite: bool, work: &Value) -> Result<Workspace> {
        refuse_existing_as(form, target, overwrite)?;
        let home = home_of(target)?;
        refuse_foreign(&home)?;
        create_dir(&home).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                Error::new(Kind::CannotCreate, "the directory of the output does not exist").in_file(target)
            }
            _ => Error::output(&e, "create the output directory", &home),
        })?;
        let lock = lock(&home.join(LOCK))?;
        let (name, dir) = (target.file_name().unwrap_or_default(), home.join(OUTPUT));
        let output = if form == Form::File { dir.join(name) } else { dir.clone() };
        let (target, resumed) = (target.to_path_buf(), false);
        let mut workspace = Workspace { form, target, home, dir, output, overwrite, resumed, _lock: lock };
        match workspace.enter(work) {
            Ok(()) => Ok(workspace),
            Err(e) => {
                workspace.remove_if_empty();
                Err(e)
            }
        }
    }

    fn enter(&mut self, work: &Value) -> Result<()> {
        atomic::sweep(&self.home)?;
        let journal = self.home.join(JOURNAL);
        if let Some(earlier) = read_json::<Value>(&journal)? {
            let differences = differences("", &earlier, work);
            if differences.is_empty() {
                return self.go_on();
            }
            if !self.overwrite {
                return Err(Error::plan(format!(
                    "unfinished work of another kind is here:\n    {}",
                    differences.join("\n    ")
                ))
                .in_file(&self.home)
                .hint("remove that directory, or say --overwrite, to start anew"));
            }
        }
        self.clear()?;
        // Work that was published without cleaning up is no excuse for another.
        refuse_existing_as(self.form, &self.target, self.overwrite)?;
        write_json(&journal, work)?;
        self.create_output()
    }

    /// Takes up the work of an earlier run.
    fn go_on(&mut self) -> Result<()> {
        self.resumed = true;
        if self.is_published()? {
            self.dir.clone_from(&self.target);
            self.output.clone_from(&self.target);
            return Ok(());
        }
        self.create_output()?;
        atomic::sweep(&self.dir)
    }

    fn create_output(&self) -> Result<()> {
        create_dir(&self.dir).map_err(|e| Error::output(&e, "create the output directory", &self.dir))
    }

    /// Removes what an earlier run left.
    fn clear(&self) -> Result<()> {
        place::clear(&self.home)
    }

    /// Where the files go.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file, where the output is one.
    pub fn file(&self) -> &Path {
        &self.output
    }

    /// Where what is no part of the output may lie meanwhile; it goes when the work is done.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Whether earlier work goes on.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// Whether an earlier run gave the output its name and was stopped then: nothing is to be written any more.
    ///
    /// # Errors
    /// The file system does not tell.
    pub fn is_published(&self) -> Result<bool> {
        place::is_published(&self.home, &self.target)
    }

    /// The note that an earlier run left about a finished piece.
    ///
    /// # Errors
    /// A note that cannot be read or is no such JSON.
    pub fn note<T: DeserializeOwned>(&self, piece: &str) -> Result<Option<T>> {
        read_json(&self.home.join(format!("{piece}{NOTE_SUFFIX}")))
    }

    /// Leaves a note that `piece` is finished.
    ///
    /// # Errors
    /// The note cannot be written.
    pub fn leave_note<T: Serialize>(&self, piece: &str, note: &T) -> Result<()> {
        write_json(&self.home.join(format!("{piece}{NOTE_SUFFIX}")), note)
    }

    /// Makes the output appear as the target. The manifest must be in a directory.
    ///
    /// # Errors
    /// The file system refuses; the workspace then stays for another try.
    pub fn publish(self) -> Result<()> {
        if !self.is_published()? {
            storage::sync_dir(&self.dir).map_err(|e| Error::output(&e, "fsync", &self.dir))?;
            self.leave_note(PUBLISHED, &list_sha256(&self.output)?)?;
            self.rename()?;
        }
        let parent = self.target.parent().unwrap_or(Path::new("."));
        storage::sync_dir(parent).map_err(|e| Error::output(&e, "fsync the directory of", &self.target))?;
        self.remove();
        Ok(())
    }

    /// Gives the finished output its name. An old one changes places with it.
    fn rename(&self) -> Result<()> {
        if self.overwrite && storage::exists(&self.target)? {
            return storage::exchange(&self.output, &self.target)
                .map_err(|e| Error::output(&e, "exchange the old output for the new", &self.target));
        }
        storage::rename_new(&self.output, &self.target)
            .map_err(|e| Error::output(&e, "rename the finished output", &self.target))
    }

    /// Removes the workspace. What cannot be removed is found by whoever does this work again; there is nothing to
    /// tell a user whose output is there, or who is told of a worse error.
    fn remove(self) {
        // Without a journal nobody goes on with what is half removed.
        let _ = storage::rename(&self.home.join(JOURNAL), &self.home.join(GARBAGE));
        let _ = self.clear();
        self.remove_if_empty();
    }

    /// Removes a workspace in which there is nothing but the lock.
    fn remove_if_empty(self) {
        if entries(&self.home).is_ok_and(|paths| paths.iter().all(|path| path.ends_with(LOCK))) {
            let _ = storage::remove_file(&self.home.join(LOCK));
            let _ = storage::remove_dir(&self.home);
        }
    }

    /// Ends a failed run: what may go on later is kept, what never can, and what is not worth it, is removed.
    pub fn give_up(self, error: Error) -> Error {
        let may_go_on = matches!(error.kind(), Kind::Temporary | Kind::Interrupted | Kind::Io);
        if may_go_on && self.has_finished_pieces() {
            return error
                .hint(format!("finished work is kept in {}; the same command goes on", self.home.display()));
        }
        self.remove();
        error
    }

    /// Whether any piece is finished, or it cannot be known.
    fn has_finished_pieces(&self) -> bool {
        entries(&self.home)
            .map_or(true, |paths| paths.iter().any(|p| place::name_of(p).ends_with(NOTE_SUFFIX)))
    }
}

/// Creates a directory, unless it is there.
fn create_dir(dir: &Path) -> std::io::Result<()> {
    match storage::create_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use moepack_format::manifest::MANIFEST;
    use serde_json::json;

    #[test]
    fn work_appears_under_its_name_only_when_published() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("m.moepack");
        let workspace = Workspace::open(&target, false, &json!({"recipe": 1})).unwrap();
        fs::write(workspace.dir().join("experts-00000.safetensors"), "x").unwrap();
        fs::write(workspace.dir().join(MANIFEST), "{}").unwrap();
        workspace.leave_note("experts-00000", &7).unwrap();
        assert!(!target.exists());
        drop(workspace);

        let workspace = Workspace::open(&target, false, &json!({"recipe": 1})).unwrap();
        assert!(workspace.resumed());
        assert_eq!(workspace.note("experts-00000"), Ok(Some(7)));
        assert_eq!(workspace.note::<i32>("experts-00001"), Ok(None));
        workspace.publish().unwrap();
        let mut names: Vec<_> = entries(&target).unwrap();
        names.sort();
        assert_eq!(names, [target.join("experts-00000.safetensors"), target.join(MANIFEST)]);
        assert!(!home_of(&target).unwrap().exists());
    }

    #[test]
    fn other_work_is_refused_with_the_difference() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("m.moepack");
        drop(Workspace::open(&target, false, &json!({"recipe": {"codec": "int4"}})).unwrap());
        let e = Workspace::open(&target, false, &json!({"recipe": {"codec": "int8"}})).unwrap_err();
        assert!(e.what().ends_with("recipe.codec: was \"int4\", is \"int8\""), "{e}");
        assert_eq!(e.kind().exit_code(), 78);
        assert!(!Workspace::open(&target, true, &json!({"recipe": 3})).unwrap().resumed());
    }

    #[test]
    fn two_runs_do_not_write_to_one_place() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("m.moepack");
        let _first = Workspace::open(&target, false, &json!(1)).unwrap();
        let e = Workspace::open(&target, false, &json!(1)).unwrap_err();
        assert_eq!(e.kind().exit_code(), 75);
        assert!(e.what().contains(&format!("process {}", std::process::id())), "{e}");
    }

    #[test]
    fn what_someone_else_keeps_is_never_removed() {
        let root = tempfile::tempdir().unwrap();
        let (target, partial) = (root.path().join("m"), root.path().join("m.partial"));
        let code = || Workspace::open(&target, true, &json!(1)).unwrap_err().kind().exit_code();
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join("diary.txt"), "dear").unwrap();
        assert_eq!(code(), 73);
        assert_eq!(fs::read(partial.join("diary.txt")).unwrap(), b"dear");
        fs::rename(&partial, root.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", &partial).unwrap();
        assert_eq!(code(), 73, "a symlink");
        // A web page has a manifest.json too.
        fs::create_dir(&target).unwrap();
        fs::write(target.join(MANIFEST), r#"{"name": "page", "files": [{"path": "index.html"}]}"#).unwrap();
        fs::write(target.join("index.html"), "<html>").unwrap();
        assert_eq!(code(), 73, "another program's manifest");
        let ours = r#"{"format": "moepack.bundle", "files": [{"path": "index.html"}]}"#;
        fs::write(target.join(MANIFEST), ours).unwrap();
        assert_eq!(refuse_existing(&target, true), Ok(()));
        fs::write(target.join("notes.txt"), "mine").unwrap();
        assert_eq!(code(), 73, "a note beside the bundle");
    }

    #[test]
    fn what_exists_is_not_overwritten_by_accident() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(refuse_existing(root.path(), false).unwrap_err().kind().exit_code(), 73);
        fs::write(root.path().join("page.html"), "").unwrap();
        assert_eq!(refuse_existing(root.path(), true).unwrap_err().kind().exit_code(), 73);
        assert_eq!(refuse_existing(&root.path().join("new"), false), Ok(()));
    }
}
