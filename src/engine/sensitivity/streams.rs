//! The streams of the first pass: the undisturbed one, those with noise in one projection of a band of layers, and the one
//! that is disturbed everywhere.

use std::ops::Range;

use moepack_convert::Model;
use moepack_format::{Error, Kind, Result};
use moepack_quant::Isa;
use moepack_verify::drift::logits::compare;
use moepack_verify::forward::{
    ExpertOutput, GatedMlp, Head, HeadScratch, LayerWeights, MoePass, RoutedSum, Stream, embed, ordered,
};
use moepack_verify::tokens::Windows;
use rayon::prelude::*;

use super::NOISE;
use crate::engine::coder::Coder;
use crate::engine::noise::{Disturbance, disturb_part};
use crate::engine::trial::Trial;
use crate::engine::trunk::rounded::Rounded;
use crate::recipe::MATRICES;
use crate::session::Session;

/// The streams on their way.
pub(super) struct Run<'a> {
    pub(super) isa: Isa,
    model: &'a Model,
    sample: Windows,
    /// The undisturbed stream, then those that were disturbed in earlier bands.
    clean: (Windows, Stream),
    /// Those that are being disturbed: in gate, up or down.
    noisy: Vec<Stream>,
    /// The one that is disturbed everywhere, and by how much now.
    joint: Option<(Stream, [Disturbance; 3])>,
    /// The one that goes through a rounded trunk.
    trunk: Option<TrunkStream<'a>>,
}

/// The undisturbed experts behind a rounded trunk.
struct TrunkStream<'a> {
    stream: Stream,
    rounded: Rounded<'a>,
    /// Of the layer in work.
    weights: Option<LayerWeights>,
}

impl TrunkStream<'_> {
    fn attention(&mut self, isa: Isa, sample: &Windows, layer: usize) -> Result<()> {
        let weights = LayerWeights::load(isa, &self.rounded, layer)?;
        weights.attention(sample, &mut self.stream)?;
        self.weights = Some(weights);
        Ok(())
    }

    fn dense(&mut self) -> Result<()> {
        self.weights.iter().try_for_each(|weights| weights.dense(&mut self.stream))
    }
}

