//! dots.llm1: norms of each head, windows in late layers, DeepSeek V3's router and shared experts.
//! Source: transformers 5.23.0 `models/dots1`.

use super::{
    AttentionRule, Family, GqaRule, MoeLayers, MoeRule, NormRule, RouterRule, SharedRule, Switch, WindowRule,
};
use super::{glm4_moe, qwen3_moe};
use crate::spec::QkNorm;

pub const FAMILY: Family = Family {
    model_types: &["dots1"],
    class: "Dots1ForCausalLM",
    gguf: "dots1",
    norm: NormRule::Rms(1e-6),
    attention: AttentionRule::Gqa(GqaRule {
        qk_norm: QkNorm::Head,
        window: WindowRule::LayerTypesFrom { default: 62 },
        ..GqaRule::PLAIN
    }),
    rope: qwen3_moe::FAMILY.rope,
    moe_layers: MoeLayers::From("first_k_dense_replace", 0),
    moe: MoeRule {
        router: RouterRule { renorm: Switch::Key("norm_topk_prob", false), ..RouterRule::SIGMOID },
        shared: SharedRule::Count("n_shared_experts", 0),
        ..MoeRule::PLAIN
    },
    ..glm4_moe::FAMILY
};
