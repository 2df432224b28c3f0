//! Foreign layouts in and out. A family is a declarative description, a table entry, not a copy of code.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests"))]

pub mod spec;
pub mod tensor;
