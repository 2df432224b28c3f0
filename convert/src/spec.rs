//! What a model is, as data: the value that a family makes of a config.json and that the forward pass reads.
//!
//! Nothing here names a family. A new attention kind, router or residual is a variant here, one implementation in
//! `verify`, and a field in the families that have it.

mod attention;
mod moe;
mod ngrams;
mod recurrent;
mod role;

pub use attention::{
    Attention, Blocks, Compressed, Compression, Delta, DeltaProjections, Gate, GateBy, Gqa, Indexer,
    KeyChoice, LongRope, Mla, Pairing, Pools, QkNorm, Rope, RoutedAttention, Temperature,
};
pub use moe::{
    Activation, Choice, GateUp, GroupScore, Groups, Mlp, Moe, RouteWeights, Router, Score, Shared, SharedSum,
    Shortcut,
};
pub use ngrams::Ngrams;
pub use recurrent::{Lightning, ShortConv, StateSpace};
pub use role::{Part, Role};

/// A whole model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of the family.
    pub family: &'static str,
    /// Width of a sublayer's input.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// How norms work; `eps` of all but the latent ones.
    pub norm: Norm,
    /// `eps` of the final norm, where it has one of its own.
    pub final_eps: Option<f32>,
    /// The embedding is multiplied by this.
    pub embed_scale: f32,
    /// Logits are multiplied by this.
    pub logit_scale: f32,
    /// Logits become this · tanh(logit / this).
    pub logit_softcap: Option<f32>,
    /// The head has a bias.
    pub head_bias: bool,
    /// The head is the embedding.
    pub tied_head: bool,
    /// Several residual streams, collapsed before the final norm.
    pub hyper: Option<Hyper>,
    /// Longest position the family was made for.
    pub max_positions: usize,
    /// One entry a layer of the backbone, in order. MTP layers are not in it.
    pub layers: Vec<LayerSpec>,
}

impl ModelSpec {
    /// Values of a token between two layers.
    pub fn width(&self) -> usize {
        self.hidden * self.hyper.map_or(1, |h| h.n_streams)
    }

    /// Whether a forward pass is described.
    pub fn has_forward(&self) -> bool {
        self.layers.iter().all(|layer| layer.attention != Attention::Carried)
    }

    /// Layers with routed experts, ascending.
    pub fn moe_layers(&self) -> impl Iterator<Item = (usize, &Moe)> {
        self.layers.iter().enumerate().filter_map(|(l, layer)| Some((l, layer.mlp.moe()?)))
    }

    /// The routed experts of a layer.
    pub fn moe(&self, layer: usize) -> Option<&Moe> {
        self.layers.get(layer)?.mlp.moe()
    }

    /// Routed experts of all layers.
    pub fn n_experts(&self) -> u64 {
        self.moe_layers().map(|(_, moe)| moe.n_experts as u64).sum()
    }

    /// Weights of all routed experts, biases not counted.
    pub fn expert_weights(&self) -> u64 {
        self.moe_layers().map(|(_, moe)| moe.n_experts as u64 * moe.weights_each(self.hidden)).sum()
    }
}

/// One transformer layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Embeddings of n-grams that come before.
    pub ngrams: Option<Ngrams>,
    /// How tokens mix.
    pub attention: Attention,
    /// How channels mix.
    pub mlp: Mlp,
    /// How the two are added to the stream.
    pub residual: Residual,
    /// What leaves the layer is multiplied by a learnt number.
    pub scaled: bool,
    /// What runs while the experts do, if they are on a shortcut.
    pub shortcut: Option<Shortcut>,
}

/// Normalisation kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// x · rsqrt(mean(x²) + eps) · w
    Rms {
        /// Added to the mean square.
        eps: f32,
    },
    /// x · rsqrt(mean(x²) + eps) · (1 + w)
    RmsPlusOne {
        /// Added to the mean square.
        eps: f32,
    },
    /// (x − mean) · rsqrt(variance + eps) · w + b
    Layer {
        /// Added to the variance.
        eps: f32,
        /// Whether there is a b.
        bias: bool,
    },
}

impl Norm {
    /// What is added under the root.
    pub fn eps(self) -> f32 {
        match self {
            Norm::Rms { eps } | Norm::RmsPlusOne { eps } | Norm::Layer { eps, .. } => eps,
        }
    }
}

/// How a sublayer's output joins the stream; f is attention first, then the MLP.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Residual {
    /// x += f(norm(x))
    Plain,
    /// x += factor · f(norm(x))
    Scaled(f32),
    /// x += attention(norm(x)) + mlp(norm(x)), one norm for both.
    Parallel,
    /// x += f(norm(x)), once: the layer is either attention or an MLP.
    Single,
    /// x = a · norm(x) + b · f(norm(x)), with a and b of attention and of the MLP
    OfNormed {
        /// a and b of attention.
        attention: [f32; 2],
        /// a and b of the MLP.
        mlp: [f32; 2],
    },
    /// x += norm(f(x))
    Post,
    /// x += norm(f(norm(x)))
    Sandwich,
    /// Streams that are mixed before and after f; see [`Hyper`].
    Hyper(Hyper),
}

impl Residual {
    /// A norm stands before each sublayer.
    pub fn has_pre_norm(self) -> bool {
        self != Residual::Post && !self.is_gated()
    }

    /// Streams pass gates of each channel, which do the norm's work.
    pub fn is_gated(self) -> bool {
        matches!(self, Residual::Hyper(Hyper { across: Across::Gated(_), .. }))
    }

    /// Attention and MLP have one norm between them.
    pub fn shares_norm(self) -> bool {
        matches!(self, Residual::Parallel | Residual::Single)
    }

    /// A norm stands behind each sublayer.
    pub fn has_post_norm(self) -> bool {
        matches!(self, Residual::Post | Residual::Sandwich)
    }
}

/// Manifold-constrained hyper-connections (Xie et al. 2026; DeepSeek V4 paper, section 2.2): n streams X, with weights
/// from all of them before every sublayer:
///
/// ```text
/// y = Σ_j pre_j X_j;  X'_k = post_k f(norm(y)) + Σ_j C_jk X_j,  C made doubly stochastic by Sinkhorn's steps
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// Streams.
    pub n_streams: usize,
    /// How streams mix.
    pub across: Across,
    /// Added to weights and sums.
    pub eps: f32,
    /// Streams are collapsed to their mean before the final norm, not to a weighted sum.
    pub mean_head: bool,
}

/// How the streams of hyper-connections mix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Across {
    /// By C, made doubly stochastic in so many of Sinkhorn's steps, each over rows and columns.
    Sinkhorn(usize),
    /// Each goes on alone: C is the identity. `post` is this times a sigmoid, plus `eps` (Hunyuan 4).
    Alone(f32),
    /// Each goes on alone; all are normed, and their mean is taken after gates of each channel that come through a latent of
    /// this rank (Qwen4):
    ///
    /// ```text
    /// z = norm of each stream;  g = sigmoid(W_up silu(W_down z / n));  y = mean_j g_j z_j
    /// X'_k = X_k + 2 sigmoid(W_k z / n) f(y)
    /// ```
    Gated(usize),
}

impl Hyper {
    /// Numbers that a sublayer's weights are: pre, post and C.
    pub fn n_mixes(&self) -> usize {
        match self.across {
            Across::Sinkhorn(_) => (2 + self.n_streams) * self.n_streams,
            Across::Alone(_) => 2 * self.n_streams,
            Across::Gated(_) => self.n_streams,
        }
    }
}
