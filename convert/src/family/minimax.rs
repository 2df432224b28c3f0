//! MiniMax-Text-01 and M1: lightning attention in most layers, softmax attention in the others; what is normed, not what
//! came in, is added to a sublayer's output, both with a factor.
//! Source: transformers 5.23.0 `models/minimax`; released as MiniMax-Text-01(-hf), MiniMax-M1-40k and -80k.

use super::Dim::{Hidden, MixerIn, MixerInner};
use super::common::{GQA, LLAMA, SPARSE_ROUTER, W1_W3_W2, rule};
use super::{
    AttentionRule, Family, Fixed, GqaRule, MixedLayers, MixerRule, MoeLayers, ResidualRule, Rule, Switch,
    WindowRule, mixtral,
};
use crate::spec::Role;

const LIGHTNING: &[Rule] = &[
    rule(Role::MixerIn, "self_attn.qkv_proj.weight", &[MixerIn, Hidden]),
    rule(Role::MixerNorm, "self_attn.norm.weight", &[MixerInner]),
    rule(Role::MixerOut, "self_attn.out_proj.weight", &[Hidden, MixerInner]),
    rule(Role::AttnGate, "self_attn.output_gate.weight", &[MixerInner, Hidden]),
];

const FULL: GqaRule =
    GqaRule { qkv_bias: Switch::Never, o_bias: Switch::Never, window: WindowRule::All, ..GqaRule::PLAIN };

const WHY: &str = "a table that config.json determines";

pub const FAMILY: Family = Family {
    model_types: &["minimax", "minimax_text_01", "minimax_m1"],
    class: "MiniMaxForCausalLM",
    gguf: "minimax-text-01",
    fixed: &[
        ("hidden_act", Fixed::Text("silu")),
        ("postnorm", Fixed::Bool(true)),
        ("shared_intermediate_size", Fixed::Int(0)),
    ],
    residual: ResidualRule::OfNormed {
        full: [
            &["full_attn_alpha_factor", "layernorm_full_attention_alpha"],
            &["full_attn_beta_factor", "layernorm_full_attention_beta"],
        ],
        mixer: [
            &["linear_attn_alpha_factor", "layernorm_linear_attention_alpha"],
            &["linear_attn_beta_factor", "layernorm_linear_attention_beta"],
        ],
        mlp: [&["mlp_alpha_factor", "layernorm_mlp_alpha"], &["mlp_beta_factor", "layernorm_mlp_beta"]],
    },
    attention: AttentionRule::Mixed(FULL, MixerRule::Lightning, MixedLayers::ListedElseOdd),
    moe_layers: MoeLayers::All,
    rules: &[LLAMA, GQA, LIGHTNING, SPARSE_ROUTER],
    experts: &[W1_W3_W2],
    left_out: &[
        ("self_attn.slope_rate", WHY),
        ("self_attn.query_decay", WHY),
        ("self_attn.key_decay", WHY),
        ("self_attn.diagonal_decay", WHY),
        ("rotary_emb.inv_freq", WHY),
    ],
    ..mixtral::FAMILY
};
