//! Ling 2.0 and Ring (Bailing MoE v2): one matrix for queries, keys and values, norms of each head, half of each head
//! rotates; DeepSeek V3's router and shared experts.
//! Source: the released models' own code; transformers 5.23.0 has no class for it, so there is no golden either.

use super::Dim::{AttnOut, Experts, Head, Hidden, Qkv, Vocab};
use super::common::{DENSE, ROUTER, SHARED_EXPERTS, rule};
use super::{
    AttentionRule, Factor, Family, Fixed, GqaRule, MoeLayers, MoeRule, Mtp, RouterRule, Rule, SharedRule,
    Switch, qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::{QkNorm, Role};

const NAMES: &[Rule] = &[
    rule(Role::Embed, "model.word_embeddings.weight", &[Vocab, Hidden]),
    rule(Role::FinalNorm, "model.norm.weight", &[Hidden]),
    rule(Role::LmHead, "lm_head.weight", &[Vocab, Hidden]),
    rule(Role::AttnNorm, "input_layernorm.weight", &[Hidden]),
    rule(Role::MlpNorm, "post_attention_layernorm.weight", &[Hidden]),
    rule(Role::Qkv, "attention.query_key_value.weight", &[Qkv, Hidden]),
    rule(Role::QNorm, "attention.query_layernorm.weight", &[Head]),
    rule(Role::KNorm, "attention.key_layernorm.weight", &[Head]),
    rule(Role::O, "attention.dense.weight", &[Hidden, AttnOut]),
    rule(Role::RouterCorrection, "mlp.gate.expert_bias", &[Experts]),
];

pub const FAMILY: Family = Family {
    model_types: &["bailing_moe_v2"],
    class: "BailingMoeV2ForCausalLM",
    gguf: "bailingmoe2",
    fixed: &[
        ("hidden_act", Fixed::Text("silu")),
        ("score_function", Fixed::Text("sigmoid")),
        ("use_bias", Fixed::Bool(false)),
        ("use_qkv_bias", Fixed::Bool(false)),
        ("moe_router_enable_expert_bias", Fixed::Bool(true)),
    ],
    attention: AttentionRule::Gqa(GqaRule {
        fused: true,
        qk_norm: QkNorm::Head,
        qk_norm_if: Switch::Key("use_qk_norm", true),
        qkv_bias: Switch::Never,
        o_bias: Switch::Never,
        ..GqaRule::PLAIN
    }),
    rope: RopeRule { partial: 0.5, ..RopeRule::PLAIN },
    moe_layers: MoeLayers::From("first_k_dense_replace", 0),
    moe: MoeRule {
        router: RouterRule { scale: Factor::Key("routed_scaling_factor", 2.5), ..RouterRule::SIGMOID },
        shared: SharedRule::Count("num_shared_experts", 1),
        ..MoeRule::PLAIN
    },
    mtp: Mtp::ExtraLayers { mark: "eh_proj.weight" },
    rules: &[NAMES, DENSE, ROUTER, SHARED_EXPERTS],
    ..qwen3_moe::FAMILY
};
