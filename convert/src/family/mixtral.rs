//! Mixtral: plain grouped-query attention, top-2 softmax router, w1 = gate, w3 = up, w2 = down.
//! Source: transformers 5.23.0 `models/mixtral`; released as Mixtral-8x7B and -8x22B.

use super::common::{GQA, LLAMA, SPARSE_ROUTER, W1_W3_W2};
use super::{
    AttentionRule, Family, GqaRule, MoeLayers, MoeRule, NormRule, RouterRule, Switch, WindowRule, qwen3_moe,
};
use crate::rope::RopeRule;

pub const FAMILY: Family = Family {
    model_types: &["mixtral"],
    class: "MixtralForCausalLM",
    gguf: "llama",
    norm: NormRule::Rms(1e-5),
    attention: AttentionRule::Gqa(GqaRule {
        qkv_bias: Switch::Never,
        o_bias: Switch::Never,
        window: WindowRule::All,
        ..GqaRule::PLAIN
    }),
    rope: RopeRule { theta: 1e6, ..RopeRule::PLAIN },
    moe_layers: MoeLayers::All,
    moe: MoeRule {
        n_experts: &["num_local_experts", "num_experts"],
        inter: &["intermediate_size"],
        router: RouterRule { renorm: Switch::Always, ..RouterRule::SOFTMAX },
        ..MoeRule::PLAIN
    },
    rules: &[LLAMA, GQA, SPARSE_ROUTER],
    experts: &[W1_W3_W2],
    ..qwen3_moe::FAMILY
};
