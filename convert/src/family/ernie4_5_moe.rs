//! ERNIE 4.5: adjacent rotary pairs, softmax router whose choice is corrected, shared experts.
//! Source: transformers 5.23.0 `models/ernie4_5_moe`; released as ERNIE-4.5-21B-A3B and -300B-A47B.

use super::Dim::{Experts, One};
use super::common::{DENSE, GQA, LLAMA, ROUTER, SHARED_EXPERTS, rule};
use super::{
    AttentionRule, Family, Fixed, GqaRule, MoeLayers, MoeRule, NormRule, RouterRule, Rule, SharedRule,
    Switch, qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::{Pairing, Role};

const CORRECTION: &[Rule] =
    &[rule(Role::RouterCorrection, "mlp.moe_statics.e_score_correction_bias", &[One, Experts])];

pub const FAMILY: Family = Family {
    model_types: &["ernie4_5_moe"],
    class: "Ernie4_5_MoeForCausalLM",
    gguf: "ernie4_5-moe",
    fixed: &[("hidden_act", Fixed::Text("silu")), ("use_bias", Fixed::Bool(false))],
    norm: NormRule::Rms(1e-5),
    tied_head: true,
    attention: AttentionRule::Gqa(GqaRule {
        qkv_bias: Switch::Never,
        o_bias: Switch::Never,
        pairing: Pairing::Adjacent,
        ..GqaRule::PLAIN
    }),
    rope: RopeRule { theta: 5e5, ..RopeRule::PLAIN },
    moe_layers: MoeLayers::Interval,
    moe: MoeRule {
        n_experts: &["moe_num_experts", "num_experts"],
        n_experts_used: &["moe_k", "num_experts_per_tok"],
        router: RouterRule {
            correction: true,
            renorm: Switch::Always,
            renorm_eps: 1e-12,
            ..RouterRule::SOFTMAX
        },
        shared: SharedRule::Count("moe_num_shared_experts", 2),
        ..MoeRule::PLAIN
    },
    rules: &[LLAMA, GQA, DENSE, ROUTER, CORRECTION, SHARED_EXPERTS],
    ..qwen3_moe::FAMILY
};
