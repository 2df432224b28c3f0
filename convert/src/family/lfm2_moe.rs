//! LFM2-MoE: short convolutions between gates in most layers, attention with a norm over each head in the others; a
//! sigmoid router with a correction.
//! Source: transformers 5.23.0 `models/lfm2_moe`; released as LFM2-8B-A1B.

use super::Dim::{
    AttnOut, DenseInter, Experts, Head, Hidden, Kv, MixerChannels, MixerIn, MixerInner, MixerKernel, One,
    QOut, Values, Vocab,
};
use super::common::{one, rule};
use super::{
    AttentionRule, ExpertLayout, Family, GqaRule, MixedLayers, MixerRule, MoeLayers, MoeRule, NormRule,
    RouterRule, Rule, Switch, qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::{Part, QkNorm, Role};

const NAMES: &[Rule] = &[
    rule(Role::Embed, "model.embed_tokens.weight", &[Vocab, Hidden]),
    rule(Role::FinalNorm, "model.embedding_norm.weight", &[Hidden]),
    rule(Role::LmHead, "lm_head.weight", &[Vocab, Hidden]),
    rule(Role::AttnNorm, "operator_norm.weight", &[Hidden]),
    rule(Role::MlpNorm, "ffn_norm.weight", &[Hidden]),
    rule(Role::Q, "self_attn.q_proj.weight", &[QOut, Hidden]),
    rule(Role::K, "self_attn.k_proj.weight", &[Kv, Hidden]),
    rule(Role::V, "self_attn.v_proj.weight", &[Values, Hidden]),
    rule(Role::O, "self_attn.out_proj.weight", &[Hidden, AttnOut]),
    rule(Role::QNorm, "self_attn.q_layernorm.weight", &[Head]),
    rule(Role::KNorm, "self_attn.k_layernorm.weight", &[Head]),
    rule(Role::MixerIn, "conv.in_proj.weight", &[MixerIn, Hidden]),
    rule(Role::MixerInBias, "conv.in_proj.bias", &[MixerIn]),
    rule(Role::MixerConv, "conv.conv.weight", &[MixerChannels, One, MixerKernel]),
    rule(Role::MixerConvBias, "conv.conv.bias", &[MixerChannels]),
    rule(Role::MixerOut, "conv.out_proj.weight", &[Hidden, MixerInner]),
    rule(Role::MixerOutBias, "conv.out_proj.bias", &[Hidden]),
    rule(Role::DenseGate, "feed_forward.w1.weight", &[DenseInter, Hidden]),
    rule(Role::DenseUp, "feed_forward.w3.weight", &[DenseInter, Hidden]),
    rule(Role::DenseDown, "feed_forward.w2.weight", &[Hidden, DenseInter]),
    rule(Role::Router, "feed_forward.gate.weight", &[Experts, Hidden]),
    rule(Role::RouterCorrection, "feed_forward.expert_bias", &[Experts]),
];

const W1_W3_W2: ExpertLayout = ExpertLayout {
    name: "per expert, w1 w3 w2",
    pieces: &[
        one(Part::Gate, "feed_forward.experts.{E}.w1.weight"),
        one(Part::Up, "feed_forward.experts.{E}.w3.weight"),
        one(Part::Down, "feed_forward.experts.{E}.w2.weight"),
    ],
};

const ATTENTION: GqaRule =
    GqaRule { qk_norm: QkNorm::Head, qkv_bias: Switch::Never, o_bias: Switch::Never, ..GqaRule::PLAIN };

pub const FAMILY: Family = Family {
    model_types: &["lfm2_moe"],
    class: "Lfm2MoeForCausalLM",
    gguf: "lfm2moe",
    fixed: &[],
    norm: NormRule::RmsOf("norm_eps", 1e-5),
    tied_head: true,
    attention: AttentionRule::Mixed(ATTENTION, MixerRule::ShortConv, MixedLayers::Listed),
    rope: RopeRule { theta: 1e6, ..RopeRule::PLAIN },
    moe_layers: MoeLayers::From("num_dense_layers", 2),
    moe: MoeRule {
        router: RouterRule {
            groups: None,
            correction_if: Switch::Key("use_expert_bias", true),
            renorm_eps: 1e-6,
            ..RouterRule::SIGMOID
        },
        ..MoeRule::PLAIN
    },
    rules: &[NAMES],
    experts: &[W1_W3_W2],
    ..qwen3_moe::FAMILY
};
