//! What a model family is, as data, and the table of all of them.
//!
//! A family says which keys of config.json mean what (`describe.rs` turns that into a [`ModelSpec`]) and how
//! tensors are called (`catalog.rs` claims them). It has no code of its own. A new family is one file with
//! one constant, and one line in [`FAMILIES`]; what differs from another family is said with `..OTHER`.
//!
//! [`ModelSpec`]: crate::spec::ModelSpec

use moepack_format::{Error, Result};

use crate::hparams::{Config, Keys};
use crate::rope::RopeRule;
use crate::spec::{GroupScore, Part, QkNorm, Role, RouteWeights, Score};

mod common;
mod deepseek_v3;
mod gpt_oss;
mod mixtral;
mod olmoe;
mod qwen2_moe;
mod qwen3_moe;

/// Every family that can be read.
pub static FAMILIES: &[&Family] = &[
    &deepseek_v3::FAMILY,
    &gpt_oss::FAMILY,
    &mixtral::FAMILY,
    &olmoe::FAMILY,
    &qwen2_moe::FAMILY,
    &qwen3_moe::FAMILY,
];

/// A model family.
#[derive(Debug)]
pub struct Family {
    /// `model_type` in config.json; the first is the family's name, the others are the same architecture.
    pub model_types: &'static [&'static str],
    /// Class in transformers.
    pub class: &'static str,
    /// Architecture name in GGUF.
    pub gguf: &'static str,
    /// Keys that must have this value where they are written: other values are another architecture.
    pub fixed: &'static [(&'static str, Fixed)],
    /// `rms_norm_eps` where config.json has none.
    pub norm_eps: f64,
    /// How tokens mix.
    pub attention: AttentionRule,
    /// Rotary encoding.
    pub rope: RopeRule,
    /// Which layers have experts.
    pub moe_layers: MoeLayers,
    /// Experts, router and shared experts.
    pub moe: MoeRule,
    /// Keys for the rows of a dense layer's MLP.
    pub dense_inter: Keys,
    /// Where multi-token-prediction layers are.
    pub mtp: Mtp,
    /// What stands before the name of a layer's tensor.
    pub layer_prefix: &'static str,
    /// Trunk tensors: role, name, shape. A rule holds on the layers whose description has the role.
    pub rules: &'static [&'static [Rule]],
    /// Ways the experts are stored; the tensors' names tell which.
    pub experts: &'static [ExpertLayout],
    /// Name endings that are left out, and why that loses nothing.
    pub left_out: &'static [(&'static str, &'static str)],
}

/// A value that a key of config.json must have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fixed {
    /// This string.
    Text(&'static str),
    /// This integer.
    Int(i64),
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
}

/// Attention of a family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum AttentionRule {
    /// Grouped-query attention.
    Gqa {
        /// `head_dim` where config.json has none; `None` means hidden / heads.
        head_dim: Option<usize>,
        /// Norm of queries and keys.
        qk_norm: QkNorm,
        /// Biases of q, k and v.
        qkv_bias: Switch,
        /// Bias of the output.
        o_bias: Switch,
        /// Key of the clamp of q, k and v.
        clip: Option<&'static str>,
        /// Sliding windows.
        window: WindowRule,
        /// One learnt logit a head.
        sinks: bool,
    },
    /// Multi-head latent attention.
    Mla {
        /// `eps` of the latent norms.
        latent_eps: f64,
        /// Biases of the down projections and the output.
        bias: Switch,
        /// Whether rotary pairs are adjacent.
        adjacent: Switch,
    },
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
}

/// Which layers have experts; the others are dense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MoeLayers {
    /// Every layer.
    All,
    /// From the layer that this key says; transformers' default where it is missing.
    From(&'static str, usize),
    /// Every n-th (`decoder_sparse_step`, 1 where it is missing), except those in `mlp_only_layers`.
    Sparse,
}

/// Experts of a family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeRule {
    /// Keys for the number of experts.
    pub n_experts: Keys,
    /// Keys for the number of experts a token uses.
    pub n_experts_used: Keys,
    /// Keys for the rows of an expert's gate and up.
    pub inter: Keys,
    /// Nonlinearity.
    pub activation: ActivationRule,
    /// Experts have biases.
    pub bias: bool,
    /// Router.
    pub router: RouterRule,
    /// Shared experts.
    pub shared: SharedRule,
}

/// Nonlinearity of a family's MLPs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ActivationRule {
    /// silu(gate) · up
    Silu,
    /// gpt-oss's clamped swish; `swiglu_alpha` and `swiglu_limit`, with transformers' defaults.
    ClampedSwish {
        /// Default of `swiglu_alpha`.
        alpha: f64,
        /// Default of `swiglu_limit`.
        limit: f64,
    },
}

/// Router of a family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterRule {
    /// A bias is added to the logits.
    pub bias: bool,
    /// From logits to scores.
    pub score: Score,
    /// A correction bias is added to the scores for choosing.
    pub correction: bool,
    /// Score of a group (`n_group`, `topk_group`).
    pub groups: Option<GroupScore>,
    /// From scores to weights.
    pub weights: RouteWeights,
    /// Whether the chosen weights are divided by their sum.
    pub renorm: Switch,
    /// What is added to that sum.
    pub renorm_eps: f32,
    /// Key of a factor of the weights, with transformers' default.
    pub scale: Option<(&'static str, f64)>,
}

