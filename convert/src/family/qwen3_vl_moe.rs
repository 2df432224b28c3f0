//! Qwen3-VL-MoE (text): Qwen3-MoE with experts stacked as `[in, out]`; towers are carried.
//! Source: transformers 5.23.0 `models/qwen3_vl_moe`, which saves them as `[out, in]` under the same names.

use super::common::{PER_EXPERT, one, turned, two};
use super::{
    AttentionRule, ExpertLayout, Family, GqaRule, MoeRule, Piece, RouterRule, Split, Switch, qwen3_moe,
};
use crate::rope::RopeRule;
use crate::spec::{Part, QkNorm};

/// As released.
const TRANSPOSED: ExpertLayout = ExpertLayout {
    name: "stacked, [in, out]",
    pieces: &[
        Piece {
            either: true,
            ..turned(two(Part::Gate, Part::Up, Split::Halves, "mlp.experts.gate_up_proj"))
        },
        Piece { either: true, ..turned(one(Part::Down, "mlp.experts.down_proj")) },
    ],
};

pub const FAMILY: Family = Family {
    model_types: &["qwen3_vl_moe", "qwen3_vl_moe_text"],
    class: "Qwen3VLMoeForConditionalGeneration",
    gguf: "qwen3vlmoe",
    tied_head: false,
    attention: AttentionRule::Gqa(GqaRule { qk_norm: QkNorm::Head, ..GqaRule::PLAIN }),
    rope: RopeRule { theta: 5e5, ..RopeRule::PLAIN },
    moe: MoeRule { router: RouterRule { renorm: Switch::Always, ..RouterRule::SOFTMAX }, ..MoeRule::PLAIN },
    experts: &[TRANSPOSED, PER_EXPERT],
    ..qwen3_moe::FAMILY
};
