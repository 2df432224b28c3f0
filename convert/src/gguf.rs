//! GGUF version 3: what a file of llama.cpp says about itself, read strictly and written in one pass.
//!
//! ```text
//!  "GGUF" | version u32 | n_tensors u64 | n_keys u64 | keys | tensor infos | zeros up to alignment | data
//!
//!  key          name: string, type u32, value           string: bytes u64, UTF-8
//!  tensor info  name: string, n_dims u32, dims u64 × n_dims, type u32, offset u64 from the beginning of the data
//! ```
//!
//! Numbers are little-endian; the first dimension is the one whose numbers lie side by side. Source: `docs/gguf.md` of
//! ggml. `arch.rs`, `tensors.rs` and `vocabulary.rs` say what a model becomes in such a file; nothing else here knows a model.
//! Its bytes are made by `write/gguf.rs`, like those of every other export.

pub mod arch;
pub(crate) mod codes;
pub mod file;
mod pretokenizer;
pub mod read;
mod sentencepiece;
pub mod set;
pub(crate) mod tensors;
pub mod types;
pub mod value;
pub(crate) mod vocabulary;
pub(crate) mod write;

pub use read::Gguf;
pub use types::{TYPES, Type};
pub use value::Value;

/// First bytes of a file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is read and written.
pub const VERSION: u32 = 3;
/// Where data begins, and every tensor in it, unless the key [`ALIGNMENT_KEY`] says otherwise.
pub const ALIGNMENT: u64 = 32;
/// The key that says otherwise.
pub const ALIGNMENT_KEY: &str = "general.alignment";

/// Largest alignment that is believed; published files have 32.
const ALIGNMENT_MAX: u64 = 1 << 20;
/// Bytes of all that comes before the data; the largest vocabularies make 20 MB. With the two caps below it bounds the
/// memory that reading takes.
const HEADER_BYTES_MAX: u64 = 64 << 20;
/// Tensors of a file; published ones, in which the experts of a layer are one, have under 3000.
const TENSORS_MAX: u64 = 1 << 16;
/// Elements of all arrays together that are kept in memory; an [outline](Gguf::outline) keeps few of each.
const ELEMENTS_MAX: u64 = 1 << 21;
/// Bytes of a key; the format's own limit.
const KEY_BYTES_MAX: u64 = 65_535;
/// Bytes of a string value; chat templates stay under 100 kB.
const STRING_BYTES_MAX: u64 = 16 << 20;
/// Elements of an array; vocabularies have some 260 k tokens and 450 k merges.
const ARRAY_MAX: u64 = 1 << 26;
/// Elements of each array that an outline keeps.
const OUTLINE_ELEMENTS: usize = 8;
/// Keys of a file; published ones have under 100.
const KEYS_MAX: u64 = 1 << 16;
/// Bytes of a tensor's name; ggml has room for 64 with the zero at the end.
const NAME_BYTES_MAX: u64 = 63;
/// Dimensions of a tensor in ggml.
const DIMS_MAX: u32 = 4;

/// What a file says of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Sizes, the one whose numbers lie side by side first.
    pub dims: Vec<u64>,
    /// How numbers are stored.
    pub kind: &'static Type,
}

impl TensorInfo {
    /// Bytes of its data.
    ///
    /// # Errors
    /// Rows that are no whole blocks, a dimension of 0, more than 64 bits can count.
    pub fn bytes(&self) -> moepack_format::Result<u64> {
        self.kind.bytes(&self.dims).map_err(|e| e.in_tensor(&self.name))
    }
}
