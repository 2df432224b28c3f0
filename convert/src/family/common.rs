//! What families share: names that began with Llama, DeepSeek and Mixtral, and the usual defaults.

use super::Dim::{
    AttnOut, DeltaHead, DeltaHeads, DeltaKernel, DeltaValues, DenseInter, Experts, Head, Hidden, Index,
    IndexHead, IndexHeads, Kv, KvA, KvB, KvLora, One, Q, QLora, QOut, SharedInter, Values, Vocab,
};
use super::{Dim, ExpertLayout, Holds, Piece, Rule, Split};
use crate::spec::{Part, Role};

/// One line of a table.
pub const fn rule(role: Role, name: &'static str, shape: &'static [Dim]) -> Rule {
    Rule { role, name, shape }
}

/// An expert tensor that holds one matrix `[out, in]`.
pub const fn one(part: Part, name: &'static str) -> Piece {
    Piece { name, holds: Holds::One(part), transposed: false, flat: false, either: false }
}

/// An expert tensor that holds two matrices or biases.
pub const fn two(a: Part, b: Part, split: Split, name: &'static str) -> Piece {
    Piece { holds: Holds::Two(a, b, split), ..one(a, name) }
}

/// The same piece, stored `[in, out]`.
pub const fn turned(piece: Piece) -> Piece {
    Piece { transposed: true, ..piece }
}

/// Embedding, head and the two norms of a layer.
pub const LLAMA: &[Rule] = &[
    rule(Role::Embed, "model.embed_tokens.weight", &[Vocab, Hidden]),
    rule(Role::FinalNorm, "model.norm.weight", &[Hidden]),
    rule(Role::LmHead, "lm_head.weight", &[Vocab, Hidden]),
    rule(Role::AttnNorm, "input_layernorm.weight", &[Hidden]),
    rule(Role::MlpNorm, "post_attention_layernorm.weight", &[Hidden]),
];

/// Grouped-query attention; biases and norms of queries and keys are there where the description has them.
pub const GQA: &[Rule] = &[
    rule(Role::Q, "self_attn.q_proj.weight", &[QOut, Hidden]),
    rule(Role::K, "self_attn.k_proj.weight", &[Kv, Hidden]),
    rule(Role::V, "self_attn.v_proj.weight", &[Values, Hidden]),
    rule(Role::O, "self_attn.o_proj.weight", &[Hidden, AttnOut]),
    rule(Role::QBias, "self_attn.q_proj.bias", &[QOut]),
    rule(Role::KBias, "self_attn.k_proj.bias", &[Kv]),
    rule(Role::VBias, "self_attn.v_proj.bias", &[Values]),
    rule(Role::OBias, "self_attn.o_proj.bias", &[Hidden]),
];

/// Norms of queries and keys, over each head.
pub const QK_NORM_HEAD: &[Rule] = &[
    rule(Role::QNorm, "self_attn.q_norm.weight", &[Head]),
    rule(Role::KNorm, "self_attn.k_norm.weight", &[Head]),
];

/// Norms of queries and keys, over all heads together.
pub const QK_NORM_FULL: &[Rule] = &[
    rule(Role::QNorm, "self_attn.q_norm.weight", &[Q]),
    rule(Role::KNorm, "self_attn.k_norm.weight", &[Kv]),
];

/// Multi-head latent attention.
pub const MLA: &[Rule] = &[
    rule(Role::Q, "self_attn.q_proj.weight", &[Q, Hidden]),
    rule(Role::QA, "self_attn.q_a_proj.weight", &[QLora, Hidden]),
    rule(Role::QABias, "self_attn.q_a_proj.bias", &[QLora]),
    rule(Role::QANorm, "self_attn.q_a_layernorm.weight", &[QLora]),
    rule(Role::QB, "self_attn.q_b_proj.weight", &[Q, QLora]),
    rule(Role::KvA, "self_attn.kv_a_proj_with_mqa.weight", &[KvA, Hidden]),
    rule(Role::KvABias, "self_attn.kv_a_proj_with_mqa.bias", &[KvA]),
    rule(Role::KvANorm, "self_attn.kv_a_layernorm.weight", &[KvLora]),
    rule(Role::KvB, "self_attn.kv_b_proj.weight", &[KvB, KvLora]),
    rule(Role::O, "self_attn.o_proj.weight", &[Hidden, AttnOut]),
    rule(Role::OBias, "self_attn.o_proj.bias", &[Hidden]),
];

/// The indexer of latent attention.
pub const INDEXER: &[Rule] = &[
    rule(Role::IndexQ, "self_attn.indexer.wq_b.weight", &[Index, QLora]),
    rule(Role::IndexK, "self_attn.indexer.wk.weight", &[IndexHead, Hidden]),
    rule(Role::IndexKNorm, "self_attn.indexer.k_norm.weight", &[IndexHead]),
    rule(Role::IndexKNormBias, "self_attn.indexer.k_norm.bias", &[IndexHead]),
    rule(Role::IndexWeights, "self_attn.indexer.weights_proj.weight", &[IndexHeads, Hidden]),
];

