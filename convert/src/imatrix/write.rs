//! Writing either form, as llama-imatrix does it.

use std::path::Path;

use moepack_format::atomic::AtomicFile;
use moepack_format::error::Context;
use moepack_format::{Error, Result};

use super::{About, CHUNK_TOKENS, COUNT_MAX, Form};
use crate::gguf::file::write_file;
use crate::gguf::{TensorInfo, Type, Value};

/// The matrices of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The tensor's name in GGUF.
    pub name: String,
    /// Columns of each matrix.
    pub cols: usize,
    /// Inputs that each matrix saw.
    pub counts: Vec<u64>,
}

impl Entry {
    fn calls(&self, chunk_tokens: u64) -> u64 {
        self.counts.iter().max().copied().unwrap_or(0).div_ceil(chunk_tokens)
    }

    /// What is left out of `.dat`.
    fn is_empty(&self) -> bool {
        self.counts.iter().all(|&n| n == 0)
    }
}

/// Writes a file. `means(i)` are the mean squares `[matrices, cols]` of entry `i`; it is asked once for each, in order of
/// names.
///
/// # Errors
/// Nothing that any matrix saw; more than the form can count; what `means` says; a failed write.
pub fn write(
    path: &Path,
    form: Form,
    about: &About,
    entries: &[Entry],
    mut means: impl FnMut(usize) -> Result<Vec<f32>>,
) -> Result<()> {
    if entries.iter().all(Entry::is_empty) {
        return Err(Error::bad_data("no expert saw a token, so there is no importance to write"));
    }
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by_key(|&i| entries.get(i).map(|e| &e.name));
    let sorted: Vec<(usize, &Entry)> = order.into_iter().filter_map(|i| Some((i, entries.get(i)?))).collect();
    let mut checked = |i: usize, entry: &Entry| {
        let means = means(i)?;
        match means.len() == entry.cols.saturating_mul(entry.counts.len()) {
            true => Ok(means),
            false => Err(Error::bad_data(format!("{} means", means.len())).in_tensor(&entry.name)),
        }
    };
    match form {
        Form::Gguf => gguf(path, about, &sorted, &mut checked),
        Form::Dat => dat(path, about, &sorted, &mut checked),
    }
}

type Means<'a> = dyn FnMut(usize, &Entry) -> Result<Vec<f32>> + 'a;

fn gguf(path: &Path, about: &About, entries: &[(usize, &Entry)], means: &mut Means<'_>) -> Result<()> {
    let number = |n: u64| u32::try_from(n).map_err(|_| Error::bad_data(format!("{n} does not fit 32 bits")));
    let keys = [
        ("general.type".to_owned(), Value::String("imatrix".to_owned())),
        ("imatrix.datasets".to_owned(), Value::strings(about.datasets.iter().cloned())),
        ("imatrix.chunk_count".to_owned(), Value::U32(number(about.n_chunks)?)),
        ("imatrix.chunk_size".to_owned(), Value::U32(number(about.chunk_tokens.unwrap_or(CHUNK_TOKENS))?)),
    ];
    let kind = Type::of_codec("f32").ok_or_else(|| Error::bad_data("no type for f32"))?;
    let infos = entries.iter().flat_map(|(_, e)| {
        let info = |ending: &str, cols: usize| TensorInfo {
            name: format!("{}.{ending}", e.name),
            dims: vec![cols as u64, e.counts.len() as u64],
            kind,
        };
        [info("in_sum2", e.cols), info("counts", 1)]
    });
    let infos: Vec<TensorInfo> = infos.collect();
    write_file(path, &keys, &infos, |tensor, sink| {
        let Some((i, entry)) = entries.get(tensor / 2) else { return Ok(()) };
        if tensor % 2 == 1 {
            let counts: Vec<u8> = entry.counts.iter().flat_map(|&n| (n as f32).to_le_bytes()).collect();
            return sink(&counts);
        }
        let means = means(*i, entry)?;
        for (row, &count) in means.chunks_exact(entry.cols.max(1)).zip(&entry.counts) {
            let sum = |&mean: &f32| (f64::from(mean) * count as f64).min(f64::from(f32::MAX)) as f32;
            sink(&row.iter().flat_map(|mean| sum(mean).to_le_bytes()).collect::<Vec<u8>>())?;
        }
        Ok(())
    })
}

fn dat(path: &Path, about: &About, entries: &[(usize, &Entry)], means: &mut Means<'_>) -> Result<()> {
    let chunk_tokens = about.chunk_tokens.unwrap_or(CHUNK_TOKENS).max(1);
    let number = |n: u64| match n <= COUNT_MAX {
        true => Ok((n as i32).to_le_bytes()),
        false => Err(Error::bad_data(format!("{n} does not fit 31 bits"))),
    };
    let text =
        |text: &str| Ok([&number(text.len() as u64)?[..], text.as_bytes()].concat()) as Result<Vec<u8>>;
    let kept: Vec<&(usize, &Entry)> = entries.iter().filter(|(_, e)| !e.is_empty()).collect();
    let mut file = AtomicFile::create(path)?;
    file.append(&number(kept.len() as u64)?)?;
    for (i, entry) in kept {
        let means = means(*i, entry)?;
        let calls = entry.calls(chunk_tokens);
        let head = [&text(&entry.name)?[..], &number(calls)?, &number(means.len() as u64)?].concat();
        file.append(&head).in_tensor(&entry.name)?;
        for (row, &count) in means.chunks_exact(entry.cols.max(1)).zip(&entry.counts) {
            // What nobody saw is as important as anything, says llama-imatrix.
            let mean = |&mean: &f32| if count == 0 { 1.0 } else { mean };
            let value = |v: &f32| (mean(v) * calls as f32).min(f32::MAX).to_le_bytes();
            file.append(&row.iter().flat_map(value).collect::<Vec<u8>>())?;
        }
    }
    file.append(&number(about.n_chunks)?)?;
    file.append(&text(about.datasets.last().map_or("", String::as_str))?)?;
    file.commit()
}
