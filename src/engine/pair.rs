//! The evaluation text on its way through reference and bundle side by side.

use moepack_convert::ModelSpec;
use moepack_format::{Error, Kind, Result};
use moepack_quant::Isa;
use moepack_verify::drift::{
    ExpertDrift, ExpertError, LayerDrift, LogitDrift, RoutingOverlap, SquareSums, WindowDrift,
};
use moepack_verify::forward::{
    Delta, ExpertOutput, GatedMlp, Head, HeadScratch, LayerWeights, MoePass, RoutedSum, Stream, Weights,
    embed,
};
use moepack_verify::tokens::Windows;
use rayon::prelude::*;

/// Both residual streams of every token, and the drift so far.
#[derive(Debug)]
pub struct Pair {
    isa: Isa,
    windows: Windows,
    reference: Stream,
    bundle: Stream,
    layers: Vec<LayerDrift>,
    experts: Vec<ExpertDrift>,
}

/// The drift of a whole run.
#[derive(Debug)]
pub struct Drift {
    /// The text.
    pub windows: Windows,
    /// Predictions.
    pub logits: LogitDrift,
    /// One for each layer.
    pub layers: Vec<LayerDrift>,
    /// One for each routed expert.
    pub experts: Vec<ExpertDrift>,
}

impl Pair {
    /// Embeds the text on both sides.
    ///
    /// # Errors
    /// An embedding cannot be read.
    pub fn begin(isa: Isa, reference: &dyn Weights, bundle: &dyn Weights, windows: Windows) -> Result<Pair> {
        let own = embed(reference, &windows)?;
        let coded = if is_same(reference, bundle) { own.clone() } else { embed(bundle, &windows)? };
        let (reference, bundle) = (own, coded);
        Ok(Pair { isa, windows, reference, bundle, layers: Vec::new(), experts: Vec::new() })
    }

    /// Runs both layers' attention, and their MLPs where they are dense.
    ///
    /// # Errors
    /// As the forward pass.
    pub fn enter(&mut self, reference: &LayerWeights, bundle: &LayerWeights) -> Result<()> {
        for (layer, stream) in [(reference, &mut self.reference), (bundle, &mut self.bundle)] {
            layer.attention(&self.windows, stream)?;
            if layer.n_experts() == 0 {
                layer.dense(stream)?;
            }
        }
        Ok(())
    }

    /// Routes every token on both sides.
    ///
    /// # Errors
    /// As the forward pass.
    pub fn route<'a>(
        &'a self,
        reference: &'a LayerWeights,
        bundle: &'a LayerWeights,
    ) -> Result<PairPass<'a>> {
        Ok(PairPass {
            isa: self.isa,
            reference: MoePass::begin(reference, &self.windows.tokens, &self.reference)?,
            bundle: MoePass::begin(bundle, &self.windows.tokens, &self.bundle)?,
        })
    }

    /// Adds what the experts of a layer made; gives how much the routing agreed.
    pub fn add(&mut self, delta: PairDelta) -> RoutingOverlap {
        self.reference.add(self.isa, &delta.reference);
        self.bundle.add(self.isa, &delta.bundle);
        self.experts.extend(delta.experts);
        delta.overlap
    }

    /// Ends a layer: measures how far the streams are apart.
    pub fn leave(&mut self, layer: usize, overlap: Option<RoutingOverlap>) {
        let sums = SquareSums::of_stream(self.isa, &self.reference.hidden, &self.bundle.hidden);
        let routing_overlap = overlap.and_then(|o| o.mean());
        self.layers.push(LayerDrift { layer, rel_error: sums.rel_error(), routing_overlap, bits: None });
    }

    /// Compares the predictions.
    ///
    /// # Errors
    /// A head that cannot be read, heads of different width.
    pub fn finish(self, reference: &dyn Weights, bundle: &dyn Weights) -> Result<Drift> {
        let own = Head::load(self.isa, reference)?;
        let other = if is_same(reference, bundle) { None } else { Some(Head::load(self.isa, bundle)?) };
        let heads = [&own, other.as_ref().unwrap_or(&own)];
        let ranges: Vec<_> = self.windows.ranges().collect();
        let windows =
            ranges.into_par_iter().map(|range| self.window(&heads, range)).collect::<Result<Vec<_>>>()?;
        Ok(Drift {
            windows: self.windows,
            logits: LogitDrift { windows },
            layers: self.layers,
            experts: self.experts,
        })
    }

    fn window(&self, heads: &[&Head; 2], range: std::ops::Range<usize>) -> Result<WindowDrift> {
        let (width, vocab) = (self.reference.width, heads[0].vocab());
        let mut scratch = [HeadScratch::default(), HeadScratch::default()];
        let mut drift = WindowDrift::default();
        let scored: Vec<usize> = range.clone().take(range.len().saturating_sub(1)).collect();
        for block in scored.chunks(heads[0].rows()) {
            let rows = block.first().copied().unwrap_or(0)..block.last().map_or(0, |l| l + 1);
            let values = rows.start * width..rows.end * width;
            let [a, b] = &mut scratch;
            let a = heads[0].logits(self.reference.hidden.get(values.clone()).unwrap_or_default(), a);
            let b = heads[1].logits(self.bundle.hidden.get(values).unwrap_or_default(), b);
            for ((token, a), b) in rows.zip(a.chunks_exact(vocab)).zip(b.chunks_exact(vocab)) {
                let target = self.windows.tokens.get(token + 1).copied();
                let target = target.ok_or_else(|| Error::new(Kind::Io, "a scored token is not there"))?;
                drift.add(self.isa, a, b, target)?;
            }
        }
        Ok(drift)
    }
}

