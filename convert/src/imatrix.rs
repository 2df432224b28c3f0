//! Importance matrices of llama.cpp: for each matrix the mean squares of its inputs, column by column, and how many inputs
//! there were. In and out, in both forms.
//!
//! ```text
//!  GGUF   general.type = "imatrix", imatrix.datasets [string], imatrix.chunk_count u32, imatrix.chunk_size u32,
//!         NAME.in_sum2 f32 [cols, n_matrices]  sums of squares     NAME.counts f32 [1, n_matrices]  inputs seen
//!  .dat   n_entries i32, entries, n_chunks i32, dataset: length i32, bytes
//!         entry: name: length i32, bytes; n_calls i32; n_values i32; means of squares × n_calls, f32 [cols × n_matrices]
//! ```
//!
//! NAME is that of the tensor in GGUF, such as `blk.3.ffn_down_exps.weight`, whose matrices are experts. An expert without
//! inputs has count 0 in GGUF and ones as means in `.dat`, which does not keep counts of experts. Sources: llama.cpp,
//! `tools/imatrix/imatrix.cpp` and `common/imatrix-loader.cpp`; ik_llama.cpp, `examples/imatrix/imatrix.cpp`, as of
//! September 2026.
#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

use std::collections::BTreeMap;
use std::path::Path;

use moepack_format::error::Context;
use moepack_format::{Error, InputFile, Result, storage};
use moepack_quant::stats::ColumnStats;

use crate::gguf;

mod dat;
mod from_gguf;
mod write;

pub use write::{Entry, write};

/// Tokens of a chunk where a file does not say: what llama-imatrix takes.
pub const CHUNK_TOKENS: u64 = 512;
/// Bytes of the name of an entry; the format's is 63 in GGUF.
const NAME_BYTES_MAX: u64 = 256;
/// Entries of a file; a model has some ten for each layer.
const ENTRIES_MAX: u64 = 1 << 16;
/// Chunks, values and lengths are signed in files.
const COUNT_MAX: u64 = i32::MAX as u64;

/// How importance is kept in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A GGUF file, as current versions of llama.cpp write it.
    Gguf,
    /// What llama.cpp wrote before, and ik_llama.cpp writes.
    Dat,
}

/// What a file says about how it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// Chunks of text.
    pub n_chunks: u64,
    /// Tokens of a chunk, where that is known.
    pub chunk_tokens: Option<u64>,
    /// Names of the texts.
    pub datasets: Vec<String>,
}

/// An opened file; values are read when they are asked for.
#[derive(Debug)]
pub struct Imatrix {
    file: InputFile,
    form: Form,
    about: About,
    entries: BTreeMap<String, Place>,
}

/// Where the values of an entry lie, as f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    values_offset: u64,
    n_values: u64,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counts {
    /// One for each matrix, as f32 in the file; or one for all.
    Stored { offset: u64, n: u64 },
    /// Calls, by which the values are to be divided.
    Calls(u64),
}

impl Imatrix {
    /// Whether a file looks like one, so that complaints about it are to be those of [`Imatrix::open`].
    pub fn looks_like(path: &Path) -> bool {
        let found =
            || Ok(gguf::set::is_gguf(path) || dat::looks_like(&InputFile::open(path)?)) as Result<bool>;
        storage::is_file(path) && found().unwrap_or(false)
    }

    /// Opens a file of either form; of the values only that they are there.
    ///
    /// # Errors
    /// A file that is neither, sums without counts, lengths beyond the file, names said twice.
    pub fn open(path: &Path) -> Result<Imatrix> {
        let file = InputFile::open(path)?;
        let (form, (about, entries)) = match gguf::set::is_gguf(path) {
            true => (Form::Gguf, from_gguf::entries(path)?),
            false => (Form::Dat, dat::entries(&file).in_file(path)?),
        };
        if entries.is_empty() {
            return Err(Error::bad_data("an imatrix without entries").in_file(path));
        }
        Ok(Imatrix { file, form, about, entries })
    }

    /// How it was made.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// The form of the file.
    pub fn form(&self) -> Form {
        self.form
    }

    /// The file.
    pub fn file(&self) -> &InputFile {
        &self.file
    }

