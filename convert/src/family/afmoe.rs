//! AFMoE (Trinity): norms before and after each sublayer, a gate on attention's output, windows with position encoding,
//! without either in each fourth layer; sigmoid router.
//! Source: transformers 5.23.0 `models/afmoe`.

use super::Dim::{AttnOut, Hidden, Vocab};
use super::common::{DENSE, GQA, QK_NORM_HEAD, ROUTER_GATE, SHARED_EXPERTS, rule};
use super::{
    AttentionRule, Factor, Family, GqaRule, MoeLayers, MoeRule, NopeRule, NormRule, ResidualRule, RouterRule,
    Rule, SharedRule, Switch, WindowRule, qwen3_moe,
};
use crate::spec::{Gate, QkNorm, Role};

const NAMES: &[Rule] = &[
    rule(Role::Embed, "model.embed_tokens.weight", &[Vocab, Hidden]),
    rule(Role::FinalNorm, "model.norm.weight", &[Hidden]),
    rule(Role::LmHead, "lm_head.weight", &[Vocab, Hidden]),
    rule(Role::AttnNorm, "input_layernorm.weight", &[Hidden]),
    rule(Role::AttnPostNorm, "post_attention_layernorm.weight", &[Hidden]),
    rule(Role::MlpNorm, "pre_mlp_layernorm.weight", &[Hidden]),
    rule(Role::MlpPostNorm, "post_mlp_layernorm.weight", &[Hidden]),
    rule(Role::AttnGate, "self_attn.gate_proj.weight", &[AttnOut, Hidden]),
];

pub const FAMILY: Family = Family {
    model_types: &["afmoe"],
    class: "AfmoeForCausalLM",
    gguf: "afmoe",
    norm: NormRule::Rms(1e-5),
    embed_scale: Factor::RootOfHiddenIf("mup_enabled"),
    residual: ResidualRule::Sandwich,
    attention: AttentionRule::Gqa(GqaRule {
        head_dim: Some(128),
        qk_norm: QkNorm::Head,
        window: WindowRule::AllBut {
            every: "global_attn_every_n_layers",
            n: 4,
            first_too: false,
            default: 1024,
        },
        nope: NopeRule::WithoutWindow,
        gate: Some(Gate::Own),
        ..GqaRule::PLAIN
    }),
    moe_layers: MoeLayers::From("num_dense_layers", 1),
    moe: MoeRule {
        router: RouterRule {
            groups: None,
            renorm: Switch::Always,
            scale: Factor::Key("route_scale", 1.0),
            ..RouterRule::SIGMOID
        },
        shared: SharedRule::Count("num_shared_experts", 2),
        ..MoeRule::PLAIN
    },
    rules: &[NAMES, GQA, QK_NORM_HEAD, DENSE, ROUTER_GATE, SHARED_EXPERTS],
    ..qwen3_moe::FAMILY
};
