//! Llama 4 (text): chunked attention with adjacent rotary pairs and unweighted norms, each fourth layer without position
//! but with growing queries; one routed expert, whose input the router weighs, and a shared one.
//! Source: transformers 5.23.0 `models/llama4`; released as Scout and Maverick.

use super::Dim::{DenseInter, Experts, Hidden, SharedInter};
use super::common::{GQA, LLAMA, one, rule, turned, two};
use super::{
    AttentionRule, ExpertLayout, Family, GqaRule, MoeLayers, MoeRule, NopeRule, NormRule, RouterRule, Rule,
    SharedRule, Split, Switch, WindowRule, qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::{Pairing, Part, QkNorm, Role, RouteWeights};

const NAMES: &[Rule] = &[
    rule(Role::DenseGate, "feed_forward.gate_proj.weight", &[DenseInter, Hidden]),
    rule(Role::DenseUp, "feed_forward.up_proj.weight", &[DenseInter, Hidden]),
    rule(Role::DenseDown, "feed_forward.down_proj.weight", &[Hidden, DenseInter]),
    rule(Role::Router, "feed_forward.router.weight", &[Experts, Hidden]),
    rule(Role::SharedGate, "feed_forward.shared_expert.gate_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedUp, "feed_forward.shared_expert.up_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedDown, "feed_forward.shared_expert.down_proj.weight", &[Hidden, SharedInter]),
];

const TRANSPOSED: ExpertLayout = ExpertLayout {
    name: "stacked, [in, out]",
    pieces: &[
        turned(two(Part::Gate, Part::Up, Split::Halves, "feed_forward.experts.gate_up_proj")),
        turned(one(Part::Down, "feed_forward.experts.down_proj")),
    ],
};

pub const FAMILY: Family = Family {
    model_types: &["llama4_text", "llama4"],
    class: "Llama4ForCausalLM",
    gguf: "llama4",
    norm: NormRule::Rms(1e-5),
    attention: AttentionRule::Gqa(GqaRule {
        head_dim: Some(128),
        qk_norm: QkNorm::Unweighted,
        qk_norm_if: Switch::Key("use_qk_norm", true),
        qk_norm_late: true,
        window: WindowRule::Chunks { default: 8192 },
        nope: NopeRule::Listed,
        temperature: true,
        pairing: Pairing::Adjacent,
        ..GqaRule::PLAIN
    }),
    rope: RopeRule { theta: 5e5, ..RopeRule::PLAIN },
    moe_layers: MoeLayers::Listed,
    moe: MoeRule {
        inter: &["intermediate_size"],
        weighs_input: true,
        router: RouterRule { weights: RouteWeights::Sigmoid, ..RouterRule::LOGITS },
        shared: SharedRule::Width(&["intermediate_size"]),
        ..MoeRule::PLAIN
    },
    dense_inter: &["intermediate_size_mlp"],
    rules: &[LLAMA, GQA, NAMES],
    experts: &[TRANSPOSED],
    ..qwen3_moe::FAMILY
};
