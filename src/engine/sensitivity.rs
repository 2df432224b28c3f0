//! What a model is sensitive to: how much its predictions drift when one projection of one layer loses precision.
//!
//! A quantizer's error is much like white noise. So noise of a known relative squared error is added to one projection of
//! one layer at a time, and the KLD against the undisturbed model is measured on a sample of the calibration text:
//! `c = KLD / relative error`, for KLD grows in proportion to the error (and adds up over projections) as long as it is
//! small. All disturbed streams travel side by side, so that one pass over the checkpoint is enough:
//!
//! ```text
//! for each layer
//!     all streams: attention
//!     at a layer with experts, three streams branch off the undisturbed one: gate, up, down
//!     for each expert: once as it is over all earlier streams, three times with noise over the new ones
//! head: KLD of each stream against the undisturbed one
//! ```
//!
//! What a run will lose is measured on the same way: one more stream, `joint`, branches off at the first layer with experts
//! and is disturbed in all matrices of all layers, by as much as a few experts lost that were coded on trial
//! ([`Trial`]). Its KLD is what the run's is expected to be.
//!
//! What a coded trunk loses is measured by one more stream, which goes through the trunk as rounding to nearest leaves it and
//! through undisturbed experts.
//!
//! Models of many layers are measured in bands of layers that follow each other, so that the number of streams is bounded.
//! How the sensitivity of a projection is shared among experts follows from what they contribute: the energy of their
//! outputs times the squared routing weight.

use std::ops::Range;

use moepack_convert::Model;
use moepack_convert::spec::Part;
use moepack_format::Result;
use moepack_quant::rates::relative_error;
use moepack_verify::forward::LayerWeights;
use moepack_verify::tokens::Windows;

use crate::engine::budget::stream_bytes;
use crate::engine::coder::Coder;
use crate::engine::trial::Trial;
use crate::engine::trunk::rounded::Rounded;
use crate::recipe::{Choice, MATRICES, moe_layers};
use crate::session::Session;

mod streams;

use streams::{Energy, Klds, Run};

/// Relative squared error of the noise: that of about 3.3 bits a weight.
const NOISE: f64 = 1e-2;
/// KLD of coded experts over that of white noise which spoils outputs as much: measured on two small models
/// (docs/allocation.md). Coded errors are not quite white.
const CODED_OVER_WHITE: f64 = 1.25;
/// KLD of a trunk that a solver with Hessians codes over that of one rounded to nearest (docs/allocation.md).
const SOLVED_OVER_ROUNDED: f64 = 0.7;
/// Tokens of the sample, at most.
const TOKENS_MAX: usize = 4096;
/// Layers in which experts are coded on trial, at most.
const TRIED_LAYERS_MAX: usize = 6;
/// Bands of layers that are told apart, at most.
const BANDS_MAX: usize = 16;
/// Bytes of all streams together, at most; the sample is shorter where streams are wide or many.
const STREAM_BYTES_MAX: u64 = 512 << 20;
/// An expert counts as if it had been seen with average energy by so many tokens more.
const PRIOR_TOKENS: f64 = 8.0;

/// Sensitivities of all projections and experts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sensitivity {
    layers: Vec<LayerSensitivity>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct LayerSensitivity {
    layer: usize,
    /// dKLD / d relative squared error, of gate, up and down.
    parts: [f64; 3],
    /// Share of each expert; they add up to 1.
    shares: Vec<f64>,
}

impl Sensitivity {
    /// KLD (nats) that a projection of a layer costs for each unit of relative squared error.
    pub fn of_part(&self, layer: usize, part: Part) -> f64 {
        let at = MATRICES.iter().position(|&m| m == part);
        self.layer(layer).and_then(|l| l.parts.get(at?).copied()).unwrap_or(0.0)
    }

    /// The share that some experts have in what their layer is sensitive to.
    pub fn share(&self, layer: usize, experts: Range<usize>) -> f64 {
        self.layer(layer).and_then(|l| l.shares.get(experts)).map_or(0.0, |s| s.iter().sum())
    }

