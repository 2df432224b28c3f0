//! The layer-major engine and the commands: the only crate that prints, and the only one that exits.
//!
//! `commands` is the table of what a user can say; `engine` is the one pass over a model that calibrates, quantizes
//! and measures; the rest is what commands share.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests"))]

pub mod cli;
pub mod cluster;
pub mod commands;
pub mod engine;
pub mod memory;
pub mod output;
pub mod progress;
pub mod recipe;
pub mod session;
pub mod size;
pub mod stop;
pub mod text;
