//! Architectures of llama.cpp that models are exported to, and the keys and names of each.

use moepack_format::{Error, Result};

use super::Value;
use crate::limits::INTER_MAX;
use crate::model::Model;
use crate::rope::{Source, frequencies};
use crate::spec::{Attention, Gqa, Moe, Norm, Pairing, Residual, Role, Rope, RouteWeights, Score};

/// An architecture of llama.cpp; its name is the family's, [`crate::Family::gguf`].
#[derive(Debug)]
pub struct Arch {
    /// `model_type` of the family.
    pub family: &'static str,
    /// The graph divides weights of the chosen experts by their sum; a file cannot say so.
    pub renorm: bool,
    /// Only files are loaded whose heads are together as wide as the model, and whose head is not the embedding.
    pub strict: bool,
}

/// Families that are exported: grouped-query attention without anything that llama.cpp's graph lacks. Source: llama.cpp,
/// `src/models/qwen3moe.cpp`, `qwen2moe.cpp`, `olmoe.cpp` as of August 2026.
pub const ARCHES: &[Arch] = &[
    Arch { family: "qwen3_moe", renorm: true, strict: false },
    Arch { family: "qwen2_moe", renorm: false, strict: true },
    Arch { family: "olmoe", renorm: false, strict: true },
];

/// Names of trunk tensors, in a layer after `blk.N.`.
const NAMES: &[(Role, &str)] = &[
    (Role::Embed, "token_embd.weight"),
    (Role::FinalNorm, "output_norm.weight"),
    (Role::LmHead, "output.weight"),
    (Role::AttnNorm, "attn_norm.weight"),
    (Role::Q, "attn_q.weight"),
    (Role::K, "attn_k.weight"),
    (Role::V, "attn_v.weight"),
    (Role::O, "attn_output.weight"),
    (Role::QBias, "attn_q.bias"),
    (Role::KBias, "attn_k.bias"),
    (Role::VBias, "attn_v.bias"),
    (Role::QNorm, "attn_q_norm.weight"),
    (Role::KNorm, "attn_k_norm.weight"),
    (Role::MlpNorm, "ffn_norm.weight"),
    (Role::Router, "ffn_gate_inp.weight"),
    (Role::SharedGate, "ffn_gate_shexp.weight"),
    (Role::SharedUp, "ffn_up_shexp.weight"),
    (Role::SharedDown, "ffn_down_shexp.weight"),
    (Role::SharedRouter, "ffn_gate_inp_shexp.weight"),
];

/// The name of a trunk tensor; `None` where there is none.
pub(super) fn name_of(role: Role) -> Option<&'static str> {
    NAMES.iter().find(|(r, _)| *r == role).map(|(_, name)| *name)
}

/// Where tensors of a role stand among those of their layer.
pub(super) fn order_of(role: Role) -> usize {
    NAMES.iter().position(|(r, _)| *r == role).unwrap_or(NAMES.len())
}

/// Refuses a model that llama.cpp computes otherwise, or does not load.
///
/// # Errors
/// `Plan` if there is no architecture for it, or if the model has what its graph does not.
pub(super) fn check(model: &Model) -> Result<()> {
    let spec = model.spec();
    let Some(arch) = ARCHES.iter().find(|a| a.family == spec.family) else {
        let known: Vec<_> = ARCHES.iter().map(|a| a.family).collect();
        let what = format!("{} is not exported to GGUF, {} are", spec.family, known.join(" "));
        return Err(Error::plan(what).in_file(model.root()));
    };
    let name = model.family().gguf;
    if arch.strict && spec.tied_head {
        let what = format!("the head is the embedding, but llama.cpp's {name} wants a head of its own");
        return Err(Error::plan(what).in_file(model.root()));
    }
    for (n, layer) in spec.layers.iter().enumerate() {
        let plain = layer.residual == Residual::Plain && matches!(spec.norm, Norm::Rms { .. });
        let attends = matches!(&layer.attention, Attention::Gqa(gqa) if arch.attends(gqa, spec.hidden));
        let routes = layer.mlp.moe().is_some_and(|moe| arch.routes(moe));
        if !(plain && attends && routes) {
            let what = format!("layer {n} is not as llama.cpp's {name} computes it");
            return Err(Error::plan(what).in_file(model.root()));
        }
    }
    Ok(())
}

