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
use crate::spec::Role;

mod afmoe;
mod bailing_hybrid;
mod bailing_moe;
mod bailing_moe_v2;
mod cohere2_moe;
mod common;
mod dbrx;
mod deepseek_v2;
mod deepseek_v3;
mod deepseek_v32;
mod deepseek_v4;
mod deepseek_v41;
mod deepseek_v4_names;
mod dense;
mod dots1;
mod ernie4_5_moe;
mod exaone_moe;
mod flex_olmo;
mod gemma4;
mod glm4_moe;
mod glm5_next;
mod glm_moe_dsa;
mod gpt_oss;
mod granitemoe;
mod granitemoehybrid;
mod hunyuan_v1_moe;
mod hy_v3;
mod hy_v4;
mod jamba;
mod jetmoe;
mod kimi_linear;
mod laguna;
mod layout;
mod lfm2_moe;
mod llama4;
mod longcat_flash;
mod mimo_v2_flash;
mod minimax;
mod minimax_m2;
mod minimax_m3;
mod mistral4;
mod mixer_rules;
mod mixtral;
mod moe_rules;
mod nemotron_h;
mod olmoe;
mod phimoe;
mod qwen2_moe;
mod qwen3_moe;
mod qwen3_next;
mod qwen3_vl_moe;
mod qwen4_exp;
mod rules;
mod solar_open;

pub use layout::{ExpertLayout, Holds, Piece, Split};
pub use mixer_rules::{MixedLayers, MixerRule, StateRule, StepRule};
pub use moe_rules::{ActivationRule, HashRule, MoeLayers, MoeRule, RouterRule, ScoreRule, SharedRule};
pub use rules::{
    AttentionRule, Bound, CompressedRule, DeltaRule, Factor, Fixed, GqaRule, IndexerRule, MlaRule, NopeRule,
    NormRule, ResidualRule, Sinks, Switch, WindowRule,
};

/// Every family that can be read.
pub static FAMILIES: &[&Family] = &[
    &afmoe::FAMILY,
    &bailing_hybrid::FAMILY,
    &bailing_moe::FAMILY,
    &bailing_moe_v2::FAMILY,
    &cohere2_moe::FAMILY,
    &dbrx::FAMILY,
    &deepseek_v2::FAMILY,
    &deepseek_v3::FAMILY,
    &deepseek_v32::FAMILY,
    &deepseek_v4::FAMILY,
    &deepseek_v41::FAMILY,
    &dense::LLAMA_FAMILY,
    &dense::MISTRAL,
    &dense::QWEN2,
    &dense::QWEN3,
    &dots1::FAMILY,
    &ernie4_5_moe::FAMILY,
    &exaone_moe::FAMILY,
    &flex_olmo::FAMILY,
    &gemma4::FAMILY,
    &glm4_moe::FAMILY,
    &glm5_next::FAMILY,
    &glm_moe_dsa::FAMILY,
    &glm_moe_dsa::LITE,
    &gpt_oss::FAMILY,
    &granitemoe::FAMILY,
    &granitemoehybrid::FAMILY,
    &hunyuan_v1_moe::FAMILY,
    &hy_v3::FAMILY,
    &hy_v4::FAMILY,
    &jamba::FAMILY,
    &jetmoe::FAMILY,
    &kimi_linear::FAMILY,
    &laguna::FAMILY,
    &lfm2_moe::FAMILY,
    &llama4::FAMILY,
    &longcat_flash::FAMILY,
    &mimo_v2_flash::FAMILY,
    &minimax::FAMILY,
    &minimax_m2::FAMILY,
    &minimax_m3::FAMILY,
    &mistral4::FAMILY,
    &mixtral::FAMILY,
    &nemotron_h::FAMILY,
    &olmoe::FAMILY,
    &phimoe::FAMILY,
    &qwen2_moe::FAMILY,
    &qwen3_moe::FAMILY,
    &qwen3_next::FAMILY,
    &qwen3_next::QWEN3_5,
    &qwen3_vl_moe::FAMILY,
    &qwen4_exp::FAMILY,
    &solar_open::FAMILY,
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
    /// Norms.
    pub norm: NormRule,
    /// What the embedding is multiplied by.
    pub embed_scale: Factor,
    /// What logits are multiplied by.
    pub logit_scale: Factor,
    /// Key of the logits' soft cap; none where it is 0, null or missing.
    pub logit_softcap: Keys,
    /// What leaves a layer is multiplied by a learnt number.
    pub layer_scale: bool,
    /// Bias of the head.
    pub head_bias: Switch,
    /// `tie_word_embeddings` where config.json has none.
    pub tied_head: bool,
    /// Layers have embeddings of n-grams: `ple_layer_ids`, `ngram_size`, `heads_per_ngram` …
    pub ngrams: bool,
    /// How sublayers join the stream.
    pub residual: ResidualRule,
    /// How tokens mix.
    pub attention: AttentionRule,
    /// Rotary encoding.
    pub rope: RopeRule,
    /// Which layers have experts.
    pub moe_layers: MoeLayers,
    /// Experts, router and shared experts.
    pub moe: MoeRule,
    /// Experts are on a shortcut past a dense MLP, a second attention and a second MLP.
    pub shortcut: bool,
    /// Keys for the rows of a dense layer's MLP.
    pub dense_inter: Keys,
    /// Where multi-token-prediction layers are.
    pub mtp: Mtp,
    /// What stands before the name of a layer's tensor.
    pub layer_prefix: &'static str,
    /// Other spellings of names: what is found, and what it stands for here. One that begins with a dot is looked for
    /// anywhere, the others at the beginning; all that fit are applied, in order.
    pub spellings: &'static [(&'static str, &'static str)],
    /// Trunk tensors: role, name, shape. A rule holds on the layers whose description has the role.
    pub rules: &'static [&'static [Rule]],
    /// Ways the experts are stored; the tensors' names tell which.
    pub experts: &'static [ExpertLayout],
    /// Name beginnings of what is kept as it is and is no part of the text model, or of its forward pass here. One that
    /// begins with a dot stands after a layer's prefix.
    pub carried: &'static [&'static str],
    /// Name endings that are left out, and why that loses nothing.
    pub left_out: &'static [(&'static str, &'static str)],
}

