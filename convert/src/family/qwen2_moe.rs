//! Qwen2-MoE: Qwen3-MoE with biases on q, k and v, without their norms, and with one gated shared expert.
//! Source: transformers 5.23.0 `models/qwen2_moe`; released as Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B.

use super::Dim::{Hidden, One, SharedInter};
use super::common::{DENSE, GQA, LLAMA, ROUTER, rule};
use super::{AttentionRule, Family, GqaRule, MoeRule, Rule, SharedRule, Switch, WindowRule, qwen3_moe};
use crate::spec::Role;

pub const SHARED: &[Rule] = &[
    rule(Role::SharedGate, "mlp.shared_expert.gate_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedUp, "mlp.shared_expert.up_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedDown, "mlp.shared_expert.down_proj.weight", &[Hidden, SharedInter]),
    rule(Role::SharedRouter, "mlp.shared_expert_gate.weight", &[One, Hidden]),
];

pub const FAMILY: Family = Family {
    model_types: &["qwen2_moe"],
    class: "Qwen2MoeForCausalLM",
    gguf: "qwen2moe",
    attention: AttentionRule::Gqa(GqaRule {
        qkv_bias: Switch::Key("qkv_bias", true),
        o_bias: Switch::Never,
        window: WindowRule::LayerTypesIfUsed,
        ..GqaRule::PLAIN
    }),
    moe: MoeRule { shared: SharedRule::Gated(&["shared_expert_intermediate_size"]), ..qwen3_moe::FAMILY.moe },
    rules: &[LLAMA, GQA, DENSE, ROUTER, SHARED],
    ..qwen3_moe::FAMILY
};
