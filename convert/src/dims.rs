//! What follows from a model's description: which tensors a layer has, and how long their sides are.

use crate::family::Dim;
use crate::spec::{
    Across, Activation, Attention, Compressed, Delta, DeltaProjections, Gate, GateUp, Gqa, Hyper, Indexer,
    LayerSpec, Mla, Mlp, ModelSpec, Moe, Norm, QkNorm, Residual, Role, StateSpace,
};

/// Whether the model has this tensor: in this layer, or outside of all.
pub fn has(spec: &ModelSpec, layer: Option<&LayerSpec>, role: Role) -> bool {
    let Some(layer) = layer else { return has_global(spec, role) };
    if let Some(first) = role.first() {
        return layer.shortcut.is_some() && has(spec, Some(layer), first);
    }
    let attention = match &layer.attention {
        Attention::Gqa(gqa) => gqa_has(gqa, role),
        Attention::Mla(mla) => mla_has(mla, role),
        Attention::Compressed(attention) => compressed_has(attention, role),
        Attention::Delta(delta) => delta_has(delta, role),
        Attention::Routed(_) => matches!(
            role,
            Role::AttnRouter | Role::AttnExpertsIn | Role::AttnExpertsOut | Role::KeysValues | Role::OBias
        ),
        Attention::StateSpace(space) => state_space_has(space, role),
        Attention::ShortConv(conv) => match role {
            Role::MixerIn | Role::MixerConv | Role::MixerOut => true,
            Role::MixerInBias | Role::MixerConvBias | Role::MixerOutBias => conv.bias,
            _ => false,
        },
        Attention::Lightning(_) => {
            matches!(role, Role::MixerIn | Role::MixerNorm | Role::MixerOut | Role::AttnGate)
        }
        Attention::None | Attention::Carried => false,
    };
    let mlp = match &layer.mlp {
        Mlp::Dense { activation, gate_up, .. } => dense_has(*activation, *gate_up, role),
        Mlp::Moe(moe) => moe_has(moe, role),
        Mlp::None => false,
    };
    let beside = layer.shortcut.is_some_and(|s| dense_has(s.activation, GateUp::Two, role));
    residual_has(layer.residual, spec.norm, role)
        || attention
        || mlp
        || beside
        || role == Role::LayerScale && layer.scaled
        || ngrams_have(layer, role)
}

fn dense_has(activation: Activation, gate_up: GateUp, role: Role) -> bool {
    match (gate_up, role) {
        (GateUp::Two, Role::DenseGate) => activation.is_gated(),
        (GateUp::Two, role) => matches!(role, Role::DenseUp | Role::DenseDown),
        (GateUp::One, role) => matches!(role, Role::DenseGateUp | Role::DenseDown),
        (GateUp::AsShared, role) => matches!(role, Role::SharedGateUp | Role::SharedDown),
    }
}

fn ngrams_have(layer: &LayerSpec, role: Role) -> bool {
    use Role::{
        NgramConv, NgramConvNorm, NgramFactors, NgramKey, NgramKeyNorm, NgramOffsets, NgramPart,
        NgramQueryNorm, NgramSizes, NgramValue,
    };
    let is_one = matches!(
        role,
        NgramConv
            | NgramConvNorm
            | NgramFactors
            | NgramKey
            | NgramKeyNorm
            | NgramOffsets
            | NgramPart(_)
            | NgramQueryNorm
            | NgramSizes
            | NgramValue
    );
    is_one && layer.ngrams.is_some()
}

/// How many tensors of a layer a rule with this role stands for.
pub fn n_parts(layer: &LayerSpec, role: Role) -> usize {
    match (role, &layer.ngrams) {
        (Role::NgramPart(_), Some(ngrams)) => ngrams.n_parts,
        _ => 1,
    }
}

/// The head may be the embedding, which is for the tensors to decide.
fn has_global(spec: &ModelSpec, role: Role) -> bool {
    match role {
        Role::Embed | Role::LmHead => true,
        Role::FinalNorm => !is_gated(spec.hyper),
        Role::HeadGateNorm | Role::HeadGateDown | Role::HeadGateUp => is_gated(spec.hyper),
        Role::FinalNormBias => has_bias(spec.norm),
        Role::LmHeadBias => spec.head_bias,
        Role::HeadMix | Role::HeadMixBase | Role::HeadMixScale => {
            spec.hyper.is_some_and(|h| !h.mean_head) && !is_gated(spec.hyper)
        }
        _ => false,
    }
}

fn is_gated(hyper: Option<Hyper>) -> bool {
    hyper.is_some_and(|h| Residual::Hyper(h).is_gated())
}

fn has_bias(norm: Norm) -> bool {
    matches!(norm, Norm::Layer { bias: true, .. })
}

