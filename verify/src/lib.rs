//! Reference forward pass and drift metrics.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests"))]

pub mod baseline;
pub mod drift;
pub mod forward;
pub mod gates;
pub mod report;
pub mod text;
pub mod tokens;
