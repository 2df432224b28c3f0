//! Attention kinds.

use super::recurrent::{Lightning, ShortConv, StateSpace};

/// Attention kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Attention {
    /// Grouped-query attention.
    Gqa(Gqa),
    /// Multi-head latent attention.
    Mla(Mla),
    /// One key that is also the value, a window of them and compressed entries beyond.
    Compressed(Compressed),
    /// Linear attention: a state that each token changes by the gated delta rule.
    Delta(Delta),
    /// Attention whose queries and outputs come from experts.
    Routed(RoutedAttention),
    /// A selective state space.
    StateSpace(StateSpace),
    /// A short convolution between gates.
    ShortConv(ShortConv),
    /// Linear attention whose state decays at a fixed rate.
    Lightning(Lightning),
    /// None: the layer is an MLP alone.
    None,
    /// Not described: its tensors are carried, and no forward pass runs through it.
    Carried,
}

/// Grouped-query attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Gqa {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Dimensions of a query or key.
    pub head_dim: usize,
    /// Dimensions of a value.
    pub v_dim: usize,
    /// Queries, keys and values come from one matrix, in this order.
    pub fused: bool,
    /// Values are the keys before their norm and position.
    pub k_is_v: bool,
    /// Values have a norm of each head, without weights.
    pub v_norm: bool,
    /// Norm of queries and keys.
    pub qk_norm: QkNorm,
    /// This norm comes after RoPE, not before.
    pub qk_norm_late: bool,
    /// q, k and v projections have biases.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub o_bias: bool,
    /// Queries, keys and values are clamped to ±this (`clip_qkv`).
    pub clip: Option<f32>,
    /// Keys `t - window + 1 ..= t` only.
    pub window: Option<usize>,
    /// Keys of the query's own chunk of this length only.
    pub chunk: Option<usize>,
    /// Each head has a learnt logit without a value.
    pub sinks: bool,
    /// Factor of the logits.
    pub scale: f32,
    /// Queries grow with their position.
    pub temperature: Option<Temperature>,
    /// Factor of the values.
    pub v_scale: f32,
    /// A gate on what the heads give.
    pub gate: Option<Gate>,
    /// From the gate's logits to factors.
    pub gate_by: GateBy,
    /// Queries see only some blocks of keys.
    pub blocks: Option<Blocks>,
    /// Queries see only some pools of keys.
    pub pools: Option<Pools>,
    /// Position encoding.
    pub rope: Rope,
}

/// Which pools of consecutive keys a query sees (Qwen4): those of the largest sums over heads of relu(q_h · k), where k is
/// the mean of the pool's keys, normed and rotated as its first; and those after the last pool that it sees as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pools {
    /// Heads of the indexer.
    pub n_heads: usize,
    /// Dimensions of its queries and keys, the rotary ones first.
    pub head_dim: usize,
    /// Keys of a pool.
    pub size: usize,
    /// Pools that a query sees.
    pub n_used: usize,
}

/// Which blocks of keys a query sees (MiniMax-M3): those of the largest products of an indexer's query with one of their
/// keys, and the last ones before the query. Each of the indexer's heads chooses for equally many consecutive heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Heads of the indexer; divides the query heads.
    pub n_heads: usize,
    /// Dimensions of its queries and its one key, the rotary ones first.
    pub head_dim: usize,
    /// Keys of a block.
    pub size: usize,
    /// Blocks that a query sees.
    pub n_used: usize,
    /// So many of them are the query's own and those before it.
    pub n_local: usize,
}

/// A mixture of attention heads (Zhang et al. 2022, arXiv 2210.05144; JetMoE, arXiv 2404.07413): each expert a token uses
/// projects queries, which see the same keys and values, and projects what they find back.
#[derive(Clone, Debug, PartialEq)]
pub struct RoutedAttention {
    /// Experts.
    pub n_experts: usize,
    /// Experts a token uses.
    pub n_used: usize,
    /// Heads of keys and values, and of an expert's queries.
    pub n_kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
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
    /// Over each head's dimensions, without weights.
    Unweighted,
}

/// What the heads give is multiplied by a function of this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// The second half of each head's part of `q_proj`.
    InQuery,
    /// A matrix of its own, as wide as the heads.
    Own,
    /// A matrix of its own with one row a head.
    PerHead,
}

/// From a gate's logits to factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateBy {
    /// 1 / (1 + e^−g)
    Sigmoid,
    /// ln(1 + e^g)
    Softplus,
}

/// Queries are multiplied by `1 + beta · ln(1 + floor((position + shift) / floor))` (Llama 4's attention temperature).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature {
    /// Strength.
    pub beta: f32,
    /// Positions of one step.
    pub floor: f32,
    /// Added to the position.
    pub shift: f32,
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
    /// The key-value latent is multiplied by this after its norm.
    pub kv_gain: f32,
    /// Biases on the down projections and the output.
    pub bias: bool,
    /// Factor of the logits, YaRN's mscale² included.
    pub scale: f32,
    /// Queries grow with their position.
    pub temperature: Option<Temperature>,
    /// Which keys a query sees.
    pub choice: KeyChoice,
    /// A gate on what the heads give: the sigmoid of a matrix of its own.
    pub gate: Option<Gate>,
    /// Each head has a learnt logit without a value.
    pub sinks: bool,
    /// Position encoding of the rope dimensions.
    pub rope: Rope,
}

