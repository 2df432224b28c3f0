//! Hy4: latent attention with an indexer, sinks and a gate on the output; hyper-connections whose streams do not mix;
//! sigmoid router, a clamp in the routed experts only.
//! Source: transformers 5.23.0 `models/hy_v4`; released as Hy4-preview.

use super::Dim::{DenseInter, GateOut, Heads, Hidden, Mixes, One, Scales, SharedInter, Streams, Width};
use super::common::{CORRECTION, INDEXER, LLAMA, MLA, ROUTER, rule};
use super::{
    ActivationRule, AttentionRule, Factor, Family, IndexerRule, MlaRule, MoeLayers, MoeRule, Mtp, NormRule,
    ResidualRule, RouterRule, Rule, SharedRule, Switch, deepseek_v3, qwen3_next,
};
use crate::spec::{Gate, Pairing, Role};

const OWN: &[Rule] = &[
    rule(Role::AttnGate, "self_attn.linear_gate.weight", &[GateOut, Hidden]),
    rule(Role::Sinks, "self_attn.learnable_sink_param", &[Heads]),
    rule(Role::DenseGate, "mlp.linear_gate.weight", &[DenseInter, Hidden]),
    rule(Role::DenseUp, "mlp.up_proj.weight", &[DenseInter, Hidden]),
    rule(Role::DenseDown, "mlp.down_proj.weight", &[Hidden, DenseInter]),
    rule(Role::SharedGate, "mlp.shared_experts.linear_gate.weight", &[SharedInter, Hidden]),
    rule(Role::SharedUp, "mlp.shared_experts.up_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedDown, "mlp.shared_experts.down_proj.weight", &[Hidden, SharedInter]),
];

const HYPER: &[Rule] = &[
    rule(Role::HeadMix, "model.hc_pre.hc_head.hc_head_fn", &[Streams, Width]),
    rule(Role::HeadMixBase, "model.hc_pre.hc_head.hc_head_base", &[Streams]),
    rule(Role::HeadMixScale, "model.hc_pre.hc_head.hc_head_scale", &[One]),
    rule(Role::AttnMix, "hc_pre.hc_attn_layer.hc_fn", &[Mixes, Width]),
    rule(Role::AttnMixBase, "hc_pre.hc_attn_layer.hc_base", &[Mixes]),
    rule(Role::AttnMixScale, "hc_pre.hc_attn_layer.hc_scale", &[Scales]),
    rule(Role::MlpMix, "hc_pre.hc_mlp_layer.hc_fn", &[Mixes, Width]),
    rule(Role::MlpMixBase, "hc_pre.hc_mlp_layer.hc_base", &[Mixes]),
    rule(Role::MlpMixScale, "hc_pre.hc_mlp_layer.hc_scale", &[Scales]),
];

pub const FAMILY: Family = Family {
    model_types: &["hy_v4"],
    class: "HYV4ForCausalLM",
    gguf: "hy-v4",
    norm: NormRule::Rms(1e-5),
    residual: ResidualRule::HyperAlone,
    attention: AttentionRule::Mla(MlaRule {
        adjacent: Switch::Never,
        indexer: Some(IndexerRule {
            rotates_last: true,
            model_eps: true,
            every: 4,
            ..IndexerRule::plain(Pairing::Half)
        }),
        gate: Some(Gate::Own),
        sinks: true,
        ..MlaRule::PLAIN
    }),
    moe_layers: MoeLayers::From("first_k_dense_replace", 1),
    moe: MoeRule {
        activation: ActivationRule::ClampedSilu { limit: 10.0 },
        plain_elsewhere: true,
        router: RouterRule { scale: Factor::Key("routed_scaling_factor", 2.827), ..RouterRule::SIGMOID },
        shared: SharedRule::Count("n_shared_experts", 1),
        ..MoeRule::PLAIN
    },
    mtp: Mtp::None,
    rules: &[LLAMA, MLA, INDEXER, OWN, HYPER, ROUTER, CORRECTION],
    experts: &[qwen3_next::STACKED],
    carried: &["model.mtp_layers."],
    ..deepseek_v3::FAMILY
};
