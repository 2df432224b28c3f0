//! Granite 4.0 hybrid: Granite's multipliers and experts with a shared one; Mamba 2 in most layers, attention without
//! position in the others. Without experts the shared one is the MLP.
//! Source: transformers 5.23.0 `models/granitemoehybrid`; released as Granite-4.0-H-Tiny and -Small.

use super::Dim::{Hidden, MixerChannels, MixerIn, MixerInner, MixerKernel, One, Steps};
use super::common::{GQA, LLAMA, rule};
use super::{
    AttentionRule, Factor, Family, Fixed, GqaRule, MixedLayers, MixerRule, MoeLayers, NopeRule, Rule,
    StateRule, granitemoe,
};
use crate::spec::Role;

const MAMBA: &[Rule] = &[
    rule(Role::MixerIn, "mamba.in_proj.weight", &[MixerIn, Hidden]),
    rule(Role::MixerInBias, "mamba.in_proj.bias", &[MixerIn]),
    rule(Role::MixerConv, "mamba.conv1d.weight", &[MixerChannels, One, MixerKernel]),
    rule(Role::MixerConvBias, "mamba.conv1d.bias", &[MixerChannels]),
    rule(Role::MixerNorm, "mamba.norm.weight", &[MixerInner]),
    rule(Role::MixerOut, "mamba.out_proj.weight", &[Hidden, MixerInner]),
    rule(Role::MixerOutBias, "mamba.out_proj.bias", &[Hidden]),
    rule(Role::StateStep, "mamba.dt_bias", &[Steps]),
    rule(Role::StateDecay, "mamba.A_log", &[Steps]),
    rule(Role::StateSkip, "mamba.D", &[Steps]),
];

const ATTENTION: GqaRule = GqaRule {
    scale: Some(Factor::Key("attention_multiplier", 1.0)),
    nope: NopeRule::UnlessAsked,
    ..GqaRule::PLAIN
};

pub const FAMILY: Family = Family {
    model_types: &["granitemoehybrid"],
    class: "GraniteMoeHybridForCausalLM",
    gguf: "granitehybrid",
    fixed: &[("hidden_act", Fixed::Text("silu"))],
    attention: AttentionRule::Mixed(
        ATTENTION,
        MixerRule::StateSpace(StateRule::MAMBA_2),
        MixedLayers::Listed,
    ),
    moe_layers: MoeLayers::AllUnlessZero,
    dense_inter: &["shared_intermediate_size"],
    rules: &[LLAMA, GQA, MAMBA, granitemoe::NAMES],
    ..granitemoe::FAMILY
};
