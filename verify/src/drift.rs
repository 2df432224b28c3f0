//! Drift: what a bundle computes differently from its checkpoint, as numbers.
//!
//! [`logits`] compares predictions (KL divergence, top-1 agreement, perplexity), [`stream`] the residual stream of
//! each layer, [`routing`] the experts that were chosen, [`experts`] the outputs of each expert. Each is an
//! accumulator that the engine feeds; sums are in f64 and in a fixed order, so results depend neither on threads nor
//! on the instruction set. [`intervals`] says how far the figures carry beyond the text they were measured on.

pub mod experts;
pub mod intervals;
pub mod logits;
pub mod routing;
pub(crate) mod rows;
pub mod stream;

pub use experts::{ExpertDrift, ExpertError};
pub use intervals::{Estimate, Unit};
pub use logits::{LogitDrift, LogitSummary, Position, TailBound, WindowDrift};
pub use routing::RoutingOverlap;
pub use stream::{LayerDrift, SquareSums};
