//! Grouped-query attention: query heads share the keys and values of their group.

use moepack_convert::spec::{Gate, GateBy, Gqa as Spec, QkNorm, Role, Rope, Temperature};
use moepack_format::Result;
use moepack_quant::gemm::{PackedWeights, Rows};
use moepack_quant::{Isa, math};

use super::attention::{Heads, Scratch, Tables};
use super::blocks::Blocks;
use super::linear::Linear;
use super::norm::Norm;
use super::pools::MeanPools;
use super::rope::Table;
use super::router::softplus;
use super::{Weights, sized, tensor};

/// The weights of one layer.
pub(super) struct Gqa {
    spec: Spec,
    projections: Projections,
    /// `[hidden, n_heads · v_dim]`
    o: Linear,
    /// `[n_heads · v_dim, hidden]`, or one row a head.
    gate: Option<Linear>,
    /// Norms of queries and keys, over a head or over all heads.
    qk_norm: Option<(Norm, Norm)>,
    /// `[n_heads]`
    sinks: Option<Vec<f32>>,
    blocks: Option<Blocks>,
    pools: Option<MeanPools>,
    /// Of norms without weights.
    eps: f32,
}

/// How queries, keys and values are made.
struct Projections {
    /// `[n_heads · head_dim, hidden]`; twice as many rows where each head's gate follows its query.
    q: Linear,
    /// `[n_kv_heads · head_dim, hidden]`
    k: Linear,
    /// `[n_kv_heads · v_dim, hidden]`; none where values are keys.
    v: Option<Linear>,
}

impl Projections {
    fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Projections> {
        let (l, hidden, d) = (Some(layer), weights.spec().hidden, spec.head_dim);
        let gates = if spec.gate == Some(Gate::InQuery) { 2 } else { 1 };
        let (nq, nk, nv) = (gates * spec.n_heads * d, spec.n_kv_heads * d, spec.n_kv_heads * spec.v_dim);
        if spec.fused {
            let all = tensor(weights, l, Role::Qkv, &[nq + nk + nv, hidden])?;
            let (q, kv) = all.split_at(nq * hidden);
            let (k, v) = kv.split_at(nk * hidden);
            let part = |rows, n| Linear::new(rows, None, n, hidden);
            let q = part(q, nq).watched(weights.tap(l, Role::Qkv));
            return Ok(Projections { q, k: part(k, nk), v: Some(part(v, nv)) });
        }
        let qkv = |role, bias, n| Linear::load(weights, l, (role, spec.qkv_bias.then_some(bias)), n, hidden);
        Ok(Projections {
            q: qkv(Role::Q, Role::QBias, nq)?,
            k: qkv(Role::K, Role::KBias, nk)?,
            v: if spec.k_is_v { None } else { Some(qkv(Role::V, Role::VBias, nv)?) },
        })
    }
}

impl Gqa {
    pub(super) fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Gqa> {
        let (l, hidden, d) = (Some(layer), weights.spec().hidden, spec.head_dim);
        let n_out = spec.n_heads * spec.v_dim;
        let norm = |role, width| Norm::load_with(weights, l, role, width, None);
        let norms = |q, k| -> Result<_> { Ok(Some((norm(Role::QNorm, q)?, norm(Role::KNorm, k)?))) };
        let gate = |n| Linear::load(weights, l, (Role::AttnGate, None), n, hidden);
        Ok(Gqa {
            projections: Projections::load(weights, layer, spec)?,
            o: Linear::load(weights, l, (Role::O, spec.o_bias.then_some(Role::OBias)), hidden, n_out)?,
            gate: match spec.gate {
                Some(Gate::Own) => Some(gate(n_out)?),
                Some(Gate::PerHead) => Some(gate(spec.n_heads)?),
                Some(Gate::InQuery) | None => None,
            },
            qk_norm: match spec.qk_norm {
                QkNorm::None => None,
                QkNorm::Head => norms(d, d)?,
                QkNorm::Full => norms(spec.n_heads * d, spec.n_kv_heads * d)?,
                QkNorm::Unweighted => {
                    let eps = weights.spec().norm.eps();
                    Some((Norm::unweighted(d, eps), Norm::unweighted(d, eps)))
                }
            },
            sinks: if spec.sinks { Some(tensor(weights, l, Role::Sinks, &[spec.n_heads])?) } else { None },
            pools: spec.pools.map(|p| MeanPools::load(weights, layer, p)).transpose()?,
            blocks: spec.blocks.map(|b| Blocks::load(weights, layer, b)).transpose()?,
            eps: weights.spec().norm.eps(),
            spec: spec.clone(),
        })
    }

    pub(super) fn rope(&self) -> &Rope {
        &self.spec.rope
    }

