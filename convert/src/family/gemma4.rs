//! Gemma 4 with experts (26B-A4B): an MLP and routed experts beside each other, each between norms of its own; windows, and
//! in each sixth layer wider heads whose values may be their keys; a factor of each layer, capped logits.
//! Source: transformers 5.23.0 `models/gemma4`. Inputs of single layers and shared keys are those of dense siblings.

use super::Dim::{Experts, Head, Hidden, One, SharedInter, Vocab};
use super::common::{GQA, one, rule, two};
use super::{
    ActivationRule, AttentionRule, ExpertLayout, Factor, Family, Fixed, GqaRule, MoeLayers, MoeRule,
    ResidualRule, RouterRule, Rule, SharedRule, Split, Switch, WindowRule, qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::{Part, QkNorm, Role};

const NAMES: &[Rule] = &[
    rule(Role::Embed, "model.embed_tokens.weight", &[Vocab, Hidden]),
    rule(Role::FinalNorm, "model.norm.weight", &[Hidden]),
    rule(Role::LmHead, "lm_head.weight", &[Vocab, Hidden]),
    rule(Role::AttnNorm, "input_layernorm.weight", &[Hidden]),
    rule(Role::AttnPostNorm, "post_attention_layernorm.weight", &[Hidden]),
    rule(Role::QNorm, "self_attn.q_norm.weight", &[Head]),
    rule(Role::KNorm, "self_attn.k_norm.weight", &[Head]),
    rule(Role::LayerScale, "layer_scalar", &[One]),
    rule(Role::MlpNorm, "pre_feedforward_layernorm_2.weight", &[Hidden]),
    rule(Role::RoutedPostNorm, "post_feedforward_layernorm_2.weight", &[Hidden]),
    rule(Role::SharedNorm, "pre_feedforward_layernorm.weight", &[Hidden]),
    rule(Role::SharedPostNorm, "post_feedforward_layernorm_1.weight", &[Hidden]),
    rule(Role::MlpPostNorm, "post_feedforward_layernorm.weight", &[Hidden]),
    rule(Role::SharedGate, "mlp.gate_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedUp, "mlp.up_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedDown, "mlp.down_proj.weight", &[Hidden, SharedInter]),
    rule(Role::Router, "router.proj.weight", &[Experts, Hidden]),
    rule(Role::RouterInput, "router.scale", &[Hidden]),
    rule(Role::RouterExpertScale, "router.per_expert_scale", &[Experts]),
];

pub const FAMILY: Family = Family {
    model_types: &["gemma4", "gemma4_text"],
    class: "Gemma4ForCausalLM",
    gguf: "gemma4",
    fixed: &[
        ("hidden_activation", Fixed::Text("gelu_pytorch_tanh")),
        ("enable_moe_block", Fixed::Bool(true)),
        ("hidden_size_per_layer_input", Fixed::Int(0)),
        ("num_kv_shared_layers", Fixed::Int(0)),
        ("use_bidirectional_attention", Fixed::NotText("all")),
    ],
    embed_scale: Factor::RootOfHidden,
    logit_softcap: &["final_logit_softcapping"],
    layer_scale: true,
    tied_head: true,
    residual: ResidualRule::Sandwich,
    attention: AttentionRule::Gqa(GqaRule {
        head_dim: Some(256),
        qk_norm: QkNorm::Head,
        v_norm: true,
        window: WindowRule::AllButLast { n: 6, default: 512 },
        wide_if: Some("attention_k_eq_v"),
        scale: Some(Factor::One),
        ..GqaRule::PLAIN
    }),
    rope: RopeRule { by_layers: true, ..RopeRule::PLAIN },
    moe_layers: MoeLayers::All,
    moe: MoeRule {
        n_experts_used: &["top_k_experts"],
        activation: ActivationRule::GeluTanh,
        router: RouterRule { own_input: true, renorm: Switch::Always, ..RouterRule::SOFTMAX },
        shared: SharedRule::Width(&["intermediate_size"]),
        shared_normed: true,
        ..MoeRule::PLAIN
    },
    rules: &[NAMES, GQA],
    experts: &[ExpertLayout {
        name: "stacked, gate before up",
        pieces: &[
            two(Part::Gate, Part::Up, Split::Halves, "experts.gate_up_proj"),
            one(Part::Down, "experts.down_proj"),
        ],
    }],
    ..qwen3_moe::FAMILY
};
