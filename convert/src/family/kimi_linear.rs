//! Kimi-Linear: delta attention with one decay a channel in three of four layers, latent attention without position in the
//! fourth; DeepSeek V3's router under Mixtral's names.
//! Source: transformers 5.23.0 `models/kimi_linear`, which saves the dense layer under the experts' name.

use super::Dim::{DeltaHeads, Experts, Hidden, One, SharedInter};
use super::common::{DENSE, KDA, KDA_LOW_RANK, LLAMA, MLA, SPARSE_ROUTER, W1_W3_W2, rule};
use super::{
    AttentionRule, DeltaRule, Factor, Family, Fixed, MlaRule, MoeLayers, MoeRule, NormRule, RouterRule, Rule,
    SharedRule, Switch, qwen3_moe,
};
use crate::spec::{DeltaProjections, Role};

const DECAY: &[Rule] = &[rule(Role::DeltaDecay, "self_attn.A_log", &[One, One, DeltaHeads, One])];

const MOE: &[Rule] = &[
    rule(Role::RouterCorrection, "block_sparse_moe.gate.e_score_correction_bias", &[Experts]),
    rule(Role::SharedGate, "block_sparse_moe.shared_experts.gate_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedUp, "block_sparse_moe.shared_experts.up_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedDown, "block_sparse_moe.shared_experts.down_proj.weight", &[Hidden, SharedInter]),
];

pub const FAMILY: Family = Family {
    model_types: &["kimi_linear"],
    class: "KimiLinearForCausalLM",
    gguf: "kimi-linear",
    fixed: &[
        ("hidden_act", Fixed::Text("silu")),
        ("moe_router_activation_func", Fixed::Text("sigmoid")),
        ("moe_layer_freq", Fixed::Int(1)),
    ],
    norm: NormRule::Rms(1e-5),
    attention: AttentionRule::HybridMla(
        MlaRule { nope: true, ..MlaRule::PLAIN },
        DeltaRule::plain(DeltaProjections::LowRank),
    ),
    moe_layers: MoeLayers::From("first_k_dense_replace", 1),
    moe: MoeRule {
        n_experts_used: &["num_experts_per_token", "num_experts_per_tok"],
        router: RouterRule {
            renorm: Switch::Key("moe_renormalize", true),
            scale: Factor::Key("routed_scaling_factor", 2.446),
            ..RouterRule::SIGMOID
        },
        shared: SharedRule::Count("num_shared_experts", 1),
        ..MoeRule::PLAIN
    },
    spellings: &[
        (".block_sparse_moe.gate_proj.", ".mlp.gate_proj."),
        (".block_sparse_moe.up_proj.", ".mlp.up_proj."),
        (".block_sparse_moe.down_proj.", ".mlp.down_proj."),
    ],
    rules: &[LLAMA, MLA, KDA, KDA_LOW_RANK, DECAY, DENSE, SPARSE_ROUTER, MOE],
    experts: &[W1_W3_W2],
    ..qwen3_moe::FAMILY
};
