//! DeepSeek V3.2: V3 whose queries see the keys that an indexer chooses.
//! Source: transformers 5.23.0 `models/deepseek_v32`.

use super::common::{CORRECTION, DENSE, INDEXER, LLAMA, MLA, ROUTER, SHARED_EXPERTS};
use super::{AttentionRule, Family, IndexerRule, MlaRule, Switch, deepseek_v3};
use crate::spec::Pairing;

pub const FAMILY: Family = Family {
    model_types: &["deepseek_v32"],
    class: "DeepseekV32ForCausalLM",
    gguf: "deepseek32",
    attention: AttentionRule::Mla(MlaRule {
        adjacent: Switch::Always,
        indexer: Some(IndexerRule::plain(Pairing::Half)),
        ..MlaRule::PLAIN
    }),
    rules: &[LLAMA, MLA, INDEXER, DENSE, ROUTER, CORRECTION, SHARED_EXPERTS],
    ..deepseek_v3::FAMILY
};
