//! `gpt-oss`: sinks, biases everywhere, a window on every other layer, the first one included.

use moepack_format::Result;

use super::common::{gqa, gqa_keys, is_plain_gqa, is_plain_layer, moe, moe_keys};
use super::keys::Keys;
use super::qwen::wants_head;
use super::{Arch, Move};
use crate::model::Model;
use crate::spec::{Activation, Attention, Choice, LayerSpec, ModelSpec, Role, RouteWeights};

/// gpt-oss.
pub const ARCH: Arch = Arch {
    family: "gpt_oss",
    names: &[(Role::MlpNorm, "post_attention_norm.weight", Move::Same)],
    fits,
    refuses,
    keys,
};

/// Constants of its graph.
const ACTIVATION: Activation = Activation::ClampedSwish { alpha: 1.702, limit: 7.0 };

fn fits(spec: &ModelSpec, layer: &LayerSpec) -> bool {
    let biased = |gqa: &crate::spec::Gqa| gqa.qkv_bias && gqa.o_bias && gqa.sinks;
    let attends = matches!(&layer.attention, Attention::Gqa(gqa) if is_plain_gqa(gqa) && biased(gqa));
    let routes = layer.mlp.moe().is_some_and(|moe| {
        let router = &moe.router;
        let softmax = router.weights == RouteWeights::SoftmaxOverChosen && router.choice == Choice::Best;
        let bare = !router.correction && router.groups.is_none() && router.scale == 1.0 && router.bias;
        softmax && bare && moe.bias && moe.activation == ACTIVATION && moe.shared.is_none()
    });
    is_plain_layer(spec, layer) && attends && routes
}

fn refuses(model: &Model) -> Option<String> {
    let windows = model.spec().layers.iter().map(|layer| match &layer.attention {
        Attention::Gqa(gqa) => gqa.window,
        _ => None,
    });
    let first = windows.clone().next().flatten();
    let expected = |n: usize| if n.is_multiple_of(2) { first } else { None };
    if first.is_none() || windows.enumerate().any(|(n, window)| window != expected(n)) {
        return Some("windows are not on every other layer, the first one included".to_owned());
    }
    wants_head(model)
}

fn keys(model: &Model, keys: &mut Keys<'_>) -> Result<()> {
    let attention = gqa(model)?;
    gqa_keys(model, attention, keys)?;
    moe_keys(model, moe(model)?, keys)?;
    match attention.window {
        Some(window) => keys.number("attention.sliding_window", window),
        None => Ok(()),
    }
}