/// Where multi-token-prediction layers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mtp {
    /// The family has none, or they are among what is carried.
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
    /// All value heads together.
    Values,
    /// All query, key and value heads together.
    Qkv,
    /// Queries, with their gates where those are in the same matrix.
    QOut,
    /// One head.
    Head,
    /// Number of query heads.
    Heads,
    /// What attention hands to the output projection.
    AttnOut,
    /// Rows of the matrix that gates it.
    GateOut,
    /// Rank of the query latent.
    QLora,
    /// Rank of the key-value latent.
    KvLora,
    /// Key-value latent and rotary key.
    KvA,
    /// Keys without position and values of all heads.
    KvB,
    /// Heads of one group of the output projection.
    GroupIn,
    /// Rank of all groups of the output projection together.
    GroupRank,
    /// Embedding of a token's n-grams.
    NgramWidth,
    /// One row of their table.
    NgramRow,
    /// Their orders, and one.
    NgramOrders,
    /// Heads of all orders together.
    NgramHeads,
    /// Length of their convolution.
    NgramKernel,
    /// As many as the tensor has.
    Any,
    /// All streams of the residual together.
    Width,
    /// Streams of the residual.
    Streams,
    /// What hyper-connections compute for a sublayer.
    Mixes,
    /// Factors of that.
    Scales,
    /// Rank of the gates that streams pass.
    GateRank,
    /// Tokens of a compressed entry.
    Ratio,
    /// What a token gives to compressed entries.
    Entry,
    /// One compressed entry.
    EntryHead,
    /// All heads of the indexer together.
    Index,
    /// These and its key.
    IndexQk,
    /// One head of the indexer.
    IndexHead,
    /// Number of the indexer's heads.
    IndexHeads,
    /// Keys of a pool.
    Pool,
    /// What a token gives to the indexer's entries.
    IndexEntry,
    /// Channels of a linear attention's convolution.
    DeltaChannels,
    /// These and the gates of values.
    DeltaQkvz,
    /// All value heads of linear attention together.
    DeltaValues,
    /// Their number.
    DeltaHeads,
    /// Twice their number.
    DeltaBa,
    /// One of them.
    DeltaHead,
    /// Length of the convolution.
    DeltaKernel,
    /// What the input projection of a state space or a short convolution makes.
    MixerIn,
    /// Channels of its convolution.
    MixerChannels,
    /// What its output projection takes.
    MixerInner,
    /// Length of its convolution.
    MixerKernel,
    /// Step sizes of a state space.
    Steps,
    /// Values of a channel's state.
    States,
    /// Rank of step sizes.
    StepRank,
    /// That, and what goes into and comes out of a state.
    Selected,
    /// Rows of the dense MLP.
    DenseInter,
    /// Rows of its gate and up together.
    DenseGateUp,
    /// Rows of a routed expert.
    Inter,
    /// What routed experts work on.
    Latent,
    /// All key and value heads of routed attention together.
    KeysValues,
    /// Experts of routed attention.
    AttnExperts,
    /// Rows of the shared expert.
    SharedInter,
    /// Rows of the shared expert's gate and up together.
    SharedGateUp,
    /// Number of experts that the router knows.
    Experts,
    /// Experts a token uses.
    ExpertsUsed,
    /// 1.
    One,
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

    use crate::spec::Part;

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
                let gated = family.moe.activation != ActivationRule::SquaredRelu;
                let expected = match (family.moe.bias, gated) {
                    (true, _) => &Part::ALL[..],
                    (false, true) => &Part::ALL[..3],
                    (false, false) => &Part::ALL[1..3],
                };
                assert_eq!(parts, expected, "{} {}", family.name(), layout.name);
            }
        }
    }

    #[test]
    fn an_unknown_type_is_refused_with_the_known_ones() {
        let config = |text: &str| Config::parse(Path::new("config.json"), text.as_bytes()).unwrap();
        let e = Family::of(&config(r#"{"model_type": "gpt9"}"#)).unwrap_err();
        assert!(e.what().starts_with("model_type \"gpt9\" is not known; known are "), "{e}");
        for family in FAMILIES {
            assert!(family.model_types.iter().all(|t| e.what().contains(t)), "{}: {e}", family.name());
        }
        let e = Family::of(&config("{}")).unwrap_err();
        assert!(e.what().starts_with("model_type is missing; known are "), "{e}");
        assert_eq!(e.kind().exit_code(), 65);
    }
}
