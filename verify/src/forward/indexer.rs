//! The lightning indexer: which keys a query sees (DeepSeek V3.2 report, section 2; V4 paper, section 2.3.1).
//!
//! ```text
//! score(t, s) = Σ_h w_th · relu(q_th · k_s);  the n_used best keys s of those that t may see
//! ```
//!
//! Runtimes rotate q and k by a Hadamard matrix and quantize them; the first changes nothing, the second is theirs.

use moepack_convert::spec::{Indexer as Spec, Role};
use moepack_format::Result;
use moepack_quant::Isa;
use moepack_quant::gemm::{PackedWeights, Rows};

use super::Weights;
use super::attention::{BLOCK, Chosen};
use super::linear::Linear;

/// What queries are compared by.
pub(super) struct Indexer {
    spec: Spec,
    /// `[n_heads · head_dim, q_lora]`
    pub(super) queries: Linear,
    /// `[n_heads, hidden]`
    weights: Linear,
}

impl Indexer {
    pub(super) fn load(weights: &dyn Weights, layer: usize, spec: &Spec, q_lora: usize) -> Result<Indexer> {
        let (l, hidden) = (Some(layer), weights.spec().hidden);
        let n = spec.n_heads * spec.head_dim;
        Ok(Indexer {
            spec: spec.clone(),
            queries: Linear::load(weights, l, (Role::IndexQ, None), n, q_lora)?,
            weights: Linear::load(weights, l, (Role::IndexWeights, None), spec.n_heads, hidden)?,
        })
    }

    /// Dimensions of a head.
    pub(super) fn head_dim(&self) -> usize {
        self.spec.head_dim
    }

    /// Chooses for every query of a window. `x` is `[len, hidden]`, `q` `[len, n_heads, head_dim]` and `keys`
    /// `[n, head_dim]`, both with their positions; query t may see the first `visible(t)` keys.
    pub(super) fn choose(
        &self,
        isa: Isa,
        x: &[f32],
        q: &[f32],
        keys: &[f32],
        visible: impl Fn(usize) -> usize,
        chosen: &mut Chosen,
    ) {
        let Spec { n_heads, head_dim: d, n_used, .. } = self.spec;
        let (len, n_keys, stride) = (x.len() / self.weights.k(), keys.len() / d, n_heads * d);
        let mut weights = vec![0.0; len * n_heads]; // [len, n_heads]
        self.weights.apply(isa, x, &mut weights);
        let scale = (1.0 / ((d * n_heads) as f64).sqrt()) as f32;
        let packed = PackedWeights::pack(keys, n_keys, d);
        let (mut of_head, mut scores) = (vec![0.0; BLOCK * n_keys], vec![0.0; BLOCK * n_keys]); // [queries, keys]
        chosen.clear();
        for from in (0..len).step_by(BLOCK) {
            let to = len.min(from + BLOCK);
            let n = visible(to - 1);
            scores.fill(0.0);
            for h in 0..n_heads {
                let queries = Rows { data: &q[from * stride + h * d..], stride };
                if n > 0 {
                    packed.matmul_part(isa, queries, to - from, 0..n, 0..d, &mut of_head, n_keys);
                }
                for (t, (sums, dots)) in (from..to)
                    .zip(scores.chunks_exact_mut(n_keys.max(1)).zip(of_head.chunks_exact(n_keys.max(1))))
                {
                    let weight = weights[t * n_heads + h] * scale;
                    sums[..n].iter_mut().zip(dots).for_each(|(sum, &dot)| *sum += weight * dot.max(0.0));
                }
            }
            for t in from..to {
                chosen.push_best(&scores[(t - from) * n_keys..][..visible(t)], n_used);
            }
        }
    }
}