/// Which of the keys before it a query sees.
#[derive(Clone, Debug, PartialEq)]
pub enum KeyChoice {
    /// All.
    All,
    /// Those that an indexer chooses.
    Indexed(Indexer),
    /// Those that the indexer of the last layer with one chose.
    AsBefore,
}

impl KeyChoice {
    /// The layer's own indexer.
    pub fn indexer(&self) -> Option<&Indexer> {
        if let KeyChoice::Indexed(indexer) = self { Some(indexer) } else { None }
    }
}

/// Chooses the keys that a query sees: Σ_h w_h · relu(q_h · k), the largest of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Indexer {
    /// Heads.
    pub n_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Keys a query sees.
    pub n_used: usize,
    /// Added to the variance in the norm of keys.
    pub key_eps: f32,
    /// Keys are chosen in pools of so many, each by one key that a softmax over its gates makes of theirs; the last pool of
    /// a query, which is not complete, is always seen.
    pub pool: Option<usize>,
    /// The last dimensions of a head rotate, not the first.
    pub rotates_last: bool,
    /// Position encoding of queries and keys.
    pub rope: Rope,
}

/// DeepSeek V4's attention (paper, section 2.3): queries through a latent; one head of keys that are also the values, of
/// the last `window` tokens and of compressed entries; the rotation of the values undone in the output; an output
/// projection in groups and through a latent.
#[derive(Clone, Debug, PartialEq)]
pub struct Compressed {
    /// Query heads.
    pub n_heads: usize,
    /// Dimensions of a head, the rotary ones last.
    pub head_dim: usize,
    /// Rank of the query latent.
    pub q_lora: usize,
    /// Groups of heads in the output projection.
    pub n_groups: usize,
    /// Rank of each group.
    pub o_lora: usize,
    /// Uncompressed keys `t - window + 1 ..= t`.
    pub window: usize,
    /// Factor of the logits.
    pub scale: f32,
    /// Position encoding.
    pub rope: Rope,
    /// The compressed entries, where there are any.
    pub compression: Option<Compression>,
}

/// Entries that stand for `ratio` tokens each.
#[derive(Clone, Debug, PartialEq)]
pub struct Compression {
    /// Tokens of an entry.
    pub ratio: usize,
    /// An entry also looks at the tokens of the entry before, with weights of their own.
    pub overlap: bool,
    /// Which entries a query sees; all where there is none.
    pub indexer: Option<Indexer>,
}

impl Compression {
    /// Vectors that each token gives to entries: its own and, with overlap, the next.
    pub fn n_series(&self) -> usize {
        if self.overlap { 2 } else { 1 }
    }
}

/// Linear attention by the gated delta rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Delta {
    /// Heads of queries and keys.
    pub n_k_heads: usize,
    /// Heads of values; a multiple of the others.
    pub n_v_heads: usize,
    /// Dimensions of a query or key.
    pub k_dim: usize,
    /// Dimensions of a value.
    pub v_dim: usize,
    /// Tokens that the convolution looks at.
    pub kernel: usize,
    /// How a token's input becomes queries, keys, values, gates, betas and decays.
    pub projections: DeltaProjections,
    /// What the heads give is multiplied by the sigmoid of the gates, not by their silu.
    pub sigmoid_gate: bool,
    /// Decays are exp(bound · sigmoid(exp(A) · a)), not exp(−exp(A) · softplus(a)).
    pub decay_bound: Option<f32>,
}

/// How a token's input becomes what the gated delta rule takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeltaProjections {
    /// Two matrices whose rows are grouped by key heads; one decay a value head; gates through silu.
    Grouped,
    /// Four matrices; the rest as before.
    Separate,
    /// Queries, keys and values of their own, gates and decays through a rank of one head (Kimi's delta attention): one
    /// decay a channel of the keys; gates through the sigmoid.
    LowRank,
    /// The same with gates and decays through one matrix each.
    FullRank,
}

impl DeltaProjections {
    /// Queries, keys and values have matrices and convolutions of their own, keys a decay for each channel.
    pub fn is_kimi(self) -> bool {
        matches!(self, DeltaProjections::LowRank | DeltaProjections::FullRank)
    }
}

impl Delta {
    /// Channels of the convolution: queries, keys and values.
    pub fn n_channels(&self) -> usize {
        2 * self.n_k_heads * self.k_dim + self.n_v_heads * self.v_dim
    }
}

/// Rotary position encoding, with every scaling rule already worked into the frequencies.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Angle per position of each pair; `2 * inv_freq.len()` dimensions rotate, the first ones of the head unless the
    /// attention kind says otherwise. None rotate where this is empty.
    pub inv_freq: Vec<f32>,
    /// Which dimensions make a pair.
    pub pairing: Pairing,
    /// Factor of cos and sin (YaRN's attention factor).
    pub amplitude: f32,
    /// What differs in long texts.
    pub long: Option<LongRope>,
}

impl Rope {
    /// No position at all.
    pub const NONE: Rope = Rope { inv_freq: Vec::new(), pairing: Pairing::Half, amplitude: 1.0, long: None };
}

/// Another amplitude for texts beyond a length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LongRope {
    /// The longest text without it.
    pub positions: usize,
    /// Factor of cos and sin.
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
