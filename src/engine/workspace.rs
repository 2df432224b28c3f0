//! The directory a bundle grows in: `OUT.partial` beside `OUT`, renamed to `OUT` when everything is there.
//!
//! A killed run leaves the directory; the same command finds it, sees from `journal.json` that it is the same work,
//! and goes on after the last finished piece. Nobody sees `OUT` before it is whole.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use moepack_format::limits::MANIFEST_BYTES_MAX;
use moepack_format::manifest::{BUNDLE_FORMAT, MANIFEST};
use moepack_format::{Context, Error, Kind, Result, atomic};
use rustix::fs::{FlockOperation, RenameFlags};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

const JOURNAL: &str = "journal.json";
const LOCK: &str = "lock";
/// What lists the files of a model that was written for other programs.
pub const EXPORT: &str = "moepack.json";
/// What `format` says in it.
pub const EXPORT_FORMAT: &str = "moepack.export";
/// Files of the workspace that are no part of the bundle end with this.
const NOTE_SUFFIX: &str = ".note.json";

/// An output directory in the making.
#[derive(Debug)]
pub struct Workspace {
    target: PathBuf,
    dir: PathBuf,
    overwrite: bool,
    resumed: bool,
    _lock: File,
}

impl Workspace {
    /// Opens or resumes the workspace of `target`. `work` describes the work: recipe, sources, version; a directory
    /// left by other work is refused with the difference, unless `overwrite`.
    ///
    /// # Errors
    /// The target exists (kind `CannotCreate`), other work is unfinished here (`Plan`), another process is at it
    /// (`Temporary`), or the file system refuses.
    pub fn open(target: &Path, overwrite: bool, work: &Value) -> Result<Workspace> {
        refuse_existing(target, overwrite)?;
        let dir = partial_dir(target)?;
        refuse_foreign(&dir)?;
        fs::create_dir(&dir)
            .or_else(|e| if e.kind() == std::io::ErrorKind::AlreadyExists { Ok(()) } else { Err(e) })
            .map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound => {
                    Error::new(Kind::CannotCreate, "the directory of the output does not exist")
                        .in_file(target)
                }
                _ => Error::output(&e, "create the output directory", &dir),
            })?;
        let lock = lock(&dir)?;
        let mut workspace =
            Workspace { target: target.to_path_buf(), dir, overwrite, resumed: false, _lock: lock };
        atomic::sweep(&workspace.dir)?;
        workspace.enter(work)?;
        Ok(workspace)
    }

    fn enter(&mut self, work: &Value) -> Result<()> {
        let journal = self.dir.join(JOURNAL);
        if let Some(earlier) = read_json::<Value>(&journal)? {
            let differences = differences("", &earlier, work);
            if differences.is_empty() {
                self.resumed = true;
                return Ok(());
            }
            if !self.overwrite {
                return Err(Error::plan(format!(
                    "unfinished work of another kind is here:\n    {}",
                    differences.join("\n    ")
                ))
                .in_file(&self.dir)
                .hint("remove that directory, or say --overwrite, to start anew"));
            }
        }
        self.clear()?;
        write_json(&journal, work)
    }

    /// Removes what an earlier, different or torn run left; the journal, which says that it is ours, at last.
    fn clear(&self) -> Result<()> {
        let mut paths = entries(&self.dir)?;
        paths.sort_by_key(|path| path.ends_with(JOURNAL));
        for path in paths.iter().filter(|path| !path.ends_with(LOCK)) {
            fs::remove_file(path).map_err(|e| Error::output(&e, "remove", path))?;
        }
        Ok(())
    }

    /// Where the files go.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether earlier work goes on.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// The note that an earlier run left about a finished piece.
    ///
    /// # Errors
    /// A note that cannot be read or is no such JSON.
    pub fn note<T: DeserializeOwned>(&self, piece: &str) -> Result<Option<T>> {
        read_json(&self.dir.join(format!("{piece}{NOTE_SUFFIX}")))
    }

    /// Leaves a note that `piece` is finished.
    ///
    /// # Errors
    /// The note cannot be written.
    pub fn leave_note<T: Serialize>(&self, piece: &str, note: &T) -> Result<()> {
        write_json(&self.dir.join(format!("{piece}{NOTE_SUFFIX}")), note)
    }

    /// Makes the directory appear as the target. The manifest must be in it.
    ///
    /// # Errors
    /// The file system refuses; the workspace then stays for another try.
    pub fn publish(self) -> Result<()> {
        for path in entries(&self.dir)?.iter().filter(|path| is_note(&name_of(path))) {
            fs::remove_file(path).map_err(|e| Error::output(&e, "remove", path))?;
        }
        sync_dir(&self.dir)?;
        rename(&self.dir, &self.target, self.overwrite)?;
        match self.target.parent().filter(|p| !p.as_os_str().is_empty()) {
            Some(parent) => sync_dir(parent),
            None => sync_dir(Path::new(".")),
        }
    }

    /// Ends a failed run: what may go on later is kept, what never can is removed.
    pub fn give_up(self, error: Error) -> Error {
        if matches!(error.kind(), Kind::Temporary | Kind::Interrupted | Kind::Io) {
            return error
                .hint(format!("finished work is kept in {}; the same command goes on", self.dir.display()));
        }
        // The error that led here matters more than one of cleaning up.
        let _ = fs::remove_dir_all(&self.dir);
        error
    }
}

