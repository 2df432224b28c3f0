//! Running a finished model over a text: alone (perplexity), beside its reference (drift), or into a baseline.

use moepack_convert::Model;
use moepack_format::Result;
use moepack_quant::Isa;
use moepack_verify::forward::{self, Head, LayerWeights, Stream, ordered};
use moepack_verify::tokens::Windows;

use crate::engine::pair::{Drift, Pair, check_comparable};
use crate::session::Session;

/// The negative log-likelihood in nats of every scored token, a list a window.
///
/// # Errors
/// Weights that cannot be read; a requested stop.
pub fn nll(session: &Session, model: &Model, windows: &Windows) -> Result<Vec<Vec<f64>>> {
    let stream = run_layers(session, "perplexity", model, windows)?;
    session.stop.check()?;
    Head::load(Isa::get(), model)?.nll(windows, &stream, &|_, _| ())
}

/// Pushes the text through all layers of a model, with progress under `label`: the stream that its head takes.
///
/// # Errors
/// Weights that cannot be read; a requested stop.
pub fn run_layers(session: &Session, label: &str, model: &Model, windows: &Windows) -> Result<Stream> {
    let display = session.progress(label, 0, model.spec().n_experts());
    forward::run_layers(Isa::get(), model, windows, &|at| {
        display.add(0, u64::from(at.experts_done > 0));
        session.stop.check()
    })
}

/// Pushes the text through both models side by side, layer by layer.
///
/// # Errors
/// Models that cannot be compared, weights that cannot be read, a requested stop.
pub fn compare(session: &Session, reference: &Model, bundle: &Model, windows: Windows) -> Result<Drift> {
    check_comparable(reference, bundle)?;
    let isa = Isa::get();
    let display = session.progress("verify", 0, reference.spec().n_experts());
    let mut pair = Pair::begin(isa, reference, bundle, windows)?;
    for (l, layer) in reference.spec().layers.iter().enumerate() {
        session.stop.check()?;
        let weights = [LayerWeights::load(isa, reference, l)?, LayerWeights::load(isa, bundle, l)?];
        pair.enter(&weights[0], &weights[1])?;
        let Some(moe) = layer.mlp.moe() else {
            pair.leave(l, None);
            continue;
        };
        let pass = pair.route(&weights[0], &weights[1])?;
        let mut sums = pass.sums(l);
        let work = |e: usize| {
            session.stop.check()?;
            let own = weights[0].pack_expert(&reference.expert(l, e)?.decode(isa)?)?;
            let coded = weights[1].pack_expert(&bundle.expert(l, e)?.decode(isa)?)?;
            pass.run_expert(e, &own, &coded)
        };
        ordered(moe.n_experts, work, |_, output| {
            sums.add(&output);
            display.add(0, 1);
            Ok(())
        })?;
        let delta = pass.finish(sums)?;
        let overlap = pair.add(delta);
        pair.leave(l, Some(overlap));
    }
    pair.finish(reference, bundle)
}
