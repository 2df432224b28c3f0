//! What several architectures share: grouped-query attention, experts, rotary positions.

use moepack_format::{Error, Result};

use super::keys::Keys;
use crate::gguf::Value;
use crate::limits::INTER_MAX;
use crate::model::Model;
use crate::rope::{Source, Yarn, base_and_yarn, frequencies};
use crate::spec::{
    Activation, Attention, Choice, Gqa, GroupScore, LayerSpec, ModelSpec, Moe, Norm, Pairing, QkNorm,
    Residual, Rope, RouteWeights, Score,
};

/// What every file says.
pub fn general(model: &Model, name: &str, keys: &mut Keys<'_>) -> Result<()> {
    let spec = model.spec();
    let text = |t: &str| Value::String(t.to_owned());
    keys.general("architecture", text(model.family().gguf));
    keys.general("type", text("model"));
    keys.general("name", text(name));
    keys.general("quantization_version", Value::U32(2));
    keys.float("attention.layer_norm_rms_epsilon", spec.norm.eps());
    keys.numbers(&[
        ("block_count", spec.layers.len()),
        ("context_length", spec.max_positions),
        ("embedding_length", spec.hidden),
        ("vocab_size", spec.vocab),
    ])
}

/// The attention of all layers, if it is grouped-query attention, alike but for windows.
///
/// # Errors
/// `Plan` where layers differ.
pub fn gqa(model: &Model) -> Result<&Gqa> {
    let mut layers = model.spec().layers.iter().map(|layer| match &layer.attention {
        Attention::Gqa(gqa) => Some(gqa),
        _ => None,
    });
    let first = layers.next().flatten();
    let same = |layer: Option<&Gqa>| match (layer, first) {
        (Some(a), Some(b)) => Gqa { window: None, ..a.clone() } == Gqa { window: None, ..b.clone() },
        _ => false,
    };
    let alike = layers.all(same);
    first.filter(|_| alike).ok_or_else(|| differ(model))
}

/// The experts of all layers that have any.
///
/// # Errors
/// `Plan` where layers differ.
pub fn moe(model: &Model) -> Result<&Moe> {
    let mut layers = model.spec().moe_layers().map(|(_, moe)| moe);
    let first = layers.next();
    let alike = layers.all(|moe| Some(moe) == first);
    first.filter(|_| alike).ok_or_else(|| differ(model))
}

fn differ(model: &Model) -> Error {
    Error::plan("layers differ, but a GGUF file describes all at once").in_file(model.root())
}

/// Keys of grouped-query attention and its positions.
pub fn gqa_keys(model: &Model, gqa: &Gqa, keys: &mut Keys<'_>) -> Result<()> {
    keys.numbers(&[
        ("attention.head_count", gqa.n_heads),
        ("attention.head_count_kv", gqa.n_kv_heads),
        ("attention.key_length", gqa.head_dim),
        ("attention.value_length", gqa.v_dim),
    ])?;
    let Some(yarn) = rope_keys(model, &gqa.rope, keys)? else { return Ok(()) };
    let amplitude = 0.1 * libm::log(yarn.factor) + 1.0;
    if yarn.factor > 1.0 && (f64::from(gqa.rope.amplitude) - amplitude).abs() < 1e-6 {
        return Ok(());
    }
    let what = format!("YaRN multiplies by {}, llama.cpp by {amplitude}", gqa.rope.amplitude);
    Err(Error::plan(what).in_file(model.root()))
}

/// Keys of experts.
pub fn moe_keys(model: &Model, moe: &Moe, keys: &mut Keys<'_>) -> Result<()> {
    // What the published converter takes, though no layer may be dense; experts of OLMoE and others are this wide.
    let dense = model.config().uint_opt(model.family().dense_inter, 1, INTER_MAX)?;
    keys.numbers(&[
        ("feed_forward_length", dense.unwrap_or(moe.inter)),
        ("expert_feed_forward_length", moe.inter),
        ("expert_count", moe.n_experts),
        ("expert_used_count", moe.n_experts_used),
    ])
}

/// Keys of the router where a file may say more than the graph knows.
pub fn router_keys(moe: &Moe, keys: &mut Keys<'_>) -> Result<()> {
    let router = &moe.router;
    keys.float("expert_weights_scale", router.scale);
    keys.flag("expert_weights_norm", router.renorm.is_some());
    let gating = match router.score {
        Score::Softmax | Score::Identity => 1,
        Score::Sigmoid => 2,
        Score::SqrtSoftplus => 4,
    };
    keys.number("expert_gating_func", gating)?;
    if let Some(groups) = router.groups {
        keys.number("expert_group_count", groups.n_groups)?;
        keys.number("expert_group_used_count", groups.n_groups_used)?;
    }
    Ok(())
}

/// How many shared experts of the routed ones' width there are.
pub fn n_shared(moe: &Moe) -> Option<usize> {
    let inter = moe.shared.as_ref()?.inter;
    inter.is_multiple_of(moe.inter).then(|| inter / moe.inter)
}

