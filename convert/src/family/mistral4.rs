//! Mistral-Small-4: DeepSeek's latent attention with queries that grow with the position, softmax router.
//! Source: transformers 5.23.0 `models/mistral4`.

use super::common::{DENSE, LLAMA, MLA, PER_EXPERT, ROUTER, SHARED_EXPERTS};
use super::{
    AttentionRule, Factor, Family, Fixed, MlaRule, MoeLayers, MoeRule, Mtp, RouterRule, Switch, deepseek_v3,
    qwen3_next,
};
use crate::spec::GroupScore;

pub const FAMILY: Family = Family {
    model_types: &["mistral4"],
    class: "Mistral4ForCausalLM",
    gguf: "mistral4",
    fixed: &[("hidden_act", Fixed::Text("silu"))],
    attention: AttentionRule::Mla(MlaRule { temperature: true, ..MlaRule::PLAIN }),
    moe_layers: MoeLayers::From("first_k_dense_replace", 0),
    moe: MoeRule {
        router: RouterRule {
            groups: Some(GroupScore::Top2Sum),
            renorm: Switch::Key("norm_topk_prob", true),
            renorm_eps: 1e-20,
            scale: Factor::Key("routed_scaling_factor", 1.0),
            ..RouterRule::SOFTMAX
        },
        ..deepseek_v3::FAMILY.moe
    },
    mtp: Mtp::None,
    rules: &[LLAMA, MLA, DENSE, ROUTER, SHARED_EXPERTS],
    experts: &[qwen3_next::STACKED, PER_EXPERT],
    ..deepseek_v3::FAMILY
};
