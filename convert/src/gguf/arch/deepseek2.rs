//! `deepseek2`: DeepSeek V2 and V3, Kimi K2. Latent attention is computed as attention with one key: queries pass through
//! the part of `kv_b` that makes keys, and what they find through the part that makes values.

use moepack_format::{Error, Result};

use super::Arch;
use super::common::{
    groups_by_two, is_plain_layer, is_plain_moe, moe, moe_keys, n_shared, rope_keys, router_keys,
};
use super::keys::Keys;
use crate::model::Model;
use crate::spec::{
    Activation, Attention, GateUp, KeyChoice, LayerSpec, Mla, Mlp, ModelSpec, Pairing, RouteWeights,
    SharedSum,
};

/// DeepSeek V3 and R1, Kimi K2.
pub const V3: Arch = Arch { family: "deepseek_v3", names: &[], fits, refuses, keys };
/// DeepSeek V2.
pub const V2: Arch = Arch { family: "deepseek_v2", ..V3 };

fn fits(spec: &ModelSpec, layer: &LayerSpec) -> bool {
    let attends = matches!(&layer.attention, Attention::Mla(mla) if is_plain(mla));
    let mixes = match &layer.mlp {
        Mlp::Dense { activation, gate_up, .. } => *activation == Activation::Silu && *gate_up == GateUp::Two,
        Mlp::Moe(moe) => {
            let shared = moe.shared.as_ref().is_some_and(|s| {
                !s.gated
                    && !s.fused
                    && !s.normed
                    && s.sum == SharedSum::Sum
                    && s.activation == Activation::Silu
            });
            let routes =
                is_plain_moe(moe) && moe.router.weights == RouteWeights::Scores && groups_by_two(moe);
            routes && shared && n_shared(moe).is_some() && !moe.bias && moe.activation == Activation::Silu
        }
        Mlp::None => false,
    };
    is_plain_layer(spec, layer) && attends && mixes
}

fn is_plain(mla: &Mla) -> bool {
    let bare = !mla.bias && mla.gate.is_none() && !mla.sinks && mla.temperature.is_none();
    let all_keys = mla.choice == KeyChoice::All && mla.kv_gain == 1.0;
    bare && all_keys && mla.rope.pairing == Pairing::Adjacent
}

/// What the loader infers from other numbers than those that say it.
fn refuses(model: &Model) -> Option<String> {
    let spec = model.spec();
    let dense = spec.layers.iter().take_while(|l| l.mlp.moe().is_none()).count();
    if spec.layers.iter().skip(dense).any(|l| l.mlp.moe().is_none()) {
        return Some("dense layers come after such with experts".to_owned());
    }
    let n = spec.layers.len();
    let is_lite = n == 26 || n == 27 || (n == 48 && spec.vocab == 128_256);
    match mla(model).ok()?.q_lora {
        Some(_) if is_lite => Some(format!("{n} layers have queries through a latent")),
        None if !is_lite => Some(format!("{n} layers have queries without a latent")),
        _ => None,
    }
}

fn mla(model: &Model) -> Result<&Mla> {
    let mut layers = model.spec().layers.iter().map(|layer| &layer.attention);
    let first = layers.next();
    match first {
        Some(Attention::Mla(mla)) if layers.all(|a| Some(a) == first) => Ok(mla),
        _ => Err(Error::plan("layers differ in attention").in_file(model.root())),
    }
}

fn keys(model: &Model, keys: &mut Keys<'_>) -> Result<()> {
    let (mla, moe, spec) = (mla(model)?, moe(model)?, model.spec());
    let dense = spec.layers.iter().take_while(|l| l.mlp.moe().is_none()).count();
    keys.numbers(&[
        ("leading_dense_block_count", dense),
        ("attention.head_count", mla.n_heads),
        ("attention.head_count_kv", 1),
        ("attention.kv_lora_rank", mla.kv_lora),
        ("attention.key_length", mla.kv_lora + mla.rope_dim),
        ("attention.value_length", mla.kv_lora),
        ("attention.key_length_mla", mla.nope_dim + mla.rope_dim),
        ("attention.value_length_mla", mla.v_dim),
        ("expert_shared_count", n_shared(moe).unwrap_or(0)),
    ])?;
    if let Some(rank) = mla.q_lora {
        keys.number("attention.q_lora_rank", rank)?;
    }
    moe_keys(model, moe, keys)?;
    router_keys(moe, keys)?;
    if mla.latent_eps != spec.norm.eps() {
        keys.notes.push(format!(
            "norms of latents have eps {:e} here, {:e} in llama.cpp, which knows one for all",
            mla.latent_eps,
            spec.norm.eps()
        ));
    }
    let Some(yarn) = rope_keys(model, &mla.rope, keys)? else { return Ok(()) };
    // llama.cpp takes mscale for mscale_all_dim, and multiplies logits by the square of what follows from it.
    if yarn.mscale != yarn.mscale_all_dim || yarn.mscale == 0.0 {
        let what = format!(
            "YaRN has mscale {} and mscale_all_dim {}, llama.cpp knows one number for both",
            yarn.mscale, yarn.mscale_all_dim
        );
        return Err(Error::plan(what).in_file(model.root()));
    }
    keys.float("rope.scaling.yarn_log_multiplier", 0.1 * yarn.mscale_all_dim as f32);
    Ok(())
}
