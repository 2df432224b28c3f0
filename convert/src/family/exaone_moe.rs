//! K-EXAONE: windows with position encoding, without either in each fourth layer; DeepSeek V3's router.
//! Source: transformers 5.23.0 `models/exaone_moe`.

use super::Dim::Experts;
use super::common::{DENSE, GQA, LLAMA, QK_NORM_HEAD, ROUTER, SHARED_EXPERTS, rule};
use super::{
    AttentionRule, Factor, Family, GqaRule, MoeRule, NopeRule, RouterRule, Rule, SharedRule, Switch,
    WindowRule, glm4_moe, qwen3_moe,
};
use crate::spec::{QkNorm, Role};

const CORRECTION: &[Rule] = &[rule(Role::RouterCorrection, "mlp.e_score_correction_bias", &[Experts])];

pub const FAMILY: Family = Family {
    model_types: &["exaone_moe"],
    class: "ExaoneMoeForCausalLM",
    gguf: "exaone-moe",
    attention: AttentionRule::Gqa(GqaRule {
        qk_norm: QkNorm::Head,
        qkv_bias: Switch::Never,
        o_bias: Switch::Never,
        window: WindowRule::AllBut { every: "sliding_window_pattern", n: 4, first_too: false, default: 4096 },
        nope: NopeRule::WithoutWindow,
        ..GqaRule::PLAIN
    }),
    rope: qwen3_moe::FAMILY.rope,
    moe: MoeRule {
        router: RouterRule { scale: Factor::Key("routed_scaling_factor", 2.5), ..RouterRule::SIGMOID },
        shared: SharedRule::Count("num_shared_experts", 1),
        ..MoeRule::PLAIN
    },
    rules: &[LLAMA, GQA, QK_NORM_HEAD, DENSE, ROUTER, CORRECTION, SHARED_EXPERTS],
    ..glm4_moe::FAMILY
};
