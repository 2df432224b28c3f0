//! The strict reader: every count is compared with what is left of the file before anything is allocated.
#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use moepack_format::error::Context;
use moepack_format::file::InputFile;
use moepack_format::{Error, Result};

use super::value::{self, Value};
use super::*;

/// The header of a file.
#[derive(Debug)]
pub struct Gguf {
    /// Where it was read.
    pub path: PathBuf,
    /// Length of the file.
    pub file_bytes: u64,
    /// What the file says of itself.
    pub metadata: BTreeMap<String, Value>,
    /// Elements that arrays have in the file, of those of which an outline keeps less.
    pub shortened: BTreeMap<String, u64>,
    /// Tensors in the order of the file, each with the place of its first byte in the file.
    pub tensors: Vec<(TensorInfo, u64)>,
}

impl Gguf {
    /// Reads and checks the header; of the data only that it is there.
    ///
    /// # Errors
    /// Anything that version 3 does not allow, names said twice, tensors that do not lie one after the other up to the
    /// end of the file, a header beyond the caps of this module.
    pub fn open(path: &Path) -> Result<Gguf> {
        Gguf::read(path, usize::MAX)
    }

    /// The same, for looking at: of arrays the first few elements are kept. All are read and checked.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn outline(path: &Path) -> Result<Gguf> {
        Gguf::read(path, OUTLINE_ELEMENTS)
    }

    fn read(path: &Path, kept_each: usize) -> Result<Gguf> {
        let file = InputFile::open(path)?;
        Reader::new(&file, kept_each).gguf().in_file(path)
    }

    /// The alignment of the data, 32 where nothing is said.
    pub fn alignment(&self) -> u64 {
        self.metadata.get(ALIGNMENT_KEY).and_then(Value::as_u64).unwrap_or(ALIGNMENT)
    }

    /// The elements that an array has in the file.
    pub fn array_len(&self, key: &str) -> Option<u64> {
        let kept = |value: &Value| match value {
            Value::Array(_, values) => Some(values.len() as u64),
            _ => None,
        };
        self.shortened.get(key).copied().or_else(|| kept(self.metadata.get(key)?))
    }
}

/// Reads on from a position, 64 KiB at a time.
struct Reader<'a> {
    file: &'a InputFile,
    position: u64,
    buffer: Vec<u8>,
    buffer_start: u64,
    /// Elements of each array that are kept.
    kept_each: usize,
    /// Elements that may still be kept.
    elements_left: u64,
}

const BUFFER_BYTES: u64 = 1 << 16;

impl<'a> Reader<'a> {
    fn new(file: &'a InputFile, kept_each: usize) -> Reader<'a> {
        let (buffer, elements_left) = (Vec::new(), ELEMENTS_MAX);
        Reader { file, position: 0, buffer, buffer_start: 0, kept_each, elements_left }
    }
}

impl Reader<'_> {
    fn gguf(mut self) -> Result<Gguf> {
        let (n_tensors, n_keys) = self.head()?;
        let (mut metadata, mut shortened) = (BTreeMap::new(), BTreeMap::new());
        for _ in 0..n_keys {
            let at = self.position;
            let key = self.string(KEY_BYTES_MAX)?;
            let (value, n) = self.value().map_err(|e| of_key(&e, &key))?;
            if matches!(&value, Value::Array(_, kept) if (kept.len() as u64) < n) {
                shortened.insert(key.clone(), n);
            }
            if metadata.insert(key.clone(), value).is_some() {
                return Err(Error::bad_data(format!("key {key:?} is said twice")).at_byte(at));
            }
        }
        let alignment = alignment(&metadata)?;
        let mut infos = Vec::new();
        for _ in 0..n_tensors {
            infos.push(self.tensor()?);
        }
        let (path, file_bytes) = (self.file.path().to_path_buf(), self.file.len());
        let tensors = place(infos, self.position, alignment, file_bytes)?;
        Ok(Gguf { path, file_bytes, metadata, shortened, tensors })
    }

    /// Magic, version and the two counts.
    fn head(&mut self) -> Result<(u64, u64)> {
        let magic: [u8; 4] = self.take()?;
        if magic != MAGIC {
            return Err(
                Error::bad_data(format!("the file begins with {magic:02x?}, not with \"GGUF\"")).at_byte(0)
            );
        }
        let version = self.u32()?;
        if version == VERSION.swap_bytes() {
            let what = "the file is big-endian, which is not read";
            return Err(Error::bad_data(what)
                .at_byte(4)
                .hint("gguf-py's gguf-convert-endian turns it round"));
        }
        if version != VERSION {
            let what = format!("GGUF version {version}, expected {VERSION}");
            return Err(Error::bad_data(what)
                .at_byte(4)
                .hint("convert the model again with a current llama.cpp"));
        }
        let (n_tensors, n_keys) = (self.u64()?, self.u64()?);
        // The smallest tensor info has 33 bytes, the smallest key 13.
        self.check_count("tensors", n_tensors, 33, TENSORS_MAX)?;
        self.check_count("keys", n_keys, 13, KEYS_MAX)?;
        Ok((n_tensors, n_keys))
    }

