//! OLMoE: norms over all heads' queries and keys together, optional clamp of q, k and v, softmax router.
//! Source: transformers 5.23.0 `models/olmoe`; released as OLMoE-1B-7B.

use super::common::{GQA, LLAMA, QK_NORM_FULL, ROUTER};
use super::{AttentionRule, Family, GqaRule, MoeLayers, MoeRule, NormRule, qwen3_moe};
use crate::spec::QkNorm;

pub const FAMILY: Family = Family {
    model_types: &["olmoe"],
    class: "OlmoeForCausalLM",
    gguf: "olmoe",
    norm: NormRule::Rms(1e-5),
    attention: AttentionRule::Gqa(GqaRule { qk_norm: QkNorm::Full, clip: &["clip_qkv"], ..GqaRule::PLAIN }),
    moe_layers: MoeLayers::All,
    // The class's default for intermediate_size is not that of the released model, so the key must be there.
    moe: MoeRule { inter: &["intermediate_size"], ..qwen3_moe::FAMILY.moe },
    rules: &[LLAMA, GQA, QK_NORM_FULL, ROUTER],
    ..qwen3_moe::FAMILY
};
