//! gpt-oss: biases everywhere, attention sinks, a window on every other layer, softmax over the chosen
//! logits, clamped swish. Gate and up share one tensor, their output rows interleaved.
//! Source: transformers 5.23.0 `models/gpt_oss` and `integrations/mxfp4.py`; released as gpt-oss-20b and -120b.

use super::Dim::{Experts, Heads, Hidden};
use super::common::{GQA, LLAMA, one, rule, turned, two};
use super::{
    ActivationRule, AttentionRule, ExpertLayout, Family, GqaRule, MoeLayers, MoeRule, NormRule, Piece,
    RouterRule, Rule, Sinks, Split, Switch, WindowRule, qwen3_moe,
};
use crate::rope::{RopeRule, Yarn};
use crate::spec::{Part, Role};

const GPT_OSS: &[Rule] = &[
    rule(Role::Sinks, "self_attn.sinks", &[Heads]),
    rule(Role::Router, "mlp.router.weight", &[Experts, Hidden]),
    rule(Role::RouterBias, "mlp.router.bias", &[Experts]),
];

const GATE_UP_BIAS: Piece =
    two(Part::GateBias, Part::UpBias, Split::Interleaved, "mlp.experts.gate_up_proj_bias");
const DOWN_BIAS: Piece = one(Part::DownBias, "mlp.experts.down_proj_bias");

/// As released: rows are outputs.
const MXFP4: ExpertLayout = ExpertLayout {
    name: "stacked MXFP4 blocks",
    pieces: &[
        two(Part::Gate, Part::Up, Split::Interleaved, "mlp.experts.gate_up_proj_blocks"),
        one(Part::Down, "mlp.experts.down_proj_blocks"),
        GATE_UP_BIAS,
        DOWN_BIAS,
    ],
};

/// As transformers saves it after decoding: `[in, out]`, which square matrices do not show.
const DECODED: ExpertLayout = ExpertLayout {
    name: "stacked, [in, out]",
    pieces: &[
        turned(two(Part::Gate, Part::Up, Split::Interleaved, "mlp.experts.gate_up_proj")),
        turned(one(Part::Down, "mlp.experts.down_proj")),
        GATE_UP_BIAS,
        DOWN_BIAS,
    ],
};

pub const FAMILY: Family = Family {
    model_types: &["gpt_oss"],
    class: "GptOssForCausalLM",
    gguf: "gpt-oss",
    norm: NormRule::Rms(1e-5),
    attention: AttentionRule::Gqa(GqaRule {
        head_dim: Some(64),
        qkv_bias: Switch::Key("attention_bias", true),
        o_bias: Switch::Key("attention_bias", true),
        window: WindowRule::LayerTypes { default: 128 },
        sinks: Sinks::All,
        ..GqaRule::PLAIN
    }),
    rope: RopeRule {
        theta: 1.5e5,
        scaling: Some(Yarn { factor: 32.0, original_positions: 4096.0, truncate: false, ..Yarn::DEFAULT }),
        ..RopeRule::PLAIN
    },
    moe_layers: MoeLayers::All,
    moe: MoeRule {
        n_experts: &["num_local_experts", "num_experts"],
        n_experts_used: &["num_experts_per_tok", "experts_per_token"],
        inter: &["intermediate_size"],
        activation: ActivationRule::ClampedSwish { alpha: 1.702, limit: 7.0 },
        bias: true,
        router: RouterRule { bias: true, ..RouterRule::LOGITS },
        ..MoeRule::PLAIN
    },
    rules: &[LLAMA, GQA, GPT_OSS],
    experts: &[MXFP4, DECODED],
    ..qwen3_moe::FAMILY
};