    fn tensor(&mut self) -> Result<(TensorInfo, u64, u64)> {
        let at = self.position;
        let name = self.string(NAME_BYTES_MAX)?;
        let rest = self.dims_and_kind().and_then(|(dims, kind)| Ok((dims, kind, self.u64()?)));
        let (dims, kind, offset) = rest.in_tensor(&name).at_byte(at)?;
        Ok((TensorInfo { name, dims, kind }, offset, at))
    }

    fn dims_and_kind(&mut self) -> Result<(Vec<u64>, &'static Type)> {
        let n_dims = self.u32()?;
        if n_dims == 0 || n_dims > DIMS_MAX {
            return Err(Error::bad_data(format!("{n_dims} dimensions, expected 1 to {DIMS_MAX}")));
        }
        let dims = (0..n_dims).map(|_| self.u64()).collect::<Result<Vec<_>>>()?;
        let id = self.u32()?;
        let kind = Type::with_id(id).ok_or_else(|| Error::bad_data(format!("unknown type {id}")))?;
        Ok((dims, kind))
    }

    /// A value behind its kind; of an array as much as is kept, and how many elements there are.
    fn value(&mut self) -> Result<(Value, u64)> {
        let kind = self.u32()?;
        if kind != value::ARRAY {
            return Ok((self.scalar(kind)?, 1));
        }
        let at = self.position;
        let (kind, n) = (self.u32()?, self.u64()?);
        if kind == value::ARRAY {
            return Err(Error::bad_data("an array of arrays").at_byte(at));
        }
        let bytes_min = value::bytes_min(kind).ok_or_else(|| unknown_kind(kind, at))?;
        self.check_count("elements", n, bytes_min, ARRAY_MAX)?;
        let n_kept = n.min(self.kept_each as u64);
        self.elements_left = self.elements_left.checked_sub(n_kept).ok_or_else(|| {
            Error::bad_data(format!("more than {ELEMENTS_MAX} elements in arrays")).at_byte(at)
        })?;
        let mut kept = Vec::new();
        for i in 0..n {
            let value = self.scalar(kind)?;
            if i < n_kept {
                kept.push(value);
            }
        }
        Ok((Value::Array(kind, kept), n))
    }

    fn scalar(&mut self, kind: u32) -> Result<Value> {
        let at = self.position;
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.take()?)),
            1 => Value::I8(i8::from_le_bytes(self.take()?)),
            2 => Value::U16(u16::from_le_bytes(self.take()?)),
            3 => Value::I16(i16::from_le_bytes(self.take()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.take()?)),
            6 => Value::F32(f32::from_le_bytes(self.take()?)),
            7 => match self.take()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(Error::bad_data(format!("a bool of {other}")).at_byte(at)),
            },
            value::STRING => Value::String(self.string(STRING_BYTES_MAX)?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.take()?)),
            12 => Value::F64(f64::from_le_bytes(self.take()?)),
            _ => return Err(unknown_kind(kind, at)),
        })
    }

    fn string(&mut self, bytes_max: u64) -> Result<String> {
        let at = self.position;
        let n = self.u64()?;
        self.check_count("bytes of a string", n, 1, bytes_max)?;
        let text = if n <= BUFFER_BYTES {
            String::from_utf8(self.buffered(n as usize)?.to_vec())
        } else {
            self.check_header(n)?;
            let mut bytes = vec![0; n as usize];
            self.file.read_exact_at(self.position, &mut bytes)?;
            self.position = self.position.saturating_add(n);
            String::from_utf8(bytes)
        };
        text.map_err(|_| Error::bad_data("a string that is not UTF-8").at_byte(at))
    }

    /// Compares a count with its cap and with what is left of the file.
    fn check_count(&self, what: &str, n: u64, bytes_each: u64, most: u64) -> Result<()> {
        let left = self.file.len().saturating_sub(self.position);
        if n > most || n.checked_mul(bytes_each).is_none_or(|bytes| bytes > left) {
            let what =
                format!("{n} {what}, but {left} bytes are left of the file and at most {most} are read");
            return Err(Error::bad_data(what).at_byte(self.position.saturating_sub(8)));
        }
        Ok(())
    }

    fn u32(&mut self) -> Result<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.buffered(N)?;
        Ok(bytes.first_chunk().copied().unwrap_or([0; N]))
    }

    /// The next `n` bytes, [`BUFFER_BYTES`] at most.
    fn buffered(&mut self, n: usize) -> Result<&[u8]> {
        let place = |r: &Self| {
            let from = usize::try_from(r.position.checked_sub(r.buffer_start)?).ok()?;
            Some(from..from.checked_add(n).filter(|&to| to <= r.buffer.len())?)
        };
        let range = match place(self) {
            Some(range) => range,
            None => {
                self.check_header(n as u64)?;
                let left = self.file.len().saturating_sub(self.position);
                if left < n as u64 {
                    let what = format!("the file ends where {n} bytes are expected");
                    return Err(Error::bad_data(what).at_byte(self.position));
                }
                self.buffer.resize(left.min(BUFFER_BYTES) as usize, 0);
                self.buffer_start = self.position;
                self.file.read_exact_at(self.position, &mut self.buffer)?;
                0..n
            }
        };
        self.position = self.position.saturating_add(n as u64);
        Ok(self.buffer.get(range).unwrap_or_default())
    }

    /// Refuses a header that goes on for ever.
    fn check_header(&self, more: u64) -> Result<()> {
        if self.position.saturating_add(more) <= HEADER_BYTES_MAX {
            return Ok(());
        }
        let what =
            format!("a header of more than {HEADER_BYTES_MAX} bytes, which is all that is read of one");
        Err(Error::bad_data(what).at_byte(self.position))
    }
}