    fn layer(&self, layer: usize) -> Option<&LayerSensitivity> {
        self.layers.iter().find(|l| l.layer == layer)
    }
}

/// What pushing a sample of the calibration text through the model showed.
#[derive(Clone, Debug, Default)]
pub struct FirstPass {
    /// What each projection is worth, if that was asked for.
    pub sensitivity: Option<Sensitivity>,
    /// KLD (nats) when all experts lose what those lost that were tried.
    pub kld: f64,
    /// KLD (nats) that coding the trunk as was asked is expected to cost; none where that changes nothing.
    pub trunk_kld: Option<f64>,
    /// One for each layer in which experts were tried.
    pub trials: Vec<Trial>,
}

impl FirstPass {
    /// KLD (nats) that the experts are expected to cost.
    pub fn expert_kld(&self) -> f64 {
        self.kld * CODED_OVER_WHITE
    }

    /// What is expected of the experts at another rate.
    pub fn at_rate(self, [was, is]: [f64; 2]) -> FirstPass {
        FirstPass { kld: self.kld * relative_error(is) / relative_error(was), ..self }
    }

    /// Bytes of all its streams and their sums, at most.
    pub fn stream_bytes(&self, model: &Model) -> u64 {
        let bands = Bands::new(model, self.sensitivity.is_some(), self.trunk_kld.is_some());
        stream_bytes(model.spec(), (bands.n_streams() * bands.tokens_max(model)) as u64)
    }
}

/// Pushes a sample of `text` through a model whose experts are going to be coded by `coder`; `parts` says whether each
/// projection's sensitivity is wanted, which takes three more streams for each band of layers. `trunk` is what may become of
/// the trunk.
///
/// # Errors
/// As the forward pass and coding; a requested stop.
pub fn first_pass(
    session: &Session,
    model: &Model,
    text: &Windows,
    coder: &Coder<'_>,
    parts: bool,
    trunk: &Choice,
) -> Result<FirstPass> {
    let rounded = Rounded::of(model, trunk)?;
    let bands = Bands::new(model, parts, rounded.is_some());
    let sample = sample(text, bands.tokens_max(model));
    let progress = session.progress("first pass", 0, model.spec().n_experts());
    let mut run = Run::begin(model, sample, rounded)?;
    let tried = tried_layers(model);
    let (mut shares, mut trials) = (Vec::new(), Vec::new());
    for (l, layer) in model.spec().layers.iter().enumerate() {
        session.stop.check()?;
        let weights = LayerWeights::load(run.isa, model, l)?;
        run.attention(&weights, l)?;
        if layer.mlp.moe().is_none() {
            run.dense(&weights)?;
            continue;
        }
        let band = bands.of(l);
        if tried.contains(&l) {
            trials.push(run.try_experts(coder, l, &weights)?);
        }
        if parts && band.start == l {
            run.branch_off();
        }
        let energies = run.experts(session, &weights, l, || progress.add(0, 1))?;
        shares.push(smoothed(&energies));
        if parts && band.end == l + 1 {
            run.join();
        }
    }
    let Klds { parts: klds, joint, trunk: rounded } = run.finish(model)?;
    let solved = if coder.solver.needs_hessian() { SOLVED_OVER_ROUNDED } else { 1.0 };
    let trunk_kld = rounded.map(|kld| kld * solved);
    let sensitivity = parts.then(|| Sensitivity { layers: bands.spread(&klds, shares) });
    Ok(FirstPass { sensitivity, kld: joint.unwrap_or(0.0), trunk_kld, trials })
}

/// Layers in which experts are tried: evenly spread, the first with experts among them.
fn tried_layers(model: &Model) -> Vec<usize> {
    let layers = moe_layers(model.spec());
    let n = layers.len().min(TRIED_LAYERS_MAX);
    (0..n).filter_map(|i| Some(layers.get(i * layers.len() / n)?.0)).collect()
}

/// Layers with experts, cut into bands. Between the first and the last layer of a band there may be dense ones.
struct Bands {
    /// MoE layers of each band.
    bands: Vec<Vec<usize>>,
    /// Whether streams branch off in each.
    parts: bool,
    /// Whether one goes through a rounded trunk.
    trunk: bool,
}

