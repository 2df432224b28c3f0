//! Ling 3.0 (Bailing hybrid): Kimi's delta attention with bounded decays, and in each sixth layer latent attention with a
//! gate on each head; DeepSeek V3's router and shared experts.
//! Source: transformers 5.23.0 `models/bailing_hybrid`.

use super::Dim::{DeltaHeads, DeltaValues, Experts, GateOut, Hidden};
use super::common::{DENSE, KDA, LLAMA, MLA, ROUTER, SHARED_EXPERTS, rule};
use super::{
    AttentionRule, Bound, DeltaRule, Factor, Family, Fixed, MlaRule, MoeLayers, MoeRule, Mtp, RouterRule,
    Rule, SharedRule, Switch, qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::{DeltaProjections, Gate, Role};

const OWN: &[Rule] = &[
    rule(Role::AttnGate, "self_attn.g_proj.weight", &[GateOut, Hidden]),
    rule(Role::DeltaA, "self_attn.f_proj.weight", &[DeltaValues, Hidden]),
    rule(Role::DeltaDecay, "self_attn.A_log", &[DeltaHeads]),
    rule(Role::RouterCorrection, "mlp.gate.expert_bias", &[Experts]),
];

pub const FAMILY: Family = Family {
    model_types: &["bailing_hybrid"],
    class: "BailingHybridForCausalLM",
    gguf: "bailing-hybrid",
    fixed: &[("hidden_act", Fixed::Text("silu")), ("scoring_func", Fixed::Text("sigmoid"))],
    attention: AttentionRule::HybridMla(
        MlaRule { direct_q: true, adjacent: Switch::Always, gate: Some(Gate::PerHead), ..MlaRule::PLAIN },
        DeltaRule {
            group: Some(("layer_group_size", 6)),
            bound: Some(Bound { switch: Some("kda_safe_gate"), keys: &["kda_lower_bound"], default: -5.0 }),
            ..DeltaRule::plain(DeltaProjections::FullRank)
        },
    ),
    rope: RopeRule { theta: 6e6, ..RopeRule::PLAIN },
    moe_layers: MoeLayers::From("first_k_dense_replace", 2),
    moe: MoeRule {
        n_experts_used: &["num_experts_per_tok", "num_experts_per_token"],
        router: RouterRule {
            renorm: Switch::Key("moe_renormalize", true),
            scale: Factor::Key("routed_scaling_factor", 2.5),
            ..RouterRule::SIGMOID
        },
        shared: SharedRule::Count("num_shared_experts", 1),
        ..MoeRule::PLAIN
    },
    mtp: Mtp::ExtraLayers { mark: "eh_proj.weight" },
    spellings: &[
        ("model.word_embeddings.", "model.embed_tokens."),
        (".attention.dense.", ".self_attn.o_proj."),
        (".attention.", ".self_attn."),
    ],
    rules: &[LLAMA, MLA, KDA, OWN, DENSE, ROUTER, SHARED_EXPERTS],
    ..qwen3_moe::FAMILY
};
