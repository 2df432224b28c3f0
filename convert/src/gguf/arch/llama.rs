//! `llama` with experts: Mixtral. Queries and keys lie as Meta had them, dimensions that rotate together side by side.

use super::common::{gqa, gqa_keys, is_bare_gqa, is_plain_layer, moe, moe_keys, routes_by_softmax};
use super::{Arch, Move, nothing};
use crate::spec::{Attention, LayerSpec, ModelSpec, Role};

/// Mixtral.
pub const MIXTRAL: Arch = Arch {
    family: "mixtral",
    names: &[(Role::Q, "attn_q.weight", Move::Interleaved), (Role::K, "attn_k.weight", Move::Interleaved)],
    fits,
    refuses: nothing,
    keys: |model, keys| {
        gqa_keys(model, gqa(model)?, keys)?;
        moe_keys(model, moe(model)?, keys)
    },
};

fn fits(spec: &ModelSpec, layer: &LayerSpec) -> bool {
    let attends = matches!(&layer.attention, Attention::Gqa(gqa) if is_bare_gqa(gqa));
    let routes = layer.mlp.moe().is_some_and(|moe| routes_by_softmax(moe, true) && moe.shared.is_none());
    is_plain_layer(spec, layer) && attends && routes
}
