//! What a run will come to, said before it begins: size, memory, time and drift.
//!
//! Size follows from shapes, memory from [`Budget`]. Time and drift are measured on a small sample of the model itself
//! with the codecs of the recipe, on this machine, and scaled up:
//!
//! ```text
//! time   = weights × (seconds to code one)                                         experts or matrices on trial
//!        + layers × (seconds to read and pack) + tokens × (seconds to push one)    the first layer with experts
//! KLD    = that of a stream in which all experts lose what those on trial lost     with a calibration text
//!        = floor + c · relative squared error of matrices on trial                 without, c a stated default
//! ```
//!
//! Experts are tried before a budget is shared out, at one rate for all; what sharing it out gains follows from sensitivities.
//! What a coded trunk loses is added.

use std::time::Instant;

use moepack_convert::{Model, Part};
use moepack_format::Result;
use moepack_quant::rates::relative_error;
use moepack_quant::{CodecRef, Isa, Matrix};
use moepack_verify::drift::SquareSums;
use moepack_verify::forward::{LayerWeights, MoePass, embed};
use moepack_verify::tokens::Windows;
use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::engine::budget::Budget;
use crate::engine::sensitivity::{FirstPass, Sensitivity, sample};
use crate::engine::sizes::Sizes;
use crate::engine::trial::timed;
use crate::memory::peak_rss_bytes;
use crate::recipe::{Choice, Choices, MATRICES, moe_layers};
use crate::session::Session;

/// KLD per relative squared error of all experts where it was not measured: the median of published models of 35 to 400
/// billion weights is about 4.
pub const KLD_PER_ERROR: f64 = 4.0;
/// KLD that is left when experts are nearly exact, where nothing was measured. What was measured needs none: everything
/// but the experts is as in the checkpoint.
pub const KLD_FLOOR: f64 = 1e-4;

/// Weights of a matrix that are tried.
const SAMPLE_WEIGHTS: usize = 1 << 19;
/// Layers that are tried.
const SAMPLE_LAYERS: usize = 6;
/// Tokens that are pushed through a layer on trial.
const SAMPLE_TOKENS: usize = 1024;
/// Experts that are tried.
const SAMPLE_EXPERTS: usize = 4;
/// Seconds to make a file durable.
const FILE_SECONDS: f64 = 0.004;

/// What is expected of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Every byte of the bundle.
    pub bundle_bytes: u64,
    /// Peak resident set.
    pub peak_rss_bytes: u64,
    /// From start to end.
    pub seconds: f64,
    /// Mean KLD on other text, nats.
    pub kld_mean: f64,
    /// Where the KLD's factor comes from: `measured` on the calibration text, or `default`.
    pub kld_basis: &'static str,
}

/// What is to be predicted.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// The checkpoint.
    pub model: &'a Model,
    /// Codec of each matrix.
    pub choices: &'a Choices,
    /// Bytes of everything.
    pub sizes: &'a Sizes,
    /// What was measured of the model.
    pub first: Option<&'a FirstPass>,
    /// Text to calibrate on.
    pub calibration: Option<&'a Windows>,
    /// Text to measure drift on.
    pub evaluation: Option<&'a Windows>,
    /// When the program began.
    pub started: Instant,
}

/// Predicts a run.
///
/// # Errors
/// Weights that cannot be read or coded.
pub fn predict(session: &Session, plan: Plan<'_>, budget: &Budget) -> Result<Prediction> {
    let trials = match plan.first {
        Some(first) => known_trials(&plan, first)?,
        None => session.in_pool(|| trials(&plan))?,
    };
    let coded_weights = plan.sizes.expert_weights() + plan.sizes.trunk_learning.n_weights;
    let coding = trials.seconds_a_weight * coded_weights as f64 / session.threads as f64;
    let texts = text_seconds(&plan, session.threads)?;
    let files = FILE_SECONDS * (plan.sizes.layers.len() + 8) as f64 + hash_seconds(&plan, session.threads);
    let measuring =
        plan.first.map_or(0, |first| Budget::of_bytes(first.stream_bytes(plan.model)).likely_bytes());
    // What was tried on the way here has taken its memory already.
    let peak_so_far = peak_rss_bytes().unwrap_or(0);
    Ok(Prediction {
        bundle_bytes: plan.sizes.bundle_bytes(),
        peak_rss_bytes: budget.likely_bytes().max(measuring).max(peak_so_far),
        seconds: plan.started.elapsed().as_secs_f64() + coding + texts + files,
        kld_mean: trials.kld,
        kld_basis: if plan.first.is_some() { "measured" } else { "default" },
    })
}

