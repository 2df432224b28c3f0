//! Jamba: Mamba with normed step sizes in most layers, attention without position in the others; experts in every other
//! layer, chosen by a softmax whose weights keep their sum.
//! Source: transformers 5.23.0 `models/jamba`; released as Jamba-v0.1, Jamba-1.5 and -1.6.

use super::Dim::{
    DenseInter, Experts, Hidden, MixerChannels, MixerIn, MixerInner, MixerKernel, One, Selected, States,
    StepRank, Steps, Vocab,
};
use super::common::{GQA, one, rule};
use super::{
    AttentionRule, ExpertLayout, Family, Fixed, GqaRule, MixedLayers, MixerRule, MoeLayers, MoeRule,
    NopeRule, RouterRule, Rule, StateRule, Switch, qwen3_moe,
};
use crate::spec::{Part, Role};

const NAMES: &[Rule] = &[
    rule(Role::Embed, "model.embed_tokens.weight", &[Vocab, Hidden]),
    rule(Role::FinalNorm, "model.final_layernorm.weight", &[Hidden]),
    rule(Role::LmHead, "lm_head.weight", &[Vocab, Hidden]),
    rule(Role::AttnNorm, "input_layernorm.weight", &[Hidden]),
    rule(Role::MlpNorm, "pre_ff_layernorm.weight", &[Hidden]),
    rule(Role::MixerIn, "mamba.in_proj.weight", &[MixerIn, Hidden]),
    rule(Role::MixerInBias, "mamba.in_proj.bias", &[MixerIn]),
    rule(Role::MixerConv, "mamba.conv1d.weight", &[MixerChannels, One, MixerKernel]),
    rule(Role::MixerConvBias, "mamba.conv1d.bias", &[MixerChannels]),
    rule(Role::MixerOut, "mamba.out_proj.weight", &[Hidden, MixerInner]),
    rule(Role::MixerOutBias, "mamba.out_proj.bias", &[Hidden]),
    rule(Role::StateSelect, "mamba.x_proj.weight", &[Selected, MixerInner]),
    rule(Role::StateStepUp, "mamba.dt_proj.weight", &[Steps, StepRank]),
    rule(Role::StateStep, "mamba.dt_proj.bias", &[Steps]),
    rule(Role::StateDecay, "mamba.A_log", &[Steps, States]),
    rule(Role::StateSkip, "mamba.D", &[Steps]),
    rule(Role::StateStepNorm, "mamba.dt_layernorm.weight", &[StepRank]),
    rule(Role::StateInNorm, "mamba.b_layernorm.weight", &[States]),
    rule(Role::StateOutNorm, "mamba.c_layernorm.weight", &[States]),
    rule(Role::DenseGate, "feed_forward.gate_proj.weight", &[DenseInter, Hidden]),
    rule(Role::DenseUp, "feed_forward.up_proj.weight", &[DenseInter, Hidden]),
    rule(Role::DenseDown, "feed_forward.down_proj.weight", &[Hidden, DenseInter]),
    rule(Role::Router, "feed_forward.router.weight", &[Experts, Hidden]),
];

const PER_EXPERT: ExpertLayout = ExpertLayout {
    name: "per expert",
    pieces: &[
        one(Part::Gate, "feed_forward.experts.{E}.gate_proj.weight"),
        one(Part::Up, "feed_forward.experts.{E}.up_proj.weight"),
        one(Part::Down, "feed_forward.experts.{E}.down_proj.weight"),
    ],
};

const ATTENTION: GqaRule =
    GqaRule { qkv_bias: Switch::Never, o_bias: Switch::Never, nope: NopeRule::All, ..GqaRule::PLAIN };

pub const FAMILY: Family = Family {
    model_types: &["jamba"],
    class: "JambaForCausalLM",
    gguf: "jamba",
    fixed: &[("hidden_act", Fixed::Text("silu"))],
    attention: AttentionRule::Mixed(
        ATTENTION,
        MixerRule::StateSpace(StateRule::MAMBA),
        MixedLayers::Period(8, 4),
    ),
    moe_layers: MoeLayers::Period(2, 1),
    moe: MoeRule {
        inter: &["intermediate_size"],
        router: RouterRule { renorm: Switch::Never, ..RouterRule::SOFTMAX },
        ..MoeRule::PLAIN
    },
    rules: &[NAMES, GQA],
    experts: &[PER_EXPERT],
    ..qwen3_moe::FAMILY
};