fn residual_has(residual: Residual, norm: Norm, role: Role) -> bool {
    let own_mlp_norm = residual.has_pre_norm() && !residual.shares_norm();
    match role {
        Role::AttnNorm => residual.has_pre_norm(),
        Role::MlpNorm => own_mlp_norm,
        Role::AttnNormBias => residual.has_pre_norm() && has_bias(norm),
        Role::MlpNormBias => own_mlp_norm && has_bias(norm),
        Role::AttnPostNorm | Role::MlpPostNorm => residual.has_post_norm(),
        Role::AttnMix
        | Role::AttnMixBase
        | Role::AttnMixScale
        | Role::MlpMix
        | Role::MlpMixBase
        | Role::MlpMixScale => matches!(residual, Residual::Hyper(_)) && !residual.is_gated(),
        Role::AttnGateNorm
        | Role::AttnGateDown
        | Role::AttnGateUp
        | Role::AttnInject
        | Role::MlpGateNorm
        | Role::MlpGateDown
        | Role::MlpGateUp
        | Role::MlpInject => residual.is_gated(),
        _ => false,
    }
}

fn gqa_has(gqa: &Gqa, role: Role) -> bool {
    match role {
        Role::V => !gqa.fused && !gqa.k_is_v,
        Role::Q | Role::K => !gqa.fused,
        Role::Qkv => gqa.fused,
        Role::O => true,
        Role::VBias => gqa.qkv_bias && !gqa.k_is_v,
        Role::QBias | Role::KBias => gqa.qkv_bias,
        Role::OBias => gqa.o_bias,
        Role::QNorm | Role::KNorm => matches!(gqa.qk_norm, QkNorm::Head | QkNorm::Full),
        Role::IndexQ | Role::IndexK => gqa.blocks.is_some(),
        Role::IndexQk => gqa.pools.is_some(),
        Role::IndexQNorm | Role::IndexKNorm => gqa.blocks.is_some() || gqa.pools.is_some(),
        Role::Sinks => gqa.sinks,
        Role::AttnGate => matches!(gqa.gate, Some(Gate::Own | Gate::PerHead)),
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
        Role::AttnGate => mla.gate.is_some(),
        Role::Sinks => mla.sinks,
        Role::IndexQ | Role::IndexK | Role::IndexKNorm | Role::IndexKNormBias | Role::IndexWeights => {
            mla.choice.indexer().is_some()
        }
        Role::IndexCompressGate | Role::IndexCompressBias => {
            mla.choice.indexer().is_some_and(|i| i.pool.is_some())
        }
        _ => false,
    }
}

fn compressed_has(attention: &Compressed, role: Role) -> bool {
    use Role::{
        CompressBias, CompressGate, CompressKv, CompressNorm, IndexCompressBias, IndexCompressGate,
        IndexCompressKv, IndexCompressNorm, IndexQ, IndexWeights, Kv, KvNorm, OA, OB, QA, QANorm, QB, Sinks,
    };
    match role {
        Sinks | QA | QANorm | QB | Kv | KvNorm | OA | OB => true,
        CompressKv | CompressGate | CompressBias | CompressNorm => attention.compression.is_some(),
        IndexQ | IndexWeights | IndexCompressKv | IndexCompressGate | IndexCompressBias
        | IndexCompressNorm => attention.compression.as_ref().is_some_and(|c| c.indexer.is_some()),
        _ => false,
    }
}

fn delta_has(delta: &Delta, role: Role) -> bool {
    match role {
        Role::DeltaQkvz | Role::DeltaBa => delta.projections == DeltaProjections::Grouped,
        Role::DeltaQkv | Role::DeltaZ => delta.projections == DeltaProjections::Separate,
        Role::DeltaA => {
            matches!(delta.projections, DeltaProjections::Separate | DeltaProjections::FullRank)
        }
        Role::AttnGate => delta.projections == DeltaProjections::FullRank,
        Role::DeltaB => delta.projections != DeltaProjections::Grouped,
        Role::DeltaConv | Role::DeltaOut => !delta.projections.is_kimi(),
        Role::Q | Role::K | Role::V | Role::O => delta.projections.is_kimi(),
        Role::DeltaConvQ | Role::DeltaConvK | Role::DeltaConvV => delta.projections.is_kimi(),
        Role::DeltaGateA | Role::DeltaGateB | Role::DeltaDecayA | Role::DeltaDecayB => {
            delta.projections == DeltaProjections::LowRank
        }
        Role::DeltaStep | Role::DeltaDecay | Role::DeltaNorm => true,
        _ => false,
    }
}