impl<'a> Run<'a> {
    pub(super) fn begin(model: &'a Model, sample: Windows, rounded: Option<Rounded<'a>>) -> Result<Run<'a>> {
        let stream = embed(model, &sample)?;
        let trunk = rounded.map(|rounded| TrunkStream { stream: stream.clone(), rounded, weights: None });
        let clean = (sample.clone(), stream);
        Ok(Run { isa: Isa::get(), model, clean, sample, noisy: Vec::new(), joint: None, trunk })
    }

    pub(super) fn attention(&mut self, weights: &LayerWeights, layer: usize) -> Result<()> {
        let (isa, sample) = (self.isa, &self.sample);
        self.trunk.iter_mut().try_for_each(|trunk| trunk.attention(isa, sample, layer))?;
        let (windows, stream) = &mut self.clean;
        weights.attention(windows, stream)?;
        let joint = self.joint.iter_mut().map(|(stream, _)| stream);
        self.noisy.iter_mut().chain(joint).try_for_each(|stream| weights.attention(&self.sample, stream))
    }

    pub(super) fn dense(&mut self, weights: &LayerWeights) -> Result<()> {
        self.trunk.iter_mut().try_for_each(TrunkStream::dense)?;
        weights.dense(&mut self.clean.1)?;
        let joint = self.joint.iter_mut().map(|(stream, _)| stream);
        self.noisy.iter_mut().chain(joint).try_for_each(|stream| weights.dense(stream))
    }

    /// Codes a few experts behind attention; the joint stream loses from here on what they lose.
    pub(super) fn try_experts(
        &mut self,
        coder: &Coder<'_>,
        layer: usize,
        weights: &LayerWeights,
    ) -> Result<Trial> {
        let base = self.clean.1.first(&self.sample);
        let trial = Trial::of_layer(
            coder,
            self.model,
            (layer, weights),
            &MoePass::begin(weights, &self.sample.tokens, &base)?,
        )?;
        let stream = self.joint.take().map_or(base, |(stream, _)| stream);
        self.joint = Some((stream, trial.disturbances));
        Ok(trial)
    }

    /// Begins to disturb: behind attention, where the streams are still the undisturbed one.
    pub(super) fn branch_off(&mut self) {
        let base = self.clean.1.first(&self.sample);
        self.noisy = MATRICES.map(|_| base.clone()).to_vec();
    }

    /// Ends to disturb.
    pub(super) fn join(&mut self) {
        for noisy in self.noisy.drain(..) {
            append(&mut self.clean, &self.sample, noisy);
        }
    }

    /// Runs a layer's experts over all streams; gives their energies.
    pub(super) fn experts(
        &mut self,
        session: &Session,
        weights: &LayerWeights,
        layer: usize,
        done: impl Fn() + Send + Sync,
    ) -> Result<Vec<Energy>> {
        let joint = self.joint.iter().map(|(stream, _)| stream);
        let clean = std::iter::once((&self.clean.0, &self.clean.1));
        let streams = clean.chain(self.noisy.iter().chain(joint).map(|stream| (&self.sample, stream)));
        let streams = streams.map(|(windows, stream)| (weights, windows, stream));
        let trunk = self.trunk.iter().filter_map(|t| Some((t.weights.as_ref()?, &self.sample, &t.stream)));
        let passes = streams
            .chain(trunk)
            .map(|(weights, windows, stream)| MoePass::begin(weights, &windows.tokens, stream))
            .collect::<Result<Vec<_>>>()?;
        let mut sums: Vec<RoutedSum<'_>> = passes.iter().map(RoutedSum::new).collect();
        let mut energies = Vec::new();
        let work = |e: usize| -> Result<Vec<ExpertOutput>> {
            session.stop.check()?;
            let mlps = self.mlps(weights, layer, e)?;
            // Behind a rounded trunk experts are as they are.
            let mlps = mlps.iter().chain(mlps.first());
            passes.iter().zip(mlps).map(|(pass, mlp)| pass.run_expert(e, mlp, None)).collect()
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
        let joint = self.joint.iter_mut().map(|(stream, _)| stream);
        let trunk = self.trunk.iter_mut().map(|trunk| &mut trunk.stream);
        let streams = std::iter::once(&mut self.clean.1).chain(&mut self.noisy).chain(joint).chain(trunk);
        streams.zip(deltas).for_each(|(stream, delta)| stream.add(self.isa, &delta));
        Ok(energies)
    }

    /// An expert for each stream: as it is, with noise in gate, up or down, disturbed in all three.
    fn mlps(&self, weights: &LayerWeights, layer: usize, index: usize) -> Result<Vec<GatedMlp>> {
        let expert = self.model.expert(layer, index)?.decode(self.isa)?;
        let mut mlps = vec![weights.pack_expert(&expert)?];
        for (part, _) in MATRICES.into_iter().zip(&self.noisy) {
            let mut noisy = expert.clone();
            disturb_part(&mut noisy, (layer, index, part), Disturbance { white: NOISE, shrink: 0.0 });
            mlps.push(weights.pack_expert(&noisy)?);
        }
        if let Some((_, disturbances)) = &self.joint {
            let mut noisy = expert;
            for (part, disturbance) in MATRICES.into_iter().zip(disturbances) {
                disturb_part(&mut noisy, (layer, index, part), *disturbance);
            }
            mlps.push(weights.pack_expert(&noisy)?);
        }
        Ok(mlps)
    }

    fn energy(&self, pass: &MoePass<'_>, output: &ExpertOutput) -> Energy {
        let width = pass.width().max(1);
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
    pub(super) fn finish(mut self, model: &Model) -> Result<Klds> {
        let (joint, trunk) = (self.joint.take(), self.trunk.take());
        let (has_joint, has_trunk) = (joint.is_some(), trunk.is_some());
        for stream in joint.map(|(stream, _)| stream).into_iter().chain(trunk.map(|t| t.stream)) {
            append(&mut self.clean, &self.sample, stream);
        }
        let mut parts = self.klds(model)?;
        let trunk = if has_trunk { parts.pop() } else { None };
        let joint = if has_joint { parts.pop() } else { None };
        Ok(Klds { parts, joint, trunk })
    }

    /// Mean KLD of each stream that was appended to the undisturbed one.
    fn klds(&self, model: &Model) -> Result<Vec<f64>> {
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

/// Mean KLDs of disturbed streams.
pub(super) struct Klds {
    /// Of gate, up and down of each band.
    pub(super) parts: Vec<f64>,
    pub(super) joint: Option<f64>,
    pub(super) trunk: Option<f64>,
}

/// What an expert contributes: Σ (g·‖y‖)² over its tokens of the undisturbed stream.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Energy {
    pub(super) sum: f64,
    pub(super) n_tokens: u64,
}

/// Lets a stream travel on behind others.
fn append((windows, stream): &mut (Windows, Stream), sample: &Windows, added: Stream) {
    windows.tokens.extend(&sample.tokens);
    windows.lens.extend(&sample.lens);
    stream.append(added);
}
