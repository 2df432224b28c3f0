//! The header of a safetensors file, read strictly: checkpoints of strangers and our own bundles alike.
//!
//! ```text
//!  byte 0          8                        8 + N                         end of file
//!       +----------+------------------------+----------------------------+
//!       | N, u64 LE| JSON, N bytes, spaces  | tensor data, no holes      |
//!       +----------+------------------------+----------------------------+
//! ```
//!
//! The JSON is one object: `"__metadata__"` maps strings to strings, every other name has `dtype`, `shape` and
//! `data_offsets` (from the end of the header). The reference reader lets duplicate names and a leading space
//! pass and ignores unknown fields; here they are refused, like everything that two readers could understand
//! in two ways. Nothing is allocated from a number before it was compared with the file.

use std::collections::BTreeMap;

use crate::dtype::Dtype;
use crate::error::{Context, Error, Kind, Result};
use crate::file::{InputFile, cut_short};
use crate::limits::{HEADER_BYTES_MAX, HEADER_BYTES_MIN, NAME_BYTES_MAX, TENSORS_MAX};

mod json;

/// The key of the string table in a header; no tensor can have this name.
pub const METADATA: &str = "__metadata__";

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, not empty.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Length of each dimension, outermost first.
    pub shape: Vec<u64>,
    /// First byte in the file.
    pub start: u64,
    /// First byte behind it in the file.
    pub end: u64,
}

impl TensorInfo {
    /// Bytes of the tensor.
    pub fn bytes(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

/// A header that keeps every rule of the format.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The string table, empty if there is none.
    pub metadata: BTreeMap<String, String>,
    /// The tensors in the order of their bytes.
    pub tensors: Vec<TensorInfo>,
    /// First byte behind the header.
    pub data_offset: u64,
    /// Places in `tensors`, sorted by name.
    by_name: Vec<u32>,
}

impl Header {
    /// Reads and checks the header of a file.
    ///
    /// # Errors
    /// `BadData` with the byte offset if anything is wrong with it; `Missing` if the file is a Git LFS pointer.
    pub fn read(file: &InputFile) -> Result<Header> {
        Header::read_inner(file).in_file(file.path())
    }

    /// Checks the header text `json` of a file of `file_len` bytes whose tensor data start at `data_offset`.
    ///
    /// # Errors
    /// `BadData` with tensor and byte offset.
    pub fn parse(json: &[u8], data_offset: u64, file_len: u64) -> Result<Header> {
        let json_offset = data_offset.saturating_sub(json.len() as u64);
        let text = check_text(json).map_err(|(e, at)| e.at_byte(json_offset.saturating_add(at)))?;
        let (metadata, mut tensors) = json::parse(text, json_offset)?;
        for tensor in &mut tensors {
            place(tensor, data_offset)?;
        }
        tensors.sort_by_key(|t| (t.start, t.end));
        check_cover(&tensors, data_offset, file_len)?;
        let by_name = index_names(&tensors)?;
        Ok(Header { metadata, tensors, data_offset, by_name })
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        let tensor = |&i: &u32| self.tensors.get(i as usize);
        let found = self.by_name.binary_search_by(|i| tensor(i).map(|t| t.name.as_str()).cmp(&Some(name)));
        found.ok().and_then(|at| self.by_name.get(at)).and_then(tensor)
    }

