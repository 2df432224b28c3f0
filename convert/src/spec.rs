//! What a model is, as data: the value that a family makes of a config.json and that the forward pass reads.
//!
//! Nothing here names a family. A new attention kind, router or residual is a variant here, one implementation in
//! `verify`, and a field in the families that have it.

/// A whole model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of the family.
    pub family: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// How norms work; `eps` of all but the latent ones.
    pub norm: Norm,
    /// The head is the embedding.
    pub tied_head: bool,
    /// Longest position the family was made for.
    pub max_positions: usize,
    /// One entry a layer of the backbone, in order. MTP layers are not in it.
    pub layers: Vec<LayerSpec>,
}

impl ModelSpec {
    /// Layers with routed experts, ascending.
    pub fn moe_layers(&self) -> impl Iterator<Item = (usize, &Moe)> {
        self.layers.iter().enumerate().filter_map(|(l, layer)| Some((l, layer.mlp.moe()?)))
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
    /// How tokens mix.
    pub attention: Attention,
    /// How channels mix.
    pub mlp: Mlp,
    /// How the two are added to the stream.
    pub residual: Residual,
}

/// Normalisation kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// x · rsqrt(mean(x²) + eps) · w
    Rms {
        /// Added to the mean square.
        eps: f32,
    },
}

/// How a sublayer's output joins the stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Residual {
    /// x += f(norm(x)), attention first, then the MLP.
    Plain,
}

/// Attention kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Attention {
    /// Grouped-query attention.
    Gqa(Gqa),
    /// Multi-head latent attention.
    Mla(Mla),
}

/// Grouped-query attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Gqa {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Norm of queries and keys before RoPE.
    pub qk_norm: QkNorm,
    /// q, k and v projections have biases.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub o_bias: bool,
    /// Queries, keys and values are clamped to ±this (`clip_qkv`).
    pub clip: Option<f32>,
    /// Keys `t - window + 1 ..= t` only.
    pub window: Option<usize>,
    /// Each head has a learnt logit without a value.
    pub sinks: bool,
    /// Factor of the logits.
    pub scale: f32,
    /// Position encoding.
    pub rope: Rope,
}

/// Norm of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Over each head's dimensions.
    Head,
    /// Over all heads' dimensions together.
    Full,
}

/// Multi-head latent attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Mla {
    /// Heads.
    pub n_heads: usize,
    /// Rank of the query latent; `None` where `q_proj` is direct.
    pub q_lora: Option<usize>,
    /// Rank of the key-value latent.
    pub kv_lora: usize,
    /// Dimensions without position.
    pub nope_dim: usize,
    /// Dimensions with position, after the others.
    pub rope_dim: usize,
    /// Dimensions of a value.
    pub v_dim: usize,
    /// `eps` of the two latent norms (1e-6 in the reference, whatever the config says).
    pub latent_eps: f32,
    /// Biases on the down projections and the output.
    pub bias: bool,
    /// Factor of the logits, YaRN's mscale² included.
    pub scale: f32,
    /// Position encoding of the rope dimensions.
    pub rope: Rope,
}

/// Rotary position encoding, with every scaling rule already worked into the frequencies.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Angle per position of each pair; `2 * inv_freq.len()` dimensions rotate, the first ones of the head.
    pub inv_freq: Vec<f32>,
    /// Which dimensions make a pair.
    pub pairing: Pairing,
    /// Factor of cos and sin (YaRN's attention factor).
    pub amplitude: f32,
}

/// Which dimensions rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// `(i, i + r/2)`
    Half,
    /// `(2i, 2i + 1)`
    Adjacent,
}

/// The MLP of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Mlp {
    /// One MLP for all tokens.
    Dense {
        /// Rows of gate and up.
        inter: usize,
        /// Nonlinearity.
        activation: Activation,
    },
    /// Routed experts.
    Moe(Moe),
}

impl Mlp {
    /// The routed experts, where there are any.
    pub fn moe(&self) -> Option<&Moe> {
        if let Mlp::Moe(moe) = self { Some(moe) } else { None }
    }
}

