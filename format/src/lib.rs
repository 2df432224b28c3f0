//! The container: banks of experts, records, index, checksums, pager. Bytes, no mathematics.
//!
//! `SPEC.md` beside this crate describes the bundle byte by byte. This crate does not know what a codec
//! means: here a codec is a name, and a part of an expert is a list of planes with a dtype and a shape.
// Tests may unwrap: a panic there is a failed test.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests"))]
#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::arithmetic_side_effects))]
#![forbid(unsafe_code)]

pub mod aligned;
pub mod atomic;
pub mod bank;
pub mod bundle;
pub mod check;
pub mod contain;
pub mod dtype;
pub mod error;
pub mod file;
mod handles;
pub mod index;
pub mod layout;
pub mod limits;
pub mod manifest;
pub mod pager;
pub mod safetensors;
pub mod salvage;
#[cfg(test)]
mod spec;
pub mod storage;
#[cfg(test)]
mod testing;
pub mod trunk;

pub use aligned::AlignedBuf;
pub use atomic::AtomicFile;
pub use bank::{
    ALIGN_DEFAULT, Bank, BankSummary, BankWriter, PartBytes, PartInfo, PartSpec, PartView, PlaneInfo,
    ReadOptions, Record,
};
pub use bundle::Bundle;
pub use check::{CheckLevel, CheckOptions, Damage};
pub use dtype::Dtype;
pub use error::{Context, Error, Kind, Result};
pub use file::{Fingerprint, InputFile};
pub use index::RecordEntry;
pub use layout::{TENSOR_ALIGN, is_pad};
pub use manifest::Manifest;
pub use pager::{Pager, PagerOptions, PagerStats};
pub use safetensors::{Header, TensorInfo};
pub use trunk::{FileSummary, TrunkFile, TrunkWriter, trunk_name};

/// One array inside a coded matrix: `codes`, `scales` … Stored as one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaneSpec {
    /// Name inside its matrix, a codec's own word.
    pub name: String,
    /// Element type as a stock safetensors reader sees it.
    pub dtype: Dtype,
    /// Shape as a stock safetensors reader sees it.
    pub shape: Vec<u64>,
}

impl PlaneSpec {
    /// A plane.
    pub fn new(name: &str, dtype: Dtype, shape: &[u64]) -> Self {
        PlaneSpec { name: name.to_owned(), dtype, shape: shape.to_vec() }
    }

    /// Bytes of the plane.
    ///
    /// # Errors
    /// A size that does not fit 64 bits.
    pub fn bytes(&self) -> Result<u64> {
        self.dtype.bytes(&self.shape)
    }
}