    /// Names of all entries.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether there is such an entry.
    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Compares an entry with the matrices it is to be used for.
    ///
    /// # Errors
    /// Another number of values or counts; no such entry.
    pub fn check(&self, name: &str, n_matrices: usize, cols: usize) -> Result<()> {
        self.place(name, n_matrices, cols).map(drop)
    }

    /// What was seen of each matrix. Where counts are of chunks, an input each is assumed for each of their tokens.
    ///
    /// # Errors
    /// As [`Imatrix::check`]; values that are no finite numbers ≥ 0, counts that are no whole ones, sums of inputs that nobody saw.
    pub fn columns(&self, name: &str, n_matrices: usize, cols: usize) -> Result<Vec<ColumnStats>> {
        let place = self.place(name, n_matrices, cols)?;
        let values = self.floats(place.values_offset, place.n_values)?;
        let rows = values.chunks_exact(cols.max(1)).enumerate();
        let located = |e: Error| e.in_file(self.file.path()).in_tensor(name);
        let stats = match place.counts {
            Counts::Calls(calls) => rows.map(|(m, row)| of_means(m, row, calls)).collect::<Result<_>>(),
            Counts::Stored { offset, n } => {
                let counts = self.floats(offset, n)?;
                let count = |m: usize| counts.get(m).or(counts.first()).copied().unwrap_or(0.0);
                rows.map(|(m, sums)| of_sums(m, sums, count(m))).collect()
            }
        };
        stats.map_err(located)
    }

    fn place(&self, name: &str, n_matrices: usize, cols: usize) -> Result<Place> {
        let refuse = |what: String| Error::bad_data(what).in_file(self.file.path()).in_tensor(name);
        let place = *self.entries.get(name).ok_or_else(|| refuse("no such entry".to_owned()))?;
        let expected = (n_matrices as u64).checked_mul(cols as u64);
        let counted = match place.counts {
            Counts::Stored { n, .. } => n == 1 || n == n_matrices as u64,
            Counts::Calls(_) => true,
        };
        if expected != Some(place.n_values) || !counted {
            let n = place.n_values;
            let what = format!("{n} values, expected those of {n_matrices} matrices of {cols} columns");
            return Err(refuse(what).hint("the imatrix is of another model"));
        }
        Ok(place)
    }

    fn floats(&self, offset: u64, n: u64) -> Result<Vec<f32>> {
        // Both were compared with the file.
        let mut bytes = vec![0; usize::try_from(n).unwrap_or(0).saturating_mul(4)];
        self.file.read_exact_at(offset, &mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }
}

/// A matrix of `.dat`, whose ones say that there was no input.
fn of_means(matrix: usize, row: &[f32], calls: u64) -> Result<ColumnStats> {
    let divisor = calls as f32;
    check(matrix, row, divisor)?;
    let second_moment: Vec<f32> = row.iter().map(|v| v / divisor).collect();
    let is_unseen = second_moment.iter().all(|&v| v == 1.0);
    let n_tokens = if is_unseen { 0 } else { calls.saturating_mul(CHUNK_TOKENS) };
    Ok(ColumnStats { n_tokens, second_moment })
}

/// A matrix of GGUF.
fn of_sums(matrix: usize, sums: &[f32], count: f32) -> Result<ColumnStats> {
    check(matrix, sums, count)?;
    let n_tokens = count as u64;
    if n_tokens == 0 && sums.iter().any(|&s| s != 0.0) {
        return Err(Error::bad_data(format!("matrix {matrix} has sums, but a count of 0")));
    }
    let mean = |&sum: &f32| (f64::from(sum) / f64::from(count.max(1.0))) as f32;
    Ok(ColumnStats { n_tokens, second_moment: sums.iter().map(mean).collect() })
}

/// Refuses counts and values that no run can have left.
fn check(matrix: usize, values: &[f32], count: f32) -> Result<()> {
    if !(count.is_finite() && count >= 0.0 && count.fract() == 0.0) {
        return Err(Error::bad_data(format!(
            "matrix {matrix} has a count of {count}, expected a whole number ≥ 0"
        )));
    }
    match values.iter().enumerate().find(|(_, v)| !(v.is_finite() && **v >= 0.0)) {
        Some((column, value)) => {
            let what = format!("{value} in column {column} of matrix {matrix}, expected a finite number ≥ 0");
            Err(Error::bad_data(what))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
