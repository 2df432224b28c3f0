//! DeepSeek V4 (Flash, Pro, Base): hyper-connected streams, one key that is also the value with a window and compressed
//! entries, experts chosen by token id in the first layers. MTP and DSpark layers (`mtp.*`) are carried.
//! Source: transformers 5.23.0 `models/deepseek_v4`; released names have no `model.`, transformers saves with it.

use super::deepseek_v4_names::{ATTENTION, EXPERTS, HYPER, NAMES};
use super::{
    ActivationRule, AttentionRule, CompressedRule, Factor, Family, Fixed, HashRule, MoeLayers, MoeRule,
    ResidualRule, RouterRule, ScoreRule, SharedRule, Switch, qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::Score;

pub const FAMILY: Family = Family {
    model_types: &["deepseek_v4"],
    class: "DeepseekV4ForCausalLM",
    gguf: "deepseek4",
    fixed: &[
        ("hidden_act", Fixed::Text("silu")),
        ("topk_method", Fixed::Text("noaux_tc")),
        ("num_key_value_heads", Fixed::Int(1)),
        ("attention_bias", Fixed::Bool(false)),
        ("mlp_bias", Fixed::Bool(false)),
    ],
    residual: ResidualRule::Hyper,
    attention: AttentionRule::Compressed(CompressedRule { ratios: [4, 128] }),
    // The reference leaves out YaRN's factor of cos and sin.
    rope: RopeRule { partial: 0.125, attention_factor: Some(1.0), ..RopeRule::PLAIN },
    moe_layers: MoeLayers::All,
    moe: MoeRule {
        activation: ActivationRule::ClampedSilu { limit: 10.0 },
        router: RouterRule {
            score: ScoreRule::ScoringFunc(Score::SqrtSoftplus),
            hash: HashRule::First(3),
            groups: None,
            renorm: Switch::Always,
            scale: Factor::Key("routed_scaling_factor", 1.5),
            ..RouterRule::SIGMOID
        },
        shared: SharedRule::Count("n_shared_experts", 1),
        ..MoeRule::PLAIN
    },
    layer_prefix: "layers.{L}.",
    spellings: &[
        ("model.", ""),
        ("embed_tokens.", "embed."),
        ("lm_head.", "head."),
        ("hc_head.hc_", "hc_head_"),
        (".attn.norm.", ".attn.kv_norm."),
    ],
    rules: &[NAMES, HYPER, ATTENTION],
    experts: &[EXPERTS],
    carried: &["mtp."],
    ..qwen3_moe::FAMILY
};
