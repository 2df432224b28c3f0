//! What a run will take: memory, disk and time, known before it begins.

use std::path::Path;

use moepack_convert::Model;
use moepack_convert::spec::Mlp;
use moepack_format::{Error, Kind, Result};
use moepack_verify::tokens::Windows;

use crate::engine::sizes::Sizes;
use crate::size::human;

/// Program, tokenizer and buffers of fixed size.
const BASE_BYTES: u64 = 48 << 20;
/// Headers and catalog, for each tensor.
const BYTES_A_TENSOR: u64 = 400;
/// Results that may wait for their turn, for each thread.
const AHEAD: u64 = 2;
/// Weights that one thread codes in a second, for the estimate of time.
const WEIGHTS_A_SECOND: f64 = 60e6;

/// The memory a run needs, and how it was worked out.
#[derive(Clone, Debug)]
pub struct Budget {
    bytes: u64,
    bundle_bytes: u64,
    seconds: f64,
}

impl Budget {
    /// Of quantizing with these texts on the way.
    pub fn of(
        model: &Model,
        sizes: &Sizes,
        threads: usize,
        calibration: Option<&Windows>,
        evaluation: Option<&Windows>,
    ) -> Budget {
        let spec = model.spec();
        let n_tensors = model.trunk_tensors().len() as u64 + 9 * sizes.n_experts();
        let inter_max = spec
            .layers
            .iter()
            .map(|l| if let Mlp::Moe(moe) = &l.mlp { moe.inter } else { 0 })
            .max()
            .unwrap_or(0);
        let expert_f32 = 3 * 4 * (spec.hidden * inter_max) as u64;
        // A thread holds the released expert, one matrix in f32 and one being coded; finished ones wait coded.
        let mut thread =
            sizes.expert_source_bytes_max + expert_f32 / 3 + sizes.expert_coded_bytes_max * (1 + AHEAD);
        let mut streams = 0;
        let tokens = |w: Option<&Windows>| w.map_or(0, |w| w.tokens.len() as u64);
        let row = 4 * spec.hidden as u64;
        let (calibration, evaluation) = (tokens(calibration), tokens(evaluation));
        if calibration + evaluation > 0 {
            // Streams and their sums, two of each for the evaluation; routing.
            streams = row * 2 * (calibration + 2 * evaluation) + 100 * (calibration + 2 * evaluation);
            // Decoded and packed experts, and their outputs for the share of tokens they get.
            let share = spec
                .layers
                .iter()
                .filter_map(|l| {
                    if let Mlp::Moe(m) = &l.mlp {
                        Some(m.n_experts_used as f64 / m.n_experts as f64)
                    } else {
                        None
                    }
                })
                .fold(0.0, f64::max);
            let outputs = (row * (calibration + 3 * evaluation)) as f64 * share;
            thread += 3 * expert_f32 + (outputs * (1 + AHEAD) as f64) as u64;
            streams += largest_layer(model) * 2;
        }
        let bytes = BASE_BYTES + n_tensors * BYTES_A_TENSOR + threads as u64 * thread + streams;
        let seconds = sizes.expert_weights() as f64 / (WEIGHTS_A_SECOND * threads as f64);
        Budget { bytes, bundle_bytes: sizes.bundle_bytes(), seconds }
    }

    /// Peak memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Time without texts.
    pub fn seconds(&self) -> f64 {
        self.seconds
    }

    /// Refuses a run that cannot stay within `limit`.
    ///
    /// # Errors
    /// Kind `Plan`, with the minimum.
    pub fn check(&self, limit: Option<u64>) -> Result<()> {
        match limit {
            Some(limit) if self.bytes > limit => Err(Error::plan(format!(
                "--memory {} is too little, this run takes about {}",
                human(limit),
                human(self.bytes)
            ))
            .hint("use fewer --threads or a shorter text, or allow more memory")),
            _ => Ok(()),
        }
    }

    /// Refuses a run whose output does not fit the disk.
    ///
    /// # Errors
    /// Kind `Temporary`, with what is needed and what is free.
    pub fn check_space(&self, target: &Path) -> Result<()> {
        let dir = target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Where the system does not tell, the run finds out.
        let Ok(space) = rustix::fs::statvfs(dir) else { return Ok(()) };
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        if free < self.bundle_bytes {
            let what =
                format!("the bundle takes about {}, {} are free", human(self.bundle_bytes), human(free));
            return Err(Error::new(Kind::Temporary, what)
                .in_file(dir)
                .hint("free some space, or write elsewhere"));
        }
        Ok(())
    }
}

/// Bytes in f32 of the largest layer's trunk.
fn largest_layer(model: &Model) -> u64 {
    let mut layers = std::collections::BTreeMap::<Option<usize>, u64>::new();
    for tensor in model.trunk_tensors().iter().filter(|t| !t.is_scale) {
        *layers.entry(tensor.layer).or_default() += 4 * tensor.shape.iter().product::<u64>();
    }
    layers.into_values().max().unwrap_or(0)
}
