//! `deepseek4`: hyper-connected streams, one key that is also the value, compressed entries, experts by token id.

use moepack_format::{Error, Result};

use super::common::{is_plain_moe, moe_keys, n_shared, router_keys, yarn_keys};
use super::keys::Keys;
use super::qwen::wants_head;
use super::{Arch, Move};
use crate::describe::COMPRESS_THETA;
use crate::model::Model;
use crate::rope::{Source, base_and_yarn};
use crate::spec::{
    Across, Activation, Attention, Choice, Compressed, LayerSpec, ModelSpec, Moe, Norm, Residual, Role,
};

/// DeepSeek V4.
pub const ARCH: Arch = Arch {
    family: "deepseek_v4",
    names: &[
        (Role::HeadMix, "output_hc_fn.weight", Move::Same),
        (Role::HeadMixBase, "output_hc_base.weight", Move::Same),
        (Role::HeadMixScale, "output_hc_scale.weight", Move::Same),
        (Role::AttnMix, "hc_attn_fn.weight", Move::Same),
        (Role::AttnMixBase, "hc_attn_base.weight", Move::Same),
        (Role::AttnMixScale, "hc_attn_scale.weight", Move::Same),
        (Role::MlpMix, "hc_ffn_fn.weight", Move::Same),
        (Role::MlpMixBase, "hc_ffn_base.weight", Move::Same),
        (Role::MlpMixScale, "hc_ffn_scale.weight", Move::Same),
        (Role::Kv, "attn_kv.weight", Move::Same),
        (Role::KvNorm, "attn_kv_a_norm.weight", Move::Same),
        (Role::OA, "attn_output_a.weight", Move::Same),
        (Role::OB, "attn_output_b.weight", Move::Same),
        (Role::CompressKv, "attn_compressor_kv.weight", Move::Same),
        (Role::CompressGate, "attn_compressor_gate.weight", Move::Same),
        (Role::CompressBias, "attn_compressor_ape.weight", Move::Same),
        (Role::CompressNorm, "attn_compressor_norm.weight", Move::Same),
        (Role::IndexQ, "indexer.attn_q_b.weight", Move::Same),
        (Role::IndexWeights, "indexer.proj.weight", Move::Same),
        (Role::IndexCompressKv, "indexer_compressor_kv.weight", Move::Same),
        (Role::IndexCompressGate, "indexer_compressor_gate.weight", Move::Same),
        (Role::IndexCompressBias, "indexer_compressor_ape.weight", Move::Same),
        (Role::IndexCompressNorm, "indexer_compressor_norm.weight", Move::Same),
    ],
    fits,
    refuses,
    keys,
};

/// Ratios that the graph has kernels for.
const RATIOS: [usize; 3] = [0, 4, 128];

/// Dimensions of the indexer's heads, which are rotated by a Hadamard matrix; with others the engine ends.
const INDEX_DIM: usize = 128;

fn fits(spec: &ModelSpec, layer: &LayerSpec) -> bool {
    let streams = matches!(&layer.residual, Residual::Hyper(h) if matches!(h.across, Across::Sinkhorn(_)) && !h.mean_head);
    let attends = matches!(&layer.attention, Attention::Compressed(c) if RATIOS.contains(&ratio(c)));
    let routes = layer.mlp.moe().is_some_and(|moe| {
        let chosen = moe.router.choice == Choice::ByToken || is_plain_moe(moe);
        let clamped = matches!(moe.activation, Activation::ClampedSilu { .. });
        chosen && clamped && moe.router.groups.is_none() && n_shared(moe).is_some()
    });
    matches!(spec.norm, Norm::Rms { .. }) && streams && attends && routes
}

fn ratio(attention: &Compressed) -> usize {
    attention.compression.as_ref().map_or(0, |c| c.ratio)
}

fn layers(model: &Model) -> impl Iterator<Item = (&Compressed, &Moe)> {
    model.spec().layers.iter().filter_map(|layer| match (&layer.attention, layer.mlp.moe()) {
        (Attention::Compressed(attention), Some(moe)) => Some((attention, moe)),
        _ => None,
    })
}

