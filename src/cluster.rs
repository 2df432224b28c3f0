//! The same work on more than one machine: a plan cut into shards, workers that do them, a merge that writes the manifest.
//!
//! ```text
//! PLAN/plan.json        what is to be done, and its id: a hash over all that decides the bytes
//! PLAN/tokens.json      the calibration text as token windows; or stats.bin, a copy of the stats
//! PLAN/activations/     the text's residual stream at the entry of each layer with experts, by unit of windows
//! PLAN/attempts/        what workers are writing, a directory for each attempt
//! PLAN/parts/           banks of some experts of a layer, until the last of them puts the whole bank together
//! PLAN/reports/         what is known of each finished piece, for the manifest
//! PLAN/status/          heartbeats
//! PLAN/bundle.partial/  the bundle in the making
//! ```
//!
//! Nothing holds a lock. A worker writes under a name of its own and gives the finished file its final name only if nobody
//! did before; whoever comes second compares. So shards may run in any order, several at once, twice, or again.

pub mod activations;
pub mod assemble;
pub mod beat;
pub mod claim;
pub mod environment;
pub mod folder;
pub mod make;
pub mod merge;
pub mod nodes;
pub mod plan;
pub mod publish;
pub mod rates;
pub mod reports;
pub mod source;
pub mod split;
pub mod status;
pub mod submit;
pub mod who;
pub mod worker;
