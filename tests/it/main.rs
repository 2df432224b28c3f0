//! End-to-end tests: each runs the `moepack` binary on small checkpoints and looks at exit code, streams and
//! files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod budgets;
mod calibrated;
mod cli;
mod cluster;
mod convert;
mod determinism;
mod drift;
mod encodings;
mod environment;
mod faults;
mod gguf;
mod goldens;
mod hostile;
mod imatrix;
mod inspect;
mod integrity;
mod many_experts;
mod paging;
mod released;
mod repair;
mod resume;
mod strangers;
mod support;
mod tidy;
mod trunk;
