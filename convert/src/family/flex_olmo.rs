//! FlexOlmo: OLMoE with norms behind the sublayers, not before them.
//! Source: transformers 5.23.0 `models/flex_olmo`.

use super::Dim::{Hidden, Vocab};
use super::common::{GQA, QK_NORM_FULL, ROUTER, rule};
use super::{AttentionRule, Family, GqaRule, NormRule, ResidualRule, Rule, olmoe};
use crate::rope::RopeRule;
use crate::spec::{QkNorm, Role};

const NAMES: &[Rule] = &[
    rule(Role::Embed, "model.embed_tokens.weight", &[Vocab, Hidden]),
    rule(Role::FinalNorm, "model.norm.weight", &[Hidden]),
    rule(Role::LmHead, "lm_head.weight", &[Vocab, Hidden]),
    rule(Role::AttnPostNorm, "post_attention_layernorm.weight", &[Hidden]),
    rule(Role::MlpPostNorm, "post_feedforward_layernorm.weight", &[Hidden]),
];

pub const FAMILY: Family = Family {
    model_types: &["flex_olmo"],
    class: "FlexOlmoForCausalLM",
    norm: NormRule::Rms(1e-6),
    residual: ResidualRule::Post,
    attention: AttentionRule::Gqa(GqaRule { qk_norm: QkNorm::Full, ..GqaRule::PLAIN }),
    rope: RopeRule { theta: 5e5, ..RopeRule::PLAIN },
    rules: &[NAMES, GQA, QK_NORM_FULL, ROUTER],
    ..olmoe::FAMILY
};