/// Keys of rotary positions: plain, or YaRN's with all that llama.cpp reads of it.
///
/// # Errors
/// `Plan` for positions that are stretched otherwise.
pub fn rope_keys(model: &Model, rope: &Rope, keys: &mut Keys<'_>) -> Result<Option<Yarn>> {
    let source = Source::new(model.config(), "full_attention")?;
    let found = base_and_yarn(source, model.family().rope, model.spec().max_positions)?;
    let dim = 2 * rope.inv_freq.len();
    let (base, yarn) = match found {
        Some((base, None)) if rope.amplitude == 1.0 && rope.inv_freq == frequencies(base, dim) => {
            (base, None)
        }
        Some((base, Some(yarn))) if rope.long.is_none() => (base, Some(yarn)),
        _ => {
            let what = "RoPE is stretched for long texts, otherwise than by YaRN, which is not exported";
            return Err(Error::plan(what).in_file(model.root()));
        }
    };
    keys.float("rope.freq_base", base as f32);
    keys.number("rope.dimension_count", dim)?;
    if let Some(yarn) = &yarn {
        yarn_keys(yarn, keys)?;
    }
    Ok(yarn)
}

/// llama.cpp rounds the ends of the ramp to whole dimensions.
pub fn yarn_keys(yarn: &Yarn, keys: &mut Keys<'_>) -> Result<()> {
    keys.text("rope.scaling.type", "yarn");
    keys.float("rope.scaling.factor", yarn.factor as f32);
    keys.number("rope.scaling.original_context_length", yarn.original_positions as usize)?;
    keys.float("rope.scaling.yarn_beta_fast", yarn.beta_fast as f32);
    keys.float("rope.scaling.yarn_beta_slow", yarn.beta_slow as f32);
    if !yarn.truncate {
        let note = "llama.cpp rounds the ends of YaRN's ramp to whole dimensions, which this model does not: angles differ a little";
        keys.notes.push(note.to_owned());
    }
    Ok(())
}

/// Norms and residuals as in Llama.
pub fn is_plain_layer(spec: &ModelSpec, layer: &LayerSpec) -> bool {
    let whole = layer.ngrams.is_none() && !layer.scaled && layer.shortcut.is_none();
    let scaled = spec.embed_scale != 1.0 || spec.logit_scale != 1.0 || spec.logit_softcap.is_some();
    let plain = layer.residual == Residual::Plain && matches!(spec.norm, Norm::Rms { .. });
    plain && whole && !scaled && spec.final_eps.is_none() && !spec.head_bias
}

/// Grouped-query attention with nothing but projections, norms, biases of projections and positions in whole heads.
pub fn is_plain_gqa(gqa: &Gqa) -> bool {
    let scale = 1.0 / (gqa.head_dim as f32).sqrt();
    let all_keys = gqa.chunk.is_none() && gqa.blocks.is_none() && gqa.pools.is_none();
    let plain = gqa.clip.is_none() && gqa.gate.is_none() && gqa.temperature.is_none() && !gqa.k_is_v;
    let normed = !gqa.qk_norm_late && !gqa.v_norm && gqa.qk_norm != QkNorm::Unweighted;
    let rotates = 2 * gqa.rope.inv_freq.len() == gqa.head_dim && gqa.rope.pairing == Pairing::Half;
    let values = gqa.v_scale == 1.0 && gqa.v_dim == gqa.head_dim;
    let scaled = (gqa.scale / scale - 1.0).abs() < 1e-6;
    all_keys && plain && normed && rotates && values && scaled && !gqa.fused
}

/// Nothing of the projections has a bias, no head has a sink, no key is out of sight.
pub fn is_bare_gqa(gqa: &Gqa) -> bool {
    is_plain_gqa(gqa) && gqa.window.is_none() && !gqa.sinks && !gqa.o_bias
}

/// Experts whose best scores choose, as wide as the model, without biases.
pub fn is_plain_moe(moe: &Moe) -> bool {
    let router = &moe.router;
    let chosen = router.choice == Choice::Best && router.softcap.is_none();
    let own = !router.own_input && !router.expert_scale && !router.bias;
    let experts = moe.n_zero == 0 && moe.latent.is_none() && !moe.weighs_input && !moe.sum_bias;
    chosen && own && experts
}

/// Softmax over all experts, weights as they come or divided by their sum.
pub fn routes_by_softmax(moe: &Moe, renorm: bool) -> bool {
    let router = &moe.router;
    let softmax = router.score == Score::Softmax && router.weights == RouteWeights::Scores;
    let bare = !router.correction && router.groups.is_none() && router.scale == 1.0;
    let plain = is_plain_moe(moe) && !moe.bias && moe.activation == Activation::Silu;
    softmax && bare && plain && router.renorm.is_some() == renorm
}

/// Groups of experts count by the sum of their two best; one group is none.
pub fn groups_by_two(moe: &Moe) -> bool {
    moe.router.groups.is_none_or(|g| g.n_groups == 1 || g.score == GroupScore::Top2Sum)
}
