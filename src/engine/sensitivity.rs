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
//! Models of many layers are measured in bands of layers that follow each other, so that the number of streams is bounded.
//! How the sensitivity of a projection is shared among experts follows from what they contribute: the energy of their
//! outputs times the squared routing weight.

use std::ops::Range;

use moepack_convert::spec::Part;
use moepack_convert::{Expert, Model};
use moepack_format::{Error, Kind, Result};
use moepack_quant::Isa;
use moepack_verify::drift::logits::compare;
use moepack_verify::forward::{
    ExpertOutput, GatedMlp, Head, HeadScratch, LayerWeights, MoePass, RoutedSum, Stream, embed, ordered,
};
use moepack_verify::tokens::Windows;
use rayon::prelude::*;

use crate::engine::noise::disturbed;
use crate::recipe::{MATRICES, moe_layers};
use crate::session::Session;

/// Relative squared error of the noise: that of about 3.3 bits a weight.
const NOISE: f64 = 1e-2;
/// Tokens of the sample, at most.
const TOKENS_MAX: usize = 4096;
/// Bands of layers that are told apart, at most.
const BANDS_MAX: usize = 16;
/// Bytes of all streams together, at most; the sample is shorter where streams are wide or many.
const STREAM_BYTES_MAX: usize = 512 << 20;
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

/// Measures a model on a sample of `text`.
///
/// # Errors
/// As the forward pass; a requested stop.
pub fn measure(session: &Session, model: &Model, text: &Windows) -> Result<Sensitivity> {
    let bands = Bands::new(model);
    let sample = sample(text, bands.tokens_max(model));
    let progress = session.progress("sensitivity", 0, model.spec().n_experts());
    let mut run = Run::begin(model, sample)?;
    let mut shares = Vec::new();
    for (l, layer) in model.spec().layers.iter().enumerate() {
        session.stop.check()?;
        let weights = LayerWeights::load(run.isa, model, l)?;
        run.attention(&weights)?;
        if layer.mlp.moe().is_none() {
            run.dense(&weights)?;
            continue;
        }
        let band = bands.of(l);
        if band.start == l {
            run.branch_off();
        }
        let energies = run.experts(session, &weights, l, || progress.add(0, 1))?;
        shares.push(smoothed(&energies));
        if band.end == l + 1 {
            run.join();
        }
    }
    let klds = run.finish(model)?;
    Ok(Sensitivity { layers: bands.spread(&klds, shares) })
}

/// Bytes of all streams and their sums, for the largest sample.
pub fn stream_bytes(model: &Model) -> u64 {
    let bands = Bands::new(model);
    let n_streams = 1 + 3 * bands.bands.len();
    (n_streams * bands.tokens_max(model) * 8 * model.spec().hidden) as u64
}

/// Layers with experts, cut into bands. Between the first and the last layer of a band there may be dense ones.
struct Bands {
    /// MoE layers of each band.
    bands: Vec<Vec<usize>>,
}

impl Bands {
    fn new(model: &Model) -> Bands {
        let layers: Vec<usize> = moe_layers(model.spec()).into_iter().map(|(l, _)| l).collect();
        let n = layers.len().min(BANDS_MAX);
        let cut = |i: usize| i * layers.len() / n.max(1);
        Bands { bands: (0..n).map(|i| layers[cut(i)..cut(i + 1)].to_vec()).collect() }
    }

    /// First layer and one beyond the last of the band that a layer is in.
    fn of(&self, layer: usize) -> Range<usize> {
        let band = self.bands.iter().find(|b| b.contains(&layer));
        let ends = band.and_then(|b| Some((*b.first()?, *b.last()?)));
        ends.map_or(layer..layer + 1, |(first, last)| first..last + 1)
    }

