//! Multi-head latent attention: keys and values come from one narrow latent a token, and one rotary key serves all
//! heads. This is the decompressed form, which says what the model means.

use moepack_convert::spec::{Mla as Spec, Role, Rope};
use moepack_format::Result;
use moepack_quant::Isa;
use moepack_quant::gemm::{PackedWeights, Rows};

use super::attention::{Heads, Scratch};
use super::linear::Linear;
use super::norm::Norm;
use super::rope::Table;
use super::{Weights, sized};

/// The weights of one layer.
pub(super) struct Mla {
    spec: Spec,
    q: Query,
    /// `[kv_lora + rope_dim, hidden]`
    kv_a: Linear,
    /// Of the first `kv_lora`.
    kv_a_norm: Norm,
    /// `[n_heads · (nope_dim + v_dim), kv_lora]`
    kv_b: Linear,
    /// `[hidden, n_heads · v_dim]`
    o: Linear,
}

/// How queries are made; their outputs are `n_heads · (nope_dim + rope_dim)`.
enum Query {
    /// From the hidden state.
    Direct(Linear),
    /// Through a latent of `q_lora`: down, norm, up.
    Latent(Linear, Norm, Linear),
}

impl Mla {
    pub(super) fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Mla> {
        let (l, hidden) = (Some(layer), weights.spec().hidden);
        let linear = |role, n, k| Linear::load(weights, l, (role, None), n, k);
        let biased = |role, bias, n, k| Linear::load(weights, l, (role, spec.bias.then_some(bias)), n, k);
        let norm = |role, width| Norm::load_with(weights, l, role, width, spec.latent_eps);
        let q_out = spec.n_heads * (spec.nope_dim + spec.rope_dim);
        let q = match spec.q_lora {
            None => Query::Direct(linear(Role::Q, q_out, hidden)?),
            Some(lora) => Query::Latent(
                biased(Role::QA, Role::QABias, lora, hidden)?,
                norm(Role::QANorm, lora)?,
                linear(Role::QB, q_out, lora)?,
            ),
        };
        Ok(Mla {
            q,
            kv_a: biased(Role::KvA, Role::KvABias, spec.kv_lora + spec.rope_dim, hidden)?,
            kv_a_norm: norm(Role::KvANorm, spec.kv_lora)?,
            kv_b: linear(Role::KvB, spec.n_heads * (spec.nope_dim + spec.v_dim), spec.kv_lora)?,
            o: biased(Role::O, Role::OBias, hidden, spec.n_heads * spec.v_dim)?,
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
        let spec = &self.spec;
        let len = x.len() / self.o.n();
        let (k_dim, kv_dim) = (spec.nope_dim + spec.rope_dim, spec.nope_dim + spec.v_dim);
        let Scratch { q, k, v, latent, heads, mixed, out, .. } = scratch;
        let q = sized(q, len * spec.n_heads * k_dim); // [len, n_heads, nope_dim + rope_dim]
        self.queries(isa, x, latent, q);
        for (t, row) in q.chunks_exact_mut(spec.n_heads * k_dim).enumerate() {
            for head in row.chunks_exact_mut(k_dim) {
                table.rotate(t, &mut head[spec.nope_dim..], spec.rope_dim);
                head.iter_mut().for_each(|v| *v *= spec.scale);
            }
        }
        // The latent, normed, and the rotary key beside it.
        let kv_a = sized(k, len * self.kv_a.n()); // [len, kv_lora + rope_dim]
        self.kv_a.apply(isa, x, kv_a);
        let latent = sized(latent, len * spec.kv_lora); // [len, kv_lora]
        for (t, (row, latent)) in
            kv_a.chunks_exact_mut(self.kv_a.n()).zip(latent.chunks_exact_mut(spec.kv_lora)).enumerate()
        {
            self.kv_a_norm.apply(isa, &row[..spec.kv_lora], latent);
            table.rotate(t, &mut row[spec.kv_lora..], spec.rope_dim);
        }
        let kv = sized(v, len * self.kv_b.n()); // [len, n_heads, nope_dim + v_dim]
        self.kv_b.apply(isa, latent, kv);
        let mixed = sized(mixed, len * spec.n_heads * spec.v_dim); // [len, n_heads, v_dim]
        let (kv_a, kv) = (&*kv_a, &*kv);
        let pack = |head: usize, keys: &mut PackedWeights, values: &mut PackedWeights| {
            let mut whole = vec![0.0; len * k_dim]; // [len, nope_dim + rope_dim]
            for (t, key) in whole.chunks_exact_mut(k_dim).enumerate() {
                let (nope, rope) = key.split_at_mut(spec.nope_dim);
                nope.copy_from_slice(&kv[t * self.kv_b.n() + head * kv_dim..][..spec.nope_dim]);
                rope.copy_from_slice(&kv_a[t * self.kv_a.n() + spec.kv_lora..][..spec.rope_dim]);
            }
            keys.repack(Rows { data: &whole, stride: k_dim }, len, k_dim);
            let v = &kv[head * kv_dim + spec.nope_dim..];
            values.repack_transposed(Rows { data: v, stride: self.kv_b.n() }, len, spec.v_dim);
        };
        let n_heads = spec.n_heads;
        let shape =
            Heads { n_heads, n_kv_heads: n_heads, k_dim, v_dim: spec.v_dim, window: None, sinks: None };
        shape.mix(isa, q, pack, heads, mixed);
        let out = sized(out, x.len()); // [len, hidden]
        self.o.apply(isa, mixed, out);
        out
    }

    fn queries(&self, isa: Isa, x: &[f32], latent: &mut Vec<f32>, q: &mut [f32]) {
        match &self.q {
            Query::Direct(linear) => linear.apply(isa, x, q),
            Query::Latent(down, norm, up) => {
                let len = x.len() / self.o.n();
                let latent = sized(latent, len * down.n()); // [len, q_lora]
                down.apply(isa, x, latent);
                norm.apply_in_place(isa, latent);
                up.apply(isa, latent, q);
            }
        }
    }
}
