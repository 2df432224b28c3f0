//! Qwen3-MoE: grouped-query attention with a norm over each head, softmax router, no shared expert.
//! Source: transformers 5.23.0 `models/qwen3_moe`; released as Qwen3-30B-A3B, -235B-A22B, Qwen3-Coder.

use super::common::{DENSE, GQA, LLAMA, PER_EXPERT, PREFIXES, QK_NORM_HEAD, ROTARY_TABLES, ROUTER, TOWERS};
use super::{
    AttentionRule, Factor, Family, Fixed, GqaRule, MoeLayers, MoeRule, Mtp, NormRule, ResidualRule, Switch,
    WindowRule,
};
use crate::rope::RopeRule;
use crate::spec::QkNorm;

pub const FAMILY: Family = Family {
    model_types: &["qwen3_moe"],
    class: "Qwen3MoeForCausalLM",
    gguf: "qwen3moe",
    fixed: &[("hidden_act", Fixed::Text("silu"))],
    norm: NormRule::Rms(1e-6),
    embed_scale: Factor::One,
    logit_scale: Factor::One,
    logit_softcap: &[],
    layer_scale: false,
    ngrams: false,
    head_bias: Switch::Never,
    tied_head: false,
    residual: ResidualRule::Plain,
    attention: AttentionRule::Gqa(GqaRule {
        qk_norm: QkNorm::Head,
        window: WindowRule::IfUsed,
        ..GqaRule::PLAIN
    }),
    rope: RopeRule::PLAIN,
    moe_layers: MoeLayers::Sparse,
    moe: MoeRule::PLAIN,
    shortcut: false,
    dense_inter: &["intermediate_size"],
    mtp: Mtp::None,
    layer_prefix: "model.layers.{L}.",
    spellings: PREFIXES,
    rules: &[LLAMA, GQA, QK_NORM_HEAD, DENSE, ROUTER],
    experts: &[PER_EXPERT],
    carried: TOWERS,
    left_out: ROTARY_TABLES,
};
