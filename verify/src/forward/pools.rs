//! Pools of keys for an indexer (GLM-5.3-Flash): it chooses among vectors that stand for several consecutive keys each.
//!
//! ```text
//! s_t = W_gate x_t + bias[t mod size];  pool_i = Σ_t softmax_t(s_t) k_t, channel by channel, over the tokens t of pool i
//! ```
//!
//! A query sees the tokens of the pools that are chosen for it, and those after the last pool that it sees as a whole.

use moepack_convert::spec::{Pools as Spec, Role};
use moepack_format::Result;
use moepack_quant::{Isa, math};

use super::attention::Chosen;
use super::compressor::weigh;
use super::linear::Linear;
use super::norm::Norm;
use super::rope::Table;
use super::{Weights, tensor};

/// The weights that make pools.
pub(super) struct Pools {
    /// Keys of a pool.
    pub(super) size: usize,
    /// `[dim, hidden]`
    gate: Linear,
    /// `[size, dim]`
    bias: Vec<f32>,
}

impl Pools {
    pub(super) fn load(weights: &dyn Weights, layer: usize, size: usize, dim: usize) -> Result<Pools> {
        let (l, hidden) = (Some(layer), weights.spec().hidden);
        Ok(Pools {
            size,
            gate: Linear::load(weights, l, (Role::IndexCompressGate, None), dim, hidden)?,
            bias: tensor(weights, l, Role::IndexCompressBias, &[size, dim])?,
        })
    }

    /// The keys of a window's pools, `[len / size, dim]`, from inputs `[len, hidden]` and keys `[len, dim]`.
    pub(super) fn keys(&self, isa: Isa, x: &[f32], keys: &[f32]) -> Vec<f32> {
        let (dim, hidden) = (self.gate.n(), self.gate.k());
        let n = keys.len() / dim / self.size;
        let mut gates = vec![0.0; n * self.size * dim]; // [n · size, dim]
        self.gate.apply(isa, &x[..n * self.size * hidden], &mut gates);
        let mut pooled = vec![0.0; n * dim]; // [n, dim]
        let mut weights = Vec::new();
        let pools = gates.chunks_exact_mut(self.size * dim).zip(keys.chunks_exact(self.size * dim));
        for ((gates, keys), out) in pools.zip(pooled.chunks_exact_mut(dim)) {
            math::add(isa, gates, &self.bias);
            weigh(isa, gates.chunks_exact(dim), &mut weights);
            for (weights, key) in weights.chunks_exact(dim).zip(keys.chunks_exact(dim)) {
                out.iter_mut().zip(weights).zip(key).for_each(|((o, w), k)| *o += w * k);
            }
        }
        pooled
    }

    /// The tokens that each query sees where these pools are chosen.
    pub(super) fn tokens(&self, len: usize, pools: &Chosen, chosen: &mut Chosen) {
        tokens(self.size, len, pools, chosen);
    }
}

/// The tokens that each of `len` queries sees where these pools are chosen.
fn tokens(size: usize, len: usize, pools: &Chosen, chosen: &mut Chosen) {
    chosen.clear();
    for t in 0..len {
        let of_pools = pools.of(t).iter().flat_map(|&p| p as usize * size..(p as usize + 1) * size);
        let tail = (t + 1) / size * size..t + 1;
        chosen.push(of_pools.chain(tail).map(|key| key as u32));
    }
}

/// The indexer of Qwen4: a pool's key is the mean of its keys.
pub(super) struct MeanPools {
    spec: Spec,
    /// `[(n_heads + 1) · head_dim, hidden]`
    projection: Linear,
    query_norm: Norm,
    key_norm: Norm,
}

impl MeanPools {
    pub(super) fn load(weights: &dyn Weights, layer: usize, spec: Spec) -> Result<MeanPools> {
        let (l, hidden, d) = (Some(layer), weights.spec().hidden, spec.head_dim);
        Ok(MeanPools {
            spec,
            projection: Linear::load(weights, l, (Role::IndexQk, None), (spec.n_heads + 1) * d, hidden)?,
            query_norm: Norm::load_with(weights, l, Role::IndexQNorm, d, None)?,
            key_norm: Norm::load_with(weights, l, Role::IndexKNorm, d, None)?,
        })
    }

    /// The keys that each query of a window sees, `[len, hidden]`.
    pub(super) fn choose(&self, isa: Isa, table: &Table, x: &[f32]) -> Chosen {
        let Spec { n_heads, head_dim: d, size, n_used } = self.spec;
        let len = x.len() / self.projection.k();
        let mut both = vec![0.0; len * self.projection.n()]; // [len, n_heads + 1, head_dim]
        self.projection.apply(isa, x, &mut both);
        let keys = self.keys(isa, table, &both);
        let scale = (1.0 / (d as f64).sqrt()) as f32;
        let (mut of_pools, mut chosen) = (Chosen::default(), Chosen::default());
        of_pools.clear();
        for (t, row) in both.chunks_exact_mut(self.projection.n()).enumerate() {
            let q = &mut row[..n_heads * d]; // [n_heads, head_dim]
            self.query_norm.apply_in_place(isa, q);
            table.rotate(t, q, d);
            let score = |key: &[f32]| q.chunks_exact(d).map(|q| dot(q, key).max(0.0)).sum::<f32>() * scale;
            let scores: Vec<f32> = keys.chunks_exact(d).take((t + 1) / size).map(score).collect();
            of_pools.push_best(&scores, n_used);
        }
        tokens(size, len, &of_pools, &mut chosen);
        chosen
    }

    /// The keys of a window's pools, `[len / size, head_dim]`.
    fn keys(&self, isa: Isa, table: &Table, both: &[f32]) -> Vec<f32> {
        let Spec { n_heads, head_dim: d, size, .. } = self.spec;
        let mut keys = Vec::new(); // [len / size, head_dim]
        for (i, pool) in both.chunks_exact(size * self.projection.n()).enumerate() {
            let mut key = vec![0.0; d];
            for row in pool.chunks_exact(self.projection.n()) {
                math::add(isa, &mut key, &row[n_heads * d..]);
            }
            key.iter_mut().for_each(|v| *v /= size as f32);
            self.key_norm.apply_in_place(isa, &mut key);
            table.rotate(i * size, &mut key, d);
            keys.extend(key);
        }
        keys
    }
}

/// One chain of fused multiply-adds.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |sum, (&a, &b)| a.mul_add(b, sum))
}

#[cfg(test)]
mod tests {
    use moepack_convert::limits::POSITIONS_MAX;

    use super::*;

    #[test]
    fn a_query_sees_its_pools_and_the_tail() {
        let pools = Pools { size: 3, gate: Linear::new(&[], None, 0, 0), bias: Vec::new() };
        let (mut of_pools, mut chosen) = (Chosen::default(), Chosen::default());
        of_pools.clear();
        for t in 0..8 {
            of_pools.push(if t >= 5 { 1..2 } else { 0..0 });
        }
        pools.tokens(8, &of_pools, &mut chosen);
        assert_eq!(chosen.of(1), [0, 1]);
        assert_eq!(chosen.of(2), [0; 0]);
        assert_eq!(chosen.of(7), [3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_pool_may_be_longer_than_any_window() {
        let (mut of_pools, mut chosen) = (Chosen::default(), Chosen::default());
        of_pools.clear();
        (0..3).for_each(|_| of_pools.push(0..0));
        tokens(POSITIONS_MAX, 3, &of_pools, &mut chosen);
        assert_eq!(chosen.of(2), [0, 1, 2]);
    }
}
