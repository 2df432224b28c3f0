//! Qwen3-Next, and Qwen3.5 and 3.6: linear attention in three of four layers, gated attention with partial rotation in the
//! fourth, norms whose weights are stored minus one, a gated shared expert. The older one groups projections by key heads.
//! Source: transformers 5.23.0 `models/qwen3_next` and `qwen3_5_moe`.

use super::Dim::{
    DeltaBa, DeltaChannels, DeltaHead, DeltaHeads, DeltaKernel, DeltaQkvz, DeltaValues, Hidden, One,
};
use super::common::{DENSE, GQA, LLAMA, PER_EXPERT, QK_NORM_HEAD, ROUTER, one, rule, two};
use super::{
    AttentionRule, DeltaRule, ExpertLayout, Family, GqaRule, MoeLayers, MoeRule, NormRule, RouterRule, Rule,
    SharedRule, Split, Switch, qwen2_moe, qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::{DeltaProjections, Gate, Part, QkNorm, Role};

/// The gated delta rule.
pub const LINEAR: &[Rule] = &[
    rule(Role::DeltaQkvz, "linear_attn.in_proj_qkvz.weight", &[DeltaQkvz, Hidden]),
    rule(Role::DeltaBa, "linear_attn.in_proj_ba.weight", &[DeltaBa, Hidden]),
    rule(Role::DeltaQkv, "linear_attn.in_proj_qkv.weight", &[DeltaChannels, Hidden]),
    rule(Role::DeltaZ, "linear_attn.in_proj_z.weight", &[DeltaValues, Hidden]),
    rule(Role::DeltaB, "linear_attn.in_proj_b.weight", &[DeltaHeads, Hidden]),
    rule(Role::DeltaA, "linear_attn.in_proj_a.weight", &[DeltaHeads, Hidden]),
    rule(Role::DeltaConv, "linear_attn.conv1d.weight", &[DeltaChannels, One, DeltaKernel]),
    rule(Role::DeltaStep, "linear_attn.dt_bias", &[DeltaHeads]),
    rule(Role::DeltaDecay, "linear_attn.A_log", &[DeltaHeads]),
    rule(Role::DeltaNorm, "linear_attn.norm.weight", &[DeltaHead]),
    rule(Role::DeltaOut, "linear_attn.out_proj.weight", &[Hidden, DeltaValues]),
];

/// As Qwen3.5 was released in BF16.
pub const STACKED: ExpertLayout = ExpertLayout {
    name: "stacked, gate before up",
    pieces: &[
        two(Part::Gate, Part::Up, Split::Halves, "mlp.experts.gate_up_proj"),
        one(Part::Down, "mlp.experts.down_proj"),
    ],
};

/// Gated attention.
pub const FULL: GqaRule =
    GqaRule { head_dim: Some(256), qk_norm: QkNorm::Head, gate: Some(Gate::InQuery), ..GqaRule::PLAIN };

pub const FAMILY: Family = Family {
    model_types: &["qwen3_next"],
    class: "Qwen3NextForCausalLM",
    gguf: "qwen3next",
    norm: NormRule::RmsPlusOne(1e-6),
    attention: AttentionRule::Hybrid(FULL, DeltaRule::plain(DeltaProjections::Grouped)),
    rope: RopeRule { partial: 0.25, ..RopeRule::PLAIN },
    moe: MoeRule {
        router: RouterRule { renorm: Switch::Key("norm_topk_prob", true), ..RouterRule::SOFTMAX },
        shared: SharedRule::Gated(&["shared_expert_intermediate_size"]),
        ..MoeRule::PLAIN
    },
    rules: &[LLAMA, GQA, QK_NORM_HEAD, LINEAR, DENSE, ROUTER, qwen2_moe::SHARED],
    experts: &[PER_EXPERT],
    ..qwen3_moe::FAMILY
};

pub const QWEN3_5: Family = Family {
    model_types: &["qwen3_5_moe", "qwen3_5_moe_text"],
    class: "Qwen3_5MoeForCausalLM",
    gguf: "qwen35moe",
    attention: AttentionRule::Hybrid(FULL, DeltaRule::plain(DeltaProjections::Separate)),
    moe_layers: MoeLayers::All,
    moe: MoeRule { router: RouterRule { renorm: Switch::Always, ..RouterRule::SOFTMAX }, ..FAMILY.moe },
    experts: &[STACKED, PER_EXPERT],
    ..FAMILY
};
