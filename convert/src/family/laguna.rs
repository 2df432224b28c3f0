//! Laguna: windows in some layers, with a rotary encoding and a number of heads of their own, a softplus gate on each head,
//! sigmoid router with a correction and a shared expert.
//! Source: transformers 5.23.0 `models/laguna`.

use super::Dim::{Experts, GateOut, Hidden, SharedInter};
use super::common::{DENSE, GQA, LLAMA, QK_NORM_HEAD, ROUTER, rule};
use super::{
    AttentionRule, Factor, Family, Fixed, GqaRule, MoeLayers, MoeRule, RouterRule, Rule, SharedRule, Switch,
    WindowRule, qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::{Gate, GateBy, QkNorm, Role};

const OWN: &[Rule] = &[
    rule(Role::AttnGate, "self_attn.g_proj.weight", &[GateOut, Hidden]),
    rule(Role::RouterCorrection, "mlp.experts.e_score_correction_bias", &[Experts]),
    rule(Role::SharedGate, "mlp.shared_expert.gate_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedUp, "mlp.shared_expert.up_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedDown, "mlp.shared_expert.down_proj.weight", &[Hidden, SharedInter]),
];

pub const FAMILY: Family = Family {
    model_types: &["laguna"],
    class: "LagunaForCausalLM",
    gguf: "laguna",
    fixed: &[("hidden_act", Fixed::Text("silu")), ("moe_apply_router_weight_on_input", Fixed::Bool(false))],
    attention: AttentionRule::Gqa(GqaRule {
        head_dim: Some(128),
        heads_of_layers: &["num_attention_heads_per_layer"],
        qk_norm: QkNorm::Head,
        window: WindowRule::Listed { default: 512 },
        gate: Some(Gate::Own),
        gate_by: GateBy::Softplus,
        gate_per_head: Some("gating"),
        ..GqaRule::PLAIN
    }),
    rope: RopeRule { theta: 5e5, by_layers: true, ..RopeRule::PLAIN },
    moe_layers: MoeLayers::From("first_k_dense_replace", 1),
    moe: MoeRule {
        router: RouterRule {
            softcap: &["moe_router_logit_softcapping"],
            groups: None,
            renorm: Switch::Always,
            renorm_eps: 0.0,
            scale: Factor::Key("moe_routed_scaling_factor", 1.0),
            ..RouterRule::SIGMOID
        },
        shared: SharedRule::Width(&["shared_expert_intermediate_size"]),
        ..MoeRule::PLAIN
    },
    spellings: &[
        (".mlp.gate.e_score_correction_bias", ".mlp.experts.e_score_correction_bias"),
        (".mlp.shared_experts.", ".mlp.shared_expert."),
    ],
    rules: &[LLAMA, GQA, QK_NORM_HEAD, DENSE, ROUTER, OWN],
    ..qwen3_moe::FAMILY
};