fn refuses(model: &Model) -> Option<String> {
    let by_token = |moe: &Moe| moe.router.choice == Choice::ByToken;
    let mut after = layers(model).skip_while(|(_, moe)| by_token(moe));
    if after.any(|(_, moe)| by_token(moe)) {
        return Some("experts are chosen by token after layers in which they are not".to_owned());
    }
    let mut indexers = layers(model).filter_map(|(a, _)| a.compression.as_ref()?.indexer.as_ref());
    if let Some(other) = indexers.find(|i| i.head_dim != INDEX_DIM) {
        return Some(format!("the indexer's heads have {} dimensions, not {INDEX_DIM}", other.head_dim));
    }
    wants_head(model)
}

fn keys(model: &Model, keys: &mut Keys<'_>) -> Result<()> {
    let spec = model.spec();
    let lacks = |what: &str| Error::plan(format!("no layer has {what}")).in_file(model.root());
    let (attention, _) = layers(model).next().ok_or_else(|| lacks("attention"))?;
    let (_, moe) = layers(model).last().ok_or_else(|| lacks("experts"))?;
    let hyper = spec.hyper.ok_or_else(|| lacks("streams"))?;
    let Across::Sinkhorn(steps) = hyper.across else { return Err(lacks("Sinkhorn's steps")) };
    let indexer = layers(model).find_map(|(a, _)| a.compression.as_ref()?.indexer.as_ref());
    let indexer = indexer.ok_or_else(|| lacks("an indexer"))?;
    keys.numbers(&[
        ("attention.head_count", attention.n_heads),
        ("attention.head_count_kv", 1),
        ("attention.key_length", attention.head_dim),
        ("attention.value_length", attention.head_dim),
        ("attention.q_lora_rank", attention.q_lora),
        ("attention.sliding_window", attention.window),
        ("attention.output_group_count", attention.n_groups),
        ("attention.output_lora_rank", attention.o_lora),
        ("attention.indexer.head_count", indexer.n_heads),
        ("attention.indexer.key_length", indexer.head_dim),
        ("attention.indexer.top_k", indexer.n_used),
        ("hyper_connection.count", hyper.n_streams),
        ("hyper_connection.sinkhorn_iterations", steps),
        ("embedding_length_out", spec.width()),
        ("expert_shared_count", n_shared(moe).unwrap_or(0)),
        ("hash_layer_count", layers(model).filter(|(_, m)| m.router.choice == Choice::ByToken).count()),
    ])?;
    keys.float("hyper_connection.epsilon", hyper.eps);
    keys.counts("attention.compress_ratios", layers(model).map(|(a, _)| ratio(a)))?;
    let limit = |activation| if let Activation::ClampedSilu { limit } = activation { limit } else { 0.0 };
    keys.floats("swiglu_clamp_exp", layers(model).map(|(_, m)| limit(m.activation)));
    keys.floats(
        "swiglu_clamp_shexp",
        layers(model).map(|(_, m)| m.shared.map_or(0.0, |s| limit(s.activation))),
    );
    moe_keys(model, moe, keys)?;
    router_keys(moe, keys)?;
    positions(model, attention, keys)
}

/// Layers without compressed entries have plain positions, the others a base of their own and YaRN.
fn positions(model: &Model, attention: &Compressed, keys: &mut Keys<'_>) -> Result<()> {
    let (config, rule, positions) = (model.config(), model.family().rope, model.spec().max_positions);
    let bad = || Error::plan("RoPE is stretched otherwise than by YaRN").in_file(model.root());
    let plain = Source::new(config, "main")?.theta()?.unwrap_or(rule.theta);
    let compressed = Source::new(config, "compress")?;
    let (_, yarn) = base_and_yarn(compressed, rule, positions)?.ok_or_else(bad)?;
    let own = if compressed.is_part("compress") { compressed.theta()? } else { None };
    let said = config.number_opt(&["compress_rope_theta"])?;
    let base = own.or(said).unwrap_or(COMPRESS_THETA);
    keys.float("rope.freq_base", plain as f32);
    keys.float("attention.compress_rope_freq_base", base as f32);
    keys.number("rope.dimension_count", 2 * attention.rope.inv_freq.len())?;
    match yarn {
        Some(yarn) => yarn_keys(&yarn, keys),
        None => Ok(()),
    }
}
