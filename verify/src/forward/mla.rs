//! Multi-head latent attention: keys and values come from one narrow latent a token, and one rotary key serves all
//! heads. This is the decompressed form, which says what the model means.

use std::slice;

use moepack_convert::spec::{Gate, GateBy, Indexer as IndexerSpec, KeyChoice, Mla as Spec, Role, Rope};
use moepack_format::{Error, Result};
use moepack_quant::Isa;
use moepack_quant::gemm::{PackedWeights, Rows};

use super::attention::{Chosen, Heads, Scratch, Tables};
use super::gqa::{apply_gates, growth};
use super::indexer::Indexer;
use super::linear::Linear;
use super::norm::Norm;
use super::pools::Pools;
use super::rope::Table;
use super::{Weights, sized, tensor};

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
    /// `[n_heads · v_dim, hidden]`, or one row a head.
    gate: Option<Linear>,
    /// `[n_heads]`
    sinks: Option<Vec<f32>>,
    chooser: Option<Chooser>,
}

/// The indexer and what makes its keys.
struct Chooser {
    indexer: Indexer,
    /// `[head_dim, hidden]`
    keys: Linear,
    /// A layer norm with a bias.
    key_norm: Norm,
    /// The last dimensions rotate, not the first.
    rotates_last: bool,
    pools: Option<Pools>,
}

impl Chooser {
    fn load(
        weights: &dyn Weights,
        layer: usize,
        spec: &IndexerSpec,
        q_lora: Option<usize>,
    ) -> Result<Chooser> {
        let (l, hidden, d) = (Some(layer), weights.spec().hidden, spec.head_dim);
        let no_latent =
            || Error::bad_data("an indexer takes its queries from a latent, which this model has not");
        let norm = tensor(weights, l, Role::IndexKNorm, &[d])?;
        let bias = tensor(weights, l, Role::IndexKNormBias, &[d])?;
        Ok(Chooser {
            indexer: Indexer::load(weights, layer, spec, q_lora.ok_or_else(no_latent)?)?,
            keys: Linear::load(weights, l, (Role::IndexK, None), d, hidden)?,
            key_norm: Norm::layer(norm, Some(bias), spec.key_eps),
            rotates_last: spec.rotates_last,
            pools: spec.pool.map(|pool| Pools::load(weights, layer, pool, d)).transpose()?,
        })
    }

