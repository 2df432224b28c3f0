//! Grouped-query attention: query heads share the keys and values of their group.

use moepack_convert::spec::{Gqa as Spec, QkNorm, Role, Rope};
use moepack_format::Result;
use moepack_quant::Isa;
use moepack_quant::gemm::{PackedWeights, Rows};

use super::attention::{Heads, Scratch};
use super::linear::Linear;
use super::norm::Norm;
use super::rope::Table;
use super::{Weights, sized, tensor};

/// The weights of one layer.
pub(super) struct Gqa {
    spec: Spec,
    /// `[n_heads · head_dim, hidden]`
    q: Linear,
    /// `[n_kv_heads · head_dim, hidden]`
    k: Linear,
    /// `[n_kv_heads · head_dim, hidden]`
    v: Linear,
    /// `[hidden, n_heads · head_dim]`
    o: Linear,
    /// Norms of queries and keys, over a head or over all heads.
    qk_norm: Option<(Norm, Norm)>,
    /// `[n_heads]`
    sinks: Option<Vec<f32>>,
}

impl Gqa {
    pub(super) fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Gqa> {
        let (l, hidden, d) = (Some(layer), weights.spec().hidden, spec.head_dim);
        let (nq, nkv) = (spec.n_heads * d, spec.n_kv_heads * d);
        let qkv = |role, bias, n| Linear::load(weights, l, (role, spec.qkv_bias.then_some(bias)), n, hidden);
        let norms = |q, k| -> Result<_> {
            Ok(Some((Norm::load(weights, l, Role::QNorm, q)?, Norm::load(weights, l, Role::KNorm, k)?)))
        };
        Ok(Gqa {
            q: qkv(Role::Q, Role::QBias, nq)?,
            k: qkv(Role::K, Role::KBias, nkv)?,
            v: qkv(Role::V, Role::VBias, nkv)?,
            o: Linear::load(weights, l, (Role::O, spec.o_bias.then_some(Role::OBias)), hidden, nq)?,
            qk_norm: match spec.qk_norm {
                QkNorm::None => None,
                QkNorm::Head => norms(d, d)?,
                QkNorm::Full => norms(nq, nkv)?,
            },
            sinks: if spec.sinks { Some(tensor(weights, l, Role::Sinks, &[spec.n_heads])?) } else { None },
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
        table: &Table,
        x: &[f32],
        scratch: &'s mut Scratch,
    ) -> &'s [f32] {
        let (spec, d) = (&self.spec, self.spec.head_dim);
        let len = x.len() / self.o.n();
        let Scratch { q, k, v, heads, mixed, out, .. } = scratch;
        let q = sized(q, len * self.q.n()); // [len, n_heads, head_dim]
        let k = sized(k, len * self.k.n()); // [len, n_kv_heads, head_dim]
        let v = sized(v, len * self.v.n()); // [len, n_kv_heads, head_dim]
        self.q.apply(isa, x, q);
        self.k.apply(isa, x, k);
        self.v.apply(isa, x, v);
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            q_norm.apply_in_place(isa, q);
            k_norm.apply_in_place(isa, k);
        }
        if let Some(limit) = spec.clip {
            [&mut *q, &mut *k, &mut *v].into_iter().flatten().for_each(|v| *v = v.clamp(-limit, limit));
        }
        for (t, row) in q.chunks_exact_mut(self.q.n()).enumerate() {
            table.rotate(t, row, d);
            row.iter_mut().for_each(|v| *v *= spec.scale);
        }
        for (t, row) in k.chunks_exact_mut(self.k.n()).enumerate() {
            table.rotate(t, row, d);
        }
        let mixed = sized(mixed, len * self.q.n()); // [len, n_heads, head_dim]
        let shape = Heads {
            n_heads: spec.n_heads,
            n_kv_heads: spec.n_kv_heads,
            k_dim: d,
            v_dim: d,
            window: spec.window,
            sinks: self.sinks.as_deref(),
        };
        let (k, v, stride) = (&*k, &*v, self.k.n());
        let pack = |kv: usize, keys: &mut PackedWeights, values: &mut PackedWeights| {
            keys.repack(Rows { data: &k[kv * d..], stride }, len, d);
            values.repack_transposed(Rows { data: &v[kv * d..], stride }, len, d);
        };
        shape.mix(isa, q, pack, heads, mixed);
        let out = sized(out, x.len()); // [len, hidden]
        self.o.apply(isa, mixed, out);
        out
    }
}
