//! The calibration text on its way through the reference: it tells what each expert's inputs are like.

use moepack_format::Result;
use moepack_quant::Isa;
use moepack_quant::stats::ColumnSums;
use moepack_verify::forward::{
    Delta, ExpertOutput, GatedMlp, LayerWeights, MoePass, Observer, Stream, Weights, embed,
};
use moepack_verify::tokens::Windows;

use crate::engine::stats::ExpertStats;

/// The text with the residual stream of every token.
#[derive(Debug)]
pub struct Calibration {
    isa: Isa,
    windows: Windows,
    stream: Stream,
}

impl Calibration {
    /// Embeds the text.
    ///
    /// # Errors
    /// The embedding cannot be read.
    pub fn begin(isa: Isa, weights: &dyn Weights, windows: Windows) -> Result<Calibration> {
        let stream = embed(weights, &windows)?;
        Ok(Calibration { isa, windows, stream })
    }

    /// Goes on between two layers with a stream that was stored there.
    pub fn resume(isa: Isa, windows: Windows, stream: Stream) -> Calibration {
        Calibration { isa, windows, stream }
    }

    /// The residual stream of every token.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// The stream as it is.
    pub fn into_stream(self) -> Stream {
        self.stream
    }

    /// Runs the layer's attention, and its MLP where that is dense.
    ///
    /// # Errors
    /// As the forward pass.
    pub fn enter(&mut self, layer: &LayerWeights) -> Result<()> {
        layer.attention(&self.windows, &mut self.stream)?;
        if layer.n_experts() == 0 { layer.dense(&mut self.stream) } else { Ok(()) }
    }

    /// Routes every token.
    ///
    /// # Errors
    /// As the forward pass.
    pub fn route<'a>(&'a self, layer: &'a LayerWeights) -> Result<MoePass<'a>> {
        MoePass::begin(layer, &self.windows.tokens, &self.stream)
    }

    /// Adds what the layer's experts made.
    pub fn leave(&mut self, delta: &Delta) {
        self.stream.add(self.isa, delta);
    }
}

/// What an expert's inputs are like, as [`run_expert`] and as llama.cpp sees them.
#[derive(Debug)]
pub struct Observed {
    /// Each token counts as its squared routing weight.
    pub weighted: ExpertStats,
    /// Each token counts alike.
    pub plain: ExpertStats,
}

/// Runs an expert over its tokens and collects what its inputs are like.
///
/// # Errors
/// An input that is no finite number: the forward pass overflowed before.
pub fn run_expert(
    isa: Isa,
    pass: &MoePass<'_>,
    expert: usize,
    mlp: &GatedMlp,
    (hidden, inter): (usize, usize),
) -> Result<(ExpertOutput, ExpertStats)> {
    let mut moments = Moments { isa, weighted: Sides::new(hidden, inter), plain: None, outcome: Ok(()) };
    let output = pass.run_expert(expert, mlp, Some(&mut moments))?;
    moments.outcome?;
    Ok((output, moments.weighted.finish()))
}

/// The same, with what it looks like where no routing weight counts.
///
/// # Errors
/// As [`run_expert`].
pub fn observe_expert(
    isa: Isa,
    pass: &MoePass<'_>,
    expert: usize,
    mlp: &GatedMlp,
    (hidden, inter): (usize, usize),
) -> Result<(ExpertOutput, Observed)> {
    let mut plain = Sides::new(hidden, inter);
    let mut moments =
        Moments { isa, weighted: Sides::new(hidden, inter), plain: Some(&mut plain), outcome: Ok(()) };
    let output = pass.run_expert(expert, mlp, Some(&mut moments))?;
    let (weighted, outcome) = (moments.weighted, moments.outcome);
    outcome?;
    Ok((output, Observed { weighted: weighted.finish(), plain: plain.finish() }))
}

/// Sums over the inputs of gate and up, and of down.
struct Sides {
    input: ColumnSums,
    inner: ColumnSums,
}

impl Sides {
    fn new(hidden: usize, inter: usize) -> Sides {
        Sides { input: ColumnSums::new(hidden), inner: ColumnSums::new(inter) }
    }

    fn add(&mut self, isa: Isa, x: &[f32], a: &[f32], weights: Option<&[f32]>) -> Result<()> {
        self.input.add(isa, x, weights)?;
        self.inner.add(isa, a, weights)
    }

    fn finish(&self) -> ExpertStats {
        ExpertStats { input: self.input.finish(), inner: self.inner.finish() }
    }
}

struct Moments<'a> {
    isa: Isa,
    weighted: Sides,
    plain: Option<&'a mut Sides>,
    outcome: Result<()>,
}

impl Observer for Moments<'_> {
    fn block(&mut self, x: &[f32], a: &[f32], weights: &[f32]) {
        if self.outcome.is_ok() {
            let squares: Vec<f32> = weights.iter().map(|w| w * w).collect();
            self.outcome = self.weighted.add(self.isa, x, a, Some(&squares));
        }
        if let (Some(plain), Ok(())) = (&mut self.plain, &self.outcome) {
            self.outcome = plain.add(self.isa, x, a, None);
        }
    }
}
