//! Codecs, solvers and matrix kernels. Matrices, no files.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests"))]

pub mod allocate;
pub mod bits;
pub mod codec;
pub mod gemm;
pub mod hessian;
pub mod isa;
mod linalg;
pub mod math;
pub mod minifloat;
pub mod numbers;
pub mod rates;
pub mod solve;
pub mod stats;

pub use codec::{Codec, CodecRef, ColumnCoder, ColumnPlan, Matrix, Planes, codec};
pub use hessian::Hessian;
pub use isa::Isa;
pub use solve::{Inputs, Solver, solver};
pub use stats::{ColumnStats, ColumnSums};

/// The example in the manual is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
