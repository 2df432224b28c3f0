//! The inputs of a target: first its seeds as they are, then what [`mutate`](crate::mutate) makes of them.

use std::path::{Path, PathBuf};

use moepack_format::{Context, Error, Result};

use crate::mutate::{Field, Shape, mutate};
use crate::random::Random;

/// A file that a reader takes, or once took wrongly.
#[derive(Clone, Debug)]
pub struct Seed {
    /// Where it comes from; a target may have prepared something under this name.
    pub name: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Seed {
    /// A seed.
    pub fn new(name: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Seed {
        Seed { name: name.into(), bytes: bytes.into() }
    }

    /// A file as a seed.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn file(name: impl Into<String>, path: &Path) -> Result<Seed> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(&e, "read", path))?;
        Ok(Seed::new(name, bytes))
    }
}

/// Seeds, and where in them something can be changed.
pub struct Corpus {
    target: &'static str,
    shape: Shape,
    seeds: Vec<(Seed, Vec<Field>)>,
}

impl Corpus {
    /// The corpus of a target.
    pub fn new(target: &'static str, shape: Shape, seeds: Vec<Seed>) -> Corpus {
        let with_fields = |seed: Seed| {
            let fields = shape.fields(&seed.bytes);
            (seed, fields)
        };
        Corpus { target, shape, seeds: seeds.into_iter().map(with_fields).collect() }
    }

    /// Number of seeds.
    pub fn n_seeds(&self) -> usize {
        self.seeds.len()
    }

    /// Input `n` of the run with this `seed`, and the name of the file it was made from.
    pub fn input(&self, seed: u64, n: u64) -> (&str, Vec<u8>) {
        let first = usize::try_from(n).ok().and_then(|n| self.seeds.get(n));
        if let Some((seed, _)) = first {
            return (&seed.name, seed.bytes.clone());
        }
        let mut random = Random::of(seed, self.target, n);
        let Some((from, fields)) = random.pick(&self.seeds) else { return ("", Vec::new()) };
        let others: Vec<&[u8]> = self.seeds.iter().map(|(s, _)| &*s.bytes).collect();
        (&from.name, mutate(&mut random, self.shape, &from.bytes, fields, &others))
    }
}

/// A path under `fixtures/`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
}

/// Directories in a directory of fixtures, sorted by name.
///
/// # Errors
/// It cannot be listed.
pub fn directories(of: &str) -> Result<Vec<(String, PathBuf)>> {
    let path = fixture(of);
    let list =
        std::fs::read_dir(&path).and_then(|d| d.map(|e| Ok(e?.path())).collect::<std::io::Result<Vec<_>>>());
    let list = list.map_err(|e| Error::io(&e, "list", &path)).in_file(&path)?;
    let name = |p: PathBuf| Some((p.file_name()?.to_str()?.to_owned(), p));
    let mut found: Vec<_> = list.into_iter().filter(|p| p.is_dir()).filter_map(name).collect();
    found.sort();
    Ok(found)
}
