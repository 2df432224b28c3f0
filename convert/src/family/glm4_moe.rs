//! GLM-4.5, 4.6 and 4.7: half of each head rotates, DeepSeek V3's router and shared expert.
//! Source: transformers 5.23.0 `models/glm4_moe`.

use super::common::{CORRECTION, DENSE, GQA, LLAMA, QK_NORM_HEAD, ROUTER, SHARED_EXPERTS};
use super::{
    AttentionRule, Family, Fixed, GqaRule, MoeLayers, MoeRule, Mtp, NormRule, RouterRule, SharedRule, Switch,
    qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::QkNorm;

pub const FAMILY: Family = Family {
    model_types: &["glm4_moe"],
    class: "Glm4MoeForCausalLM",
    gguf: "glm4moe",
    fixed: &[("hidden_act", Fixed::Text("silu")), ("moe_layer_freq", Fixed::Int(1))],
    norm: NormRule::Rms(1e-5),
    attention: AttentionRule::Gqa(GqaRule {
        qk_norm: QkNorm::Head,
        qk_norm_if: Switch::Key("use_qk_norm", false),
        o_bias: Switch::Never,
        ..GqaRule::PLAIN
    }),
    rope: RopeRule { partial: 0.5, ..RopeRule::PLAIN },
    moe_layers: MoeLayers::From("first_k_dense_replace", 1),
    moe: MoeRule {
        router: RouterRule::SIGMOID,
        shared: SharedRule::Count("n_shared_experts", 1),
        ..MoeRule::PLAIN
    },
    mtp: Mtp::ExtraLayers { mark: "eh_proj.weight" },
    rules: &[LLAMA, GQA, QK_NORM_HEAD, DENSE, ROUTER, CORRECTION, SHARED_EXPERTS],
    ..qwen3_moe::FAMILY
};
