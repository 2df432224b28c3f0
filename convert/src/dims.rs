//! What follows from a model's description: which tensors a layer has, and how long their sides are.

use crate::family::Dim;
use crate::spec::{Attention, Gqa, LayerSpec, Mla, Mlp, ModelSpec, Moe, QkNorm, Role};

/// Whether a layer has this tensor; roles outside layers are answered by [`has_global`].
pub fn has(layer: &LayerSpec, role: Role) -> bool {
    let attention = match &layer.attention {
        Attention::Gqa(gqa) => gqa_has(gqa, role),
        Attention::Mla(mla) => mla_has(mla, role),
    };
    let mlp = match &layer.mlp {
        Mlp::Dense { .. } => matches!(role, Role::DenseGate | Role::DenseUp | Role::DenseDown),
        Mlp::Moe(moe) => moe_has(moe, role),
    };
    matches!(role, Role::AttnNorm | Role::MlpNorm) || attention || mlp
}

/// Whether this tensor stands outside the layers.
pub fn has_global(role: Role) -> bool {
    matches!(role, Role::Embed | Role::FinalNorm | Role::LmHead)
}

fn gqa_has(gqa: &Gqa, role: Role) -> bool {
    match role {
        Role::Q | Role::K | Role::V | Role::O => true,
        Role::QBias | Role::KBias | Role::VBias => gqa.qkv_bias,
        Role::OBias => gqa.o_bias,
        Role::QNorm | Role::KNorm => gqa.qk_norm != QkNorm::None,
        Role::Sinks => gqa.sinks,
        _ => false,
    }
}

fn mla_has(mla: &Mla, role: Role) -> bool {
    match role {
        Role::O | Role::KvA | Role::KvANorm | Role::KvB => true,
        Role::Q => mla.q_lora.is_none(),
        Role::QA | Role::QANorm | Role::QB => mla.q_lora.is_some(),
        Role::QABias => mla.bias && mla.q_lora.is_some(),
        Role::KvABias | Role::OBias => mla.bias,
        _ => false,
    }
}

fn moe_has(moe: &Moe, role: Role) -> bool {
    match role {
        Role::Router => true,
        Role::RouterBias => moe.router.bias,
        Role::RouterCorrection => moe.router.correction,
        Role::SharedGate | Role::SharedUp | Role::SharedDown => moe.shared.is_some(),
        Role::SharedRouter => moe.shared.is_some_and(|s| s.gated),
        _ => false,
    }
}

/// A length of a tensor of this layer (or of none); `None` where the layer has no such thing.
pub fn dim(spec: &ModelSpec, layer: Option<usize>, dim: Dim) -> Option<u64> {
    let layer = layer.and_then(|l| spec.layers.get(l));
    let n = match dim {
        Dim::Hidden => Some(spec.hidden),
        Dim::Vocab => Some(spec.vocab),
        Dim::One => Some(1),
        Dim::DenseInter | Dim::Inter | Dim::SharedInter | Dim::Experts => mlp_dim(&layer?.mlp, dim),
        _ => match &layer?.attention {
            Attention::Gqa(gqa) => gqa_dim(gqa, dim),
            Attention::Mla(mla) => mla_dim(mla, dim),
        },
    };
    n.map(|n| n as u64)
}

fn gqa_dim(gqa: &Gqa, dim: Dim) -> Option<usize> {
    match dim {
        Dim::Q | Dim::AttnOut => Some(gqa.n_heads * gqa.head_dim),
        Dim::Kv => Some(gqa.n_kv_heads * gqa.head_dim),
        Dim::Head => Some(gqa.head_dim),
        Dim::Heads => Some(gqa.n_heads),
        _ => None,
    }
}

fn mla_dim(mla: &Mla, dim: Dim) -> Option<usize> {
    match dim {
        Dim::Q => Some(mla.n_heads * (mla.nope_dim + mla.rope_dim)),
        Dim::Heads => Some(mla.n_heads),
        Dim::AttnOut => Some(mla.n_heads * mla.v_dim),
        Dim::QLora => mla.q_lora,
        Dim::KvLora => Some(mla.kv_lora),
        Dim::KvA => Some(mla.kv_lora + mla.rope_dim),
        Dim::KvB => Some(mla.n_heads * (mla.nope_dim + mla.v_dim)),
        _ => None,
    }
}

fn mlp_dim(mlp: &Mlp, dim: Dim) -> Option<usize> {
    match (mlp, dim) {
        (Mlp::Dense { inter, .. }, Dim::DenseInter) => Some(*inter),
        (Mlp::Moe(moe), Dim::Inter) => Some(moe.inter),
        (Mlp::Moe(moe), Dim::SharedInter) => moe.shared.map(|s| s.inter),
        (Mlp::Moe(moe), Dim::Experts) => Some(moe.n_experts),
        _ => None,
    }
}
