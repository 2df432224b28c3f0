//! DeepSeek V3 and R1: latent attention, dense first layers, sigmoid router limited to groups of experts,
//! shared experts, multi-token-prediction layers after the last one. Kimi K2 is the same class.
//! Source: transformers 5.23.0 `models/deepseek_v3`; released as DeepSeek-V3, -R1, -V3.1, Kimi-K2.

use super::common::{CORRECTION, DENSE, LLAMA, MLA, PER_EXPERT, ROTARY_TABLES, ROUTER, SHARED_EXPERTS};
use super::{
    AttentionRule, Factor, Family, Fixed, MlaRule, MoeLayers, MoeRule, Mtp, RouterRule, SharedRule, qwen3_moe,
};

pub const FAMILY: Family = Family {
    model_types: &["deepseek_v3", "kimi_k2"],
    class: "DeepseekV3ForCausalLM",
    gguf: "deepseek2",
    fixed: &[
        ("hidden_act", Fixed::Text("silu")),
        ("scoring_func", Fixed::Text("sigmoid")),
        ("topk_method", Fixed::Text("noaux_tc")),
        ("moe_layer_freq", Fixed::Int(1)),
    ],
    attention: AttentionRule::Mla(MlaRule::PLAIN),
    moe_layers: MoeLayers::From("first_k_dense_replace", 3),
    moe: MoeRule {
        n_experts: &["n_routed_experts", "num_local_experts"],
        router: RouterRule { scale: Factor::Key("routed_scaling_factor", 2.5), ..RouterRule::SIGMOID },
        shared: SharedRule::Count("n_shared_experts", 1),
        ..MoeRule::PLAIN
    },
    mtp: Mtp::ExtraLayers { mark: "eh_proj.weight" },
    rules: &[LLAMA, MLA, DENSE, ROUTER, CORRECTION, SHARED_EXPERTS],
    experts: &[PER_EXPERT],
    left_out: ROTARY_TABLES,
    ..qwen3_moe::FAMILY
};