/// Kimi's delta attention, where its layers are beside latent attention; the decays' shape is each family's own.
pub const KDA: &[Rule] = &[
    rule(Role::K, "self_attn.k_proj.weight", &[Kv, Hidden]),
    rule(Role::V, "self_attn.v_proj.weight", &[Values, Hidden]),
    rule(Role::DeltaConvQ, "self_attn.q_conv1d.weight", &[Q, One, DeltaKernel]),
    rule(Role::DeltaConvK, "self_attn.k_conv1d.weight", &[Kv, One, DeltaKernel]),
    rule(Role::DeltaConvV, "self_attn.v_conv1d.weight", &[Values, One, DeltaKernel]),
    rule(Role::DeltaB, "self_attn.b_proj.weight", &[DeltaHeads, Hidden]),
    rule(Role::DeltaStep, "self_attn.dt_bias", &[DeltaValues]),
    rule(Role::DeltaNorm, "self_attn.o_norm.weight", &[DeltaHead]),
];

/// Gates and decays of that, through a rank of one head.
pub const KDA_LOW_RANK: &[Rule] = &[
    rule(Role::DeltaDecayA, "self_attn.f_a_proj.weight", &[DeltaHead, Hidden]),
    rule(Role::DeltaDecayB, "self_attn.f_b_proj.weight", &[DeltaValues, DeltaHead]),
    rule(Role::DeltaGateA, "self_attn.g_a_proj.weight", &[DeltaHead, Hidden]),
    rule(Role::DeltaGateB, "self_attn.g_b_proj.weight", &[DeltaValues, DeltaHead]),
];

/// The MLP of a dense layer.
pub const DENSE: &[Rule] = &[
    rule(Role::DenseGate, "mlp.gate_proj.weight", &[DenseInter, Hidden]),
    rule(Role::DenseUp, "mlp.up_proj.weight", &[DenseInter, Hidden]),
    rule(Role::DenseDown, "mlp.down_proj.weight", &[Hidden, DenseInter]),
];

/// The router beside the experts.
pub const ROUTER: &[Rule] = &[rule(Role::Router, "mlp.gate.weight", &[Experts, Hidden])];

/// What is added to scores for the choice of experts.
pub const CORRECTION: &[Rule] =
    &[rule(Role::RouterCorrection, "mlp.gate.e_score_correction_bias", &[Experts])];

/// Shared experts as DeepSeek calls them: any number, stored as one MLP.
pub const SHARED_EXPERTS: &[Rule] = &[
    rule(Role::SharedGate, "mlp.shared_experts.gate_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedUp, "mlp.shared_experts.up_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedDown, "mlp.shared_experts.down_proj.weight", &[Hidden, SharedInter]),
];

/// One tensor a matrix and expert, the commonest layout.
pub const PER_EXPERT: ExpertLayout = ExpertLayout {
    name: "per expert",
    pieces: &[
        one(Part::Gate, "mlp.experts.{E}.gate_proj.weight"),
        one(Part::Up, "mlp.experts.{E}.up_proj.weight"),
        one(Part::Down, "mlp.experts.{E}.down_proj.weight"),
    ],
};

/// Mixtral's layout.
pub const W1_W3_W2: ExpertLayout = ExpertLayout {
    name: "per expert, w1 w3 w2",
    pieces: &[
        one(Part::Gate, "block_sparse_moe.experts.{E}.w1.weight"),
        one(Part::Up, "block_sparse_moe.experts.{E}.w3.weight"),
        one(Part::Down, "block_sparse_moe.experts.{E}.w2.weight"),
    ],
};

/// The same inside of an `mlp`.
pub const MLP_W1_W3_W2: ExpertLayout = ExpertLayout {
    name: "per expert, w1 w3 w2",
    pieces: &[
        one(Part::Gate, "mlp.experts.{E}.w1.weight"),
        one(Part::Up, "mlp.experts.{E}.w3.weight"),
        one(Part::Down, "mlp.experts.{E}.w2.weight"),
    ],
};

/// Mixtral's router.
pub const SPARSE_ROUTER: &[Rule] = &[rule(Role::Router, "block_sparse_moe.gate.weight", &[Experts, Hidden])];

/// Shared experts as Tencent calls them.
pub const SHARED_MLP: &[Rule] = &[
    rule(Role::SharedGate, "mlp.shared_mlp.gate_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedUp, "mlp.shared_mlp.up_proj.weight", &[SharedInter, Hidden]),
    rule(Role::SharedDown, "mlp.shared_mlp.down_proj.weight", &[Hidden, SharedInter]),
];

/// A router that is a module of its own, with its correction beside it.
pub const ROUTER_GATE: &[Rule] = &[
    rule(Role::Router, "mlp.router.gate.weight", &[Experts, Hidden]),
    rule(Role::RouterCorrection, "mlp.expert_bias", &[Experts]),
];

/// Text models inside of others, and text models without what is around them.
pub const PREFIXES: &[(&str, &str)] = &[
    ("language_model.", ""),
    ("model.language_model.", "model."),
    ("layers.", "model.layers."),
    ("embed_tokens.", "model.embed_tokens."),
    ("norm.", "model.norm."),
];

/// Towers and projectors of models that also see or hear.
pub const TOWERS: &[&str] = &[
    "model.visual.",
    "visual.",
    "vision_tower.",
    "vision_model.",
    "model.vision_tower.",
    "model.vision_model.",
    "mm_projector.",
    "multi_modal_projector.",
    "model.multi_modal_projector.",
    "audio_tower.",
    "model.audio_tower.",
    "model.embed_vision.",
    "model.embed_audio.",
    "mtp.",
    "model.mtp",
];

/// Rotary tables that old versions of transformers saved.
pub const ROTARY_TABLES: &[(&str, &str)] =
    &[("rotary_emb.inv_freq", "a table that config.json determines; transformers no longer saves it")];
