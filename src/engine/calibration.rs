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
    let mut moments =
        Moments { isa, input: ColumnSums::new(hidden), inner: ColumnSums::new(inter), outcome: Ok(()) };
    let output = pass.run_expert(expert, mlp, Some(&mut moments))?;
    moments.outcome?;
    Ok((output, ExpertStats { input: moments.input.finish(), inner: moments.inner.finish() }))
}

struct Moments {
    isa: Isa,
    input: ColumnSums,
    inner: ColumnSums,
    outcome: Result<()>,
}

impl Observer for Moments {
    fn block(&mut self, x: &[f32], a: &[f32], weights: &[f32]) {
        if self.outcome.is_ok() {
            let squares: Vec<f32> = weights.iter().map(|w| w * w).collect();
            self.outcome = self
                .input
                .add(self.isa, x, Some(&squares))
                .and_then(|()| self.inner.add(self.isa, a, Some(&squares)));
        }
    }
}
