//! The writer: which tensors go into which file, and everything before the first number of each.
//!
//! A split model is `NAME-00001-of-0000N.gguf` …: the first file has all keys, each of them says which it is and how
//! many tensors there are (`split.no`, `split.count`, `split.tensors.count`), as llama.cpp's gguf-split does it.

use std::ops::Range;

use moepack_format::error::Context;
use moepack_format::{Error, Result};

use super::read::align_up;
use super::value::{Value, write_string};
use super::{ALIGNMENT, MAGIC, NAME_BYTES_MAX, TensorInfo, VERSION};

/// A file before its data.
#[derive(Debug)]
pub(crate) struct Layout {
    /// All that comes before the data, filled up to its alignment.
    pub header: Vec<u8>,
    /// Where each tensor starts in the file.
    pub offsets: Vec<u64>,
    /// Length of the file, zeros behind the last tensor included.
    pub bytes: u64,
}

/// The name of the `nth` file, from 1, of `count`.
pub(crate) fn file_name(name: &str, nth: usize, count: usize) -> String {
    match count {
        1 => format!("{name}.gguf"),
        _ => format!("{name}-{nth:05}-of-{count:05}.gguf"),
    }
}

/// Tensors in order, in files of at most `bytes_max`; a tensor that is larger gets its own.
///
/// # Errors
/// Tensors that their types cannot hold.
pub(crate) fn split(tensors: &[TensorInfo], bytes_max: u64) -> Result<Vec<Range<usize>>> {
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

/// The keys of the `nth` file, from 0, of `count`.
///
/// # Errors
/// More files or tensors than the keys can count.
pub(crate) fn keys_of(
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

/// The header of a file, and where its tensors go.
///
/// # Errors
/// Names that are too long, tensors that their types cannot hold, sizes beyond 64 bits.
pub(crate) fn layout(keys: &[(String, Value)], tensors: &[TensorInfo]) -> Result<Layout> {
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        write_string(key, &mut header);
        header.extend(value.kind().to_le_bytes());
        value.write(&mut header);
    }
    let (mut offsets, mut at) = (Vec::with_capacity(tensors.len()), 0u64);
    for info in tensors {
        offsets.push(at);
        write_info(info, at, &mut header)?;
        let end = at.checked_add(info.bytes()?);
        at = align_up(end.unwrap_or(u64::MAX), ALIGNMENT).in_tensor(&info.name)?;
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
    let start = header.len() as u64;
    offsets.iter_mut().for_each(|offset| *offset = offset.saturating_add(start));
    Ok(Layout { header, offsets, bytes: start.saturating_add(at) })
}

fn write_info(info: &TensorInfo, offset: u64, header: &mut Vec<u8>) -> Result<()> {
    if info.name.len() as u64 > NAME_BYTES_MAX {
        return Err(Error::plan(format!("a name of more than {NAME_BYTES_MAX} bytes")).in_tensor(&info.name));
    }
    write_string(&info.name, header);
    header.extend((info.dims.len() as u32).to_le_bytes());
    info.dims.iter().for_each(|d| header.extend(d.to_le_bytes()));
    header.extend(info.kind.id.to_le_bytes());
    header.extend(offset.to_le_bytes());
    Ok(())
}
