//! Foreign layouts in and out. A family is a declarative description, a table entry, not a copy of code.
//!
//! Reading goes from bytes to meaning: `checkpoint` opens and checks the files, `hparams` and `describe` turn
//! config.json into a [`ModelSpec`], `catalog` claims every tensor by the rules of the `family`, and
//! [`Model`] hands out trunk and experts. Nothing here computes with weights beyond decoding them.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests"))]
#![forbid(unsafe_code)]

pub mod catalog;
pub mod checkpoint;
pub mod coded;
pub mod describe;
pub mod dims;
pub mod encoding;
pub mod family;
pub mod gguf;
pub mod hparams;
pub mod imatrix;
mod json;
pub mod layout;
pub mod limits;
mod listing;
pub mod model;
mod names;
mod packing;
pub mod rope;
pub mod spec;
pub mod tensor;
#[cfg(test)]
mod testing;
pub mod write;

pub use catalog::{Catalog, TrunkTensor};
pub use checkpoint::{Checkpoint, SideFile, SourceFile};
pub use coded::{CodedExpert, CodedPart, Origin};
pub use family::{FAMILIES, Family};
pub use model::{FiniteCheck, Model, OpenOptions, StoredPart};
pub use spec::{ModelSpec, Part, Role};
pub use tensor::{Expert, Tensor};
