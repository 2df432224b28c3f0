//! `model.safetensors.index.json`: which tensor is in which file, says whoever wrote it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use moepack_format::{Error, Result};
use serde_json::Value;

use super::Place;
use crate::json;
use crate::limits::{INDEX_BYTES_MAX, JSON_VALUES_MAX, SHARDS_MAX};

const NAME: &str = "model.safetensors.index.json";

/// A parsed index.
#[derive(Debug)]
pub struct Index {
    path: PathBuf,
    /// Sorted.
    files: Vec<String>,
    /// Sorted by tensor: name and place in `files`.
    entries: Vec<(String, u32)>,
    /// Bytes of all tensors, where it says so.
    total_bytes: Option<u64>,
}

impl Index {
    /// Reads the index, if there is one.
    ///
    /// # Errors
    /// `BadData` for anything but a table of tensor names and plain file names.
    pub fn read(place: &Place) -> Result<Option<Index>> {
        if !place.has(NAME)? {
            return Ok(None);
        }
        let path = place.root().join(NAME);
        let text = place.read_small(NAME, INDEX_BYTES_MAX)?;
        let parsed = json::parse(&text, JSON_VALUES_MAX).and_then(|value| Index::of(&path, value, place));
        parsed.map(Some).map_err(|e| e.in_file(&path))
    }

    /// Names of the files, sorted.
    pub fn files(&self) -> Vec<String> {
        self.files.clone()
    }

    /// Name of a file.
    pub fn file(&self, idx: u32) -> &str {
        self.files.get(idx as usize).map_or("", String::as_str)
    }

    /// Tensor names with the place of their file, sorted by name.
    pub fn entries(&self) -> impl Iterator<Item = (&str, u32)> {
        self.entries.iter().map(|(name, file)| (name.as_str(), *file))
    }

    /// The file of this tensor.
    pub fn file_of(&self, tensor: &str) -> Option<u32> {
        let found = self.entries.binary_search_by(|(name, _)| name.as_str().cmp(tensor)).ok()?;
        self.entries.get(found).map(|(_, file)| *file)
    }

    /// Whether the index has this tensor.
    pub fn names(&self, tensor: &str) -> bool {
        self.file_of(tensor).is_some()
    }

    /// `metadata.total_size`, which nothing is checked against.
    pub fn total_bytes(&self) -> Option<u64> {
        self.total_bytes
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn of(path: &Path, value: Value, place: &Place) -> Result<Index> {
        let Value::Object(mut root) = value else { return Err(Error::bad_data("expected an object")) };
        let total_bytes = root.get("metadata").and_then(|m| m.get("total_size")).and_then(Value::as_u64);
        let Some(Value::Object(map)) = root.swap_remove("weight_map") else {
            return Err(Error::bad_data("weight_map is missing or no object"));
        };
        let mut files: BTreeMap<String, u32> = BTreeMap::new();
        let mut named = Vec::with_capacity(map.len());
        for (tensor, file) in map {
            let Value::String(file) = file else {
                return Err(Error::bad_data("the file of this tensor is no string").in_tensor(tensor));
            };
            if !files.contains_key(&file) {
                check(&file, place).map_err(|e| e.in_file(path).in_tensor(&tensor))?;
                files.insert(file.clone(), 0);
            }
            named.push((tensor, file));
        }
        if files.is_empty() {
            return Err(Error::missing("no weights: weight_map is empty"));
        }
        if files.len() > SHARDS_MAX {
            let n = files.len();
            return Err(Error::bad_data(format!("{n} weight files, expected at most {SHARDS_MAX}")));
        }
        for (place, idx) in files.values_mut().zip(0..) {
            *place = idx;
        }
        named.sort_unstable();
        let entries = named.into_iter().map(|(t, f)| (t, files.get(&f).copied().unwrap_or(0))).collect();
        Ok(Index { path: path.to_owned(), files: files.into_keys().collect(), entries, total_bytes })
    }
}

/// A weight file's name is plain and ends as such; whether the file is there is asked later, for all at once.
fn check(file: &str, place: &Place) -> Result<()> {
    match place.resolve(file) {
        Err(e) if e.kind() != moepack_format::Kind::Missing => return Err(e),
        _ => {}
    }
    if file.ends_with(".safetensors") {
        return Ok(());
    }
    Err(Error::bad_data(format!("{file:?} is no .safetensors file")))
}
