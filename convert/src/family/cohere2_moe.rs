//! Cohere2-MoE (Command A Plus): attention and MLP of the same input, adjacent rotary pairs in layers with a window and
//! none in the others, the chosen logits through a softmax or sigmoid, shared experts averaged with the routed ones.
//! Source: transformers 5.23.0 `models/cohere2_moe`.

use super::Dim::{Hidden, Vocab};
use super::common::{DENSE, GQA, ROUTER, SHARED_EXPERTS, rule};
use super::{
    AttentionRule, Factor, Family, GqaRule, MoeLayers, MoeRule, NopeRule, NormRule, ResidualRule, RouterRule,
    Rule, SharedRule, Switch, WindowRule, qwen3_moe,
};
use crate::spec::{Pairing, Role};

const NAMES: &[Rule] = &[
    rule(Role::Embed, "model.embed_tokens.weight", &[Vocab, Hidden]),
    rule(Role::FinalNorm, "model.norm.weight", &[Hidden]),
    rule(Role::LmHead, "lm_head.weight", &[Vocab, Hidden]),
    rule(Role::AttnNorm, "input_layernorm.weight", &[Hidden]),
];

pub const FAMILY: Family = Family {
    model_types: &["cohere2_moe"],
    class: "Cohere2MoeForCausalLM",
    gguf: "cohere2moe",
    norm: NormRule::LayerUnlessRms(1e-5),
    logit_scale: Factor::Key("logit_scale", 0.0625),
    tied_head: true,
    residual: ResidualRule::Parallel,
    attention: AttentionRule::Gqa(GqaRule {
        head_dim: Some(128),
        window: WindowRule::AllBut { every: "sliding_window_pattern", n: 4, first_too: false, default: 4096 },
        nope: NopeRule::WithoutWindowUnlessDense,
        pairing: Pairing::Adjacent,
        ..GqaRule::PLAIN
    }),
    moe_layers: MoeLayers::From("first_k_dense_replace", 0),
    moe: MoeRule {
        inter: &["intermediate_size"],
        router: RouterRule {
            weights_key: Some("expert_selection_fn"),
            renorm: Switch::Key("norm_topk_prob", true),
            ..RouterRule::LOGITS
        },
        shared: SharedRule::Count("num_shared_experts", 0),
        shared_sum: Some("shared_expert_combination_strategy"),
        ..MoeRule::PLAIN
    },
    dense_inter: &["prefix_dense_intermediate_size"],
    rules: &[NAMES, GQA, DENSE, ROUTER, SHARED_EXPERTS],
    ..qwen3_moe::FAMILY
};