fn is_plain(gqa: &Gqa) -> bool {
    let scale = 1.0 / (gqa.head_dim as f32).sqrt();
    let plain = gqa.window.is_none() && gqa.chunk.is_none() && gqa.clip.is_none() && gqa.gate.is_none();
    let ours = !gqa.fused && !gqa.o_bias && !gqa.sinks && !gqa.qk_norm_late && gqa.temperature.is_none();
    plain && ours && gqa.v_scale == 1.0 && (gqa.scale / scale - 1.0).abs() < 1e-6
}

impl Arch {
    /// The graphs rotate whole heads, whose queries, keys and values are alike in width.
    fn attends(&self, gqa: &Gqa, hidden: usize) -> bool {
        let rotates = 2 * gqa.rope.inv_freq.len() == gqa.head_dim && gqa.rope.pairing == Pairing::Half;
        let fits = !self.strict || gqa.n_heads.checked_mul(gqa.head_dim) == Some(hidden);
        is_plain(gqa) && rotates && gqa.v_dim == gqa.head_dim && fits
    }

    fn routes(&self, moe: &Moe) -> bool {
        let router = &moe.router;
        let softmax = router.score == Score::Softmax && router.weights == RouteWeights::Scores;
        let plain = !router.bias && !router.correction && router.groups.is_none() && router.scale == 1.0;
        softmax && plain && router.renorm.is_some() == self.renorm && !moe.bias
    }
}

/// `general.*` and the architecture's own keys.
///
/// # Errors
/// Layers that differ in what a file says once; RoPE that is stretched.
pub(super) fn keys(model: &Model, name: &str) -> Result<Vec<(String, Value)>> {
    let (spec, arch) = (model.spec(), model.family().gguf);
    let (gqa, moe) = alike(model)?;
    // What the published converter takes, though no layer is dense; OLMoE's experts are this wide.
    let dense = model.config().uint_opt(model.family().dense_inter, 1, INTER_MAX)?;
    let number = |n: usize| {
        u32::try_from(n).map(Value::U32).map_err(|_| Error::plan(format!("{n} does not fit 32 bits")))
    };
    let text = |t: &str| Value::String(t.to_owned());
    let own = |key: &str| format!("{arch}.{key}");
    let mut keys = vec![
        ("general.architecture".to_owned(), text(arch)),
        ("general.type".to_owned(), text("model")),
        ("general.name".to_owned(), text(name)),
        ("general.quantization_version".to_owned(), Value::U32(2)),
        (own("attention.layer_norm_rms_epsilon"), Value::F32(spec.norm.eps())),
        (own("rope.freq_base"), Value::F32(rope_base(model, &gqa.rope)?)),
    ];
    let numbers = [
        ("block_count", spec.layers.len()),
        ("context_length", spec.max_positions),
        ("embedding_length", spec.hidden),
        ("vocab_size", spec.vocab),
        ("feed_forward_length", dense.unwrap_or(moe.inter)),
        ("expert_feed_forward_length", moe.inter),
        ("expert_count", moe.n_experts),
        ("expert_used_count", moe.n_experts_used),
        ("attention.head_count", gqa.n_heads),
        ("attention.head_count_kv", gqa.n_kv_heads),
        ("attention.key_length", gqa.head_dim),
        ("attention.value_length", gqa.v_dim),
        ("rope.dimension_count", 2 * gqa.rope.inv_freq.len()),
    ];
    for (key, n) in numbers {
        keys.push((own(key), number(n)?));
    }
    if let Some(shared) = moe.shared {
        keys.push((own("expert_shared_feed_forward_length"), number(shared.inter)?));
    }
    Ok(keys)
}

/// The attention and the experts that all layers have.
fn alike(model: &Model) -> Result<(&Gqa, &Moe)> {
    let mut layers = model.spec().layers.iter().map(|l| (&l.attention, &l.mlp));
    let first = layers.next();
    let same = layers.all(|l| Some(l) == first);
    match first.map(|(attention, mlp)| (attention, mlp.moe())) {
        Some((Attention::Gqa(gqa), Some(moe))) if same => Ok((gqa, moe)),
        _ => Err(Error::plan("layers differ, but a GGUF file describes all at once").in_file(model.root())),
    }
}

/// The base whose powers the angles of RoPE are; nothing else is exported.
fn rope_base(model: &Model, rope: &Rope) -> Result<f32> {
    let source = Source::new(model.config(), "full_attention")?;
    let base = source.theta()?.unwrap_or(model.family().rope.theta);
    let plain = frequencies(base, 2 * rope.inv_freq.len());
    if rope.amplitude == 1.0 && rope.long.is_none() && rope.inv_freq == plain {
        return Ok(base as f32);
    }
    Err(Error::plan("RoPE is stretched for long texts, which is not exported yet").in_file(model.root()))
}