    /// The keys that each query of a window sees. `x` is `[len, hidden]`, `latent` the queries' `[len, q_lora]`.
    fn choose(&self, isa: Isa, table: &Table, x: &[f32], latent: &[f32], chosen: &mut Chosen) {
        let (d, n, len) = (self.keys.n(), self.indexer.queries.n(), x.len() / self.keys.k());
        let mut q = vec![0.0; len * n]; // [len, n_heads, head_dim]
        self.indexer.queries.apply(isa, latent, &mut q);
        let mut keys = vec![0.0; len * d]; // [len, head_dim]
        self.keys.apply(isa, x, &mut keys);
        self.key_norm.apply_in_place(isa, &mut keys);
        let rotate = if self.rotates_last { Table::rotate_last } else { Table::rotate };
        q.chunks_exact_mut(n).enumerate().for_each(|(t, row)| rotate(table, t, row, d));
        keys.chunks_exact_mut(d).enumerate().for_each(|(t, row)| rotate(table, t, row, d));
        let Some(pools) = &self.pools else {
            return self.indexer.choose(isa, x, &q, &keys, |t| t + 1, chosen);
        };
        let mut of_pools = Chosen::default();
        let keys = pools.keys(isa, x, &keys);
        self.indexer.choose(isa, x, &q, &keys, |t| (t + 1) / pools.size, &mut of_pools);
        pools.tokens(len, &of_pools, chosen);
    }
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
        let norm = |role, width| Norm::load_with(weights, l, role, width, Some(spec.latent_eps));
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
            gate: match spec.gate {
                Some(Gate::PerHead) => Some(linear(Role::AttnGate, spec.n_heads, hidden)?),
                Some(_) => Some(linear(Role::AttnGate, spec.n_heads * spec.v_dim, hidden)?),
                None => None,
            },
            sinks: if spec.sinks { Some(tensor(weights, l, Role::Sinks, &[spec.n_heads])?) } else { None },
            o: biased(Role::O, Role::OBias, hidden, spec.n_heads * spec.v_dim)?,
            chooser: spec
                .choice
                .indexer()
                .map(|i| Chooser::load(weights, layer, i, spec.q_lora))
                .transpose()?,
            spec: spec.clone(),
        })
    }

    pub(super) fn rope(&self) -> &Rope {
        &self.spec.rope
    }

    /// The layer's own indexer.
    pub(super) fn indexer(&self) -> Option<&IndexerSpec> {
        self.spec.choice.indexer()
    }

    /// Attention of one window, `[len, hidden]` to the same.
    pub(super) fn window<'s>(
        &self,
        isa: Isa,
        tables: &Tables,
        x: &[f32],
        chosen: &mut Chosen,
        scratch: &'s mut Scratch,
    ) -> &'s mut [f32] {
        let spec = &self.spec;
        let len = x.len() / self.o.n();
        let table = tables.of_window(len);
        let (n_heads, k_dim, v_dim) = (spec.n_heads, spec.nope_dim + spec.rope_dim, spec.v_dim);
        let Scratch { q, k, v, gates, latent, heads, mixed, out } = scratch;
        let q = sized(q, len * n_heads * k_dim); // [len, n_heads, nope_dim + rope_dim]
        self.queries(isa, table, x, latent, q);
        if let (Some(chooser), Some(table)) = (&self.chooser, &tables.index) {
            chooser.choose(isa, table, x, &latent[..len * spec.q_lora.unwrap_or(0)], chosen);
        }
        // A layer that is run on its own, to see how long it takes, has nobody before it.
        let sees_all = spec.choice == KeyChoice::All || chosen.n_queries() != len;
        let chosen = if sees_all { None } else { Some(slice::from_ref(&*chosen)) };
        let rotary = sized(k, len * spec.rope_dim); // [len, rope_dim]
        let kv = sized(v, len * self.kv_b.n()); // [len, n_heads, nope_dim + v_dim]
        self.keys_and_values(isa, table, x, latent, rotary, kv);
        let (rotary, kv) = (&*rotary, &*kv);
        let pack = |head: usize, keys: &mut PackedWeights, values: &mut PackedWeights| {
            let of_head = &kv[head * (spec.nope_dim + v_dim)..];
            self.pack_keys(of_head, rotary, len, keys);
            let v = Rows { data: &of_head[spec.nope_dim..], stride: self.kv_b.n() };
            values.repack_transposed(v, len, v_dim);
        };
        let mixed = sized(mixed, len * n_heads * v_dim); // [len, n_heads, v_dim]
        let shape = Heads {
            n_heads,
            n_kv_heads: n_heads,
            k_dim,
            v_dim,
            window: None,
            chunk: None,
            chosen,
            sinks: self.sinks.as_deref(),
        };
        shape.mix(isa, q, pack, heads, mixed);
        if let Some(gate) = &self.gate {
            let gates = sized(gates, len * gate.n()); // [len, n_heads, v_dim or 1]
            gate.apply(isa, x, gates);
            apply_gates(isa, GateBy::Sigmoid, gates, mixed);
        }
        let out = sized(out, x.len()); // [len, hidden]
        self.o.apply(isa, mixed, out);
        out
    }

    /// Queries of all heads, rotated and scaled.
    fn queries(&self, isa: Isa, table: &Table, x: &[f32], latent: &mut Vec<f32>, q: &mut [f32]) {
        let spec = &self.spec;
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
        let k_dim = spec.nope_dim + spec.rope_dim;
        for (t, row) in q.chunks_exact_mut(spec.n_heads * k_dim).enumerate() {
            let scale = spec.scale * growth(spec.temperature, t);
            for head in row.chunks_exact_mut(k_dim) {
                table.rotate(t, &mut head[spec.nope_dim..], spec.rope_dim);
                head.iter_mut().for_each(|v| *v *= scale);
            }
        }
    }

    /// Keys without position and values of all heads, and the rotary key that they share.
    fn keys_and_values(
        &self,
        isa: Isa,
        table: &Table,
        x: &[f32],
        latent: &mut Vec<f32>,
        rotary: &mut [f32],
        kv: &mut [f32],
    ) {
        let (lora, width) = (self.spec.kv_lora, self.kv_a.n());
        let len = x.len() / self.o.n();
        let mut kv_a = vec![0.0; len * width]; // [len, kv_lora + rope_dim]
        self.kv_a.apply(isa, x, &mut kv_a);
        let latent = sized(latent, len * lora); // [len, kv_lora]
        for (t, (from, latent)) in kv_a.chunks_exact(width).zip(latent.chunks_exact_mut(lora)).enumerate() {
            self.kv_a_norm.apply(isa, &from[..lora], latent);
            if self.spec.kv_gain != 1.0 {
                latent.iter_mut().for_each(|v| *v *= self.spec.kv_gain);
            }
            let rotary = &mut rotary[t * self.spec.rope_dim..][..self.spec.rope_dim];
            rotary.copy_from_slice(&from[lora..]);
            table.rotate(t, rotary, self.spec.rope_dim);
        }
        self.kv_b.apply(isa, latent, kv);
    }

    /// Packs the keys of one head, `[len, nope_dim + rope_dim]`; `kv` begins at the head's part of the first row.
    fn pack_keys(&self, kv: &[f32], rotary: &[f32], len: usize, keys: &mut PackedWeights) {
        let Spec { nope_dim, rope_dim, .. } = self.spec;
        let k_dim = nope_dim + rope_dim;
        let mut whole = vec![0.0; len * k_dim]; // [len, nope_dim + rope_dim]
        for (t, key) in whole.chunks_exact_mut(k_dim).enumerate() {
            let (nope, rope) = key.split_at_mut(nope_dim);
            nope.copy_from_slice(&kv[t * self.kv_b.n()..][..nope_dim]);
            rope.copy_from_slice(&rotary[t * rope_dim..][..rope_dim]);
        }
        keys.repack(Rows { data: &whole, stride: k_dim }, len, k_dim);
    }
}
