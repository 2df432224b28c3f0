//! Phi-3.5-MoE: layer norms, biases, long RoPE, a router that chooses two experts one after the other.
//! Source: transformers 5.23.0 `models/phimoe`.

use super::Dim::{Hidden, Vocab};
use super::common::{GQA, LLAMA, SPARSE_ROUTER, W1_W3_W2, rule};
use super::{
    AttentionRule, Family, GqaRule, MoeRule, NormRule, RouterRule, Rule, Switch, WindowRule, mixtral,
};
use crate::rope::RopeRule;
use crate::spec::{Choice, Role};

const BIASES: &[Rule] = &[
    rule(Role::FinalNormBias, "model.norm.bias", &[Hidden]),
    rule(Role::AttnNormBias, "input_layernorm.bias", &[Hidden]),
    rule(Role::MlpNormBias, "post_attention_layernorm.bias", &[Hidden]),
    rule(Role::LmHeadBias, "lm_head.bias", &[Vocab]),
];

pub const FAMILY: Family = Family {
    model_types: &["phimoe"],
    class: "PhimoeForCausalLM",
    gguf: "phimoe",
    norm: NormRule::Layer(1e-5),
    head_bias: Switch::Key("lm_head_bias", false),
    attention: AttentionRule::Gqa(GqaRule { window: WindowRule::All, ..GqaRule::PLAIN }),
    rope: RopeRule { theta: 1e6, ..RopeRule::PLAIN },
    moe: MoeRule {
        router: RouterRule { choice: Choice::SparseMixer(0.02), renorm: Switch::Never, ..RouterRule::LOGITS },
        ..mixtral::FAMILY.moe
    },
    rules: &[LLAMA, GQA, BIASES, SPARSE_ROUTER],
    experts: &[W1_W3_W2],
    ..mixtral::FAMILY
};
