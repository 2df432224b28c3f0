//! Softmax attention of one window, head by head, and how windows are spread over threads.
//!
//! For a query t of head h, with the keys j that it may see (j <= t, and within the sliding window):
//! ```text
//!     p_j = exp(l_j − m) / (Σ_j exp(l_j − m) + exp(sink − m)),   l_j = scale · q_t · k_j
//!     out_t = Σ_j p_j v_j
//! ```
//! Queries are taken in blocks; the products of a block with all its keys and values are matrix products. Keys that a
//! query of the block may not see get the weight zero.

use moepack_convert::spec::{Attention as Kind, Rope};
use moepack_format::Result;
use moepack_quant::gemm::{PackedWeights, Rows};
use moepack_quant::{Isa, math};
use rayon::prelude::*;

use super::gqa::Gqa;
use super::mla::Mla;
use super::norm::Norm;
use super::rope::Table;
use super::{Stream, Weights, sized};
use crate::tokens::Windows;

/// Queries of a block: a multiple of every tile height.
const BLOCK: usize = 48;
/// From this many tokens on, the heads of a window are spread over threads.
const PARALLEL_TOKENS: usize = 1024;

/// The weights of a layer's attention.
pub(super) enum Attention {
    Gqa(Gqa),
    Mla(Mla),
}

impl Attention {
    pub(super) fn load(weights: &dyn Weights, layer: usize, kind: &Kind) -> Result<Attention> {
        Ok(match kind {
            Kind::Gqa(spec) => Attention::Gqa(Gqa::load(weights, layer, spec)?),
            Kind::Mla(spec) => Attention::Mla(Mla::load(weights, layer, spec)?),
        })
    }

    fn rope(&self) -> &Rope {
        match self {
            Attention::Gqa(gqa) => gqa.rope(),
            Attention::Mla(mla) => mla.rope(),
        }
    }

    /// stream += attention(norm(stream)), each window on its own from position 0.
    pub(super) fn run(&self, isa: Isa, norm: &Norm, windows: &Windows, stream: &mut Stream) {
        let table = Table::new(self.rope(), windows.ctx());
        let mut rest = stream.hidden.as_mut_slice();
        let mut parts = Vec::with_capacity(windows.n_windows());
        for &len in &windows.lens {
            let (window, after) = rest.split_at_mut(len * norm.width());
            parts.push(window);
            rest = after;
        }
        parts.into_par_iter().for_each_init(Scratch::default, |scratch, hidden| {
            let mut normed = std::mem::take(&mut scratch.normed);
            let x = sized(&mut normed, hidden.len()); // [len, hidden]
            norm.apply(isa, hidden, x);
            let out = match self {
                Attention::Gqa(gqa) => gqa.window(isa, &table, x, scratch),
                Attention::Mla(mla) => mla.window(isa, &table, x, scratch),
            };
            math::add(isa, hidden, out);
            scratch.normed = normed;
        });
    }
}

/// Buffers of one thread, kept from window to window.
#[derive(Default)]
pub(super) struct Scratch {
    normed: Vec<f32>,
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    pub(super) latent: Vec<f32>,
    pub(super) heads: Vec<f32>,
    pub(super) mixed: Vec<f32>,
    pub(super) out: Vec<f32>,
}

/// Everything about the heads but their numbers.
pub(super) struct Heads<'a> {
    pub(super) n_heads: usize,
    pub(super) n_kv_heads: usize,
    /// Dimensions of queries and keys.
    pub(super) k_dim: usize,
    /// Dimensions of values.
    pub(super) v_dim: usize,
    /// Keys `t - window + 1 ..= t` only.
    pub(super) window: Option<usize>,
    /// `[n_heads]`
    pub(super) sinks: Option<&'a [f32]>,
}

impl Heads<'_> {
    /// Mixes the values of one window.
    ///
    /// `q` is `[len, n_heads, k_dim]`, already scaled; `out` is `[len, n_heads, v_dim]`, and `heads` a buffer.
    /// `pack` packs the keys `[len, k_dim]` and the transposed values `[v_dim, len]` of a key-value head.
    pub(super) fn mix(
        &self,
        isa: Isa,
        q: &[f32],
        pack: impl Fn(usize, &mut PackedWeights, &mut PackedWeights) + Sync,
        heads: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let (len, group) = (q.len() / (self.n_heads * self.k_dim), self.n_heads / self.n_kv_heads);
        let head_size = len * self.v_dim;
        let heads = sized(heads, self.n_heads * head_size); // [n_heads, len, v_dim]
        let of_kv_head = |work: &mut Work, (kv, out): (usize, &mut [f32])| {
            pack(kv, &mut work.keys, &mut work.values);
            for (g, out) in out.chunks_exact_mut(head_size).enumerate() {
                self.head(isa, kv * group + g, q, work, out);
            }
        };
        if len < PARALLEL_TOKENS {
            let mut work = Work::default();
            heads
                .chunks_exact_mut(group * head_size)
                .enumerate()
                .for_each(|part| of_kv_head(&mut work, part));
        } else {
            let parts = heads.par_chunks_exact_mut(group * head_size).enumerate();
            parts.for_each_init(Work::default, of_kv_head);
        }
        // [n_heads, len, v_dim] to [len, n_heads, v_dim]
        for (t, row) in out.chunks_exact_mut(self.n_heads * self.v_dim).enumerate() {
            for (h, to) in row.chunks_exact_mut(self.v_dim).enumerate() {
                to.copy_from_slice(&heads[h * head_size + t * self.v_dim..][..self.v_dim]);
            }
        }
    }

    /// One query head: `out` is `[len, v_dim]`.
    fn head(&self, isa: Isa, head: usize, q: &[f32], work: &mut Work, out: &mut [f32]) {
        let (len, stride) = (work.keys.n(), self.n_heads * self.k_dim);
        let sink = self.sinks.map(|s| s[head]);
        for from in (0..len).step_by(BLOCK) {
            let to = len.min(from + BLOCK);
            // The earliest key that the block's first query sees, down to where a panel begins.
            let first = self.first_key(from) / 16 * 16;
            let n_keys = to - first;
            let p = sized(&mut work.scores, BLOCK * n_keys); // [queries, keys]
            let queries = Rows { data: &q[from * stride + head * self.k_dim..], stride };
            work.keys.matmul_part(isa, queries, to - from, first..to, 0..self.k_dim, p, n_keys);
            for (t, row) in (from..to).zip(p.chunks_exact_mut(n_keys)) {
                let seen = self.first_key(t) - first..t + 1 - first;
                row[..seen.start].fill(0.0);
                row[seen.end..].fill(0.0);
                math::softmax(isa, &mut row[seen], sink);
            }
            let (weights, out) = (Rows { data: p, stride: n_keys }, &mut out[from * self.v_dim..]);
            work.values.matmul_part(isa, weights, to - from, 0..self.v_dim, first..to, out, self.v_dim);
        }
    }

    fn first_key(&self, t: usize) -> usize {
        self.window.map_or(0, |w| (t + 1).saturating_sub(w))
    }
}

/// Buffers of one thread inside a window.
#[derive(Default)]
struct Work {
    keys: PackedWeights,
    values: PackedWeights,
    scores: Vec<f32>,
}