fn partial_dir(target: &Path) -> Result<PathBuf> {
    let name = target.file_name().ok_or_else(|| Error::usage("the output has no name").in_file(target))?;
    let mut name = name.to_os_string();
    name.push(".partial");
    Ok(target.with_file_name(name))
}

/// Refuses a target that exists, unless it may be overwritten and is something this program wrote.
///
/// # Errors
/// Kind `CannotCreate`.
pub fn refuse_existing(target: &Path, overwrite: bool) -> Result<()> {
    let cannot =
        |what: &str, hint: &str| Err(Error::new(Kind::CannotCreate, what).in_file(target).hint(hint));
    match fs::symlink_metadata(target) {
        Err(_) => Ok(()),
        Ok(_) if !overwrite => cannot("the output exists", "choose another name, or say --overwrite"),
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

/// Refuses a `.partial` that some other program or a person made: going on would remove what is in it.
fn refuse_foreign(dir: &Path) -> Result<()> {
    let what = match fs::symlink_metadata(dir) {
        Err(_) => return Ok(()),
        Ok(found) if !found.is_dir() => "no directory is in the way of unfinished work".to_owned(),
        Ok(_) if dir.join(JOURNAL).exists() => return Ok(()),
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
    Ok(names.into_iter().find(|name| !ours(name) || dir.join(name).is_dir()))
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
    name.ends_with(NOTE_SUFFIX) || name == JOURNAL || name == LOCK
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let mut file = file.map_err(|e| Error::output(&e, "create the lock", &path))?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        let _ = (&file).take(200).read_to_string(&mut holder);
        return Err(Error::new(Kind::Temporary, format!("another run writes here ({})", holder.trim()))
            .in_file(&path)
            .hint("wait until it is done, then run the same command again"));
    }
    let holder = format!("process {} on {}\n", std::process::id(), host());
    file.set_len(0)
        .and_then(|()| file.write_all(holder.as_bytes()))
        .map_err(|e| Error::io(&e, "write the lock", &path))?;
    Ok(file)
}

pub(crate) fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "this host".into(), |h| h.trim().to_owned())
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = fs::read_dir(dir).and_then(|d| d.map(|e| Ok(e?.path())).collect());
    list.map_err(|e| Error::io(&e, "list", dir))
}

pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io(&e, "fsync the directory", dir))
}

/// Renames the finished directory. An old bundle is exchanged in one step and removed afterwards.
pub(crate) fn rename(from: &Path, to: &Path, overwrite: bool) -> Result<()> {
    let cwd = rustix::fs::CWD;
    if overwrite && to.exists() {
        rustix::fs::renameat_with(cwd, from, cwd, to, RenameFlags::EXCHANGE)
            .map_err(|e| Error::io(&e.into(), "exchange the old output for the new", to))?;
        return fs::remove_dir_all(from).map_err(|e| Error::io(&e, "remove the old output", from));
    }
    match rustix::fs::renameat_with(cwd, from, cwd, to, RenameFlags::NOREPLACE) {
        // Some file systems know no flags; the target was absent a moment ago and we hold the lock.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            fs::rename(from, to).map_err(|e| Error::io(&e, "rename the finished output", to))
        }
        done => done.map_err(|e| Error::io(&e.into(), "rename the finished output", to)),
    }
}

pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(&e, "read", path)),
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| {
                Error::bad_data(format!("not what this program wrote: {e}"))
                    .hint("remove the .partial directory")
            })
            .in_file(path),
    }
}

pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text =
        serde_json::to_vec_pretty(value).map_err(|e| Error::new(Kind::Io, e.to_string())).in_file(path)?;
    atomic::write_file(path, &text)
}

/// The leaves in which two descriptions differ, for people.
fn differences(at: &str, earlier: &Value, now: &Value) -> Vec<String> {
    match (earlier, now) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys().filter(|k| !a.contains_key(*k))).collect();
            keys.sort();
            let join = |key: &str| if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") };
            let null = Value::Null;
            keys.iter()
                .flat_map(|k| differences(&join(k), a.get(*k).unwrap_or(&null), b.get(*k).unwrap_or(&null)))
                .collect()
        }
        _ if earlier == now => Vec::new(),
        _ => vec![format!("{at}: was {}, is {}", short(earlier), short(now))],
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 120 { text } else { text.chars().take(117).collect::<String>() + "..." }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn work_appears_under_its_name_only_when_published() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("m.moepack");
        let workspace = Workspace::open(&target, false, &json!({"recipe": 1})).unwrap();
        fs::write(workspace.dir().join("experts-00000.safetensors"), "x").unwrap();
        workspace.leave_note("experts-00000", &7).unwrap();
        assert!(!target.exists());
        drop(workspace);

        let workspace = Workspace::open(&target, false, &json!({"recipe": 1})).unwrap();
        assert!(workspace.resumed());
        assert_eq!(workspace.note("experts-00000"), Ok(Some(7)));
        assert_eq!(workspace.note::<i32>("experts-00001"), Ok(None));
        workspace.publish().unwrap();
        let names: Vec<_> = entries(&target).unwrap();
        assert_eq!(names, [target.join("experts-00000.safetensors")]);
        assert!(!partial_dir(&target).unwrap().exists());
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