impl Bands {
    fn new(model: &Model, parts: bool, trunk: bool) -> Bands {
        let layers: Vec<usize> = moe_layers(model.spec()).into_iter().map(|(l, _)| l).collect();
        let n = layers.len().min(BANDS_MAX);
        let cut = |i: usize| i * layers.len() / n.max(1);
        Bands { bands: (0..n).map(|i| layers[cut(i)..cut(i + 1)].to_vec()).collect(), parts, trunk }
    }

    /// The undisturbed stream, the joint one, that of the trunk, and three for each band.
    fn n_streams(&self) -> usize {
        2 + usize::from(self.trunk) + if self.parts { 3 * self.bands.len() } else { 0 }
    }

    /// First layer and one beyond the last of the band that a layer is in.
    fn of(&self, layer: usize) -> Range<usize> {
        let band = self.bands.iter().find(|b| b.contains(&layer));
        let ends = band.and_then(|b| Some((*b.first()?, *b.last()?)));
        ends.map_or(layer..layer + 1, |(first, last)| first..last + 1)
    }

    fn tokens_max(&self, model: &Model) -> usize {
        let token = stream_bytes(model.spec(), self.n_streams() as u64).max(1);
        usize::try_from(STREAM_BYTES_MAX / token).unwrap_or(TOKENS_MAX).clamp(64, TOKENS_MAX)
    }

    /// `klds` are those of gate, up and down of each band; layers of a band share them.
    fn spread(&self, klds: &[f64], shares: Vec<Vec<f64>>) -> Vec<LayerSensitivity> {
        let bands = self.bands.iter().zip(klds.as_chunks::<3>().0);
        let layers = bands.flat_map(|(band, klds)| {
            let parts = klds.map(|kld| kld / NOISE / band.len() as f64);
            band.iter().map(move |&layer| (layer, parts))
        });
        layers.zip(shares).map(|((layer, parts), shares)| LayerSensitivity { layer, parts, shares }).collect()
    }
}

/// Windows spread over the text, of at most `tokens_max` tokens together.
pub fn sample(text: &Windows, tokens_max: usize) -> Windows {
    let longest = text.lens.iter().copied().max().unwrap_or(0).min(tokens_max);
    let n = (tokens_max / longest.max(1)).clamp(1, text.n_windows().max(1));
    let windows: Vec<&[u32]> = text.iter().collect();
    let mut sample = Windows::default();
    for i in 0..n {
        let window = windows.get(i * windows.len() / n).copied().unwrap_or_default();
        let window = window.get(..longest).unwrap_or(window);
        sample.tokens.extend(window);
        sample.lens.push(window.len());
    }
    sample
}

/// Energies with a few average tokens added, as shares.
fn smoothed(energies: &[Energy]) -> Vec<f64> {
    let (sum, n) = energies.iter().fold((0.0, 0), |(sum, n), e| (sum + e.sum, n + e.n_tokens));
    let prior = if n > 0 && sum > 0.0 { PRIOR_TOKENS * sum / n as f64 } else { 1.0 };
    let all = energies.iter().map(|e| e.sum + prior).sum::<f64>();
    energies.iter().map(|e| (e.sum + prior) / all).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_spread_over_the_text() {
        let text = Windows { tokens: (0..100).collect(), lens: vec![10; 10] };
        let some = sample(&text, 30);
        assert_eq!(some.lens, [10, 10, 10]);
        assert_eq!(some.tokens[10], 30);
        assert_eq!(sample(&text, 4).tokens, [0, 1, 2, 3]);
        assert_eq!(sample(&text, 1000), text);
    }

    #[test]
    fn an_expert_that_was_never_seen_keeps_a_share() {
        let energy = |sum, n_tokens| Energy { sum, n_tokens };
        let shares = smoothed(&[energy(0.0, 0), energy(92.0, 46), energy(8.0, 4)]);
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((shares[0] - 16.0 / 148.0).abs() < 1e-12, "{shares:?}");
        assert_eq!(smoothed(&[energy(0.0, 0); 2]), [0.5, 0.5]);
    }
}
