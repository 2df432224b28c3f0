//! Pools of keys for an indexer (GLM-5.3-Flash): it chooses among vectors that stand for several consecutive keys each.
//!
//! ```text
//! s_t = W_gate x_t + bias[t mod size];  pool_i = Σ_t softmax_t(s_t) k_t, channel by channel, over the tokens t of pool i
//! ```
//!
//! A query sees the tokens of the pools that are chosen for it, and those after the last pool that it sees as a whole.

use moepack_convert::spec::Role;
use moepack_format::Result;
use moepack_quant::{Isa, math};

use super::attention::Chosen;
use super::compressor::weigh;
use super::linear::Linear;
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
        let size = self.size as u32;
        chosen.clear();
        for t in 0..len {
            let of_pools = pools.of(t).iter().flat_map(|&p| p * size..(p + 1) * size);
            let end = t as u32 + 1;
            chosen.push(of_pools.chain(end / size * size..end));
        }
    }
}

#[cfg(test)]
mod tests {
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
}
