//! Hy3: norms of each head, sigmoid router with a correction, a shared expert, a dense first layer.
//! Source: transformers 5.23.0 `models/hy_v3`.

use super::common::{DENSE, GQA, LLAMA, QK_NORM_HEAD, ROUTER_GATE, SHARED_MLP};
use super::{
    AttentionRule, Factor, Family, GqaRule, MoeLayers, MoeRule, Mtp, NormRule, RouterRule, SharedRule,
    Switch, qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::QkNorm;

pub const FAMILY: Family = Family {
    model_types: &["hy_v3"],
    class: "HYV3ForCausalLM",
    gguf: "hy-v3",
    norm: NormRule::Rms(1e-5),
    attention: AttentionRule::Gqa(GqaRule { qk_norm: QkNorm::Head, head_dim: Some(128), ..GqaRule::PLAIN }),
    rope: RopeRule { theta: 11_158_840.0, ..RopeRule::PLAIN },
    moe_layers: MoeLayers::From("first_k_dense_replace", 1),
    moe: MoeRule {
        router: RouterRule {
            groups: None,
            renorm: Switch::Always,
            scale: Factor::Key("router_scaling_factor", 2.826),
            ..RouterRule::SIGMOID
        },
        shared: SharedRule::Count("num_shared_experts", 1),
        ..MoeRule::PLAIN
    },
    mtp: Mtp::ExtraLayers { mark: "eh_proj.weight" },
    rules: &[LLAMA, GQA, QK_NORM_HEAD, DENSE, ROUTER_GATE, SHARED_MLP],
    ..qwen3_moe::FAMILY
};
