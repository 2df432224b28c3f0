//! The engine: one pass over a model, layer by layer.
//!
//! A layer's weights are read once. Every token of every text on the way is pushed through the layer, its experts are
//! coded, and the next layer is read. So one pass over a checkpoint of any size calibrates, quantizes and measures, with
//! memory for a few experts in work plus the activations.
//!
//! ```text
//! for each layer
//!     each text:        attention                                     (pair, calibration)
//!     for each expert, on any thread:
//!         read, decode
//!         calibration text:  run, collect the second moments of what goes in
//!         solver:            decode → levels and scales               (coder)
//!         evaluation text:   run with reference and coded weights     (pair)
//!     in expert order:  record into the bank, outputs into the streams
//! ```

pub mod against;
pub mod allocation;
pub mod baseline;
pub mod budget;
pub mod calibrate;
pub mod calibration;
pub mod coder;
pub mod coding;
pub mod coverage;
pub mod evidence;
pub mod experts;
pub mod export;
pub mod hash;
pub mod heldout;
pub mod noise;
pub mod pair;
pub mod parts;
pub mod prediction;
pub mod quantize;
pub mod repair;
pub mod sensitivity;
pub mod sizes;
pub mod space;
pub mod stats;
pub mod stored;
pub mod trial;
pub mod trunk;
pub mod verify;
pub mod workspace;
pub mod writer;
