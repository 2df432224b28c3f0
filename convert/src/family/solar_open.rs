//! Solar-Open: Llama's attention with DeepSeek V3's router and shared expert.
//! Source: transformers 5.23.0 `models/solar_open`.

use super::common::{CORRECTION, DENSE, GQA, LLAMA, ROUTER, SHARED_EXPERTS};
use super::{AttentionRule, Family, GqaRule, MoeLayers, Switch, glm4_moe};
use crate::rope::RopeRule;

pub const FAMILY: Family = Family {
    model_types: &["solar_open"],
    class: "SolarOpenForCausalLM",
    gguf: "solar-open",
    attention: AttentionRule::Gqa(GqaRule { head_dim: Some(128), o_bias: Switch::Never, ..GqaRule::PLAIN }),
    rope: RopeRule { theta: 1e6, ..RopeRule::PLAIN },
    moe_layers: MoeLayers::From("first_k_dense_replace", 0),
    rules: &[LLAMA, GQA, DENSE, ROUTER, CORRECTION, SHARED_EXPERTS],
    ..glm4_moe::FAMILY
};
