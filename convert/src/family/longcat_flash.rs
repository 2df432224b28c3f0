//! LongCat-Flash: layers with two latent attentions and two dense MLPs, past which the experts are a shortcut; experts that
//! hand their input on; latents multiplied by the root of their reduction.
//! Source: transformers 5.23.0 `models/longcat_flash`, which saves weights for experts that have none.

use super::Dim::{AttnOut, DenseInter, Experts, Hidden, KvA, KvB, KvLora, Q, QLora, Vocab};
use super::common::{PER_EXPERT, rule};
use super::{
    AttentionRule, Factor, Family, Fixed, MlaRule, MoeLayers, MoeRule, NormRule, RouterRule, Rule, Switch,
    qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::Role;

const NAMES: &[Rule] = &[
    rule(Role::Embed, "model.embed_tokens.weight", &[Vocab, Hidden]),
    rule(Role::FinalNorm, "model.norm.weight", &[Hidden]),
    rule(Role::LmHead, "lm_head.weight", &[Vocab, Hidden]),
    rule(Role::AttnNorm, "input_layernorm.0.weight", &[Hidden]),
    rule(Role::MlpNorm, "post_attention_layernorm.0.weight", &[Hidden]),
    rule(Role::QA, "self_attn.0.q_a_proj.weight", &[QLora, Hidden]),
    rule(Role::QABias, "self_attn.0.q_a_proj.bias", &[QLora]),
    rule(Role::QANorm, "self_attn.0.q_a_layernorm.weight", &[QLora]),
    rule(Role::QB, "self_attn.0.q_b_proj.weight", &[Q, QLora]),
    rule(Role::KvA, "self_attn.0.kv_a_proj_with_mqa.weight", &[KvA, Hidden]),
    rule(Role::KvABias, "self_attn.0.kv_a_proj_with_mqa.bias", &[KvA]),
    rule(Role::KvANorm, "self_attn.0.kv_a_layernorm.weight", &[KvLora]),
    rule(Role::KvB, "self_attn.0.kv_b_proj.weight", &[KvB, KvLora]),
    rule(Role::O, "self_attn.0.o_proj.weight", &[Hidden, AttnOut]),
    rule(Role::OBias, "self_attn.0.o_proj.bias", &[Hidden]),
    rule(Role::DenseGate, "mlps.0.gate_proj.weight", &[DenseInter, Hidden]),
    rule(Role::DenseUp, "mlps.0.up_proj.weight", &[DenseInter, Hidden]),
    rule(Role::DenseDown, "mlps.0.down_proj.weight", &[Hidden, DenseInter]),
    rule(Role::SecondAttnNorm, "input_layernorm.1.weight", &[Hidden]),
    rule(Role::SecondMlpNorm, "post_attention_layernorm.1.weight", &[Hidden]),
    rule(Role::SecondQA, "self_attn.1.q_a_proj.weight", &[QLora, Hidden]),
    rule(Role::SecondQABias, "self_attn.1.q_a_proj.bias", &[QLora]),
    rule(Role::SecondQANorm, "self_attn.1.q_a_layernorm.weight", &[QLora]),
    rule(Role::SecondQB, "self_attn.1.q_b_proj.weight", &[Q, QLora]),
    rule(Role::SecondKvA, "self_attn.1.kv_a_proj_with_mqa.weight", &[KvA, Hidden]),
    rule(Role::SecondKvABias, "self_attn.1.kv_a_proj_with_mqa.bias", &[KvA]),
    rule(Role::SecondKvANorm, "self_attn.1.kv_a_layernorm.weight", &[KvLora]),
    rule(Role::SecondKvB, "self_attn.1.kv_b_proj.weight", &[KvB, KvLora]),
    rule(Role::SecondO, "self_attn.1.o_proj.weight", &[Hidden, AttnOut]),
    rule(Role::SecondOBias, "self_attn.1.o_proj.bias", &[Hidden]),
    rule(Role::SecondDenseGate, "mlps.1.gate_proj.weight", &[DenseInter, Hidden]),
    rule(Role::SecondDenseUp, "mlps.1.up_proj.weight", &[DenseInter, Hidden]),
    rule(Role::SecondDenseDown, "mlps.1.down_proj.weight", &[Hidden, DenseInter]),
    rule(Role::Router, "mlp.router.classifier.weight", &[Experts, Hidden]),
    rule(Role::RouterCorrection, "mlp.router.e_score_correction_bias", &[Experts]),
];

pub const FAMILY: Family = Family {
    model_types: &["longcat_flash"],
    class: "LongcatFlashForCausalLM",
    gguf: "longcat-flash",
    fixed: &[
        ("hidden_act", Fixed::Text("silu")),
        ("router_bias", Fixed::Bool(false)),
        ("zero_expert_type", Fixed::Text("identity")),
    ],
    norm: NormRule::Rms(1e-5),
    attention: AttentionRule::Mla(MlaRule { adjacent: Switch::Always, gain: true, ..MlaRule::PLAIN }),
    rope: RopeRule { theta: 1e7, ..RopeRule::PLAIN },
    moe_layers: MoeLayers::All,
    moe: MoeRule {
        n_zero: &["zero_expert_num"],
        n_experts_used: &["moe_topk", "num_experts_per_tok"],
        inter: &["expert_ffn_hidden_size", "moe_intermediate_size"],
        router: RouterRule {
            correction: true,
            renorm: Switch::Never,
            scale: Factor::Key("routed_scaling_factor", 6.0),
            ..RouterRule::SOFTMAX
        },
        ..MoeRule::PLAIN
    },
    shortcut: true,
    dense_inter: &["ffn_hidden_size", "intermediate_size"],
    rules: &[NAMES],
    experts: &[PER_EXPERT],
    ..qwen3_moe::FAMILY
};
