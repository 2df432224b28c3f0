//! The writer: header first, then the data of one tensor after the other, in files of a chosen size.
//!
//! A split model is `NAME-00001-of-0000N.gguf` …: the first file has all keys, each of them says which it is and how
//! many tensors there are (`split.no`, `split.count`, `split.tensors.count`), as llama.cpp's gguf-split does it.

use std::ops::Range;
use std::path::{Path, PathBuf};

use moepack_format::atomic::AtomicFile;
use moepack_format::error::Context;
use moepack_format::{Error, Result};

use super::read::align_up;
use super::value::{Value, write_string};
use super::{ALIGNMENT, MAGIC, TensorInfo, VERSION};

/// Takes the bytes of a tensor as they come.
pub type Sink<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// Writes a model into `dir`, as one file `NAME.gguf` or as several of at most `split_bytes_max` bytes of data each (one tensor
/// at least). `data(i, sink)` hands over the bytes of tensor `i`; it is called in order, once for each. Returns the
/// files.
///
/// # Errors
/// Tensors that their types cannot hold, data of another length than that, more files than `split.no` can count, what
/// `data` complains of, the disk.
pub fn write(
    dir: &Path,
    name: &str,
    metadata: &[(String, Value)],
    tensors: &[TensorInfo],
    split_bytes_max: Option<u64>,
    mut data: impl FnMut(usize, &mut Sink<'_>) -> Result<()>,
) -> Result<Vec<PathBuf>> {
    let files = split(tensors, split_bytes_max.unwrap_or(u64::MAX))?;
    let mut paths = Vec::new();
    for (nth, range) in files.iter().enumerate() {
        let path = dir.join(file_name(name, nth, files.len()));
        let keys = keys_of(metadata, nth, files.len(), tensors.len())?;
        let part = tensors.get(range.clone()).unwrap_or_default();
        write_file(&path, &keys, part, |i, sink| data(range.start + i, sink))?;
        paths.push(path);
    }
    Ok(paths)
}

/// Writes one file; as [`write`].
///
/// # Errors
/// As [`write`].
pub fn write_file(
    path: &Path,
    metadata: &[(String, Value)],
    tensors: &[TensorInfo],
    mut data: impl FnMut(usize, &mut Sink<'_>) -> Result<()>,
) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.append(&header(metadata, tensors)?)?;
    for (i, info) in tensors.iter().enumerate() {
        write_tensor(&mut file, info, |sink| data(i, sink)).in_file(path)?;
    }
    file.commit()
}

/// The name of the `nth` file, from 0, of `count`.
fn file_name(name: &str, nth: usize, count: usize) -> String {
    match count {
        1 => format!("{name}.gguf"),
        _ => format!("{name}-{:05}-of-{count:05}.gguf", nth + 1),
    }
}

/// Tensors in order, in files of at most `bytes_max`; a tensor that is larger gets its own.
fn split(tensors: &[TensorInfo], bytes_max: u64) -> Result<Vec<Range<usize>>> {
    let mut files = Vec::new();
    let (mut first, mut total) = (0, 0u64);
    for (i, info) in tensors.iter().enumerate() {
        let bytes = align_up(info.bytes()?, ALIGNMENT)?;
        if i > first && total.saturating_add(bytes) > bytes_max {
            files.push(first..i);
            (first, total) = (i, 0);
        }
        total = total.saturating_add(bytes);
    }
    files.push(first..tensors.len());
    Ok(files)
}

fn keys_of(
    metadata: &[(String, Value)],
    nth: usize,
    count: usize,
    n_tensors: usize,
) -> Result<Vec<(String, Value)>> {
    let mut keys = if nth == 0 { metadata.to_vec() } else { Vec::new() };
    if count > 1 {
        let too_many =
            || Error::plan(format!("{count} files, more than GGUF counts")).hint("ask for larger files");
        let number = |n: usize| u16::try_from(n).map(Value::U16).map_err(|_| too_many());
        let total = i32::try_from(n_tensors).map(Value::I32).map_err(|_| too_many())?;
        keys.push(("split.no".to_owned(), number(nth)?));
        keys.push(("split.count".to_owned(), number(count)?));
        keys.push(("split.tensors.count".to_owned(), total));
    }
    Ok(keys)
}

/// All that comes before the data, filled up to its alignment.
fn header(keys: &[(String, Value)], tensors: &[TensorInfo]) -> Result<Vec<u8>> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        write_string(key, &mut out);
        out.extend(value.kind().to_le_bytes());
        value.write(&mut out);
    }
    let mut offset = 0u64;
    for info in tensors {
        write_string(&info.name, &mut out);
        out.extend((info.dims.len() as u32).to_le_bytes());
        info.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
        out.extend(info.kind.id.to_le_bytes());
        out.extend(offset.to_le_bytes());
        let end = offset.checked_add(info.bytes()?);
        offset = align_up(end.unwrap_or(u64::MAX), ALIGNMENT).in_tensor(&info.name)?;
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    Ok(out)
}

fn write_tensor(
    file: &mut AtomicFile,
    info: &TensorInfo,
    data: impl FnOnce(&mut Sink<'_>) -> Result<()>,
) -> Result<()> {
    let (start, bytes) = (file.position(), info.bytes()?);
    data(&mut |part| file.append(part)).in_tensor(&info.name)?;
    let written = file.position().saturating_sub(start);
    if written != bytes {
        let what =
            format!("{written} bytes of data, but {:?} of {} takes {bytes}", info.dims, info.kind.name);
        return Err(Error::bad_data(what).in_tensor(&info.name));
    }
    file.append_zeros(align_up(bytes, ALIGNMENT)? - bytes)
}
