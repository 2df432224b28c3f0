//! Qwen3-MoE: grouped-query attention with a norm over each head, softmax router, no shared expert.
//! Source: transformers 5.23.0 `models/qwen3_moe`; released as Qwen3-30B-A3B, -235B-A22B, Qwen3-Coder.

use super::common::{DENSE, GQA, LLAMA, PER_EXPERT, QK_NORM_HEAD, ROTARY_TABLES, ROUTER};
use super::{
    ActivationRule, AttentionRule, Family, Fixed, MoeLayers, MoeRule, Mtp, RouterRule, SharedRule, Switch,
    WindowRule,
};
use crate::rope::RopeRule;
use crate::spec::{QkNorm, RouteWeights, Score};

pub const FAMILY: Family = Family {
    model_types: &["qwen3_moe"],
    class: "Qwen3MoeForCausalLM",
    gguf: "qwen3moe",
    fixed: &[("hidden_act", Fixed::Text("silu"))],
    norm_eps: 1e-6,
    attention: AttentionRule::Gqa {
        head_dim: None,
        qk_norm: QkNorm::Head,
        qkv_bias: Switch::Key("attention_bias", false),
        o_bias: Switch::Key("attention_bias", false),
        clip: None,
        window: WindowRule::IfUsed,
        sinks: false,
    },
    rope: RopeRule { theta: 1e4, scaling: None },
    moe_layers: MoeLayers::Sparse,
    moe: MoeRule {
        n_experts: &["num_experts", "num_local_experts"],
        n_experts_used: &["num_experts_per_tok"],
        inter: &["moe_intermediate_size"],
        activation: ActivationRule::Silu,
        bias: false,
        router: RouterRule {
            bias: false,
            score: Score::Softmax,
            correction: false,
            groups: None,
            weights: RouteWeights::Scores,
            renorm: Switch::Key("norm_topk_prob", false),
            renorm_eps: 0.0,
            scale: None,
        },
        shared: SharedRule::None,
    },
    dense_inter: &["intermediate_size"],
    mtp: Mtp::None,
    layer_prefix: "model.layers.{L}.",
    rules: &[LLAMA, GQA, QK_NORM_HEAD, DENSE, ROUTER],
    experts: &[PER_EXPERT],
    left_out: ROTARY_TABLES,
};