/// What coding on trial showed.
struct Trials {
    /// Of one thread.
    seconds_a_weight: f64,
    /// Mean KLD.
    kld: f64,
}

/// What the first pass showed.
fn known_trials(plan: &Plan<'_>, first: &FirstPass) -> Result<Trials> {
    let seconds: f64 = first.trials.iter().map(|t| t.coding_seconds).sum();
    let n_weights: usize = first.trials.iter().map(|t| t.n_weights).sum();
    let seconds_a_weight = if n_weights > 0 { seconds / n_weights as f64 } else { 0.0 };
    let experts = first.expert_kld() * allocated_share(plan, first.sensitivity.as_ref())?;
    Ok(Trials { seconds_a_weight, kld: experts + first.trunk_kld.unwrap_or(0.0) })
}

/// What is left of the KLD of one rate for all where rates follow sensitivities.
fn allocated_share(plan: &Plan<'_>, sensitivity: Option<&Sensitivity>) -> Result<f64> {
    let Some(sensitivity) = sensitivity else { return Ok(1.0) };
    let (mut allocated, mut alike) = (0.0, 0.0);
    for (layer, n_experts) in moe_layers(plan.model.spec()) {
        for part in MATRICES {
            for expert in 0..n_experts {
                let Some((bits, _)) = bits_of(plan, layer, expert, part)? else { continue };
                let worth = sensitivity.of_part(layer, part) * sensitivity.share(layer, expert..expert + 1);
                allocated += worth * relative_error(bits);
                alike += worth * relative_error(plan.sizes.bits_each());
            }
        }
    }
    Ok(if alike > 0.0 { allocated / alike } else { 1.0 })
}

/// One matrix that was coded.
struct Trial {
    layer: usize,
    part: Part,
    /// Measured over expected relative error.
    excess: f64,
    seconds: f64,
    n_weights: usize,
}

/// What the codecs do to a few matrices, where there is no text.
fn trials(plan: &Plan<'_>) -> Result<Trials> {
    let layers = moe_layers(plan.model.spec());
    let n = layers.len().min(SAMPLE_LAYERS);
    let tried: Vec<(usize, usize)> =
        (0..n).filter_map(|i| layers.get(i * layers.len() / n).copied()).collect();
    let places: Vec<_> =
        tried.iter().flat_map(|&(l, n)| MATRICES.map(|part| (l, l % n.max(1), part))).collect();
    let trials =
        places.into_par_iter().map(|(l, e, part)| trial(plan, l, e, part)).collect::<Result<Vec<_>>>()?;
    let (seconds, n_weights) = trials.iter().fold((0.0, 0), |(s, n), t| (s + t.seconds, n + t.n_weights));
    let weights = plan.sizes.expert_weights().max(1) as f64;
    // What is kept bit for bit does not drift.
    let is_kept = n_weights == 0 && matches!(plan.choices.trunk(), Choice::Native);
    let mut kld = if is_kept { 0.0 } else { KLD_FLOOR };
    for &(layer, n_experts) in &layers {
        for part in MATRICES {
            let near = trials.iter().filter(|t| t.part == part).min_by_key(|t| t.layer.abs_diff(layer));
            let excess = near.map_or(1.0, |t| t.excess);
            for expert in 0..n_experts {
                let Some((bits, n)) = bits_of(plan, layer, expert, part)? else { continue };
                kld += KLD_PER_ERROR * n as f64 / weights * excess * relative_error(bits);
            }
        }
    }
    Ok(Trials { seconds_a_weight: seconds / n_weights.max(1) as f64, kld })
}

