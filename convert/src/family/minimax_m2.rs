//! MiniMax-M2, 2.1, 2.5 and 2.7: norms over all heads together, half of each head rotates, sigmoid router with a
//! correction, Mixtral's names.
//! Source: transformers 5.23.0 `models/minimax_m2`.

use super::Dim::Experts;
use super::common::{GQA, LLAMA, QK_NORM_FULL, SPARSE_ROUTER, W1_W3_W2, rule};
use super::{
    AttentionRule, Factor, Family, GqaRule, MoeLayers, MoeRule, RouterRule, Rule, Switch, qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::{QkNorm, Role};

const CORRECTION: &[Rule] =
    &[rule(Role::RouterCorrection, "block_sparse_moe.e_score_correction_bias", &[Experts])];

pub const FAMILY: Family = Family {
    model_types: &["minimax_m2"],
    class: "MiniMaxM2ForCausalLM",
    gguf: "minimax-m2",
    attention: AttentionRule::Gqa(GqaRule {
        qk_norm: QkNorm::Full,
        qkv_bias: Switch::Never,
        o_bias: Switch::Never,
        ..GqaRule::PLAIN
    }),
    rope: RopeRule { theta: 5e6, ..RopeRule::PLAIN },
    moe_layers: MoeLayers::All,
    moe: MoeRule {
        inter: &["intermediate_size"],
        router: RouterRule {
            groups: None,
            renorm: Switch::Always,
            renorm_eps: 0.0,
            scale: Factor::One,
            ..RouterRule::SIGMOID
        },
        ..MoeRule::PLAIN
    },
    rules: &[LLAMA, GQA, QK_NORM_FULL, SPARSE_ROUTER, CORRECTION],
    experts: &[W1_W3_W2],
    ..qwen3_moe::FAMILY
};
