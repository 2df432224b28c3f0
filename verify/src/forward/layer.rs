//! The trunk weights of one layer: everything but its routed experts, read and packed once.

use moepack_convert::spec::{Activation, GateUp, Mlp, Moe, Residual, Role};
use moepack_convert::tensor::Expert;
use moepack_format::{Error, Result};
use moepack_quant::Isa;
use rayon::prelude::*;

use super::attention::Attention;
use super::experts::{GatedMlp, Scratch};
use super::linear::Linear;
use super::ngrams::Ngrams;
use super::norm::Norm;
use super::residual::{self, Sublayer};
use super::router::Router;
use super::shortcut::Beside;
use super::{ROWS, Stream, Weights, sized, tensor};
use crate::tokens::Windows;

/// The trunk weights of one layer.
pub struct LayerWeights {
    pub(super) isa: Isa,
    pub(super) hidden: usize,
    residual: Residual,
    ngrams: Option<Ngrams>,
    around_attention: Sublayer,
    attention: Attention,
    pub(super) around_mlp: Sublayer,
    mlp: MlpWeights,
    /// What runs beside experts on a shortcut.
    beside: Option<Box<Beside>>,
}

enum MlpWeights {
    Dense(Box<GatedMlp>),
    /// The layer is attention alone.
    None,
    Moe(Box<MoeWeights>),
}

/// What a layer with routed experts has beside them.
pub(super) struct MoeWeights {
    pub(super) spec: Moe,
    pub(super) router: Router,
    pub(super) shared: Option<SharedWeights>,
    /// Added to the sum of experts. `[hidden]`
    pub(super) sum_bias: Option<Vec<f32>>,
    /// To what experts work on, `[latent, hidden]`, and back.
    pub(super) latent: Option<(Linear, Linear)>,
}

/// Shared experts, as one MLP.
pub(super) struct SharedWeights {
    pub(super) mlp: GatedMlp,
    /// `[1, hidden]`: the output is multiplied by its sigmoid.
    pub(super) gate: Option<Linear>,
    pub(super) norms: Option<SharedNorms>,
}

/// Norms of an MLP beside the routed experts.
pub(super) struct SharedNorms {
    pub(super) before: Norm,
    pub(super) behind: Norm,
    /// Of the routed experts' sum.
    pub(super) routed: Norm,
}

impl LayerWeights {
    /// Reads layer `l`.
    ///
    /// # Errors
    /// A layer beyond the model's, a tensor that cannot be read or does not have the spec's shape.
    pub fn load(isa: Isa, weights: &dyn Weights, l: usize) -> Result<LayerWeights> {
        let spec = weights.spec();
        let n_layers = spec.layers.len();
        let no_layer = || Error::bad_data(format!("layer {l}, but the model has {n_layers}"));
        let layer = spec.layers.get(l).ok_or_else(no_layer)?;
        let mlp = match &layer.mlp {
            &Mlp::Dense { inter, activation, gate_up } => {
                MlpWeights::Dense(Box::new(load_dense(weights, l, (inter, activation), gate_up)?))
            }
            Mlp::Moe(moe) => MlpWeights::Moe(Box::new(MoeWeights::load(weights, l, moe)?)),
            Mlp::None => MlpWeights::None,
        };
        let mut around_mlp = Sublayer::load(weights, l, layer.residual, &residual::MLP)?;
        if layer.scaled {
            let factor = tensor(weights, Some(l), Role::LayerScale, &[1])?;
            around_mlp.layer_scale = factor.first().copied();
        }
        Ok(LayerWeights {
            isa,
            hidden: spec.hidden,
            residual: layer.residual,
            ngrams: layer.ngrams.as_ref().map(|n| Ngrams::load(weights, l, n)).transpose()?,
            around_attention: Sublayer::load(weights, l, layer.residual, &residual::ATTENTION)?,
            attention: Attention::load(weights, l, &layer.attention)?,
            around_mlp,
            mlp,
            beside: layer.shortcut.map(|s| Beside::load(weights, l, layer, s)).transpose()?.map(Box::new),
        })
    }

    /// Routed experts of this layer; 0 where one MLP serves all tokens.
    pub fn n_experts(&self) -> usize {
        self.moe().map_or(0, |moe| moe.spec.n_experts)
    }

    pub(super) fn moe(&self) -> Option<&MoeWeights> {
        match &self.mlp {
            MlpWeights::Dense(_) | MlpWeights::None => None,
            MlpWeights::Moe(moe) => Some(moe),
        }
    }

    /// Packs a routed expert of this layer.
    ///
    /// # Errors
    /// The layer has no experts, or this one has matrices of another size.
    pub fn pack_expert(&self, expert: &Expert) -> Result<GatedMlp> {
        let moe = self.moe().ok_or_else(|| Error::bad_data("this layer has no routed experts"))?;
        let width = moe.spec.width(self.hidden);
        GatedMlp::of_expert(expert, width, moe.spec.inter, moe.spec.activation)
    }

