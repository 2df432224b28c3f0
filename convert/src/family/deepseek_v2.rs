//! DeepSeek V2, V2-Lite and Coder-V2: V3's latent attention with a softmax router, groups by their best expert, weights
//! that are not divided by their sum.
//! Source: transformers 5.23.0 `models/deepseek_v2`.

use super::common::{DENSE, LLAMA, MLA, ROUTER, SHARED_EXPERTS};
use super::{
    AttentionRule, Factor, Family, Fixed, MlaRule, MoeLayers, MoeRule, RouterRule, SharedRule, Switch,
    deepseek_v3,
};
use crate::spec::GroupScore;

pub const FAMILY: Family = Family {
    model_types: &["deepseek_v2"],
    class: "DeepseekV2ForCausalLM",
    fixed: &[
        ("hidden_act", Fixed::Text("silu")),
        ("scoring_func", Fixed::Text("softmax")),
        ("norm_topk_prob", Fixed::Bool(false)),
        ("moe_layer_freq", Fixed::Int(1)),
    ],
    attention: AttentionRule::Mla(MlaRule { adjacent: Switch::Always, ..MlaRule::PLAIN }),
    moe_layers: MoeLayers::From("first_k_dense_replace", 0),
    moe: MoeRule {
        router: RouterRule {
            groups: Some(GroupScore::Max),
            groups_if: Some(("topk_method", "group_limited_greedy")),
            renorm: Switch::Never,
            scale: Factor::Key("routed_scaling_factor", 1.0),
            ..RouterRule::SOFTMAX
        },
        shared: SharedRule::Count("n_shared_experts", 2),
        ..deepseek_v3::FAMILY.moe
    },
    rules: &[LLAMA, MLA, DENSE, ROUTER, SHARED_EXPERTS],
    ..deepseek_v3::FAMILY
};