/// What is wrong with the value of a key.
fn of_key(error: &Error, key: &str) -> Error {
    let named = Error::new(error.kind(), format!("key {key:?}: {}", error.what()));
    let named = error.byte().into_iter().fold(named, Error::at_byte);
    error.hint_text().into_iter().fold(named, Error::hint)
}

fn unknown_kind(kind: u32, at: u64) -> Error {
    Error::bad_data(format!("a value of unknown kind {kind}")).at_byte(at)
}

/// What the file says, or 32.
fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64> {
    let Some(said) = metadata.get(ALIGNMENT_KEY) else { return Ok(ALIGNMENT) };
    let sound = |n: &u64| n.is_power_of_two() && (8..=ALIGNMENT_MAX).contains(n);
    let said_so = said.as_u64().filter(|_| matches!(said, Value::U32(_)));
    said_so.filter(sound).ok_or_else(|| {
        Error::bad_data(format!(
            "{ALIGNMENT_KEY} is {said:?}, expected a power of two from 8 to {ALIGNMENT_MAX}"
        ))
    })
}

pub(super) fn align_up(position: u64, alignment: u64) -> Result<u64> {
    position
        .checked_next_multiple_of(alignment)
        .ok_or_else(|| Error::bad_data("the data begins beyond 64 bits"))
}

/// Places in the file. As ggml wants it, each tensor begins at the first multiple of the alignment behind the one before,
/// and the last ends the file, but for what fills it up.
fn place(
    infos: Vec<(TensorInfo, u64, u64)>,
    header_end: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<Vec<(TensorInfo, u64)>> {
    let start = align_up(header_end, alignment)?;
    let mut names = BTreeSet::new();
    let (mut placed, mut expected) = (Vec::new(), 0u64);
    for (info, offset, at) in infos {
        let refuse = |what: String| Err(Error::bad_data(what).in_tensor(&info.name).at_byte(at));
        let bytes = info.bytes().at_byte(at)?;
        let end = offset.checked_add(bytes).filter(|&e| e <= file_bytes.saturating_sub(start));
        let (Some(begin), Some(end)) = (start.checked_add(offset), end) else {
            return refuse(format!(
                "{bytes} bytes from {offset} of the data on, beyond the file of {file_bytes}"
            ));
        };
        if !offset.is_multiple_of(alignment) {
            return refuse(format!("offset {offset}, expected a multiple of {alignment}"));
        }
        if !names.insert(info.name.clone()) {
            return refuse("a second tensor of that name".to_owned());
        }
        if offset != expected {
            let fault = if offset < expected { "inside of another tensor" } else { "behind a hole" };
            return refuse(format!("offset {offset} is {fault}, expected {expected}"));
        }
        expected = align_up(end, alignment)?;
        placed.push((info, begin));
    }
    let end = start.saturating_add(expected);
    if file_bytes > end {
        let what = format!(
            "{} bytes behind the last tensor, which nothing tells of",
            file_bytes.saturating_sub(end)
        );
        return Err(Error::bad_data(what).at_byte(end));
    }
    Ok(placed)
}

#[cfg(test)]
mod tests;
