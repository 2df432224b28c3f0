//! End-to-end tests: each runs the `moepack` binary on small checkpoints and looks at exit code, streams and files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod determinism;
mod drift;
mod goldens;
mod hostile;
mod integrity;
mod resume;
mod support;
