//! DeepSeek V3 and R1: latent attention, dense first layers, sigmoid router limited to groups of experts,
//! shared experts, multi-token-prediction layers after the last one. Kimi K2 is the same class.
//! Source: transformers 5.23.0 `models/deepseek_v3`; released as DeepSeek-V3, -R1, -V3.1, Kimi-K2.

use super::Dim::Experts;
use super::common::{DENSE, LLAMA, MLA, PER_EXPERT, ROTARY_TABLES, ROUTER, SHARED_EXPERTS, rule};
use super::{
    ActivationRule, AttentionRule, Family, Fixed, MoeLayers, MoeRule, Mtp, RouterRule, Rule, SharedRule,
    Switch,
};
use crate::rope::RopeRule;
use crate::spec::{GroupScore, Role, RouteWeights, Score};

const CORRECTION: &[Rule] = &[rule(Role::RouterCorrection, "mlp.gate.e_score_correction_bias", &[Experts])];

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
    norm_eps: 1e-6,
    attention: AttentionRule::Mla {
        // The reference gives the latent norms their class default, whatever rms_norm_eps says.
        latent_eps: 1e-6,
        bias: Switch::Key("attention_bias", false),
        adjacent: Switch::Key("rope_interleave", true),
    },
    rope: RopeRule { theta: 1e4, scaling: None },
    moe_layers: MoeLayers::From("first_k_dense_replace", 3),
    moe: MoeRule {
        n_experts: &["n_routed_experts", "num_local_experts"],
        n_experts_used: &["num_experts_per_tok"],
        inter: &["moe_intermediate_size"],
        activation: ActivationRule::Silu,
        bias: false,
        router: RouterRule {
            bias: false,
            score: Score::Sigmoid,
            correction: true,
            groups: Some(GroupScore::Top2Sum),
            weights: RouteWeights::Scores,
            renorm: Switch::Key("norm_topk_prob", true),
            renorm_eps: 1e-20,
            scale: Some(("routed_scaling_factor", 2.5)),
        },
        shared: SharedRule::Count("n_shared_experts", 1),
    },
    dense_inter: &["intermediate_size"],
    mtp: Mtp::ExtraLayers { mark: "eh_proj.weight" },
    layer_prefix: "model.layers.{L}.",
    rules: &[LLAMA, MLA, DENSE, ROUTER, CORRECTION, SHARED_EXPERTS],
    experts: &[PER_EXPERT],
    left_out: ROTARY_TABLES,
};
