//! The strict reader: every count is compared with what is left of the file before anything is allocated.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use moepack_format::error::Context;
use moepack_format::file::InputFile;
use moepack_format::{Error, Result};

use super::value::{self, Value};
use super::*;
use crate::limits::TENSORS_MAX;

/// The header of a file.
#[derive(Debug)]
pub struct Gguf {
    /// Where it was read.
    pub path: PathBuf,
    /// What the file says of itself.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors in the order of the file, each with the place of its first byte in the file.
    pub tensors: Vec<(TensorInfo, u64)>,
}

impl Gguf {
    /// Reads and checks the header; of the data only that it is there.
    ///
    /// # Errors
    /// Anything that version 3 does not allow, names said twice, tensors outside of the file or one in another.
    pub fn open(path: &Path) -> Result<Gguf> {
        let file = InputFile::open(path)?;
        Reader { file: &file, position: 0, buffer: Vec::new(), buffer_start: 0 }.gguf().in_file(path)
    }

    /// The alignment of the data, 32 where nothing is said.
    pub fn alignment(&self) -> u64 {
        self.metadata.get(ALIGNMENT_KEY).and_then(Value::as_u64).unwrap_or(ALIGNMENT)
    }
}

/// Reads on from a position, 64 KiB at a time.
struct Reader<'a> {
    file: &'a InputFile,
    position: u64,
    buffer: Vec<u8>,
    buffer_start: u64,
}

const BUFFER_BYTES: u64 = 1 << 16;

impl Reader<'_> {
    fn gguf(mut self) -> Result<Gguf> {
        let (n_tensors, n_keys) = self.head()?;
        let mut metadata = BTreeMap::new();
        for _ in 0..n_keys {
            let at = self.position;
            let key = self.string(KEY_BYTES_MAX)?;
            let kind = self.u32()?;
            let value = self.value(kind)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(Error::bad_data(format!("key {key:?} is said twice")).at_byte(at));
            }
        }
        let alignment = alignment(&metadata)?;
        let mut infos = Vec::new();
        for _ in 0..n_tensors {
            infos.push(self.tensor()?);
        }
        let start = align_up(self.position, alignment)?;
        let path = self.file.path().to_path_buf();
        let tensors = place(infos, start, alignment, self.file.len())?;
        Ok(Gguf { path, metadata, tensors })
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
        self.check_count("tensors", n_tensors, 33, TENSORS_MAX as u64)?;
        self.check_count("keys", n_keys, 13, KEYS_MAX)?;
        Ok((n_tensors, n_keys))
    }

    fn tensor(&mut self) -> Result<(TensorInfo, u64, u64)> {
        let at = self.position;
        let name = self.string(NAME_BYTES_MAX)?;
        let n_dims = self.u32()?;
        if n_dims == 0 || n_dims > DIMS_MAX {
            let what = format!("{n_dims} dimensions, expected 1 to {DIMS_MAX}");
            return Err(Error::bad_data(what).in_tensor(name).at_byte(at));
        }
        let dims = (0..n_dims).map(|_| self.u64()).collect::<Result<Vec<_>>>()?;
        let id = self.u32()?;
        let Some(kind) = Type::with_id(id) else {
            return Err(Error::bad_data(format!("unknown type {id}")).in_tensor(name).at_byte(at));
        };
        Ok((TensorInfo { name, dims, kind }, self.u64()?, at))
    }

    fn value(&mut self, kind: u32) -> Result<Value> {
        if kind != value::ARRAY {
            return self.scalar(kind);
        }
        let at = self.position;
        let (kind, n) = (self.u32()?, self.u64()?);
        if kind == value::ARRAY {
            return Err(Error::bad_data("an array of arrays").at_byte(at));
        }
        let bytes_min = value::bytes_min(kind).ok_or_else(|| unknown_kind(kind, at))?;
        self.check_count("elements", n, bytes_min, ARRAY_MAX)?;
        let mut values = Vec::new();
        for _ in 0..n {
            values.push(self.scalar(kind)?);
        }
        Ok(Value::Array(kind, values))
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
        let mut bytes = vec![0; n as usize];
        self.file.read_exact_at(self.position, &mut bytes)?;
        self.position += n;
        String::from_utf8(bytes).map_err(|_| Error::bad_data("a string that is not UTF-8").at_byte(at))
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
        let buffered = |r: &Self| {
            let from = usize::try_from(r.position.checked_sub(r.buffer_start)?).ok()?;
            r.buffer.get(from..)?.first_chunk::<N>().copied()
        };
        let bytes = match buffered(self) {
            Some(bytes) => bytes,
            None => {
                let left = self.file.len().saturating_sub(self.position);
                if left < N as u64 {
                    let what = format!("the file ends where {N} bytes are expected");
                    return Err(Error::bad_data(what).at_byte(self.position));
                }
                self.buffer.resize(left.min(BUFFER_BYTES) as usize, 0);
                self.buffer_start = self.position;
                self.file.read_exact_at(self.position, &mut self.buffer)?;
                buffered(self).unwrap_or([0; N])
            }
        };
        self.position += N as u64;
        Ok(bytes)
    }
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

/// Places in the file, after each tensor is compared with the file, the alignment and all others.
fn place(
    infos: Vec<(TensorInfo, u64, u64)>,
    start: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<Vec<(TensorInfo, u64)>> {
    let mut names = BTreeSet::new();
    let mut extents = Vec::new();
    let mut placed = Vec::new();
    for (info, offset, at) in infos {
        let refuse = |what: String| Err(Error::bad_data(what).in_tensor(&info.name).at_byte(at));
        let bytes = info.bytes().map_err(|e| e.at_byte(at))?;
        let begin = start.checked_add(offset);
        let end = begin.and_then(|b| b.checked_add(bytes));
        let (Some(begin), Some(end)) = (begin, end.filter(|&e| e <= file_bytes)) else {
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
        extents.push((begin, end, at));
        placed.push((info, begin));
    }
    extents.sort_unstable();
    let overlap = extents.windows(2).find_map(|w| match w {
        [a, b] if b.0 < a.1 => Some(b),
        _ => None,
    });
    match overlap {
        Some((begin, _, at)) => {
            Err(Error::bad_data(format!("a tensor begins at {begin}, inside of another")).at_byte(*at))
        }
        None => Ok(placed),
    }
}

#[cfg(test)]
mod tests;
