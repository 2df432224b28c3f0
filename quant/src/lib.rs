//! Codecs, solvers and matrix kernels. Matrices, no files.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests"))]

pub mod codec;
pub mod gemm;
pub mod isa;
pub mod math;

pub use codec::{Codec, CodecRef, Matrix, Planes};
pub use isa::Isa;