/// Bits a weight and weights of a matrix that is quantized.
fn bits_of(plan: &Plan<'_>, layer: usize, expert: usize, part: Part) -> Result<Option<(f64, usize)>> {
    let Choice::Codec(codec) = plan.choices.of_part(layer, expert, part)? else { return Ok(None) };
    let parts = plan.model.expert_parts(layer, expert)?;
    let Some(stored) = parts.iter().find(|p| p.part == part) else { return Ok(None) };
    Ok(Some((codec.bits_per_weight(stored.rows, stored.cols)?, stored.rows * stored.cols)))
}

fn trial(plan: &Plan<'_>, layer: usize, expert: usize, part: Part) -> Result<Trial> {
    let (isa, nothing) = (Isa::get(), Trial { layer, part, excess: 0.0, seconds: 0.0, n_weights: 0 });
    let Choice::Codec(codec) = plan.choices.of_part(layer, expert, part)? else { return Ok(nothing) };
    let Some((cols, w, decoded)) = trial_weights(plan, layer, expert, part)? else { return Ok(nothing) };
    let rows = w.len() / cols.max(1);
    let sample = Matrix { rows, cols, data: &w };
    let started = Instant::now();
    let sums = coded(isa, codec, sample)?;
    let n_weights = sample.data.len();
    let seconds = started.elapsed().as_secs_f64() + decoded * n_weights as f64;
    let expected = relative_error(codec.bits_per_weight(rows, cols)?);
    Ok(Trial { excess: sums.relative() / expected, seconds, n_weights, ..nothing })
}

/// Columns, the rows that are tried, and the seconds that a weight took to decode.
type TrialWeights = (usize, Vec<f32>, f64);

/// The first rows of a matrix; where no weights are there, as many normal numbers.
fn trial_weights(plan: &Plan<'_>, layer: usize, expert: usize, part: Part) -> Result<Option<TrialWeights>> {
    let rows_tried = |rows: usize, cols: usize| (SAMPLE_WEIGHTS / cols.max(1)).clamp(1, rows.max(1));
    if plan.model.is_names_alone() {
        let parts = plan.model.expert_parts(layer, expert)?;
        let stored = parts.iter().find(|p| p.part == part);
        return Ok(stored.map(|s| (s.cols, normal(rows_tried(s.rows, s.cols) * s.cols), 0.0)));
    }
    let source = plan.model.expert(layer, expert)?;
    let Some(stored) = source.part(part) else { return Ok(None) };
    let started = Instant::now();
    let mut w = stored.decode(Isa::get())?;
    let decoded = started.elapsed().as_secs_f64() / w.len().max(1) as f64;
    w.truncate(rows_tried(stored.rows, stored.cols) * stored.cols);
    Ok(Some((stored.cols, w, decoded)))
}

/// Nearly N(0, 1): sums of four uniform numbers of a linear congruence.
pub(crate) fn normal(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    };
    (0..n).map(|_| (uniform() + uniform() + uniform() + uniform()) * 1.732).collect()
}

/// Codes a matrix and compares, as the engine does.
fn coded(isa: Isa, codec: &CodecRef, w: Matrix<'_>) -> Result<SquareSums> {
    let planes = codec.encode(isa, w, None)?;
    let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
    let mut decoded = vec![0.0; w.data.len()];
    codec.decode(isa, &planes, w.rows, w.cols, 0, &mut decoded)?;
    Ok(SquareSums::of(isa, w.data, &decoded))
}

/// Reading and hashing: the sources beside the work, the bundle's files once written.
fn hash_seconds(plan: &Plan<'_>, threads: usize) -> f64 {
    const TRIED_BYTES: usize = 8 << 20;
    let bytes = vec![1_u8; TRIED_BYTES];
    let started = Instant::now();
    let digest = Sha256::digest(&bytes);
    let each = started.elapsed().as_secs_f64() / TRIED_BYTES as f64 + f64::from(digest.is_empty());
    each * (plan.sizes.source_bytes as f64 / threads as f64 + plan.sizes.bundle_bytes() as f64)
}

