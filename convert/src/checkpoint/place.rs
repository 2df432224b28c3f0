//! Where a checkpoint is, and which of its files may be read.
//!
//! Names come from strangers (an index, a directory). A name must be one plain component, and what it leads
//! to must lie inside the checkpoint after every symlink is followed. In a Hugging Face cache the files of a
//! snapshot are symlinks into `blobs/` of the same repository, so there the whole repository counts as
//! inside.

use std::path::{Component, Path, PathBuf};

use moepack_format::contain::root_of;
use moepack_format::{Error, InputFile, Result, storage};

use super::listed;
use crate::limits::{DIR_ENTRIES_MAX, SHARDS_MAX};

/// The directory of a checkpoint or bundle.
#[derive(Clone, Debug)]
pub struct Place {
    root: PathBuf,
    /// Symlinks may lead anywhere below this.
    fence: PathBuf,
}

impl Place {
    /// The directory that `path` means: itself, or the snapshot of a Hugging Face cache directory.
    ///
    /// # Errors
    /// `Missing` if there is none, `BadData` if it is a file or a cache without a snapshot.
    pub fn find(path: &Path) -> Result<Place> {
        let meta = storage::metadata(path).map_err(|e| Error::io(&e, "open", path))?;
        if !meta.is_dir() {
            return Err(not_a_directory(path));
        }
        let root = snapshot(path)?.unwrap_or_else(|| path.to_owned());
        let fence = root_of(&root)?;
        Ok(Place { root, fence })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The path of a file in it.
    ///
    /// # Errors
    /// `BadData` for a name that is no plain file name or leads out of the checkpoint, `Missing` if nothing
    /// is there.
    pub fn resolve(&self, name: &str) -> Result<PathBuf> {
        check_name(name)?;
        let path = self.root.join(name);
        let real = canonical(&path)?;
        if real.starts_with(&self.fence) {
            return Ok(path);
        }
        Err(Error::bad_data(format!("a symlink to {}, outside the checkpoint", real.display()))
            .in_file(&path)
            .hint(
                "copy the file into the checkpoint; only a Hugging Face cache may link, into its own blobs/",
            ))
    }

    /// Whether a file is there.
    ///
    /// # Errors
    /// The file system does not tell.
    pub fn has(&self, name: &str) -> Result<bool> {
        storage::exists(&self.root.join(name))
    }

    /// A whole small file.
    ///
    /// # Errors
    /// `Missing` if it is not there or only a Git LFS pointer, `BadData` if it is longer than `bytes_max`.
    pub fn read_small(&self, name: &str, bytes_max: u64) -> Result<Vec<u8>> {
        let path = self.resolve(name)?;
        let file = InputFile::open(&path)?;
        let bad = |what: String| Err(Error::bad_data(what).in_file(&path));
        if file.len() > bytes_max {
            return bad(format!("{} bytes, expected at most {bytes_max}", file.len()));
        }
        let Ok(len) = usize::try_from(file.len()) else { return bad("too long".to_owned()) };
        let mut bytes = vec![0; len];
        file.read_exact_at(0, &mut bytes)?;
        if bytes.starts_with(b"version https://git-lfs") {
            return Err(Error::missing("a Git LFS pointer, expected the file it stands for")
                .in_file(&path)
                .hint("run `git lfs pull` in the checkpoint, or fetch it with `hf download`"));
        }
        Ok(bytes)
    }

    /// Names of the files in the directory, sorted.
    ///
    /// # Errors
    /// `BadData` for a weight file whose name is not UTF-8 and for too many entries.
    pub fn entries(&self) -> Result<Vec<String>> {
        let io = |e: std::io::Error| Error::io(&e, "list", &self.root);
        let mut names = Vec::new();
        let paths = storage::list(&self.root, DIR_ENTRIES_MAX + 1).map_err(io)?;
        if paths.len() > DIR_ENTRIES_MAX {
            return Err(Error::bad_data(format!("more than {DIR_ENTRIES_MAX} files")).in_file(&self.root));
        }
        for path in &paths {
            match path.file_name().unwrap_or_default().to_os_string().into_string() {
                Ok(name) => names.push(name),
                Err(odd) if odd.to_string_lossy().ends_with(".safetensors") => {
                    let what = format!("a weight file's name is not UTF-8: {:?}", odd);
                    return Err(Error::bad_data(what).in_file(&self.root));
                }
                Err(_) => {}
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Complains about all of these files that are not there, at once.
    ///
    /// # Errors
    /// `Missing` with the list.
    pub fn missing(&self, names: &[String]) -> Result<()> {
        let mut missing = Vec::new();
        for name in names {
            if !self.has(name)? {
                missing.push(name.clone());
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let what =
            format!("{} of {} weight files are missing:{}", missing.len(), names.len(), listed(&missing));
        Err(Error::missing(what).in_file(&self.root).hint("fetch these files; the index names them"))
    }

    /// A warning about weight files that the index does not name.
    ///
    /// # Errors
    /// As [`Place::entries`].
    pub fn extra_weights(&self, named: &[String]) -> Result<Option<String>> {
        let mut named: Vec<&str> = named.iter().map(String::as_str).collect();
        named.sort_unstable();
        let extra: Vec<String> =
            self.weights()?.into_iter().filter(|n| named.binary_search(&n.as_str()).is_err()).collect();
        if extra.is_empty() {
            return Ok(None);
        }
        Ok(Some(format!(
            "{} weight files are not in the index and are not read:{}",
            extra.len(),
            listed(&extra)
        )))
    }

    /// The weight files where there is no index: `model.safetensors`, or all there are.
    ///
    /// # Errors
    /// `Missing` if there are none; `BadData` if there are only pickles or GGUF files.
    pub fn weights_without_index(&self, notes: &mut Vec<String>) -> Result<Vec<String>> {
        const SINGLE: &str = "model.safetensors";
        let weights = self.weights()?;
        if self.has(SINGLE)? || weights.iter().any(|n| n == SINGLE) {
            let rest: Vec<String> = weights.into_iter().filter(|n| n != SINGLE).collect();
            if !rest.is_empty() {
                let n = rest.len();
                notes.push(format!("{n} weight files beside {SINGLE} are not read:{}", listed(&rest)));
            }
            return Ok(vec![SINGLE.to_owned()]);
        }
        match weights.len() {
            0 => Err(self.no_weights()?),
            1 => Ok(weights),
            n if n > SHARDS_MAX => {
                Err(Error::bad_data(format!("{n} weight files, expected at most {SHARDS_MAX}"))
                    .in_file(&self.root))
            }
            n => {
                notes.push(format!(
                    "no model.safetensors.index.json: took the tensors of all {n} weight files"
                ));
                Ok(weights)
            }
        }
    }

    fn weights(&self) -> Result<Vec<String>> {
        Ok(self
            .entries()?
            .into_iter()
            .filter(|n| n.ends_with(".safetensors") && !n.starts_with('.'))
            .collect())
    }

    /// Why there is nothing to read.
    fn no_weights(&self) -> Result<Error> {
        let entries = self.entries()?;
        let first = |endings: &[&str]| entries.iter().find(|n| endings.iter().any(|e| n.ends_with(e)));
        if let Some(name) = first(&[".bin", ".pt", ".pth", ".ckpt", ".bin.index.json"]) {
            return Ok(Error::bad_data("only PyTorch pickles, which can run code when they are read")
                .in_file(self.root.join(name))
                .hint(
                    "convert it to safetensors elsewhere, for example with save_pretrained of transformers",
                ));
        }
        if let Some(name) = first(&[".gguf"]) {
            return Ok(Error::bad_data("a GGUF file, expected a checkpoint in safetensors files")
                .in_file(self.root.join(name))
                .hint("start from the original release"));
        }
        Ok(Error::missing("no weights: no .safetensors file here")
            .in_file(&self.root)
            .hint("give the directory that holds config.json and the .safetensors files"))
    }
}

fn not_a_directory(path: &Path) -> Error {
    Error::bad_data("a file, expected the directory of a checkpoint")
        .in_file(path)
        .hint("give the directory that holds config.json and the .safetensors files")
}

fn canonical(path: &Path) -> Result<PathBuf> {
    storage::canonicalize(path).map_err(|e| Error::io(&e, "open", path))
}

/// The current snapshot, if `path` is the directory of a repository in a Hugging Face cache.
fn snapshot(path: &Path) -> Result<Option<PathBuf>> {
    let snapshots = path.join("snapshots");
    if storage::exists(&path.join("config.json"))? || !storage::is_dir(&snapshots) {
        return Ok(None);
    }
    let main = path.join("refs").join("main");
    if storage::exists(&main)? {
        let cache = Place { root: path.to_owned(), fence: canonical(path)? };
        let refs = Place { root: path.join("refs"), fence: cache.fence };
        let revision = refs.read_small("main", 1024)?;
        let revision = String::from_utf8_lossy(&revision).trim().to_owned();
        check_name(&revision).map_err(|e| e.in_file(&main))?;
        let dir = snapshots.join(&revision);
        if storage::is_dir(&dir) {
            return Ok(Some(dir));
        }
        return Err(Error::missing(format!(
            "refs/main names revision {revision}, whose snapshot is not there"
        ))
        .in_file(&snapshots)
        .hint("fetch it again with `hf download`, or give the snapshot directory you want"));
    }
    let listed = storage::list(&snapshots, DIR_ENTRIES_MAX);
    let mut dirs = listed.map_err(|e| Error::io(&e, "list", &snapshots))?;
    dirs.retain(|d| storage::is_dir(d));
    match dirs.as_slice() {
        [only] => Ok(Some(only.clone())),
        _ => Err(Error::missing(format!("{} snapshots and no refs/main that says which", dirs.len()))
            .in_file(&snapshots)
            .hint("give the snapshot directory you want")),
    }
}

/// A name that is one plain component on every system.
fn check_name(name: &str) -> Result<()> {
    let mut components = Path::new(name).components();
    let plain =
        matches!((components.next(), components.next()), (Some(Component::Normal(c)), None) if c == name);
    let odd = |c: char| c == '/' || c == '\\' || c == ':' || c.is_control();
    if plain && !name.contains(odd) && name.len() <= 255 {
        return Ok(());
    }
    let shown: String = name.chars().take(100).collect();
    Err(Error::bad_data(format!("{shown:?} is no plain file name"))
        .hint("a checkpoint names only files beside its config.json; do not trust this one"))
}
