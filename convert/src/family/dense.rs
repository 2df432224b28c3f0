//! Dense models, of which everything is trunk: Llama, Mistral, Qwen2 and Qwen3.
//! Source: transformers 5.23.0 `models/llama`, `mistral`, `qwen2` and `qwen3`.

use super::common::{DENSE, GQA, LLAMA, QK_NORM_HEAD};
use super::{AttentionRule, Family, Fixed, GqaRule, MoeLayers, NormRule, Switch, WindowRule, qwen3_moe};
use crate::spec::QkNorm;

const FIXED: &[(&str, Fixed)] = &[("hidden_act", Fixed::Text("silu")), ("mlp_bias", Fixed::Bool(false))];

pub const LLAMA_FAMILY: Family = Family {
    model_types: &["llama"],
    class: "LlamaForCausalLM",
    gguf: "llama",
    fixed: FIXED,
    attention: AttentionRule::Gqa(GqaRule::PLAIN),
    moe_layers: MoeLayers::None,
    rules: &[LLAMA, GQA, DENSE],
    experts: &[],
    ..qwen3_moe::FAMILY
};

pub const MISTRAL: Family = Family {
    model_types: &["mistral"],
    class: "MistralForCausalLM",
    attention: AttentionRule::Gqa(GqaRule {
        qkv_bias: Switch::Never,
        o_bias: Switch::Never,
        window: WindowRule::All,
        ..GqaRule::PLAIN
    }),
    norm: NormRule::Rms(1e-6),
    ..LLAMA_FAMILY
};

pub const QWEN2: Family = Family {
    model_types: &["qwen2"],
    class: "Qwen2ForCausalLM",
    gguf: "qwen2",
    attention: AttentionRule::Gqa(GqaRule {
        qkv_bias: Switch::Always,
        o_bias: Switch::Never,
        window: WindowRule::LayerTypesIfUsed,
        ..GqaRule::PLAIN
    }),
    ..LLAMA_FAMILY
};

pub const QWEN3: Family = Family {
    model_types: &["qwen3"],
    class: "Qwen3ForCausalLM",
    gguf: "qwen3",
    attention: AttentionRule::Gqa(GqaRule {
        qk_norm: QkNorm::Head,
        window: WindowRule::LayerTypesIfUsed,
        ..GqaRule::PLAIN
    }),
    rules: &[LLAMA, GQA, QK_NORM_HEAD, DENSE],
    ..LLAMA_FAMILY
};