    /// Attention of one window, `[len, hidden]` to the same.
    pub(super) fn window<'s>(
        &self,
        isa: Isa,
        tables: &Tables,
        x: &[f32],
        scratch: &'s mut Scratch,
    ) -> &'s mut [f32] {
        let (spec, d) = (&self.spec, self.spec.head_dim);
        let (len, n_out) = (x.len() / self.o.n(), spec.n_heads * spec.v_dim);
        let Scratch { q, k, v, gates, heads, mixed, out, .. } = scratch;
        let q = sized(q, len * spec.n_heads * d); // [len, n_heads, head_dim]
        let k = sized(k, len * spec.n_kv_heads * d); // [len, n_kv_heads, head_dim]
        let v = sized(v, len * spec.n_kv_heads * spec.v_dim); // [len, n_kv_heads, v_dim]
        let n_gates =
            if spec.gate == Some(Gate::InQuery) { n_out } else { self.gate.as_ref().map_or(0, Linear::n) };
        let gates = sized(gates, len * n_gates); // [len, n_heads, v_dim or 1]
        self.project(isa, x, [&mut *q, &mut *k, &mut *v, &mut *gates]);
        self.position(isa, tables.of_window(len), q, k);
        let mixed = sized(mixed, len * n_out); // [len, n_heads, v_dim]
        let table = tables.of_window(len);
        let chosen = match (&self.blocks, &self.pools) {
            (Some(blocks), _) => Some(blocks.choose(isa, table, x)),
            (None, Some(pools)) => Some(vec![pools.choose(isa, table, x)]),
            (None, None) => None,
        };
        let shape = Heads {
            n_heads: spec.n_heads,
            n_kv_heads: spec.n_kv_heads,
            k_dim: d,
            v_dim: spec.v_dim,
            window: spec.window,
            chunk: spec.chunk,
            chosen: chosen.as_deref(),
            sinks: self.sinks.as_deref(),
        };
        let (k, v) = (&*k, &*v);
        let pack = |kv: usize, keys: &mut PackedWeights, values: &mut PackedWeights| {
            let (k_stride, v_stride) = (spec.n_kv_heads * d, spec.n_kv_heads * spec.v_dim);
            keys.repack(Rows { data: &k[kv * d..], stride: k_stride }, len, d);
            values.repack_transposed(Rows { data: &v[kv * spec.v_dim..], stride: v_stride }, len, spec.v_dim);
        };
        shape.mix(isa, q, pack, heads, mixed);
        if spec.gate.is_some() {
            apply_gates(isa, spec.gate_by, gates, mixed);
        }
        let out = sized(out, x.len()); // [len, hidden]
        self.o.apply(isa, mixed, out);
        out
    }

    /// Queries, keys, values and gates, before norms and position.
    fn project(&self, isa: Isa, x: &[f32], [q, k, v, gates]: [&mut [f32]; 4]) {
        let (spec, d) = (&self.spec, self.spec.head_dim);
        let Projections { q: to_q, k: to_k, v: to_v } = &self.projections;
        if spec.gate == Some(Gate::InQuery) {
            let mut both = vec![0.0; 2 * q.len()]; // [len, n_heads, 2, head_dim]
            to_q.apply(isa, x, &mut both);
            let heads = q.chunks_exact_mut(d).zip(gates.chunks_exact_mut(d));
            for ((q, gate), both) in heads.zip(both.chunks_exact(2 * d)) {
                q.copy_from_slice(&both[..d]);
                gate.copy_from_slice(&both[d..]);
            }
        } else {
            to_q.apply(isa, x, q);
        }
        to_k.apply(isa, x, k);
        match to_v {
            Some(to_v) => to_v.apply(isa, x, v),
            None => v.copy_from_slice(k),
        }
        if spec.v_norm {
            Norm::unweighted(spec.v_dim, self.eps).apply_in_place(isa, v);
        }
        if let Some(gate) = &self.gate {
            gate.apply(isa, x, gates);
        }
        if spec.v_scale != 1.0 {
            v.iter_mut().for_each(|v| *v *= spec.v_scale);
        }
        if let Some(limit) = spec.clip {
            v.iter_mut().for_each(|v| *v = v.clamp(-limit, limit));
        }
    }

    /// Norms, clamp, position and scale of queries and keys.
    fn position(&self, isa: Isa, table: &Table, q: &mut [f32], k: &mut [f32]) {
        let (spec, d) = (&self.spec, self.spec.head_dim);
        let norms = self.qk_norm.as_ref();
        if let Some((q_norm, k_norm)) = norms.filter(|_| !spec.qk_norm_late) {
            q_norm.apply_in_place(isa, q);
            k_norm.apply_in_place(isa, k);
        }
        if let Some(limit) = spec.clip {
            [&mut *q, &mut *k].into_iter().flatten().for_each(|v| *v = v.clamp(-limit, limit));
        }
        for (t, row) in q.chunks_exact_mut(spec.n_heads * d).enumerate() {
            table.rotate(t, row, d);
        }
        for (t, row) in k.chunks_exact_mut(spec.n_kv_heads * d).enumerate() {
            table.rotate(t, row, d);
        }
        if let Some((q_norm, k_norm)) = norms.filter(|_| spec.qk_norm_late) {
            q_norm.apply_in_place(isa, q);
            k_norm.apply_in_place(isa, k);
        }
        for (t, row) in q.chunks_exact_mut(spec.n_heads * d).enumerate() {
            let scale = spec.scale * growth(spec.temperature, t);
            row.iter_mut().for_each(|v| *v *= scale);
        }
    }
}

/// Multiplies what heads give by a function of gates: one for each value, or one for equally many consecutive ones.
pub(super) fn apply_gates(isa: Isa, by: GateBy, gates: &mut [f32], values: &mut [f32]) {
    match by {
        GateBy::Sigmoid => math::sigmoid_all(isa, gates),
        GateBy::Softplus => gates.iter_mut().for_each(|g| *g = softplus(*g)),
    }
    let each = values.len() / gates.len().max(1);
    for (values, g) in values.chunks_exact_mut(each.max(1)).zip(&*gates) {
        values.iter_mut().for_each(|v| *v *= g);
    }
}

/// What a query at this position is multiplied by.
pub(super) fn growth(temperature: Option<Temperature>, position: usize) -> f32 {
    let Some(Temperature { beta, floor, shift }) = temperature else { return 1.0 };
    let steps = ((position as f32 + shift) / floor).floor();
    1.0 + beta * math::log(1.0 + f64::from(steps)) as f32
}
