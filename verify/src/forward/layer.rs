//! The trunk weights of one layer: everything but its routed experts, read and packed once.

use moepack_convert::spec::{Mlp, Moe, Residual, Role};
use moepack_convert::tensor::Expert;
use moepack_format::{Error, Result};
use moepack_quant::{Isa, math};
use rayon::prelude::*;

use super::attention::Attention;
use super::experts::{GatedMlp, Scratch};
use super::linear::Linear;
use super::norm::Norm;
use super::router::Router;
use super::{ROWS, Stream, Weights};
use crate::tokens::Windows;

/// The trunk weights of one layer.
pub struct LayerWeights {
    pub(super) isa: Isa,
    hidden: usize,
    residual: Residual,
    attn_norm: Norm,
    attention: Attention,
    pub(super) mlp_norm: Norm,
    mlp: MlpWeights,
}

enum MlpWeights {
    Dense(GatedMlp),
    Moe(Box<MoeWeights>),
}

/// What a layer with routed experts has beside them.
pub(super) struct MoeWeights {
    pub(super) spec: Moe,
    pub(super) router: Router,
    pub(super) shared: Option<SharedWeights>,
}

/// Shared experts, as one MLP.
pub(super) struct SharedWeights {
    pub(super) mlp: GatedMlp,
    /// `[1, hidden]`: the output is multiplied by its sigmoid.
    pub(super) gate: Option<Linear>,
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
            &Mlp::Dense { inter, activation } => {
                let roles = [Role::DenseGate, Role::DenseUp, Role::DenseDown];
                MlpWeights::Dense(GatedMlp::load(weights, l, roles, inter, activation)?)
            }
            Mlp::Moe(moe) => MlpWeights::Moe(Box::new(MoeWeights::load(weights, l, moe)?)),
        };
        Ok(LayerWeights {
            isa,
            hidden: spec.hidden,
            residual: layer.residual,
            attn_norm: Norm::load(weights, Some(l), Role::AttnNorm, spec.hidden)?,
            attention: Attention::load(weights, l, &layer.attention)?,
            mlp_norm: Norm::load(weights, Some(l), Role::MlpNorm, spec.hidden)?,
            mlp,
        })
    }

    /// Routed experts of this layer; 0 where one MLP serves all tokens.
    pub fn n_experts(&self) -> usize {
        self.moe().map_or(0, |moe| moe.spec.n_experts)
    }

    pub(super) fn moe(&self) -> Option<&MoeWeights> {
        match &self.mlp {
            MlpWeights::Dense(_) => None,
            MlpWeights::Moe(moe) => Some(moe),
        }
    }

    /// Packs a routed expert of this layer.
    ///
    /// # Errors
    /// The layer has no experts, or this one has matrices of another size.
    pub fn pack_expert(&self, expert: &Expert) -> Result<GatedMlp> {
        let moe = self.moe().ok_or_else(|| Error::bad_data("this layer has no routed experts"))?;
        GatedMlp::of_expert(expert, self.hidden, moe.spec.inter, moe.spec.activation)
    }

    /// stream += attention(norm(stream)), each window on its own from position 0.
    ///
    /// # Errors
    /// The stream does not have the windows' tokens.
    pub fn attention(&self, windows: &Windows, stream: &mut Stream) -> Result<()> {
        let n_tokens: usize = windows.lens.iter().sum();
        if stream.width != self.hidden || stream.hidden.len() != n_tokens * self.hidden {
            let (rows, width) = (stream.n_tokens(), stream.width);
            let what = format!("a stream of {rows} × {width}, but {n_tokens} × {} are due", self.hidden);
            return Err(Error::bad_data(what));
        }
        let Residual::Plain = self.residual;
        self.attention.run(self.isa, &self.attn_norm, windows, stream);
        Ok(())
    }

    /// stream += mlp(norm(stream)), for a layer without experts.
    ///
    /// # Errors
    /// The layer has routed experts: [`MoePass`](super::MoePass) runs those.
    pub fn dense(&self, stream: &mut Stream) -> Result<()> {
        let MlpWeights::Dense(mlp) = &self.mlp else {
            return Err(Error::bad_data("this layer has routed experts"));
        };
        let blocks = stream.hidden.par_chunks_mut(ROWS * self.hidden);
        blocks.for_each_init(<(Vec<f32>, Vec<f32>, Scratch)>::default, |(x, out, scratch), hidden| {
            let x = super::sized(x, hidden.len()); // [n, hidden]
            self.mlp_norm.apply(self.isa, hidden, x);
            let out = super::sized(out, hidden.len()); // [n, hidden]
            mlp.apply(self.isa, x, out, scratch);
            math::add(self.isa, hidden, out);
        });
        Ok(())
    }
}

impl MoeWeights {
    fn load(weights: &dyn Weights, l: usize, moe: &Moe) -> Result<MoeWeights> {
        let shared = moe.shared.map(|shared| -> Result<SharedWeights> {
            let roles = [Role::SharedGate, Role::SharedUp, Role::SharedDown];
            let mlp = GatedMlp::load(weights, l, roles, shared.inter, moe.activation)?;
            let hidden = weights.spec().hidden;
            let gate = || Linear::load(weights, Some(l), (Role::SharedRouter, None), 1, hidden);
            Ok(SharedWeights { mlp, gate: shared.gated.then(gate).transpose()? })
        });
        Ok(MoeWeights {
            spec: moe.clone(),
            router: Router::load(weights, l, moe)?,
            shared: shared.transpose()?,
        })
    }
}
