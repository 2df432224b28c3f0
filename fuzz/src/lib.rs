//! Every reader of moepack against damaged, forged and random files, on stable Rust.
//!
//! A [`targets::Target`] is a reader with the files it starts from; [`mutate`] makes inputs of them; [`run`] hands these to
//! the reader one after the other and looks at what comes of it; [`drive`] does so in a process that may die. An input is
//! told by target, seed and number alone, so that whoever has these three has the input.
//!
//! A reader may refuse, for that is what it is for. It may not panic, take more than a second, or hold more than a gibibyte
//! at once.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests"))]

pub mod corpus;
pub mod drive;
pub mod mutate;
pub mod random;
pub mod run;
pub mod targets;

/// Counts what is allocated, for [`run`].
#[global_allocator]
static MEMORY: peak_alloc::PeakAlloc = peak_alloc::PeakAlloc;
