//! Hunyuan-A13B: norms of each head after RoPE, NTK-scaled frequencies, softmax router, one shared expert.
//! Source: transformers 5.23.0 `models/hunyuan_v1_moe`.

use super::Dim::{Experts, Head, Hidden};
use super::common::{GQA, LLAMA, SHARED_MLP, rule};
use super::{
    AttentionRule, Family, GqaRule, MoeLayers, MoeRule, NormRule, RouterRule, Rule, SharedRule, Switch,
    qwen3_moe,
};
use crate::spec::{QkNorm, Role};

const NAMES: &[Rule] = &[
    rule(Role::QNorm, "self_attn.query_layernorm.weight", &[Head]),
    rule(Role::KNorm, "self_attn.key_layernorm.weight", &[Head]),
    rule(Role::Router, "mlp.gate.wg.weight", &[Experts, Hidden]),
];

pub const FAMILY: Family = Family {
    model_types: &["hunyuan_v1_moe"],
    class: "HunYuanMoEV1ForCausalLM",
    gguf: "hunyuan-moe",
    norm: NormRule::Rms(1e-5),
    attention: AttentionRule::Gqa(GqaRule { qk_norm: QkNorm::Head, qk_norm_late: true, ..GqaRule::PLAIN }),
    moe_layers: MoeLayers::All,
    moe: MoeRule {
        n_experts_used: &["moe_topk", "num_experts_per_tok"],
        inter: &["intermediate_size"],
        router: RouterRule { renorm: Switch::Always, ..RouterRule::SOFTMAX },
        shared: SharedRule::Width(&["intermediate_size"]),
        ..MoeRule::PLAIN
    },
    rules: &[LLAMA, GQA, NAMES, SHARED_MLP],
    ..qwen3_moe::FAMILY
};
