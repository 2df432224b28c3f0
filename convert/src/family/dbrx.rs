//! DBRX: one matrix for queries, keys and values, clamped; layer norms without bias; experts stacked along their rows.
//! Source: transformers 5.23.0 `models/dbrx`.

use super::Dim::{AttnOut, Experts, Hidden, Qkv, Vocab};
use super::common::{one, rule};
use super::{
    AttentionRule, ExpertLayout, Family, Fixed, GqaRule, MoeLayers, MoeRule, NormRule, Piece, RouterRule,
    Rule, Switch, qwen3_moe,
};
use crate::spec::{Part, Role};

const NAMES: &[Rule] = &[
    rule(Role::Embed, "transformer.wte.weight", &[Vocab, Hidden]),
    rule(Role::FinalNorm, "transformer.norm_f.weight", &[Hidden]),
    rule(Role::LmHead, "lm_head.weight", &[Vocab, Hidden]),
    rule(Role::AttnNorm, "norm_attn_norm.norm_1.weight", &[Hidden]),
    rule(Role::MlpNorm, "norm_attn_norm.norm_2.weight", &[Hidden]),
    rule(Role::Qkv, "norm_attn_norm.attn.Wqkv.weight", &[Qkv, Hidden]),
    rule(Role::O, "norm_attn_norm.attn.out_proj.weight", &[Hidden, AttnOut]),
    rule(Role::Router, "ffn.router.layer.weight", &[Experts, Hidden]),
];

/// `[experts · inter, hidden]`, the down projection transposed.
const ROWS: ExpertLayout = ExpertLayout {
    name: "stacked rows",
    pieces: &[
        rows(Part::Gate, "ffn.experts.mlp.w1", false),
        rows(Part::Up, "ffn.experts.mlp.v1", false),
        rows(Part::Down, "ffn.experts.mlp.w2", true),
    ],
};

const fn rows(part: Part, name: &'static str, transposed: bool) -> Piece {
    Piece { transposed, flat: true, ..one(part, name) }
}

pub const FAMILY: Family = Family {
    model_types: &["dbrx"],
    class: "DbrxForCausalLM",
    gguf: "dbrx",
    fixed: &[
        ("ffn_config.ffn_act_fn.name", Fixed::Text("silu")),
        ("ffn_config.moe_normalize_expert_weights", Fixed::Int(1)),
    ],
    norm: NormRule::LayerWithoutBias(1e-5),
    attention: AttentionRule::Gqa(GqaRule {
        n_kv_heads: &["attn_config.kv_n_heads", "num_key_value_heads"],
        fused: true,
        qkv_bias: Switch::Never,
        o_bias: Switch::Never,
        clip: &["attn_config.clip_qkv"],
        ..GqaRule::PLAIN
    }),
    moe_layers: MoeLayers::All,
    moe: MoeRule {
        n_experts: &["ffn_config.moe_num_experts"],
        n_experts_used: &["ffn_config.moe_top_k"],
        inter: &["ffn_config.ffn_hidden_size"],
        router: RouterRule {
            renorm: Switch::UnlessNull("ffn_config.moe_normalize_expert_weights"),
            ..RouterRule::SOFTMAX
        },
        ..MoeRule::PLAIN
    },
    layer_prefix: "transformer.blocks.{L}.",
    rules: &[NAMES],
    experts: &[ROWS],
    ..qwen3_moe::FAMILY
};
