//! Mixtral: plain grouped-query attention, top-2 softmax router, w1 = gate, w3 = up, w2 = down.
//! Source: transformers 5.23.0 `models/mixtral`; released as Mixtral-8x7B and -8x22B.

use super::Dim::{Experts, Hidden};
use super::common::{GQA, LLAMA, one, rule};
use super::{
    AttentionRule, ExpertLayout, Family, MoeLayers, MoeRule, RouterRule, Rule, Switch, WindowRule, qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::{Part, QkNorm, Role};

const ROUTER: &[Rule] = &[rule(Role::Router, "block_sparse_moe.gate.weight", &[Experts, Hidden])];

const PER_EXPERT: ExpertLayout = ExpertLayout {
    name: "per expert, w1 w3 w2",
    pieces: &[
        one(Part::Gate, "block_sparse_moe.experts.{E}.w1.weight"),
        one(Part::Up, "block_sparse_moe.experts.{E}.w3.weight"),
        one(Part::Down, "block_sparse_moe.experts.{E}.w2.weight"),
    ],
};

pub const FAMILY: Family = Family {
    model_types: &["mixtral"],
    class: "MixtralForCausalLM",
    gguf: "llama",
    norm_eps: 1e-5,
    attention: AttentionRule::Gqa {
        head_dim: None,
        qk_norm: QkNorm::None,
        qkv_bias: Switch::Never,
        o_bias: Switch::Never,
        clip: None,
        window: WindowRule::All,
        sinks: false,
    },
    rope: RopeRule { theta: 1e6, scaling: None },
    moe_layers: MoeLayers::All,
    moe: MoeRule {
        n_experts: &["num_local_experts", "num_experts"],
        inter: &["intermediate_size"],
        router: RouterRule { renorm: Switch::Always, ..qwen3_moe::FAMILY.moe.router },
        ..qwen3_moe::FAMILY.moe
    },
    rules: &[LLAMA, GQA, ROUTER],
    experts: &[PER_EXPERT],
    ..qwen3_moe::FAMILY
};