    fn tokens_max(&self, model: &Model) -> usize {
        let n_streams = 1 + 3 * self.bands.len();
        // With the sums of experts, each stream is there twice.
        let bytes_each = 8 * model.spec().hidden.max(1);
        (STREAM_BYTES_MAX / n_streams / bytes_each).clamp(64, TOKENS_MAX)
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

/// What an expert contributes: Σ (g·‖y‖)² over its tokens of the undisturbed stream.
#[derive(Clone, Copy, Debug, Default)]
struct Energy {
    sum: f64,
    n_tokens: u64,
}

/// The streams on their way.
struct Run<'a> {
    isa: Isa,
    model: &'a Model,
    sample: Windows,
    /// The undisturbed stream, then those that were disturbed in earlier bands.
    clean: (Windows, Stream),
    /// Those that are being disturbed: in gate, up or down.
    noisy: Vec<Stream>,
}

impl<'a> Run<'a> {
    fn begin(model: &'a Model, sample: Windows) -> Result<Run<'a>> {
        let stream = embed(model, &sample)?;
        Ok(Run { isa: Isa::get(), model, clean: (sample.clone(), stream), sample, noisy: Vec::new() })
    }

    fn attention(&mut self, weights: &LayerWeights) -> Result<()> {
        let (windows, stream) = &mut self.clean;
        weights.attention(windows, stream)?;
        self.noisy.iter_mut().try_for_each(|noisy| weights.attention(&self.sample, noisy))
    }

    fn dense(&mut self, weights: &LayerWeights) -> Result<()> {
        weights.dense(&mut self.clean.1)?;
        self.noisy.iter_mut().try_for_each(|noisy| weights.dense(noisy))
    }

    /// Begins to disturb: behind attention, where the streams are still the undisturbed one.
    fn branch_off(&mut self) {
        self.noisy = MATRICES.map(|_| self.clean.1.first(&self.sample)).to_vec();
    }

    /// Ends to disturb.
    fn join(&mut self) {
        for noisy in self.noisy.drain(..) {
            let (windows, stream) = &mut self.clean;
            windows.tokens.extend(&self.sample.tokens);
            windows.lens.extend(&self.sample.lens);
            stream.append(noisy);
        }
    }

    /// Runs a layer's experts over all streams; gives their energies.
    fn experts(
        &mut self,
        session: &Session,
        weights: &LayerWeights,
        layer: usize,
        done: impl Fn() + Send + Sync,
    ) -> Result<Vec<Energy>> {
        let clean = std::iter::once((&self.clean.0, &self.clean.1));
        let streams = clean.chain(self.noisy.iter().map(|noisy| (&self.sample, noisy)));
        let passes = streams
            .map(|(windows, stream)| MoePass::begin(weights, &windows.tokens, stream))
            .collect::<Result<Vec<_>>>()?;
        let mut sums: Vec<RoutedSum<'_>> = passes.iter().map(RoutedSum::new).collect();
        let mut energies = Vec::new();
        let work = |e: usize| -> Result<Vec<ExpertOutput>> {
            session.stop.check()?;
            let expert = self.model.expert(layer, e)?.decode(self.isa)?;
            let mlps = mlps(weights, layer, e, &expert)?;
            passes.iter().zip(&mlps).map(|(pass, mlp)| pass.run_expert(e, mlp, None)).collect()
        };
        ordered(weights.n_experts(), work, |_, outputs| {
            sums.iter_mut().zip(&outputs).for_each(|(sum, output)| sum.add(output));
            energies
                .extend(passes.first().zip(outputs.first()).map(|(pass, output)| self.energy(pass, output)));
            done();
            Ok(())
        })?;
        let deltas = passes.iter().zip(sums).map(|(p, sum)| p.finish(sum)).collect::<Result<Vec<_>>>()?;
        drop(passes);
        let streams = std::iter::once(&mut self.clean.1).chain(&mut self.noisy);
        streams.zip(deltas).for_each(|(stream, delta)| stream.add(self.isa, &delta));
        Ok(energies)
    }

    fn energy(&self, pass: &MoePass<'_>, output: &ExpertOutput) -> Energy {
        let width = self.model.spec().hidden.max(1);
        let tokens = pass.routing().tokens_of(output.expert).iter().zip(output.rows.chunks_exact(width));
        let mut energy = Energy::default();
        for (token, row) in tokens.filter(|(t, _)| (t.token as usize) < self.sample.tokens.len()) {
            let squares: f64 = row.iter().map(|&y| f64::from(y) * f64::from(y)).sum();
            energy.sum += f64::from(token.weight) * f64::from(token.weight) * squares;
            energy.n_tokens += 1;
        }
        energy
    }

    /// Mean KLD of each disturbed stream.
    fn finish(self, model: &Model) -> Result<Vec<f64>> {
        let head = Head::load(self.isa, model)?;
        let n_streams = self.clean.1.n_tokens() / self.sample.tokens.len().max(1);
        let ranges: Vec<Range<usize>> = self.sample.ranges().collect();
        let of_window = |range: Range<usize>| self.window(&head, range, n_streams);
        let windows = ranges.into_par_iter().map(of_window).collect::<Result<Vec<_>>>()?;
        let n_scored = self.sample.n_scored().max(1) as f64;
        let mean = |s: usize| windows.iter().filter_map(|w| w.get(s)).sum::<f64>() / n_scored;
        Ok((0..n_streams.saturating_sub(1)).map(mean).collect())
    }

    /// Sums of the KLD of each disturbed stream over one window.
    fn window(&self, head: &Head, range: Range<usize>, n_streams: usize) -> Result<Vec<f64>> {
        let (width, n_tokens) = (self.clean.1.width, self.sample.tokens.len());
        let mut scratch = [HeadScratch::default(), HeadScratch::default()];
        let mut sums = vec![0.0; n_streams.saturating_sub(1)];
        let scored = range.start..range.end.saturating_sub(1);
        for first in scored.clone().step_by(head.rows()) {
            let rows = first..scored.end.min(first + head.rows());
            let hidden = |stream: usize| {
                let at = |row: usize| (stream * n_tokens + row) * width;
                self.clean.1.hidden.get(at(rows.start)..at(rows.end)).unwrap_or_default()
            };
            let [a, b] = &mut scratch;
            let reference = head.logits(hidden(0), a);
            for (i, sum) in sums.iter_mut().enumerate() {
                let disturbed = head.logits(hidden(i + 1), b);
                let pairs = reference.chunks_exact(head.vocab()).zip(disturbed.chunks_exact(head.vocab()));
                for (reference, disturbed) in pairs {
                    let kld = compare(self.isa, reference, disturbed, 0)?.kld;
                    if !kld.is_finite() {
                        return Err(Error::new(Kind::BadData, "the model's predictions are not finite"));
                    }
                    *sum += kld;
                }
            }
        }
        Ok(sums)
    }
}

/// An expert as it is, and with noise in gate, up or down.
fn mlps(weights: &LayerWeights, layer: usize, index: usize, expert: &Expert) -> Result<Vec<GatedMlp>> {
    let mut mlps = vec![weights.pack_expert(expert)?];
    for part in MATRICES {
        mlps.push(weights.pack_expert(&disturbed(expert, (layer, index, part), NOISE))?);
    }
    Ok(mlps)
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
