//! What a family says of its parts: which keys of config.json hold their numbers, and what holds where a key is
//! missing. Each rule has a plain constant that others are written as a difference from.

use super::mixer_rules::{MixedLayers, MixerRule};
use crate::hparams::Keys;
use crate::spec::{DeltaProjections, Gate, GateBy, Pairing, QkNorm};

/// A value that a key of config.json must have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fixed {
    /// This string.
    Text(&'static str),
    /// This integer.
    Int(i64),
    /// This truth value.
    Bool(bool),
    /// Anything but this string.
    NotText(&'static str),
}

/// Whether something is there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Switch {
    /// In every model.
    Always,
    /// In none.
    Never,
    /// As this key says; transformers' default where it is missing.
    Key(&'static str, bool),
    /// Unless this key is written as null.
    UnlessNull(&'static str),
}

/// A factor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Factor {
    /// None.
    One,
    /// The value of this key, or transformers' default.
    Key(&'static str, f64),
    /// One divided by it.
    Inverse(&'static str, f64),
    /// The root of the hidden size.
    RootOfHidden,
    /// The root of the hidden size, where this key is true.
    RootOfHiddenIf(&'static str),
}

/// Norms of a family; the number is the `eps` where config.json has none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormRule {
    /// RMS, `rms_norm_eps`.
    Rms(f64),
    /// RMS of this `eps`, but for the last, which has `rms_norm_eps`, or this too.
    RmsButLast(f64),
    /// RMS, with this key instead.
    RmsOf(&'static str, f64),
    /// RMS whose weights are stored minus one, `rms_norm_eps`.
    RmsPlusOne(f64),
    /// Layer norm with a bias, `rms_norm_eps`.
    Layer(f64),
    /// Layer norm without a bias and of this `eps`, whatever config.json says.
    LayerWithoutBias(f64),
    /// RMS where `rms_norm_eps` is a number, else a layer norm without a bias, `layer_norm_eps`.
    LayerUnlessRms(f64),
}

/// How sublayers of a family join the stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ResidualRule {
    /// Added.
    Plain,
    /// Added, times a factor.
    Scaled(Factor),
    /// Attention and MLP of the same input.
    Parallel,
    /// Added; each layer is one sublayer.
    Single,
    /// Added to what is normed, not to what came in, both with a factor: its keys for the factors of what is normed and
    /// of the output, of attention, of what stands in its place, and of MLPs; 1 where they are missing.
    OfNormed {
        /// Layers with attention.
        full: [Keys; 2],
        /// The others.
        mixer: [Keys; 2],
        /// MLPs.
        mlp: [Keys; 2],
    },
    /// Normed, then added.
    Post,
    /// Normed before and after.
    Sandwich,
    /// Hyper-connections: `hc_mult`, `hc_sinkhorn_iters`, `hc_eps`.
    Hyper,
    /// The same, but the mean of the streams in the end.
    HyperMean,
    /// Streams that pass gates: `hc_count`, `hc_lowrank`.
    HyperGated,
    /// Hyper-connections whose streams do not mix: `hc_mult`, `hc_magnitude`, `hc_eps`.
    HyperAlone,
}

/// Attention of a family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum AttentionRule {
    /// Grouped-query attention.
    Gqa(GqaRule),
    /// Multi-head latent attention.
    Mla(MlaRule),
    /// Windows and compressed entries.
    Compressed(CompressedRule),
    /// Grouped-query attention in the layers that `layer_types` calls `full_attention` (without the list each
    /// `full_attention_interval`-th), linear attention in the others.
    Hybrid(GqaRule, DeltaRule),
    /// Latent attention in the layers that `layer_types` calls `full_attention` (without the list those in
    /// `linear_attn_config.full_attn_layers`, counted from 1), linear attention in the others.
    HybridMla(MlaRule, DeltaRule),
    /// Attention whose queries and outputs come from experts: `num_key_value_heads`, `kv_channels`, and as many experts as
    /// MLPs have.
    Routed,
    /// Grouped-query attention in some layers, another way to mix tokens in the others.
    Mixed(GqaRule, MixerRule, MixedLayers),
    /// Not described; its tensors are carried.
    Carried,
}

/// Linear attention of a family: `linear_num_key_heads`, `linear_num_value_heads`, `linear_key_head_dim`,
/// `linear_value_head_dim`, `linear_conv_kernel_dim`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeltaRule {
    /// How a token's input becomes what the rule takes.
    pub projections: DeltaProjections,
    /// Key of the function of the gates, `silu` where it is missing, or `sigmoid`.
    pub gate_key: Option<&'static str>,
    /// Key and default of n: each n-th layer has full attention, where config.json has no list.
    pub group: Option<(&'static str, usize)>,
    /// Decays are bounded.
    pub bound: Option<Bound>,
}

/// A bound of decays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// Key of a switch; there is no bound where it is false.
    pub switch: Option<&'static str>,
    /// Keys of the bound; there is none where it is written as null.
    pub keys: Keys,
    /// Where config.json has neither.
    pub default: f64,
}

impl DeltaRule {
    /// The plain rule with these projections.
    pub const fn plain(projections: DeltaProjections) -> DeltaRule {
        DeltaRule { projections, gate_key: None, group: None, bound: None }
    }
}

/// Grouped-query attention of a family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GqaRule {
    /// Keys for the number of key-value heads; as many as query heads where they are missing.
    pub n_kv_heads: Keys,
    /// Key-value heads of a layer with a window, as a multiple of the others'.
    pub kv_heads_in_window: usize,
    /// `head_dim` where config.json has none; `None` means hidden / heads.
    pub head_dim: Option<usize>,
    /// Keys for the dimensions of a value; those of a key where they are missing.
    pub v_dim: Keys,
    /// One matrix for queries, keys and values.
    pub fused: bool,
    /// Layers without a window have heads of their own: `per_layer_config`, else `global_head_dim` and, where this key is
    /// true, `num_global_key_value_heads`; where it is true, their values are their keys.
    pub wide_if: Option<&'static str>,
    /// A norm of values, without weights.
    pub v_norm: bool,
    /// Norm of queries and keys.
    pub qk_norm: QkNorm,
    /// Whether it is there.
    pub qk_norm_if: Switch,
    /// It comes after RoPE.
    pub qk_norm_late: bool,
    /// Biases of q, k and v.
    pub qkv_bias: Switch,
    /// Bias of the output.
    pub o_bias: Switch,
    /// Keys of the clamp of q, k and v.
    pub clip: Keys,
    /// Sliding windows and chunks.
    pub window: WindowRule,
    /// Which layers have no position encoding.
    pub nope: NopeRule,
    /// One learnt logit a head.
    pub sinks: Sinks,
    /// Factor of the logits, which else is one over the root of `head_dim`.
    pub scale: Option<Factor>,
    /// Factor of the values.
    pub v_scale: Factor,
    /// A gate on the output.
    pub gate: Option<Gate>,
    /// From its logits to factors.
    pub gate_by: GateBy,
    /// Key that may say that the gate has one value a head, as it has where the key is missing: true or `per-head`.
    pub gate_per_head: Option<&'static str>,
    /// Blocks of keys in the layers that `layer_types` calls by this name, else `sparse_attention_config` has a 1 for:
    /// `index_n_heads`, `index_head_dim`, `index_block_size`, `index_topk_blocks`, `index_local_blocks`.
    pub blocks: Option<&'static str>,
    /// Pools of keys: `indexer_n_heads`, `indexer_head_dim`, `indexer_budget`, `indexer_compress_ratio`.
    pub pools: bool,
    /// Key for a list of the query heads of each layer.
    pub heads_of_layers: Keys,
    /// Queries without position encoding grow with the position: `attn_temperature_tuning`, `attn_scale`,
    /// `floor_scale`.
    pub temperature: bool,
    /// Which dimensions rotate together.
    pub pairing: Pairing,
}