/// Routed experts with their router and shared experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// Routed experts.
    pub n_experts: usize,
    /// Experts a token uses.
    pub n_experts_used: usize,
    /// Rows of an expert's gate and up.
    pub inter: usize,
    /// Nonlinearity of routed and shared experts.
    pub activation: Activation,
    /// Experts have biases.
    pub bias: bool,
    /// How experts are chosen and weighted.
    pub router: Router,
    /// Shared experts, taken together as one MLP.
    pub shared: Option<Shared>,
}

impl Moe {
    /// Weights of one routed expert in a model of this width: gate, up and down.
    pub fn weights_each(&self, hidden: usize) -> u64 {
        3 * hidden as u64 * self.inter as u64
    }
}

/// Shared experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Rows of gate and up, all shared experts together.
    pub inter: usize,
    /// Output is multiplied by sigmoid(w · x).
    pub gated: bool,
}

/// How experts are chosen and weighted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Router {
    /// The router has a bias, added to the logits.
    pub bias: bool,
    /// From logits to scores.
    pub score: Score,
    /// A correction bias is added to the scores for choosing only.
    pub correction: bool,
    /// Experts compete in groups.
    pub groups: Option<Groups>,
    /// From scores to weights of the chosen.
    pub weights: RouteWeights,
    /// Weights are divided by their sum plus this.
    pub renorm: Option<f32>,
    /// Weights are multiplied by this.
    pub scale: f32,
}

/// From logits to scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
    /// The logits themselves.
    Identity,
}

/// Group-limited choice: only experts of the best groups may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Groups; divides `n_experts`.
    pub n_groups: usize,
    /// Groups kept.
    pub n_groups_used: usize,
    /// Score of a group.
    pub score: GroupScore,
}

/// Score of a group of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// The largest.
    Max,
    /// Sum of the two largest.
    Top2Sum,
}

/// From scores to weights of the chosen experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteWeights {
    /// The (unbiased) scores.
    Scores,
    /// Softmax over the chosen experts' scores.
    SoftmaxOverChosen,
}

/// Nonlinearity of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// silu(gate) · up
    Silu,
    /// (clamp(up) + 1) · g · sigmoid(alpha · g), g = min(gate, limit)
    ClampedSwish {
        /// Slope inside the sigmoid.
        alpha: f32,
        /// Clamp of gate (from above) and up (both sides).
        limit: f32,
    },
}

/// What a trunk tensor is for. With a layer index it names exactly one tensor of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "each name is the field's own word for the matrix")]
pub enum Role {
    Embed,
    FinalNorm,
    LmHead,
    AttnNorm,
    MlpNorm,
    Q,
    K,
    V,
    O,
    QBias,
    KBias,
    VBias,
    OBias,
    QNorm,
    KNorm,
    Sinks,
    QA,
    QANorm,
    QB,
    KvA,
    KvANorm,
    KvB,
    QABias,
    KvABias,
    DenseGate,
    DenseUp,
    DenseDown,
    Router,
    RouterBias,
    RouterCorrection,
    SharedGate,
    SharedUp,
    SharedDown,
    SharedRouter,
    /// Kept as it is, no part of the forward pass (MTP layers, rotary tables …).
    Carried,
}

/// One matrix (or bias) of a routed expert, in canonical orientation `[out, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// `[inter, hidden]`
    Gate,
    /// `[inter, hidden]`
    Up,
    /// `[hidden, inter]`
    Down,
    /// `[1, inter]`
    GateBias,
    /// `[1, inter]`
    UpBias,
    /// `[1, hidden]`
    DownBias,
}

impl Part {
    /// Order inside a record.
    pub const ALL: [Part; 6] =
        [Part::Gate, Part::Up, Part::Down, Part::GateBias, Part::UpBias, Part::DownBias];

    /// Name in a bundle.
    pub const fn name(self) -> &'static str {
        match self {
            Part::Gate => "gate_proj",
            Part::Up => "up_proj",
            Part::Down => "down_proj",
            Part::GateBias => "gate_proj_bias",
            Part::UpBias => "up_proj_bias",
            Part::DownBias => "down_proj_bias",
        }
    }

    /// Whether this is a matrix, which codecs may quantize; biases never are.
    pub const fn is_matrix(self) -> bool {
        matches!(self, Part::Gate | Part::Up | Part::Down)
    }
}
