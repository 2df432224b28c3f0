//! GLM-5.3-Flash (GLM-5 Next): Kimi's delta attention with bounded decays, and in each fourth layer latent attention without
//! position whose indexer chooses pools of keys; hyper-connections that end in the mean of their streams; clamped MLPs.
//! Source: transformers 5.23.0 `models/glm5_next`, which has the text model without a head.

use super::Dim::{DeltaHeads, Hidden, IndexHead, Pool};
use super::common::{
    CORRECTION, DENSE, INDEXER, KDA, KDA_LOW_RANK, LLAMA, MLA, PREFIXES, ROUTER, SHARED_EXPERTS, TOWERS, rule,
};
use super::deepseek_v4_names::HYPER;
use super::{
    ActivationRule, AttentionRule, Bound, DeltaRule, Family, Fixed, IndexerRule, MlaRule, MoeRule, NormRule,
    ResidualRule, Rule, deepseek_v3,
};
use crate::spec::{DeltaProjections, Pairing, Role};

const OWN: &[Rule] = &[
    rule(Role::DeltaDecay, "self_attn.A_log", &[DeltaHeads]),
    rule(Role::IndexCompressGate, "self_attn.indexer.index_kpool_compress_gate", &[IndexHead, Hidden]),
    rule(Role::IndexCompressBias, "self_attn.indexer.index_kpool_compress_ape", &[Pool, IndexHead]),
];

pub const FAMILY: Family = Family {
    model_types: &["glm5_next", "glm5_next_text"],
    class: "Glm5NextForConditionalGeneration",
    gguf: "glm5-next",
    fixed: &[
        ("hidden_act", Fixed::Text("silu")),
        ("qk_rope_head_dim", Fixed::Int(0)),
        ("index_kpool_always_select_tail", Fixed::Bool(true)),
    ],
    norm: NormRule::Rms(1e-5),
    residual: ResidualRule::HyperMean,
    attention: AttentionRule::HybridMla(
        MlaRule {
            latent_eps: None,
            indexer: Some(IndexerRule {
                pool: Some(("index_kpool", 16)),
                ..IndexerRule::plain(Pairing::Half)
            }),
            nope: true,
            ..MlaRule::PLAIN
        },
        DeltaRule {
            bound: Some(Bound {
                switch: None,
                keys: &["linear_attn_config.gate_lower_bound", "linear_lower_bound"],
                default: -5.0,
            }),
            group: Some(("full_attention_interval", 4)),
            ..DeltaRule::plain(DeltaProjections::LowRank)
        },
    ),
    moe: MoeRule { activation: ActivationRule::ClampedSilu { limit: 10.0 }, ..deepseek_v3::FAMILY.moe },
    spellings: PREFIXES,
    rules: &[LLAMA, MLA, KDA, KDA_LOW_RANK, INDEXER, OWN, HYPER, DENSE, ROUTER, CORRECTION, SHARED_EXPERTS],
    carried: TOWERS,
    ..deepseek_v3::FAMILY
};
