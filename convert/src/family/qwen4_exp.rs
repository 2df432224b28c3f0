//! Qwen3.8-Flash-Next (Qwen4): Qwen3.5's layers between streams that pass gates of each channel, full attention over pools of
//! keys that an indexer chooses; embeddings of hashed n-grams in some layers.
//! Source: transformers 5.23.0 `models/qwen4_exp`.

use super::Dim::{
    Any, GateRank, Hidden, IndexHead, IndexQk, NgramHeads, NgramKernel, NgramOrders, NgramRow, NgramWidth,
    One, Streams, Vocab, Width,
};
use super::common::{DENSE, GQA, PER_EXPERT, QK_NORM_HEAD, ROUTER, rule};
use super::{AttentionRule, DeltaRule, Family, GqaRule, ResidualRule, Rule, qwen2_moe, qwen3_next};
use crate::spec::{DeltaProjections, Role};

const NAMES: &[Rule] = &[
    rule(Role::Embed, "model.embed_tokens.weight", &[Vocab, Hidden]),
    rule(Role::LmHead, "lm_head.weight", &[Vocab, Hidden]),
    rule(Role::HeadGateNorm, "model.hyper_connection_mixer.hc_norm.weight", &[Width]),
    rule(Role::HeadGateDown, "model.hyper_connection_mixer.input_mix_weight_down.weight", &[GateRank, Width]),
    rule(Role::HeadGateUp, "model.hyper_connection_mixer.input_mix_weight_up.weight", &[Width, GateRank]),
    rule(Role::AttnGateNorm, "attn_hyper_connection.hc_norm.weight", &[Width]),
    rule(Role::AttnGateDown, "attn_hyper_connection.input_mix_weight_down.weight", &[GateRank, Width]),
    rule(Role::AttnGateUp, "attn_hyper_connection.input_mix_weight_up.weight", &[Width, GateRank]),
    rule(Role::AttnInject, "attn_hyper_connection.block_inject_weight.weight", &[Streams, Width]),
    rule(Role::MlpGateNorm, "mlp_hyper_connection.hc_norm.weight", &[Width]),
    rule(Role::MlpGateDown, "mlp_hyper_connection.input_mix_weight_down.weight", &[GateRank, Width]),
    rule(Role::MlpGateUp, "mlp_hyper_connection.input_mix_weight_up.weight", &[Width, GateRank]),
    rule(Role::MlpInject, "mlp_hyper_connection.block_inject_weight.weight", &[Streams, Width]),
    rule(Role::IndexQk, "self_attn.indexer.index_qk_proj.weight", &[IndexQk, Hidden]),
    rule(Role::IndexQNorm, "self_attn.indexer.q_layernorm.weight", &[IndexHead]),
    rule(Role::IndexKNorm, "self_attn.indexer.k_layernorm.weight", &[IndexHead]),
];

const NGRAMS: &[Rule] = &[
    rule(Role::NgramPart(0), "ple.ple_embedding.ngram_embedding.shard.{E}.weight", &[Any, NgramRow]),
    rule(Role::NgramFactors, "ple.ple_embedding.layer_multipliers", &[NgramOrders]),
    rule(Role::NgramSizes, "ple.ple_embedding.ngram_heads_vocab_sizes", &[NgramHeads]),
    rule(Role::NgramOffsets, "ple.ple_embedding.ngram_heads_offsets", &[NgramHeads]),
    rule(Role::NgramKey, "ple.key_proj.weight", &[Width, NgramWidth]),
    rule(Role::NgramValue, "ple.value_proj.weight", &[Hidden, NgramWidth]),
    rule(Role::NgramKeyNorm, "ple.norm_key.weight", &[Width]),
    rule(Role::NgramQueryNorm, "ple.norm_query.weight", &[Width]),
    rule(Role::NgramConvNorm, "ple.norm_conv.weight", &[Width]),
    rule(Role::NgramConv, "ple.conv1d.weight", &[Width, One, NgramKernel]),
];

pub const FAMILY: Family = Family {
    model_types: &["qwen4_exp", "qwen4_exp_text"],
    class: "Qwen4ExpForCausalLM",
    gguf: "qwen4exp",
    ngrams: true,
    residual: ResidualRule::HyperGated,
    attention: AttentionRule::Hybrid(
        GqaRule { pools: true, ..qwen3_next::FULL },
        DeltaRule { gate_key: Some("output_gate_type"), ..DeltaRule::plain(DeltaProjections::Separate) },
    ),
    spellings: &[("model.language_model.", "model."), (".ngram_embedding.shard_", ".ngram_embedding.shard.")],
    rules: &[NAMES, NGRAMS, GQA, QK_NORM_HEAD, qwen3_next::LINEAR, DENSE, ROUTER, qwen2_moe::SHARED],
    experts: &[qwen3_next::STACKED, PER_EXPERT],
    ..qwen3_next::QWEN3_5
};