fn state_space_has(space: &StateSpace, role: Role) -> bool {
    use Role::{
        MixerConv, MixerConvBias, MixerIn, MixerInBias, MixerNorm, MixerOut, MixerOutBias, StateDecay,
        StateInNorm, StateOutNorm, StateSelect, StateSkip, StateStep, StateStepNorm, StateStepUp,
    };
    match role {
        MixerIn | MixerConv | MixerOut | StateStep | StateDecay | StateSkip => true,
        MixerInBias | MixerOutBias => space.bias,
        MixerConvBias => space.conv_bias,
        MixerNorm => space.step_rank.is_none(),
        StateSelect | StateStepUp | StateStepNorm | StateInNorm | StateOutNorm => space.step_rank.is_some(),
        _ => false,
    }
}

fn moe_has(moe: &Moe, role: Role) -> bool {
    let shared = moe.shared.as_ref();
    match role {
        Role::Router => true,
        Role::RouterBias => moe.router.bias,
        Role::RouterCorrection => moe.router.correction,
        Role::RouterTable => moe.router.choice == crate::spec::Choice::ByToken,
        Role::ExpertsBias => moe.sum_bias,
        Role::LatentDown | Role::LatentUp => moe.latent.is_some(),
        Role::SharedGate => shared.is_some_and(|s| !s.fused && s.activation.is_gated()),
        Role::SharedUp => shared.is_some_and(|s| !s.fused),
        Role::SharedGateUp => shared.is_some_and(|s| s.fused),
        Role::SharedDown => shared.is_some(),
        Role::SharedNorm | Role::SharedPostNorm | Role::RoutedPostNorm => shared.is_some_and(|s| s.normed),
        Role::RouterInput => moe.router.own_input,
        Role::RouterExpertScale => moe.router.expert_scale,
        Role::SharedRouter => shared.is_some_and(|s| s.gated),
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
        Dim::Width => Some(spec.width()),
        Dim::Scales => spec.hyper.map(|h| if matches!(h.across, Across::Alone(_)) { 2 } else { 3 }),
        Dim::GateRank => {
            spec.hyper.and_then(|h| if let Across::Gated(rank) = h.across { Some(rank) } else { None })
        }
        Dim::NgramWidth => layer?.ngrams.as_ref().map(|n| n.width()),
        Dim::NgramRow => layer?.ngrams.as_ref().map(|n| n.dim),
        Dim::NgramOrders => layer?.ngrams.as_ref().map(|n| n.factors.len()),
        Dim::NgramHeads => layer?.ngrams.as_ref().map(|n| n.sizes.len()),
        Dim::NgramKernel => layer?.ngrams.as_ref().map(|n| n.kernel),
        Dim::Any => None,
        Dim::Streams => spec.hyper.map(|h| h.n_streams),
        Dim::Mixes => spec.hyper.map(|h| h.n_mixes()),
        Dim::DenseInter if layer?.shortcut.is_some() => layer?.shortcut.map(|s| s.inter),
        Dim::DenseInter
        | Dim::DenseGateUp
        | Dim::Inter
        | Dim::Latent
        | Dim::SharedInter
        | Dim::SharedGateUp
        | Dim::Experts
        | Dim::ExpertsUsed => mlp_dim(&layer?.mlp, dim),
        _ => match &layer?.attention {
            Attention::Gqa(gqa) => gqa_dim(gqa, dim),
            Attention::Mla(mla) => mla_dim(mla, dim),
            Attention::Compressed(attention) => compressed_dim(attention, dim),
            Attention::Delta(delta) => delta_dim(delta, dim),
            Attention::Routed(routed) => match dim {
                Dim::Kv => Some(routed.n_kv_heads * routed.head_dim),
                Dim::KeysValues => Some(2 * routed.n_kv_heads * routed.head_dim),
                Dim::AttnExperts => Some(routed.n_experts),
                _ => None,
            },
            Attention::StateSpace(space) => state_space_dim(space, dim),
            Attention::ShortConv(conv) => match dim {
                Dim::MixerIn => Some(3 * spec.hidden),
                Dim::MixerChannels | Dim::MixerInner => Some(spec.hidden),
                Dim::MixerKernel => Some(conv.kernel),
                _ => None,
            },
            Attention::Lightning(lightning) => match dim {
                Dim::MixerIn => Some(3 * lightning.inner()),
                Dim::MixerInner => Some(lightning.inner()),
                _ => None,
            },
            Attention::None | Attention::Carried => None,
        },
    };
    n.map(|n| n as u64)
}