impl GqaRule {
    /// Llama's.
    pub const PLAIN: GqaRule = GqaRule {
        n_kv_heads: &["num_key_value_heads"],
        kv_heads_in_window: 1,
        head_dim: None,
        v_dim: &[],
        fused: false,
        wide_if: None,
        v_norm: false,
        qk_norm: QkNorm::None,
        qk_norm_if: Switch::Always,
        qk_norm_late: false,
        qkv_bias: Switch::Key("attention_bias", false),
        o_bias: Switch::Key("attention_bias", false),
        clip: &[],
        window: WindowRule::None,
        nope: NopeRule::None,
        sinks: Sinks::None,
        scale: None,
        v_scale: Factor::One,
        gate: None,
        gate_by: GateBy::Sigmoid,
        gate_per_head: None,
        blocks: None,
        pools: false,
        heads_of_layers: &[],
        temperature: false,
        pairing: Pairing::Half,
    };
}

/// Which layers see only a window of keys, `sliding_window` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowRule {
    /// None.
    None,
    /// All, if `sliding_window` is a number.
    All,
    /// All, if `use_sliding_window` is true.
    IfUsed,
    /// Those that `layer_types` calls `sliding_attention`; without the list every other layer, beginning with
    /// the first.
    LayerTypes {
        /// `sliding_window` where config.json has none.
        default: usize,
    },
    /// Like `LayerTypes` where `use_sliding_window` is true; without the list every other one of the first
    /// `max_window_layers`.
    LayerTypesIfUsed,
    /// Those that `layer_types` says; without the list those from `max_window_layers` on, if `sliding_window` is a
    /// number.
    LayerTypesFrom {
        /// `max_window_layers` where config.json has none.
        default: usize,
    },
    /// Those that `layer_types` says; none without the list.
    Listed {
        /// `sliding_window` where config.json has none.
        default: usize,
    },
    /// Those that `layer_types` says; without the list all but each n-th. Never the last.
    AllButLast {
        /// n.
        n: usize,
        /// `sliding_window` where config.json has none.
        default: usize,
    },
    /// Those that `layer_types` says; without the list all but each n-th.
    AllBut {
        /// Key of n.
        every: &'static str,
        /// n where config.json has none.
        n: usize,
        /// The first layer has no window either.
        first_too: bool,
        /// `sliding_window` where config.json has none.
        default: usize,
    },
    /// Chunks of `attention_chunk_size` in those that `layer_types` calls `chunked_attention`; without the list those
    /// with position encoding.
    Chunks {
        /// `attention_chunk_size` where config.json has none.
        default: usize,
    },
}

