//! Granite MoE, with and without a shared expert: multipliers on embedding, residual, attention and logits; softmax over
//! the chosen logits; gate and up in one tensor.
//! Source: transformers 5.23.0 `models/granitemoe` and `granitemoeshared`; released as Granite-3.0-1B-A400M.

use super::Dim::{Experts, Hidden, SharedGateUp, SharedInter};
use super::common::{GQA, LLAMA, one, rule, two};
use super::{
    AttentionRule, ExpertLayout, Factor, Family, GqaRule, MoeLayers, MoeRule, ResidualRule, RouterRule, Rule,
    SharedRule, Split, qwen3_moe,
};
use crate::spec::{Part, Role};

pub const NAMES: &[Rule] = &[
    rule(Role::Router, "block_sparse_moe.router.layer.weight", &[Experts, Hidden]),
    rule(Role::SharedGateUp, "shared_mlp.input_linear.weight", &[SharedGateUp, Hidden]),
    rule(Role::SharedDown, "shared_mlp.output_linear.weight", &[Hidden, SharedInter]),
];

const STACKED: ExpertLayout = ExpertLayout {
    name: "stacked, gate before up",
    pieces: &[
        two(Part::Gate, Part::Up, Split::Halves, "block_sparse_moe.input_linear.weight"),
        one(Part::Down, "block_sparse_moe.output_linear.weight"),
    ],
};

pub const FAMILY: Family = Family {
    model_types: &["granitemoe", "granitemoeshared"],
    class: "GraniteMoeForCausalLM",
    gguf: "granitemoe",
    embed_scale: Factor::Key("embedding_multiplier", 1.0),
    logit_scale: Factor::Inverse("logits_scaling", 1.0),
    residual: ResidualRule::Scaled(Factor::Key("residual_multiplier", 1.0)),
    attention: AttentionRule::Gqa(GqaRule {
        scale: Some(Factor::Key("attention_multiplier", 1.0)),
        ..GqaRule::PLAIN
    }),
    moe_layers: MoeLayers::All,
    moe: MoeRule {
        inter: &["intermediate_size"],
        router: RouterRule::LOGITS,
        shared: SharedRule::Width(&["shared_intermediate_size"]),
        shared_fused: true,
        ..MoeRule::PLAIN
    },
    rules: &[LLAMA, GQA, NAMES],
    experts: &[STACKED],
    ..qwen3_moe::FAMILY
};