fn gqa_dim(gqa: &Gqa, dim: Dim) -> Option<usize> {
    let (q, kv, values) =
        (gqa.n_heads * gqa.head_dim, gqa.n_kv_heads * gqa.head_dim, gqa.n_kv_heads * gqa.v_dim);
    match dim {
        Dim::Q => Some(q),
        Dim::QOut => Some(if gqa.gate == Some(Gate::InQuery) { 2 * q } else { q }),
        Dim::AttnOut => Some(gqa.n_heads * gqa.v_dim),
        Dim::Kv => Some(kv),
        Dim::GateOut => Some(gate_rows(gqa.gate?, gqa.n_heads, gqa.v_dim)),
        Dim::Values => Some(values),
        Dim::Qkv => Some(q + kv + values),
        Dim::Head => Some(gqa.head_dim),
        Dim::Heads => Some(gqa.n_heads),
        Dim::Index => gqa.blocks.map(|b| b.n_heads * b.head_dim),
        Dim::IndexHead => gqa.blocks.map(|b| b.head_dim).or(gqa.pools.map(|p| p.head_dim)),
        Dim::IndexQk => gqa.pools.map(|p| (p.n_heads + 1) * p.head_dim),
        _ => None,
    }
}

/// Rows of the matrix that gates heads.
fn gate_rows(gate: Gate, n_heads: usize, v_dim: usize) -> usize {
    if gate == Gate::PerHead { n_heads } else { n_heads * v_dim }
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
        Dim::GateOut => Some(gate_rows(mla.gate?, mla.n_heads, mla.v_dim)),
        _ => indexer_dim(mla.choice.indexer()?, dim),
    }
}

fn compressed_dim(attention: &Compressed, dim: Dim) -> Option<usize> {
    let compression = attention.compression.as_ref();
    match dim {
        Dim::Q => Some(attention.n_heads * attention.head_dim),
        Dim::Heads => Some(attention.n_heads),
        Dim::Head | Dim::EntryHead => Some(attention.head_dim),
        Dim::QLora => Some(attention.q_lora),
        Dim::GroupIn => Some(attention.n_heads * attention.head_dim / attention.n_groups),
        Dim::GroupRank => Some(attention.n_groups * attention.o_lora),
        Dim::Ratio => Some(compression?.ratio),
        Dim::Entry => Some(compression?.n_series() * attention.head_dim),
        Dim::IndexEntry => Some(compression?.n_series() * compression?.indexer.as_ref()?.head_dim),
        _ => indexer_dim(compression?.indexer.as_ref()?, dim),
    }
}

fn delta_dim(delta: &Delta, dim: Dim) -> Option<usize> {
    let values = delta.n_v_heads * delta.v_dim;
    match dim {
        Dim::DeltaChannels => Some(delta.n_channels()),
        Dim::DeltaQkvz => Some(delta.n_channels() + values),
        Dim::DeltaValues | Dim::Values | Dim::AttnOut | Dim::GateOut => Some(values),
        Dim::Q | Dim::QOut | Dim::Kv => Some(delta.n_k_heads * delta.k_dim),
        Dim::DeltaHeads => Some(delta.n_v_heads),
        Dim::DeltaBa => Some(2 * delta.n_v_heads),
        Dim::DeltaHead => Some(delta.v_dim),
        Dim::DeltaKernel => Some(delta.kernel),
        _ => None,
    }
}

fn state_space_dim(space: &StateSpace, dim: Dim) -> Option<usize> {
    match dim {
        Dim::MixerIn => Some(space.n_projected()),
        Dim::MixerChannels => Some(space.n_channels()),
        Dim::MixerInner => Some(space.inner()),
        Dim::MixerKernel => Some(space.kernel),
        Dim::Steps => Some(space.n_heads),
        Dim::States => Some(space.state_dim),
        Dim::StepRank => space.step_rank,
        Dim::Selected => space.step_rank.map(|rank| rank + 2 * space.state_dim),
        _ => None,
    }
}

fn indexer_dim(indexer: &Indexer, dim: Dim) -> Option<usize> {
    match dim {
        Dim::Index => Some(indexer.n_heads * indexer.head_dim),
        Dim::IndexHead => Some(indexer.head_dim),
        Dim::IndexHeads => Some(indexer.n_heads),
        Dim::Pool => indexer.pool,
        _ => None,
    }
}

fn mlp_dim(mlp: &Mlp, dim: Dim) -> Option<usize> {
    match (mlp, dim) {
        (Mlp::Dense { inter, .. }, Dim::DenseInter | Dim::SharedInter) => Some(*inter),
        (Mlp::Dense { inter, .. }, Dim::DenseGateUp | Dim::SharedGateUp) => Some(2 * inter),
        (Mlp::Moe(moe), Dim::Inter) => Some(moe.inter),
        (Mlp::Moe(moe), Dim::Latent) => moe.latent,
        (Mlp::Moe(moe), Dim::SharedInter) => moe.shared.map(|s| s.inter),
        (Mlp::Moe(moe), Dim::SharedGateUp) => moe.shared.map(|s| 2 * s.inter),
        (Mlp::Moe(moe), Dim::Experts) => Some(moe.n_experts + moe.n_zero),
        (Mlp::Moe(moe), Dim::ExpertsUsed) => Some(moe.n_experts_used),
        _ => None,
    }
}