/// Pushing the texts through the model.
fn text_seconds(plan: &Plan<'_>, threads: usize) -> Result<f64> {
    let Some(text) = plan.calibration.or(plan.evaluation) else { return Ok(0.0) };
    let Some(layer) = LayerTrial::run(plan, &sample(text, SAMPLE_TOKENS))? else { return Ok(0.0) };
    let spec = plan.model.spec();
    let (n_layers, threads) = (spec.layers.len() as f64, threads as f64);
    let n_tokens = |text: Option<&Windows>| text.map_or(0.0, |w| w.tokens.len() as f64);
    let (calibration, evaluation) = (n_tokens(plan.calibration), n_tokens(plan.evaluation));
    // The evaluation is two streams whose experts run three times; coded experts are packed too.
    let n_packed = if plan.evaluation.is_some() { 2.0 } else { 1.0 };
    let fixed = layer.load + layer.pack * n_packed / threads;
    let learning = learning_seconds(plan).unwrap_or(layer.experts);
    let of_trunk = plan.calibration.map_or(0.0, |text| plan.sizes.trunk_learning.n_tokens(text) as f64);
    let pushed = (calibration + 2.0 * evaluation) * layer.trunk
        + of_trunk * (layer.trunk + layer.experts)
        + calibration * learning
        + 3.0 * evaluation * layer.experts;
    let head = 2.0 * evaluation * spec.vocab as f64 * spec.hidden as f64 * layer.seconds_a_product;
    Ok(n_layers * (fixed + pushed / threads) + head / threads)
}

/// Seconds that one thread takes to run a token through its experts and to learn from it, where that was tried.
fn learning_seconds(plan: &Plan<'_>) -> Option<f64> {
    let first = plan.first?;
    let (_, moe) = plan.model.spec().moe_layers().next()?;
    let seconds: f64 = first.trials.iter().map(|t| t.learning_seconds).sum();
    let n_tokens: usize = first.trials.iter().map(|t| t.n_tokens).sum();
    (n_tokens > 0).then(|| seconds / n_tokens as f64 * moe.n_experts_used as f64)
}

/// Seconds that one thread takes for a layer.
struct LayerTrial {
    load: f64,
    /// All experts.
    pack: f64,
    /// A token's attention, norms, router and shared experts.
    trunk: f64,
    /// A token's routed experts.
    experts: f64,
    /// One multiplication and addition of a matrix product.
    seconds_a_product: f64,
}

impl LayerTrial {
    /// Tries the first layer with experts; `None` if there is none.
    fn run(plan: &Plan<'_>, text: &Windows) -> Result<Option<LayerTrial>> {
        let isa = Isa::get();
        let Some((l, moe)) = plan.model.spec().moe_layers().next() else { return Ok(None) };
        let mut stream = embed(plan.model, text)?;
        let n_tokens = text.tokens.len().max(1) as f64;
        let (load, weights) = timed(|| LayerWeights::load(isa, plan.model, l))?;
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        let one =
            one.map_err(|e| moepack_format::Error::new(moepack_format::Kind::Temporary, e.to_string()))?;
        one.install(|| {
            let (attention, ()) = timed(|| weights.attention(text, &mut stream))?;
            let (routing, pass) = timed(|| MoePass::begin(&weights, &text.tokens, &stream))?;
            let (mut pack, mut experts, mut assigned) = (0.0, 0.0, 0);
            let n_tried = moe.n_experts.min(SAMPLE_EXPERTS);
            for e in 0..n_tried {
                let (seconds, mlp) = timed(|| weights.pack_expert(&plan.model.expert(l, e)?.decode(isa)?))?;
                pack += seconds;
                experts += timed(|| pass.run_expert(e, &mlp, None))?.0;
                assigned += pass.routing().tokens_of(e).len();
            }
            let each = experts / assigned.max(1) as f64;
            let shared = moe.shared.map_or(0.0, |s| s.inter as f64 / moe.inter.max(1) as f64);
            Ok(Some(LayerTrial {
                load,
                pack: pack * moe.n_experts as f64 / n_tried.max(1) as f64,
                trunk: (attention + routing) / n_tokens + each * shared,
                experts: each * moe.n_experts_used as f64,
                seconds_a_product: each / moe.weights_each(plan.model.spec().hidden).max(1) as f64,
            }))
        })
    }
}