/// Shared experts of a family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SharedRule {
    /// None.
    None,
    /// As many as this key says, each as wide as a routed expert, stored as one MLP.
    Count(&'static str, usize),
    /// One of a width of its own, its output gated by a sigmoid.
    Gated(Keys),
}

/// Where multi-token-prediction layers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mtp {
    /// The family has none.
    None,
    /// Layers after the last of the backbone; each has a tensor of this name.
    ExtraLayers {
        /// Name after the layer's prefix.
        mark: &'static str,
    },
}

/// One trunk tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// What it is for.
    pub role: Role,
    /// Its name; after the layer's prefix for the tensors of a layer.
    pub name: &'static str,
    /// Its shape.
    pub shape: &'static [Dim],
}

/// A length in a shape, worked out from the model's description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dim {
    /// Width of the stream.
    Hidden,
    /// Rows of the embedding.
    Vocab,
    /// All query heads together.
    Q,
    /// All key heads together.
    Kv,
    /// One head.
    Head,
    /// Number of query heads.
    Heads,
    /// What attention hands to the output projection.
    AttnOut,
    /// Rank of the query latent.
    QLora,
    /// Rank of the key-value latent.
    KvLora,
    /// Key-value latent and rotary key.
    KvA,
    /// Keys without position and values of all heads.
    KvB,
    /// Rows of the dense MLP.
    DenseInter,
    /// Rows of a routed expert.
    Inter,
    /// Rows of the shared expert.
    SharedInter,
    /// Number of routed experts.
    Experts,
    /// 1.
    One,
}

/// One way to store the experts of a layer.
#[derive(Debug)]
pub struct ExpertLayout {
    /// For messages.
    pub name: &'static str,
    /// The tensors. Names with `{E}` hold one expert, the others all of them along the first axis.
    pub pieces: &'static [Piece],
}

/// One tensor of an expert layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Name after the layer's prefix.
    pub name: &'static str,
    /// What it holds.
    pub holds: Holds,
    /// Stored `[in, out]`.
    pub transposed: bool,
}

/// What an expert tensor holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// One matrix or bias.
    One(Part),
    /// Two, of equally many output rows.
    Two(Part, Part, Split),
}

/// How two matrices share their output rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// First one, then the other.
    Halves,
    /// Even rows are the first, odd rows the second.
    Interleaved,
}

impl Family {
    /// The family's name.
    pub fn name(&self) -> &'static str {
        self.model_types.first().copied().unwrap_or(self.class)
    }

    /// The family that config.json names.
    ///
    /// # Errors
    /// `BadData` with the known ones where the model type is missing or unknown.
    pub fn of(config: &Config) -> Result<&'static Family> {
        let types = config.model_types();
        let known = types.iter().find_map(|t| FAMILIES.iter().find(|f| f.model_types.contains(t)));
        known.copied().ok_or_else(|| unknown(config, types.first().copied()))
    }
}

fn unknown(config: &Config, found: Option<&str>) -> Error {
    let known: Vec<_> = FAMILIES.iter().flat_map(|f| f.model_types).copied().collect();
    let known = known.join(", ");
    match found {
        Some(t) => config.error(format!("model_type {t:?} is not known; known are {known}")),
        None => config.error(format!("model_type is missing; known are {known}")),
    }
    .hint("a family is never guessed from tensors; a fine-tune keeps the model_type of its base")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::Path;

    #[test]
    fn every_name_means_one_thing() {
        let mut types = BTreeSet::new();
        for family in FAMILIES {
            assert!(family.model_types.iter().all(|t| types.insert(*t)), "{} twice", family.name());
            let mut names = BTreeSet::new();
            let mut roles = BTreeSet::new();
            for rule in family.rules.iter().copied().flatten() {
                assert!(names.insert(rule.name), "{}: {} twice", family.name(), rule.name);
                assert!(roles.insert(rule.role), "{}: {:?} twice", family.name(), rule.role);
            }
            for piece in family.experts.iter().flat_map(|l| l.pieces) {
                assert!(!names.contains(piece.name), "{}: {} twice", family.name(), piece.name);
            }
        }
    }

    #[test]
    fn every_layout_holds_each_matrix_once() {
        for family in FAMILIES {
            for layout in family.experts {
                let mut parts: Vec<Part> = Vec::new();
                for piece in layout.pieces {
                    match piece.holds {
                        Holds::One(a) => parts.push(a),
                        Holds::Two(a, b, _) => parts.extend([a, b]),
                    }
                }
                parts.sort();
                let expected = if family.moe.bias { &Part::ALL[..] } else { &Part::ALL[..3] };
                assert_eq!(parts, expected, "{} {}", family.name(), layout.name);
            }
        }
    }

    #[test]
    fn an_unknown_type_is_refused_with_the_known_ones() {
        let config = |text: &str| Config::parse(Path::new("config.json"), text.as_bytes()).unwrap();
        let e = Family::of(&config(r#"{"model_type": "gpt9"}"#)).unwrap_err();
        let known = "deepseek_v3, kimi_k2, gpt_oss, mixtral, olmoe, qwen2_moe, qwen3_moe";
        assert_eq!(e.what(), format!("model_type \"gpt9\" is not known; known are {known}"));
        let e = Family::of(&config("{}")).unwrap_err();
        assert_eq!(e.what(), format!("model_type is missing; known are {known}"));
        assert_eq!(e.kind().exit_code(), 65);
    }
}
