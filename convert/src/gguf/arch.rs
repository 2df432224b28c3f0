//! Architectures of llama.cpp that models are exported to, and the keys and names of each.

use moepack_format::{Error, Result};

use super::Value;
use crate::model::Model;
use crate::spec::{Attention, Gqa, Moe, Norm, Residual, Role, RouteWeights, Score};

/// An architecture of llama.cpp.
#[derive(Debug)]
pub struct Arch {
    /// `model_type` of the family.
    pub family: &'static str,
    /// `general.architecture`.
    pub name: &'static str,
    /// The graph divides weights of the chosen experts by their sum; a file cannot say so.
    pub renorm: bool,
}

/// Families that are exported: grouped-query attention without anything that llama.cpp's graph lacks.
pub const ARCHES: &[Arch] = &[
    Arch { family: "qwen3_moe", name: "qwen3moe", renorm: true },
    Arch { family: "qwen2_moe", name: "qwen2moe", renorm: false },
    Arch { family: "olmoe", name: "olmoe", renorm: false },
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

/// The architecture of a model.
///
/// # Errors
/// `Plan` if there is none, or if the model has what its graph does not.
pub(super) fn of(model: &Model) -> Result<&'static Arch> {
    let spec = model.spec();
    let Some(arch) = ARCHES.iter().find(|a| a.family == spec.family) else {
        let known: Vec<_> = ARCHES.iter().map(|a| a.family).collect();
        let what = format!("{} is not exported to GGUF, {} are", spec.family, known.join(" "));
        return Err(Error::plan(what).in_file(model.root()));
    };
    for (n, layer) in spec.layers.iter().enumerate() {
        let plain = layer.residual == Residual::Plain && matches!(spec.norm, Norm::Rms { .. });
        let attends = matches!(&layer.attention, Attention::Gqa(gqa) if is_plain(gqa));
        let routes = layer.mlp.moe().is_some_and(|moe| arch.routes(moe));
        if !(plain && attends && routes) {
            let what = format!("layer {n} is not as llama.cpp's {} computes it", arch.name);
            return Err(Error::plan(what).in_file(model.root()));
        }
    }
    Ok(arch)
}

fn is_plain(gqa: &Gqa) -> bool {
    let scale = 1.0 / (gqa.head_dim as f32).sqrt();
    let plain = gqa.window.is_none() && gqa.chunk.is_none() && gqa.clip.is_none() && gqa.gate.is_none();
    let ours = !gqa.fused && !gqa.o_bias && !gqa.sinks && !gqa.qk_norm_late && gqa.temperature.is_none();
    plain && ours && gqa.v_scale == 1.0 && (gqa.scale / scale - 1.0).abs() < 1e-6
}

impl Arch {
    fn routes(&self, moe: &Moe) -> bool {
        let router = &moe.router;
        let softmax = router.score == Score::Softmax && router.weights == RouteWeights::Scores;
        let plain = !router.bias && !router.correction && router.groups.is_none() && router.scale == 1.0;
        softmax && plain && router.renorm.is_some() == self.renorm && !moe.bias
    }

    /// `general.*` and the architecture's own keys.
    ///
    /// # Errors
    /// Layers that differ in what a file says once; RoPE that is stretched.
    pub(super) fn keys(&self, model: &Model, name: &str) -> Result<Vec<(String, Value)>> {
        let spec = model.spec();
        let (gqa, moe) = alike(model)?;
        let number = |n: usize| {
            u32::try_from(n).map(Value::U32).map_err(|_| Error::plan(format!("{n} does not fit 32 bits")))
        };
        let text = |t: &str| Value::String(t.to_owned());
        let own = |key: &str| format!("{}.{key}", self.name);
        let mut keys = vec![
            ("general.architecture".to_owned(), text(self.name)),
            ("general.type".to_owned(), text("model")),
            ("general.name".to_owned(), text(name)),
            ("general.quantization_version".to_owned(), Value::U32(2)),
            (own("attention.layer_norm_rms_epsilon"), Value::F32(spec.norm.eps())),
            (own("rope.freq_base"), Value::F32(rope_base(model, gqa)?)),
        ];
        let numbers = [
            ("block_count", spec.layers.len()),
            ("context_length", spec.max_positions),
            ("embedding_length", spec.hidden),
            ("feed_forward_length", moe.inter),
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
fn rope_base(model: &Model, gqa: &Gqa) -> Result<f32> {
    let config = model.config();
    let nested = match config.object_opt(&["rope_parameters"])? {
        Some(section) => section.number_opt("rope_theta")?,
        None => None,
    };
    let base = nested.or(config.number_opt(&["rope_theta"])?).unwrap_or(10_000.0);
    let rope = &gqa.rope;
    let pairs = rope.inv_freq.len() as f64;
    let near = |(i, &f): (usize, &f32)| {
        let expected = libm::pow(base, -(i as f64) / pairs);
        (f64::from(f) / expected - 1.0).abs() < 1e-5
    };
    if rope.amplitude == 1.0 && rope.long.is_none() && rope.inv_freq.iter().enumerate().all(near) {
        return Ok(base as f32);
    }
    Err(Error::plan("RoPE is stretched for long texts, which is not exported yet").in_file(model.root()))
}
