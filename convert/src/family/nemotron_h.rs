//! Nemotron-H and Nemotron 3: each layer is a Mamba 2, attention without position, experts or a dense MLP; MLPs have no
//! gate and square their positive part; experts may work on a latent.
//! Source: transformers 5.23.0 `models/nemotron_h`; released as Nemotron-3-Nano-30B-A3B and -Super.

use super::Dim::{
    AttnOut, DenseInter, Experts, Hidden, Kv, Latent, MixerChannels, MixerIn, MixerInner, MixerKernel, One,
    QOut, SharedInter, Steps, Values, Vocab,
};
use super::common::{one, rule};
use super::{
    ActivationRule, AttentionRule, ExpertLayout, Family, Fixed, GqaRule, MixedLayers, MixerRule, MoeLayers,
    MoeRule, NopeRule, NormRule, ResidualRule, RouterRule, Rule, SharedRule, StateRule, StepRule, Switch,
    qwen3_moe,
};
use crate::spec::{Part, Role};

const NAMES: &[Rule] = &[
    rule(Role::Embed, "backbone.embeddings.weight", &[Vocab, Hidden]),
    rule(Role::FinalNorm, "backbone.norm_f.weight", &[Hidden]),
    rule(Role::LmHead, "lm_head.weight", &[Vocab, Hidden]),
    rule(Role::AttnNorm, "norm.weight", &[Hidden]),
    rule(Role::Q, "mixer.q_proj.weight", &[QOut, Hidden]),
    rule(Role::K, "mixer.k_proj.weight", &[Kv, Hidden]),
    rule(Role::V, "mixer.v_proj.weight", &[Values, Hidden]),
    rule(Role::O, "mixer.o_proj.weight", &[Hidden, AttnOut]),
    rule(Role::MixerIn, "mixer.in_proj.weight", &[MixerIn, Hidden]),
    rule(Role::MixerInBias, "mixer.in_proj.bias", &[MixerIn]),
    rule(Role::MixerConv, "mixer.conv1d.weight", &[MixerChannels, One, MixerKernel]),
    rule(Role::MixerConvBias, "mixer.conv1d.bias", &[MixerChannels]),
    rule(Role::MixerNorm, "mixer.norm.weight", &[MixerInner]),
    rule(Role::MixerOut, "mixer.out_proj.weight", &[Hidden, MixerInner]),
    rule(Role::MixerOutBias, "mixer.out_proj.bias", &[Hidden]),
    rule(Role::StateStep, "mixer.dt_bias", &[Steps]),
    rule(Role::StateDecay, "mixer.A_log", &[Steps]),
    rule(Role::StateSkip, "mixer.D", &[Steps]),
    rule(Role::DenseUp, "mixer.up_proj.weight", &[DenseInter, Hidden]),
    rule(Role::DenseDown, "mixer.down_proj.weight", &[Hidden, DenseInter]),
    rule(Role::Router, "mixer.gate.weight", &[Experts, Hidden]),
    rule(Role::RouterCorrection, "mixer.gate.e_score_correction_bias", &[Experts]),
    rule(Role::LatentDown, "mixer.fc1_latent_proj.weight", &[Latent, Hidden]),
    rule(Role::LatentUp, "mixer.fc2_latent_proj.weight", &[Hidden, Latent]),
    rule(Role::SharedUp, "mixer.shared_experts.up_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedDown, "mixer.shared_experts.down_proj.weight", &[Hidden, SharedInter]),
];

const UP_DOWN: ExpertLayout = ExpertLayout {
    name: "per expert, up and down",
    pieces: &[
        one(Part::Up, "mixer.experts.{E}.up_proj.weight"),
        one(Part::Down, "mixer.experts.{E}.down_proj.weight"),
    ],
};

const ATTENTION: GqaRule = GqaRule {
    head_dim: Some(128),
    qkv_bias: Switch::Never,
    o_bias: Switch::Never,
    nope: NopeRule::All,
    ..GqaRule::PLAIN
};

const MAMBA: StateRule = StateRule {
    n_heads: &["mamba_num_heads"],
    head_dim: &["mamba_head_dim"],
    n_groups: &["mamba_n_groups", "n_groups"],
    state_dim: &["ssm_state_size"],
    kernel: &["mamba_d_conv", "conv_kernel"],
    conv_bias: Switch::Key("use_conv_bias", true),
    bias: Switch::Key("use_bias", false),
    steps: StepRule::Least(&["mamba_dt_min", "time_step_min"], 0.001),
    ..StateRule::MAMBA_2
};

pub const FAMILY: Family = Family {
    model_types: &["nemotron_h"],
    class: "NemotronHForCausalLM",
    gguf: "nemotron_h_moe",
    fixed: &[
        ("mlp_hidden_act", Fixed::Text("relu2")),
        ("mamba_hidden_act", Fixed::Text("silu")),
        ("mlp_bias", Fixed::Bool(false)),
    ],
    norm: NormRule::RmsOf("layer_norm_epsilon", 1e-5),
    residual: ResidualRule::Single,
    attention: AttentionRule::Mixed(ATTENTION, MixerRule::StateSpace(MAMBA), MixedLayers::Blocks),
    moe_layers: MoeLayers::Blocks,
    moe: MoeRule {
        activation: ActivationRule::SquaredRelu,
        latent: &["moe_latent_size"],
        router: RouterRule::SIGMOID,
        shared: SharedRule::Width(&["moe_shared_expert_intermediate_size"]),
        ..MoeRule::PLAIN
    },
    layer_prefix: "backbone.layers.{L}.",
    spellings: &[("model.", "backbone.")],
    rules: &[NAMES],
    experts: &[UP_DOWN],
    ..qwen3_moe::FAMILY
};
