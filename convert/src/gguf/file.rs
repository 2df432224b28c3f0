//! Files of tensors that a callback hands over: small ones, such as importance matrices.

use std::path::{Path, PathBuf};

use moepack_format::atomic::AtomicFile;
use moepack_format::error::Context;
use moepack_format::{Error, Result};

use super::TensorInfo;
use super::value::Value;
use super::write::{file_name, keys_of, layout, split};

/// Takes the bytes of a tensor as they come.
pub type Sink<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// Writes one file; `data(i, sink)` hands over the bytes of tensor `i`. It is called in order, once for each.
///
/// # Errors
/// Tensors that their types cannot hold, data of another length than that, what `data` complains of, the disk.
pub fn write_file(
    path: &Path,
    metadata: &[(String, Value)],
    tensors: &[TensorInfo],
    mut data: impl FnMut(usize, &mut Sink<'_>) -> Result<()>,
) -> Result<()> {
    let layout = layout(metadata, tensors)?;
    let mut file = AtomicFile::create(path)?;
    file.append(&layout.header)?;
    for (i, (info, offset)) in tensors.iter().zip(layout.offsets).enumerate() {
        fill_up(&mut file, offset)?;
        write_tensor(&mut file, info, |sink| data(i, sink)).in_file(path)?;
    }
    fill_up(&mut file, layout.bytes)?;
    file.commit()
}

/// Writes a model into `dir`, as one file `NAME.gguf` or as several of at most `split_bytes_max` bytes of data each (one tensor
/// at least); as [`write_file`]. Returns the files.
///
/// # Errors
/// As [`write_file`]; more files than `split.no` can count.
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
        let path = dir.join(file_name(name, nth + 1, files.len()));
        let keys = keys_of(metadata, nth, files.len(), tensors.len())?;
        let part = tensors.get(range.clone()).unwrap_or_default();
        write_file(&path, &keys, part, |i, sink| data(range.start + i, sink))?;
        paths.push(path);
    }
    Ok(paths)
}

/// Zeros up to a place in the file.
fn fill_up(file: &mut AtomicFile, offset: u64) -> Result<()> {
    file.append_zeros(offset.saturating_sub(file.position()))
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
    Ok(())
}
