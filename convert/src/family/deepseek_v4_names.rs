//! What DeepSeek V4 calls its tensors.

use super::Dim::{
    Entry, EntryHead, Experts, ExpertsUsed, GroupIn, GroupRank, Head, Heads, Hidden, Index, IndexEntry,
    IndexHead, IndexHeads, Mixes, One, Q, QLora, Ratio, Scales, SharedInter, Streams, Vocab, Width,
};
use super::common::{one, rule};
use super::{ExpertLayout, Rule};
use crate::spec::{Part, Role};

/// All but attention, hyper-connections of layers and routed experts.
pub const NAMES: &[Rule] = &[
    rule(Role::Embed, "embed.weight", &[Vocab, Hidden]),
    rule(Role::FinalNorm, "norm.weight", &[Hidden]),
    rule(Role::LmHead, "head.weight", &[Vocab, Hidden]),
    rule(Role::HeadMix, "hc_head_fn", &[Streams, Width]),
    rule(Role::HeadMixBase, "hc_head_base", &[Streams]),
    rule(Role::HeadMixScale, "hc_head_scale", &[One]),
    rule(Role::AttnNorm, "attn_norm.weight", &[Hidden]),
    rule(Role::MlpNorm, "ffn_norm.weight", &[Hidden]),
    rule(Role::Router, "ffn.gate.weight", &[Experts, Hidden]),
    rule(Role::RouterCorrection, "ffn.gate.bias", &[Experts]),
    rule(Role::RouterTable, "ffn.gate.tid2eid", &[Vocab, ExpertsUsed]),
    rule(Role::SharedGate, "ffn.shared_experts.w1.weight", &[SharedInter, Hidden]),
    rule(Role::SharedUp, "ffn.shared_experts.w3.weight", &[SharedInter, Hidden]),
    rule(Role::SharedDown, "ffn.shared_experts.w2.weight", &[Hidden, SharedInter]),
];

/// Hyper-connections of layers.
pub const HYPER: &[Rule] = &[
    rule(Role::AttnMix, "hc_attn_fn", &[Mixes, Width]),
    rule(Role::AttnMixBase, "hc_attn_base", &[Mixes]),
    rule(Role::AttnMixScale, "hc_attn_scale", &[Scales]),
    rule(Role::MlpMix, "hc_ffn_fn", &[Mixes, Width]),
    rule(Role::MlpMixBase, "hc_ffn_base", &[Mixes]),
    rule(Role::MlpMixScale, "hc_ffn_scale", &[Scales]),
];

/// Attention, compressed entries and their indexer.
pub const ATTENTION: &[Rule] = &[
    rule(Role::Sinks, "attn.attn_sink", &[Heads]),
    rule(Role::QA, "attn.wq_a.weight", &[QLora, Hidden]),
    rule(Role::QANorm, "attn.q_norm.weight", &[QLora]),
    rule(Role::QB, "attn.wq_b.weight", &[Q, QLora]),
    rule(Role::Kv, "attn.wkv.weight", &[Head, Hidden]),
    rule(Role::KvNorm, "attn.kv_norm.weight", &[Head]),
    rule(Role::OA, "attn.wo_a.weight", &[GroupRank, GroupIn]),
    rule(Role::OB, "attn.wo_b.weight", &[Hidden, GroupRank]),
    rule(Role::CompressKv, "attn.compressor.wkv.weight", &[Entry, Hidden]),
    rule(Role::CompressGate, "attn.compressor.wgate.weight", &[Entry, Hidden]),
    rule(Role::CompressBias, "attn.compressor.ape", &[Ratio, Entry]),
    rule(Role::CompressNorm, "attn.compressor.norm.weight", &[EntryHead]),
    rule(Role::IndexQ, "attn.indexer.wq_b.weight", &[Index, QLora]),
    rule(Role::IndexWeights, "attn.indexer.weights_proj.weight", &[IndexHeads, Hidden]),
    rule(Role::IndexCompressKv, "attn.indexer.compressor.wkv.weight", &[IndexEntry, Hidden]),
    rule(Role::IndexCompressGate, "attn.indexer.compressor.wgate.weight", &[IndexEntry, Hidden]),
    rule(Role::IndexCompressBias, "attn.indexer.compressor.ape", &[Ratio, IndexEntry]),
    rule(Role::IndexCompressNorm, "attn.indexer.compressor.norm.weight", &[IndexHead]),
];

/// One tensor a matrix and expert.
pub const EXPERTS: ExpertLayout = ExpertLayout {
    name: "per expert, w1 w3 w2",
    pieces: &[
        one(Part::Gate, "ffn.experts.{E}.w1.weight"),
        one(Part::Up, "ffn.experts.{E}.w3.weight"),
        one(Part::Down, "ffn.experts.{E}.w2.weight"),
    ],
};
