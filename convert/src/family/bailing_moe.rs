//! Ling 1 (Bailing MoE: lite, plus): the second's names with a softmax router, without norms of heads; whole heads rotate.
//! Source: the released models' own code; transformers 5.23.0 has no class for it, so there is no golden either.

use super::{AttentionRule, Family, Fixed, GqaRule, MoeRule, Mtp, RouterRule, Switch, bailing_moe_v2};
use crate::rope::RopeRule;

pub const FAMILY: Family = Family {
    model_types: &["bailing_moe"],
    class: "BailingMoeForCausalLM",
    gguf: "bailingmoe",
    fixed: &[
        ("hidden_act", Fixed::Text("silu")),
        ("use_bias", Fixed::Bool(false)),
        ("use_qkv_bias", Fixed::Bool(false)),
        ("norm_head", Fixed::Bool(false)),
        ("norm_softmax", Fixed::Bool(false)),
        ("multi_gate", Fixed::Bool(false)),
    ],
    attention: AttentionRule::Gqa(GqaRule {
        fused: true,
        qk_norm_if: Switch::Never,
        qkv_bias: Switch::Never,
        o_bias: Switch::Never,
        ..GqaRule::PLAIN
    }),
    rope: RopeRule::PLAIN,
    moe: MoeRule { router: RouterRule::SOFTMAX, ..bailing_moe_v2::FAMILY.moe },
    mtp: Mtp::None,
    ..bailing_moe_v2::FAMILY
};
