//! MiniMax-M3: an indexer of which each head chooses blocks of keys for a group of heads, norms stored minus one, gpt-oss's
//! activation in every MLP, sigmoid router with a correction, a shared expert.
//! Source: transformers 5.23.0 `models/minimax_m3_vl`, which saves gate and up as one matrix; the release has two.

use super::Dim::{DenseGateUp, Hidden, Index, IndexHead, SharedGateUp};
use super::common::{
    CORRECTION, DENSE, GQA, LLAMA, MLP_W1_W3_W2, QK_NORM_HEAD, ROUTER, SHARED_EXPERTS, TOWERS, rule,
};
use super::{
    ActivationRule, AttentionRule, Factor, Family, GqaRule, MoeLayers, MoeRule, NormRule, RouterRule, Rule,
    SharedRule, Switch, qwen3_moe, qwen3_next,
};
use crate::rope::RopeRule;
use crate::spec::{QkNorm, Role};

const OWN: &[Rule] = &[
    rule(Role::DenseGateUp, "mlp.gate_up_proj.weight", &[DenseGateUp, Hidden]),
    rule(Role::SharedGateUp, "mlp.shared_experts.gate_up_proj.weight", &[SharedGateUp, Hidden]),
    rule(Role::IndexQ, "self_attn.indexer.q_proj.weight", &[Index, Hidden]),
    rule(Role::IndexK, "self_attn.indexer.k_proj.weight", &[IndexHead, Hidden]),
    rule(Role::IndexQNorm, "self_attn.indexer.q_norm.weight", &[IndexHead]),
    rule(Role::IndexKNorm, "self_attn.indexer.k_norm.weight", &[IndexHead]),
];

pub const FAMILY: Family = Family {
    model_types: &["minimax_m3_vl", "minimax_m3_vl_text"],
    class: "MiniMaxM3VLForCausalLM",
    gguf: "minimax-m3",
    fixed: &[],
    norm: NormRule::RmsPlusOne(1e-6),
    attention: AttentionRule::Gqa(GqaRule {
        head_dim: Some(128),
        qk_norm: QkNorm::Head,
        qkv_bias: Switch::Never,
        o_bias: Switch::Never,
        blocks: Some("minimax_m3_sparse"),
        ..GqaRule::PLAIN
    }),
    rope: RopeRule { theta: 5e6, ..RopeRule::PLAIN },
    moe_layers: MoeLayers::Flags("moe_layer_freq"),
    moe: MoeRule {
        inter: &["intermediate_size"],
        activation: ActivationRule::ClampedSwish { alpha: 1.702, limit: 7.0 },
        router: RouterRule {
            groups: None,
            renorm: Switch::Always,
            renorm_eps: 0.0,
            scale: Factor::Key("routed_scaling_factor", 2.0),
            ..RouterRule::SIGMOID
        },
        shared: SharedRule::Width(&["shared_intermediate_size"]),
        ..MoeRule::PLAIN
    },
    dense_inter: &["dense_intermediate_size"],
    spellings: &[
        ("language_model.", ""),
        ("model.language_model.", "model."),
        (".block_sparse_moe.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
        (".block_sparse_moe.", ".mlp."),
        (".self_attn.index_", ".self_attn.indexer."),
    ],
    rules: &[LLAMA, GQA, QK_NORM_HEAD, OWN, DENSE, ROUTER, CORRECTION, SHARED_EXPERTS],
    experts: &[qwen3_next::STACKED, MLP_W1_W3_W2],
    carried: TOWERS,
    ..qwen3_moe::FAMILY
};