/// Which layers have no position encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NopeRule {
    /// Every layer has one.
    None,
    /// Those without a window, where others have one.
    WithoutWindow,
    /// Those without a window, unless they are dense and `prefix_dense_sliding_window_pattern` is 1.
    WithoutWindowUnlessDense,
    /// None has one.
    All,
    /// None has one, unless `position_embedding_type` is `rope`.
    UnlessAsked,
    /// Those with a 0 in `no_rope_layers`; without the list each `no_rope_layer_interval`-th.
    Listed,
}

/// Which layers have attention sinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sinks {
    /// None.
    None,
    /// All.
    All,
    /// Those with a window.
    InWindow,
}

/// Multi-head latent attention of a family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlaRule {
    /// `eps` of the latent norms; `None` is the model's.
    pub latent_eps: Option<f64>,
    /// Biases of the down projections and the output.
    pub bias: Switch,
    /// Whether rotary pairs are adjacent.
    pub adjacent: Switch,
    /// The indexer, where there is one.
    pub indexer: Option<IndexerRule>,
    /// `q_proj` is direct, whatever config.json says.
    pub direct_q: bool,
    /// A gate on the output.
    pub gate: Option<Gate>,
    /// One learnt logit a head.
    pub sinks: bool,
    /// Queries grow with the position: `llama_4_scaling_beta` among the parameters of the rotary encoding.
    pub temperature: bool,
    /// Latents are multiplied by the root of the stream's width over their rank.
    pub gain: bool,
    /// The rotary dimensions are there, but do not rotate.
    pub nope: bool,
}

impl MlaRule {
    /// DeepSeek V3's.
    pub const PLAIN: MlaRule = MlaRule {
        // The reference gives the latent norms their class default, whatever rms_norm_eps says.
        latent_eps: Some(1e-6),
        bias: Switch::Key("attention_bias", false),
        adjacent: Switch::Key("rope_interleave", true),
        indexer: None,
        direct_q: false,
        gate: None,
        sinks: false,
        temperature: false,
        gain: false,
        nope: false,
    };
}

/// The indexer of latent attention: `index_n_heads`, `index_head_dim`, `index_topk`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct IndexerRule {
    /// How its pairs rotate.
    pub pairing: Pairing,
    /// The last dimensions of its heads rotate, not the first.
    pub rotates_last: bool,
    /// The norm of its keys has the model's `eps`, not 1e-6.
    pub model_eps: bool,
    /// Key of the length of pools of keys and its default.
    pub pool: Option<(&'static str, usize)>,
    /// Where config.json does not say which layers have one: the first, and each so many layers from the second on.
    pub every: usize,
}

impl IndexerRule {
    /// DeepSeek V3.2's, with pairs of this kind.
    pub const fn plain(pairing: Pairing) -> IndexerRule {
        IndexerRule { pairing, rotates_last: false, model_eps: false, pool: None, every: 1 }
    }
}

/// DeepSeek V4's attention: what transformers assumes where config.json says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedRule {
    /// Tokens of an entry that an indexer chooses, and of the others.
    pub ratios: [usize; 2],
}
