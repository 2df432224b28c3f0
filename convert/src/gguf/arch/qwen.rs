//! `qwen3moe`, `qwen2moe` and `olmoe`: grouped-query attention, a softmax router, no dense layers.

use moepack_format::Result;

use super::common::{gqa, gqa_keys, is_bare_gqa, is_plain_layer, moe, moe_keys, routes_by_softmax};
use super::keys::Keys;
use super::{Arch, nothing};
use crate::model::Model;
use crate::spec::{Attention, LayerSpec, ModelSpec};

/// Weights of the chosen experts are divided by their sum, which a file cannot say.
pub const QWEN3_MOE: Arch = Arch {
    family: "qwen3_moe",
    names: &[],
    fits: |spec, layer| fits(spec, layer, true),
    refuses: nothing,
    keys,
};

/// Its graph wants heads that are together as wide as the model, and a head of its own.
pub const QWEN2_MOE: Arch = Arch {
    family: "qwen2_moe",
    fits: |spec, layer| fits(spec, layer, false) && is_as_wide(spec, layer),
    refuses: wants_head,
    ..QWEN3_MOE
};

/// As `qwen2moe`, and with as many keys as queries.
pub const OLMOE: Arch = Arch {
    family: "olmoe",
    fits: |spec, layer| fits(spec, layer, false) && is_as_wide(spec, layer) && has_all_keys(layer),
    ..QWEN2_MOE
};

fn fits(spec: &ModelSpec, layer: &LayerSpec, renorm: bool) -> bool {
    let attends = matches!(&layer.attention, Attention::Gqa(gqa) if is_bare_gqa(gqa));
    let routes = layer.mlp.moe().is_some_and(|moe| routes_by_softmax(moe, renorm));
    is_plain_layer(spec, layer) && attends && routes
}

fn is_as_wide(spec: &ModelSpec, layer: &LayerSpec) -> bool {
    matches!(&layer.attention, Attention::Gqa(g) if g.n_heads.checked_mul(g.head_dim) == Some(spec.hidden))
}

fn has_all_keys(layer: &LayerSpec) -> bool {
    matches!(&layer.attention, Attention::Gqa(gqa) if gqa.n_kv_heads == gqa.n_heads)
}

/// Several graphs take no embedding for a head.
pub fn wants_head(model: &Model) -> Option<String> {
    model.spec().tied_head.then(|| "the head is the embedding".to_owned())
}

fn keys(model: &Model, keys: &mut Keys<'_>) -> Result<()> {
    let moe = moe(model)?;
    gqa_keys(model, gqa(model)?, keys)?;
    moe_keys(model, moe, keys)?;
    match moe.shared {
        Some(shared) => keys.number("expert_shared_feed_forward_length", shared.inter),
        None => Ok(()),
    }
}
