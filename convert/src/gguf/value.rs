//! Values of the keys of a GGUF file.

/// A value. An array holds values of one kind, never arrays.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the names are the types")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    /// Kind of the elements, then the elements.
    Array(u32, Vec<Value>),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// Number of the kind "string".
pub const STRING: u32 = 8;
/// Number of the kind "array".
pub const ARRAY: u32 = 9;
/// Number of the kind "i32".
pub const I32: u32 = 5;
/// Number of the kind "f32".
pub const F32: u32 = 6;

/// The name of a kind, as ggml writes it; `None` for a kind that does not exist.
pub fn kind_name(kind: u32) -> Option<&'static str> {
    const NAMES: [&str; 13] =
        ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64"];
    NAMES.get(kind as usize).copied()
}

/// Fewest bytes that a value of a kind takes; `None` for a kind that does not exist.
pub(super) fn bytes_min(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        STRING | 10..=12 => Some(8),
        ARRAY => Some(12),
        _ => None,
    }
}

impl Value {
    /// Number of its kind in files.
    pub fn kind(&self) -> u32 {
        match self {
            Value::U8(_) => 0,
            Value::I8(_) => 1,
            Value::U16(_) => 2,
            Value::I16(_) => 3,
            Value::U32(_) => 4,
            Value::I32(_) => I32,
            Value::F32(_) => F32,
            Value::Bool(_) => 7,
            Value::String(_) => STRING,
            Value::Array(..) => ARRAY,
            Value::U64(_) => 10,
            Value::I64(_) => 11,
            Value::F64(_) => 12,
        }
    }

    /// The number, if it is an unsigned one of any width.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::U64(v) => Some(v),
            _ => None,
        }
    }

    /// The text, if it is a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// An array of strings.
    pub fn strings(texts: impl IntoIterator<Item = String>) -> Value {
        Value::Array(STRING, texts.into_iter().map(Value::String).collect())
    }

    /// Writes the value as it lies in files, its kind not included.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        match self {
            Value::U8(v) => out.push(*v),
            Value::I8(v) => out.extend(v.to_le_bytes()),
            Value::U16(v) => out.extend(v.to_le_bytes()),
            Value::I16(v) => out.extend(v.to_le_bytes()),
            Value::U32(v) => out.extend(v.to_le_bytes()),
            Value::I32(v) => out.extend(v.to_le_bytes()),
            Value::F32(v) => out.extend(v.to_le_bytes()),
            Value::Bool(v) => out.push(u8::from(*v)),
            Value::String(text) => write_string(text, out),
            Value::Array(kind, values) => {
                out.extend(kind.to_le_bytes());
                out.extend((values.len() as u64).to_le_bytes());
                values.iter().for_each(|v| v.write(out));
            }
            Value::U64(v) => out.extend(v.to_le_bytes()),
            Value::I64(v) => out.extend(v.to_le_bytes()),
            Value::F64(v) => out.extend(v.to_le_bytes()),
        }
    }
}

pub(super) fn write_string(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
