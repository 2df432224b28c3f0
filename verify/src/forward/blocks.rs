//! Which blocks of keys a query sees (MiniMax-M3).
//!
//! ```text
//! score(t, b) = max over the keys s <= t of block b of q_th · k_s;  the n_used best blocks,
//!               among which those of t and before it, n_local of them, always are
//! ```
//!
//! Queries and the one key of a token are normed and rotated as those of attention; each head of the indexer chooses.

use moepack_convert::spec::{Blocks as Spec, Role};
use moepack_format::Result;
use moepack_quant::Isa;
use moepack_quant::gemm::{PackedWeights, Rows};

use super::Weights;
use super::attention::{BLOCK, Chosen};
use super::linear::Linear;
use super::norm::Norm;
use super::rope::Table;

/// The weights of a layer's indexer.
pub(super) struct Blocks {
    spec: Spec,
    /// `[n_heads · head_dim, hidden]`
    queries: Linear,
    /// `[head_dim, hidden]`
    keys: Linear,
    query_norm: Norm,
    key_norm: Norm,
}

impl Blocks {
    pub(super) fn load(weights: &dyn Weights, layer: usize, spec: Spec) -> Result<Blocks> {
        let (l, hidden, d) = (Some(layer), weights.spec().hidden, spec.head_dim);
        Ok(Blocks {
            spec,
            queries: Linear::load(weights, l, (Role::IndexQ, None), spec.n_heads * d, hidden)?,
            keys: Linear::load(weights, l, (Role::IndexK, None), d, hidden)?,
            query_norm: Norm::load_with(weights, l, Role::IndexQNorm, d, None)?,
            key_norm: Norm::load_with(weights, l, Role::IndexKNorm, d, None)?,
        })
    }

    /// The keys that each query of a window sees, `[len, hidden]`: one choice a head.
    pub(super) fn choose(&self, isa: Isa, table: &Table, x: &[f32]) -> Vec<Chosen> {
        let (d, n) = (self.spec.head_dim, self.queries.n());
        let len = x.len() / self.keys.k();
        let (mut q, mut k) = (vec![0.0; len * n], vec![0.0; len * d]); // [len, n_heads, head_dim], [len, head_dim]
        self.queries.apply(isa, x, &mut q);
        self.keys.apply(isa, x, &mut k);
        self.query_norm.apply_in_place(isa, &mut q);
        self.key_norm.apply_in_place(isa, &mut k);
        q.chunks_exact_mut(n).enumerate().for_each(|(t, row)| table.rotate(t, row, d));
        k.chunks_exact_mut(d).enumerate().for_each(|(t, row)| table.rotate(t, row, d));
        let keys = PackedWeights::pack(&k, len, d);
        (0..self.spec.n_heads).map(|h| self.of_head(isa, &q[h * d..], &keys, len)).collect()
    }

    /// `q` begins at the head's part of the first query.
    fn of_head(&self, isa: Isa, q: &[f32], keys: &PackedWeights, len: usize) -> Chosen {
        let (d, stride) = (self.spec.head_dim, self.queries.n());
        let mut products = vec![0.0; BLOCK * len]; // [queries, keys]
        let mut chosen = Chosen::default();
        chosen.clear();
        for from in (0..len).step_by(BLOCK) {
            let to = len.min(from + BLOCK);
            let queries = Rows { data: &q[from * stride..], stride };
            keys.matmul_part(isa, queries, to - from, 0..to, 0..d, &mut products, len);
            for (t, row) in (from..to).zip(products.chunks_exact(len)) {
                self.push(t, &row[..=t], &mut chosen);
            }
        }
        chosen
    }

    /// Adds the choice of query `t`, whose products with the keys up to its own these are.
    fn push(&self, t: usize, products: &[f32], chosen: &mut Chosen) {
        let Spec { size, n_used, n_local, .. } = self.spec;
        let max = |block: &[f32]| block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut scores: Vec<f32> = products.chunks(size).map(max).collect(); // [blocks]
        let n_blocks = scores.len();
        scores.iter_mut().skip(n_blocks.saturating_sub(n_local)).for_each(|s| *s = f32::INFINITY);
        let mut best = Chosen::default();
        best.clear();
        best.push_best(&scores, n_used);
        let keys = |&b: &u32| b as usize * size..(t + 1).min((b as usize + 1) * size);
        chosen.push(best.of(0).iter().flat_map(keys).map(|key| key as u32));
    }
}

#[cfg(test)]
mod tests {
    use moepack_convert::limits::POSITIONS_MAX;

    use super::*;

    #[test]
    fn the_best_block_and_the_last_are_seen() {
        let spec = Spec { n_heads: 1, head_dim: 1, size: 2, n_used: 2, n_local: 1 };
        assert_eq!(choice(spec, &[1.0, 5.0, 4.0, 4.5, -1.0]), [0, 1, 4]);
        assert_eq!(choice(spec, &[1.0, 2.0]), [0, 1]);
    }

    #[test]
    fn a_block_may_be_longer_than_any_window() {
        let spec = Spec { n_heads: 1, head_dim: 1, size: POSITIONS_MAX, n_used: 2, n_local: 1 };
        assert_eq!(choice(spec, &[1.0, 2.0]), [0, 1]);
    }

    /// The keys that the last of some tokens sees, whose products with it these are.
    fn choice(spec: Spec, products: &[f32]) -> Vec<u32> {
        let linear = || Linear::new(&[0.0], None, 1, 1);
        let norm = || Norm::unweighted(1, 0.0);
        let blocks = Blocks { spec, queries: linear(), keys: linear(), query_norm: norm(), key_norm: norm() };
        let mut chosen = Chosen::default();
        chosen.clear();
        blocks.push(products.len() - 1, products, &mut chosen);
        chosen.of(0).to_vec()
    }
}