    fn read_inner(file: &InputFile) -> Result<Header> {
        let file_len = file.len();
        refuse_pointer(file)?;
        if file_len < 8 {
            let what = format!("{file_len} bytes, expected 8 bytes of header length first");
            return Err(cut_short(Error::bad_data(what)));
        }
        let mut length = [0; 8];
        file.read_exact_at(0, &mut length)?;
        let json_len = check_length(u64::from_le_bytes(length), file_len).at_byte(0)?;
        let mut json = vec![0; json_len];
        file.read_exact_at(8, &mut json)?;
        Header::parse(&json, (json_len as u64).saturating_add(8), file_len)
    }
}

/// A `git clone` without LFS leaves a small text in place of the weights.
fn refuse_pointer(file: &InputFile) -> Result<()> {
    const START: &[u8] = b"version https://git-lfs";
    let mut start = [0; START.len()];
    if file.len() < START.len() as u64 {
        return Ok(());
    }
    file.read_exact_at(0, &mut start)?;
    if start != START {
        return Ok(());
    }
    let what = "a Git LFS pointer, expected the weights it stands for";
    Err(Error::missing(what).hint("run `git lfs pull` in the checkpoint, or fetch it with `hf download`"))
}

fn check_length(json_len: u64, file_len: u64) -> Result<usize> {
    if json_len > HEADER_BYTES_MAX {
        let what = format!("header length {json_len}, expected at most {HEADER_BYTES_MAX}");
        return Err(Error::bad_data(what).hint("this is no safetensors file, or its first bytes are damaged"));
    }
    if json_len < HEADER_BYTES_MIN {
        let what = format!("header length {json_len}, expected at least {HEADER_BYTES_MIN}");
        return Err(Error::bad_data(what));
    }
    let needs = json_len.saturating_add(8);
    if needs > file_len {
        let what = format!("needs {needs} bytes for the header alone, has {file_len}");
        return Err(cut_short(Error::bad_data(what)));
    }
    usize::try_from(json_len).map_err(|_| Error::bad_data(format!("header length {json_len}")))
}

/// UTF-8 that starts with `{` and ends with `}` and spaces; an error comes with its place.
fn check_text(json: &[u8]) -> std::result::Result<&str, (Error, u64)> {
    let text = std::str::from_utf8(json).map_err(|e| {
        let at = e.valid_up_to();
        let byte = json.get(at).copied().unwrap_or_default();
        (Error::bad_data(format!("header byte 0x{byte:02x} is not UTF-8")), at as u64)
    })?;
    let trimmed = text.trim_end_matches(' ');
    match (text.chars().next(), trimmed.chars().next_back()) {
        (Some('{'), Some('}')) => Ok(trimmed),
        (Some('{'), last) => {
            let what = format!("header ends with {}, expected '}}' and spaces", quoted(last));
            Err((Error::bad_data(what), trimmed.len().saturating_sub(1) as u64))
        }
        (first, _) => {
            Err((Error::bad_data(format!("header starts with {}, expected '{{'", quoted(first))), 0))
        }
    }
}

fn quoted(c: Option<char>) -> String {
    c.map_or_else(|| "nothing".to_owned(), |c| format!("{c:?}"))
}

/// Turns the tensor's offsets from the end of the header into offsets of the file, and checks its length.
fn place(tensor: &mut TensorInfo, data_offset: u64) -> Result<()> {
    let (start, end) = (tensor.start, tensor.end);
    let placed = data_offset.checked_add(start).zip(data_offset.checked_add(end));
    let check = || {
        let Some((start_in_file, end_in_file)) = placed else {
            return Err(Error::bad_data(format!("data_offsets [{start}, {end}] go beyond 2^64")));
        };
        let Some(bytes) = end.checked_sub(start) else {
            return Err(
                Error::bad_data(format!("data_offsets [{start}, {end}] are reversed")).at_byte(start_in_file)
            );
        };
        let expected = tensor.dtype.bytes(&tensor.shape).at_byte(start_in_file)?;
        if bytes != expected {
            let (shape, dtype) = (&tensor.shape, tensor.dtype.name());
            let what = format!("{bytes} bytes, but shape {shape:?} of {dtype} takes {expected}");
            return Err(Error::bad_data(what).at_byte(start_in_file));
        }
        Ok((start_in_file, end_in_file))
    };
    (tensor.start, tensor.end) = check().in_tensor(&tensor.name)?;
    Ok(())
}

/// Every byte from `data_offset` to the end of the file belongs to exactly one tensor.
fn check_cover(tensors: &[TensorInfo], data_offset: u64, file_len: u64) -> Result<()> {
    let mut at = data_offset;
    let mut before = "the header";
    for t in tensors {
        if t.start < at {
            let what = format!("overlaps {before}, which ends at byte {at}");
            return Err(Error::bad_data(what).in_tensor(&t.name).at_byte(t.start));
        }
        if t.start > at {
            let what =
                format!("a hole of {} bytes between {before} and this tensor", t.start.saturating_sub(at));
            return Err(Error::bad_data(what).in_tensor(&t.name).at_byte(at));
        }
        (at, before) = (t.end, &t.name);
    }
    if file_len < at {
        let last = tensors.iter().find(|t| t.end > file_len);
        let e = Error::bad_data(format!("needs {at} bytes, has {file_len}"));
        let e = last.map_or(e.clone(), |t| e.in_tensor(&t.name));
        return Err(cut_short(e.at_byte(file_len)));
    }
    if file_len > at {
        let what = format!("{} bytes behind the last tensor, expected none", file_len.saturating_sub(at));
        return Err(Error::bad_data(what).at_byte(at));
    }
    Ok(())
}

/// Places in `tensors` sorted by name.
fn index_names(tensors: &[TensorInfo]) -> Result<Vec<u32>> {
    let n = u32::try_from(tensors.len()).map_err(|_| Error::bad_data("too many tensors"))?;
    let mut named: Vec<(&str, u32)> = tensors.iter().map(|t| t.name.as_str()).zip(0..n).collect();
    named.sort_unstable();
    for pair in named.windows(2) {
        if let [(a, _), (b, i)] = pair
            && a == b
        {
            let start = tensors.get(*i as usize).map_or(0, |t| t.start);
            return Err(Error::new(Kind::BadData, "this name is used twice").in_tensor(*a).at_byte(start));
        }
    }
    Ok(named.into_iter().map(|(_, i)| i).collect())
}

/// A name that may be given to a tensor.
pub(crate) fn check_name(name: &str, n_before: usize) -> Result<()> {
    if name.is_empty() {
        return Err(Error::bad_data("a tensor without a name"));
    }
    if name.len() > NAME_BYTES_MAX {
        let what = format!("a tensor name of {} bytes, expected at most {NAME_BYTES_MAX}", name.len());
        return Err(Error::bad_data(what));
    }
    if n_before >= TENSORS_MAX {
        return Err(Error::bad_data(format!("more than {TENSORS_MAX} tensors")));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