    /// The stream after attention, each window on its own from position 0. In a parallel layer attention waits in the
    /// stream for the MLP. Where experts are on a shortcut, all that they are a shortcut past has run, too.
    ///
    /// # Errors
    /// The stream does not have the windows' tokens.
    pub fn attention(&self, windows: &Windows, stream: &mut Stream) -> Result<()> {
        let (n_tokens, width) = (windows.lens.iter().sum::<usize>(), self.around_attention.width());
        if stream.width != width || stream.hidden.len() != n_tokens * width {
            let (rows, found) = (stream.n_tokens(), stream.width);
            let what = format!("a stream of {rows} × {found}, but {n_tokens} × {width} are due");
            return Err(Error::bad_data(what));
        }
        if let Some(ngrams) = &self.ngrams {
            ngrams.add(self.isa, windows, &mut stream.hidden);
        }
        if self.residual == Residual::Parallel {
            stream.pending =
                Some(self.attention.run(self.isa, &self.around_attention, windows, &stream.hidden));
            return Ok(());
        }
        self.attention.run_in_place(self.isa, &self.around_attention, windows, stream);
        if let Some(beside) = &self.beside {
            let taken = stream.hidden.clone();
            beside.run(self.isa, &self.around_mlp, windows, stream);
            stream.shortcut = Some(taken);
        }
        Ok(())
    }

    /// The stream after the MLP, for a layer without experts.
    ///
    /// # Errors
    /// The layer has routed experts: [`MoePass`](super::MoePass) runs those.
    pub fn dense(&self, stream: &mut Stream) -> Result<()> {
        let mlp = match &self.mlp {
            MlpWeights::Dense(mlp) => mlp,
            MlpWeights::None => return Ok(()),
            MlpWeights::Moe(_) => return Err(Error::bad_data("this layer has routed experts")),
        };
        add_mlp(self.isa, &self.around_mlp, mlp, stream);
        Ok(())
    }
}

/// Lets one MLP for all tokens change the stream.
pub(super) fn add_mlp(isa: Isa, around: &Sublayer, mlp: &GatedMlp, stream: &mut Stream) {
    let hidden = around.hidden();
    let n_tokens = stream.n_tokens();
    let mut notes = vec![0.0; n_tokens * around.n_notes()]; // [tokens, n_notes]
    let mut rows = vec![0.0; n_tokens * hidden]; // [tokens, hidden]
    let blocks = (
        stream.hidden.par_chunks(ROWS * stream.width),
        notes.par_chunks_mut(ROWS * around.n_notes()),
        rows.par_chunks_mut(ROWS * hidden),
    );
    blocks.into_par_iter().for_each_init(
        <(Vec<f32>, Scratch)>::default,
        |(x, scratch), (stream_rows, notes, out)| {
            let x = sized(x, out.len()); // [n, hidden]
            around.notes(isa, stream_rows, notes);
            around.inputs(isa, stream_rows, notes, x);
            mlp.apply(isa, x, out, scratch);
        },
    );
    stream.add(isa, &around.delta(isa, rows, &notes));
}

fn load_dense(
    weights: &dyn Weights,
    l: usize,
    (inter, activation): (usize, Activation),
    gate_up: GateUp,
) -> Result<GatedMlp> {
    let roles = match gate_up {
        GateUp::One => [Role::DenseGateUp, Role::DenseDown],
        GateUp::AsShared => [Role::SharedGateUp, Role::SharedDown],
        GateUp::Two => {
            let roles = [Role::DenseGate, Role::DenseUp, Role::DenseDown];
            return GatedMlp::load(weights, l, roles, inter, activation);
        }
    };
    GatedMlp::load_fused(weights, l, roles, inter, activation)
}

impl MoeWeights {
    fn load(weights: &dyn Weights, l: usize, moe: &Moe) -> Result<MoeWeights> {
        let shared = moe.shared.map(|shared| -> Result<SharedWeights> {
            let hidden = weights.spec().hidden;
            let mlp = if shared.fused {
                let roles = [Role::SharedGateUp, Role::SharedDown];
                GatedMlp::load_fused(weights, l, roles, shared.inter, shared.activation)?
            } else {
                let roles = [Role::SharedGate, Role::SharedUp, Role::SharedDown];
                GatedMlp::load(weights, l, roles, shared.inter, shared.activation)?
            };
            let gate = || Linear::load(weights, Some(l), (Role::SharedRouter, None), 1, hidden);
            let norm = |role| Norm::load_with(weights, Some(l), role, hidden, None);
            let norms = || -> Result<SharedNorms> {
                Ok(SharedNorms {
                    before: norm(Role::SharedNorm)?,
                    behind: norm(Role::SharedPostNorm)?,
                    routed: norm(Role::RoutedPostNorm)?,
                })
            };
            let norms = shared.normed.then(norms).transpose()?;
            Ok(SharedWeights { mlp, gate: shared.gated.then(gate).transpose()?, norms })
        });
        let sum_bias =
            moe.sum_bias.then(|| tensor(weights, Some(l), Role::ExpertsBias, &[weights.spec().hidden]));
        let latent = moe.latent.map(|latent| -> Result<_> {
            let (l, hidden) = (Some(l), weights.spec().hidden);
            let linear = |role, n, k| Linear::load(weights, l, (role, None), n, k);
            Ok((linear(Role::LatentDown, latent, hidden)?, linear(Role::LatentUp, hidden, latent)?))
        });
        Ok(MoeWeights {
            spec: moe.clone(),
            latent: latent.transpose()?,
            sum_bias: sum_bias.transpose()?,
            router: Router::load(weights, l, moe)?,
            shared: shared.transpose()?,
        })
    }
}
