//! DeepSeek V4.1-Flash: V4's experts in FP4, everything else in FP8 tiles of 32 × 32, and tables of hashed n-grams (Engram) that
//! a token reads a few rows of. Attention, hyper-connections, Engram, vision and MTP are carried: their forward pass is
//! not described, so commands that need one refuse the family by name. The tables (some 98 GB) are only copied.
//! Source: names of the released files; transformers 5.23.0 does not have it.

use super::deepseek_v4_names::NAMES;
use super::{AttentionRule, Family, HashRule, MoeRule, ResidualRule, RouterRule, deepseek_v4};

pub const FAMILY: Family = Family {
    model_types: &["deepseek_v41", "deepseek_v41_text"],
    class: "DeepseekV41ForConditionalGeneration",
    gguf: "deepseek41",
    // The streams' tensors are carried with the attention's, so norms are all that a layer has here.
    residual: ResidualRule::Plain,
    attention: AttentionRule::Carried,
    moe: MoeRule {
        router: RouterRule { hash: HashRule::None, ..deepseek_v4::FAMILY.moe.router },
        ..deepseek_v4::FAMILY.moe
    },
    rules: &[NAMES],
    carried: &[
        "mtp.",
        "vision.",
        "aligner.",
        "image_",
        ".attn.",
        ".hc_",
        ".engram.",
        ".ffn.gate.bias_vl",
        ".ffn.gate.gate_temp",
        ".ffn.gate_temp",
    ],
    ..deepseek_v4::FAMILY
};
