//! JetMoE: attention whose queries and outputs come from experts, too, which stay with the trunk; a bias behind the sum of
//! experts; gate and up in one tensor. Only the last norm has the `eps` of config.json.
//! Source: transformers 5.23.0 `models/jetmoe`; released as JetMoE-8B.

use super::Dim::{AttnExperts, Experts, Hidden, KeysValues, Kv};
use super::common::{LLAMA, one, rule, two};
use super::{
    AttentionRule, ExpertLayout, Family, Fixed, MoeLayers, MoeRule, NormRule, RouterRule, Rule, Split,
    qwen3_moe,
};
use crate::spec::{Part, Role};

const NAMES: &[Rule] = &[
    rule(Role::AttnRouter, "self_attention.experts.router.layer.weight", &[AttnExperts, Hidden]),
    rule(Role::AttnExpertsIn, "self_attention.experts.input_linear.weight", &[AttnExperts, Kv, Hidden]),
    rule(Role::AttnExpertsOut, "self_attention.experts.output_linear.weight", &[AttnExperts, Hidden, Kv]),
    rule(Role::OBias, "self_attention.experts.bias", &[Hidden]),
    rule(Role::KeysValues, "self_attention.kv_proj.weight", &[KeysValues, Hidden]),
    rule(Role::Router, "mlp.router.layer.weight", &[Experts, Hidden]),
    rule(Role::ExpertsBias, "mlp.bias", &[Hidden]),
];

const STACKED: ExpertLayout = ExpertLayout {
    name: "stacked, gate before up",
    pieces: &[
        two(Part::Gate, Part::Up, Split::Halves, "mlp.input_linear.weight"),
        one(Part::Down, "mlp.output_linear.weight"),
    ],
};

pub const FAMILY: Family = Family {
    model_types: &["jetmoe"],
    class: "JetMoeForCausalLM",
    gguf: "jetmoe",
    fixed: &[("activation_function", Fixed::Text("silu"))],
    norm: NormRule::RmsButLast(1e-6),
    tied_head: true,
    attention: AttentionRule::Routed,
    moe_layers: MoeLayers::All,
    moe: MoeRule {
        n_experts: &["num_local_experts", "moe_num_experts"],
        n_experts_used: &["num_experts_per_tok", "moe_top_k"],
        inter: &["intermediate_size", "ffn_hidden_size"],
        sum_bias: true,
        router: RouterRule::LOGITS,
        ..MoeRule::PLAIN
    },
    rules: &[LLAMA, NAMES],
    experts: &[STACKED],
    ..qwen3_moe::FAMILY
};
