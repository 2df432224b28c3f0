//! GLM-5, 5.1, 5.2 and 5.3: DeepSeek V3.2 with adjacent pairs in the indexer too, and layers that see what an earlier
//! one's indexer chose. GLM-4.7-Flash is the same without an indexer.
//! Source: transformers 5.23.0 `models/glm_moe_dsa` and `glm4_moe_lite`.

use super::{
    AttentionRule, Factor, Family, IndexerRule, MlaRule, MoeLayers, MoeRule, NormRule, RouterRule, Switch,
};
use super::{deepseek_v3, deepseek_v32};
use crate::spec::Pairing;

pub const FAMILY: Family = Family {
    model_types: &["glm_moe_dsa"],
    class: "GlmMoeDsaForCausalLM",
    gguf: "glm-dsa",
    norm: NormRule::Rms(1e-5),
    attention: AttentionRule::Mla(MlaRule {
        adjacent: Switch::Always,
        indexer: Some(IndexerRule::plain(Pairing::Adjacent)),
        ..MlaRule::PLAIN
    }),
    ..deepseek_v32::FAMILY
};

pub const LITE: Family = Family {
    model_types: &["glm4_moe_lite"],
    class: "Glm4MoeLiteForCausalLM",
    gguf: "glm4moelite",
    norm: NormRule::Rms(1e-5),
    moe_layers: MoeLayers::From("first_k_dense_replace", 1),
    moe: MoeRule {
        router: RouterRule { scale: Factor::Key("routed_scaling_factor", 1.8), ..RouterRule::SIGMOID },
        ..deepseek_v3::FAMILY.moe
    },
    ..deepseek_v3::FAMILY
};
