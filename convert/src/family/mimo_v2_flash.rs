//! MiMo-V2-Flash: windows with twice the key-value heads and sinks in five of six layers, values scaled and narrower than
//! keys, a third of each head rotates; DeepSeek V3's router without shared experts.
//! Source: transformers 5.23.0 `models/mimo_v2_flash`.

use super::Dim::Heads;
use super::common::{CORRECTION, DENSE, GQA, LLAMA, ROUTER, rule};
use super::{
    AttentionRule, Factor, Family, GqaRule, MoeLayers, MoeRule, NormRule, RouterRule, Rule, Sinks, Switch,
    WindowRule, qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::Role;

const SINKS: &[Rule] = &[rule(Role::Sinks, "self_attn.attention_sink_bias", &[Heads])];

pub const FAMILY: Family = Family {
    model_types: &["mimo_v2_flash"],
    class: "MiMoV2FlashForCausalLM",
    gguf: "mimo2",
    norm: NormRule::Rms(1e-5),
    attention: AttentionRule::Gqa(GqaRule {
        kv_heads_in_window: 2,
        v_dim: &["v_head_dim"],
        o_bias: Switch::Never,
        window: WindowRule::AllBut { every: "full_attention_every", n: 6, first_too: true, default: 129 },
        sinks: Sinks::InWindow,
        v_scale: Factor::Key("attention_value_scale", 0.707),
        ..GqaRule::PLAIN
    }),
    rope: RopeRule {
        theta: 5e6,
        window_theta: Some(("swa_rope_theta", 1e4)),
        partial: 0.334,
        ..RopeRule::PLAIN
    },
    moe_layers: MoeLayers::From("first_k_dense_replace", 1),
    moe: MoeRule { router: RouterRule::SIGMOID, ..MoeRule::PLAIN },
    rules: &[LLAMA, GQA, SINKS, DENSE, ROUTER, CORRECTION],
    ..qwen3_moe::FAMILY
};