/// While a checkpoint is quantized, both sides have its trunk, and nothing of it is read or held twice.
fn is_same(reference: &dyn Weights, bundle: &dyn Weights) -> bool {
    std::ptr::addr_eq(reference, bundle)
}

/// What a layer's experts do to both streams, and how they compare.
pub struct PairDelta {
    reference: Delta,
    bundle: Delta,
    experts: Vec<ExpertDrift>,
    overlap: RoutingOverlap,
}

/// One layer's experts over both streams.
pub struct PairPass<'a> {
    isa: Isa,
    reference: MoePass<'a>,
    bundle: MoePass<'a>,
}

/// What one expert made on both sides.
pub struct PairOutput {
    reference: ExpertOutput,
    bundle: ExpertOutput,
    error: ExpertError,
}

/// The sums of a layer's experts on both sides.
pub struct PairSums<'p> {
    reference: RoutedSum<'p>,
    bundle: RoutedSum<'p>,
    experts: Vec<ExpertDrift>,
    layer: usize,
}

impl PairPass<'_> {
    /// Runs an expert on both sides, and the coded one on the reference's inputs too, which is its own error without
    /// that of the layers before.
    ///
    /// # Errors
    /// As the forward pass.
    pub fn run_expert(&self, expert: usize, reference: &GatedMlp, bundle: &GatedMlp) -> Result<PairOutput> {
        let own = self.reference.run_expert(expert, reference, None)?;
        let coded = self.reference.run_expert(expert, bundle, None)?;
        let mut error = ExpertError::default();
        error.add(self.isa, self.reference.routing().tokens_of(expert).len(), &own.rows, &coded.rows);
        drop(coded);
        Ok(PairOutput { reference: own, bundle: self.bundle.run_expert(expert, bundle, None)?, error })
    }

    /// Nothing added yet.
    pub fn sums(&self, layer: usize) -> PairSums<'_> {
        let (reference, bundle) = (RoutedSum::new(&self.reference), RoutedSum::new(&self.bundle));
        PairSums { reference, bundle, experts: Vec::new(), layer }
    }

    /// What the layer adds to both streams.
    ///
    /// # Errors
    /// As the forward pass.
    pub fn finish(&self, sums: PairSums<'_>) -> Result<PairDelta> {
        let reference = self.reference.finish(sums.reference)?;
        let bundle = self.bundle.finish(sums.bundle)?;
        let (a, b) = (self.reference.routing(), self.bundle.routing());
        let mut overlap = RoutingOverlap::default();
        overlap.add(&a.experts, &b.experts, a.n_used);
        Ok(PairDelta { reference, bundle, experts: sums.experts, overlap })
    }
}

impl PairSums<'_> {
    /// Adds an expert's outputs; experts come in order.
    pub fn add(&mut self, output: &PairOutput) {
        self.reference.add(&output.reference);
        self.bundle.add(&output.bundle);
        self.experts.push(output.error.drift(self.layer, output.reference.expert));
    }
}

/// Refuses two models that cannot be compared token by token.
///
/// # Errors
/// Another vocabulary or another number of layers or experts (kind `BadData`).
pub fn check_comparable(reference: &dyn Weights, bundle: &dyn Weights) -> Result<()> {
    let (a, b) = (reference.spec(), bundle.spec());
    let experts =
        |s: &ModelSpec| s.layers.iter().map(|l| l.mlp.moe().map(|m| m.n_experts)).collect::<Vec<_>>();
    if a.vocab == b.vocab && a.hidden == b.hidden && experts(a) == experts(b) {
        return Ok(());
    }
    let say = |s: &ModelSpec| {
        format!("{} with {} layers, hidden {}, vocab {}", s.family, s.layers.len(), s.hidden, s.vocab)
    };
    Err(Error::bad_data(format!("the bundle is a {}, the reference a {}", say(b), say(a)))
        .hint("compare a bundle with the checkpoint it was made from"))
}
