//! Attention whose queries and outputs come from experts (Zhang et al. 2022, arXiv 2210.05144; JetMoE, arXiv 2404.07413):
//!
//! ```text
//! e, g = the best experts of W_r x and a softmax over their logits;  k, v = W_kv x
//! out = b + Σ_e g_e W_out_e attention(W_in_e x, k, v)
//! ```

use moepack_convert::spec::{Role, Rope, RoutedAttention as Spec};
use moepack_format::Result;
use moepack_quant::gemm::{PackedWeights, Rows};
use moepack_quant::{Isa, math};

use super::attention::{Heads, Scratch, Tables};
use super::linear::Linear;
use super::router::best;
use super::{Weights, sized, tensor};

/// The weights of one layer.
pub(super) struct RoutedAttention {
    spec: Spec,
    /// `[n_experts, hidden]`
    router: Linear,
    /// Of each expert, `[n_kv_heads · head_dim, hidden]`.
    queries: Vec<Linear>,
    /// Of each expert, `[hidden, n_kv_heads · head_dim]`.
    outputs: Vec<Linear>,
    /// Keys, then values. `[2 · n_kv_heads · head_dim, hidden]`
    kv: Linear,
    /// `[hidden]`
    bias: Vec<f32>,
}

/// What the experts of a window are given.
struct Choice {
    /// Of each expert its tokens, which of a token's experts it is, and its weight.
    tokens: Vec<Vec<(usize, usize, f32)>>,
}

impl RoutedAttention {
    pub(super) fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<RoutedAttention> {
        let (l, hidden, n) = (Some(layer), weights.spec().hidden, spec.n_experts);
        let inner = spec.n_kv_heads * spec.head_dim;
        let experts = |role, rows: usize, cols: usize| -> Result<Vec<Linear>> {
            let all = tensor(weights, l, role, &[n, rows, cols])?;
            Ok(all.chunks_exact(rows * cols).map(|w| Linear::new(w, None, rows, cols)).collect())
        };
        Ok(RoutedAttention {
            router: Linear::load(weights, l, (Role::AttnRouter, None), n, hidden)?,
            queries: experts(Role::AttnExpertsIn, inner, hidden)?,
            outputs: experts(Role::AttnExpertsOut, hidden, inner)?,
            kv: Linear::load(weights, l, (Role::KeysValues, None), 2 * inner, hidden)?,
            bias: tensor(weights, l, Role::OBias, &[hidden])?,
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
        let Spec { n_used, n_kv_heads, head_dim: d, .. } = self.spec;
        let (len, inner) = (x.len() / self.bias.len(), n_kv_heads * d);
        let choice = self.choose(isa, x);
        let Scratch { q, k, heads, mixed, out, .. } = scratch;
        let q = sized(q, len * n_used * inner); // [len, n_kv_heads, n_used, head_dim]
        self.make_queries(isa, &choice, x, q);
        let kv = sized(k, len * 2 * inner); // [len, 2, n_kv_heads, head_dim]
        self.kv.apply(isa, x, kv);
        let table = tables.of_window(len);
        q.chunks_exact_mut(n_used * inner).enumerate().for_each(|(t, row)| table.rotate(t, row, d));
        q.iter_mut().for_each(|v| *v *= self.spec.scale);
        kv.chunks_exact_mut(2 * inner).enumerate().for_each(|(t, row)| table.rotate(t, &mut row[..inner], d));
        let kv = &*kv;
        let pack = |head: usize, keys: &mut PackedWeights, values: &mut PackedWeights| {
            let part = |first: usize| Rows { data: &kv[first + head * d..], stride: 2 * inner };
            keys.repack(part(0), len, d);
            values.repack_transposed(part(inner), len, d);
        };
        let mixed = sized(mixed, q.len()); // [len, n_kv_heads, n_used, head_dim]
        let shape = Heads {
            n_heads: n_used * n_kv_heads,
            n_kv_heads,
            k_dim: d,
            v_dim: d,
            window: None,
            chunk: None,
            chosen: None,
            sinks: None,
        };
        shape.mix(isa, q, pack, heads, mixed);
        let out = sized(out, x.len()); // [len, hidden]
        self.add_outputs(isa, &choice, mixed, out);
        out
    }

    fn choose(&self, isa: Isa, x: &[f32]) -> Choice {
        let (n, hidden) = (self.spec.n_experts, self.bias.len());
        let mut logits = vec![0.0; x.len() / hidden * n]; // [len, n_experts]
        self.router.apply(isa, x, &mut logits);
        let mut tokens = vec![Vec::new(); n];
        for (t, logits) in logits.chunks_exact(n).enumerate() {
            let experts = best(logits, self.spec.n_used);
            let mut weights: Vec<f32> = experts.iter().map(|&e| logits[e]).collect();
            math::softmax(isa, &mut weights, None);
            experts.into_iter().zip(weights).enumerate().for_each(|(i, (e, w))| tokens[e].push((t, i, w)));
        }
        Choice { tokens }
    }

    /// Queries of all tokens, `[len, n_kv_heads, n_used, head_dim]`: those that share a key head lie together.
    fn make_queries(&self, isa: Isa, choice: &Choice, x: &[f32], q: &mut [f32]) {
        let (hidden, &Spec { n_used, n_kv_heads, head_dim: d, .. }) = (self.bias.len(), &self.spec);
        let inner = n_kv_heads * d;
        for (tokens, linear) in choice.tokens.iter().zip(&self.queries) {
            let rows: Vec<f32> =
                tokens.iter().flat_map(|(t, ..)| &x[t * hidden..][..hidden]).copied().collect();
            let mut made = vec![0.0; tokens.len() * inner]; // [n, n_kv_heads, head_dim]
            linear.apply(isa, &rows, &mut made);
            for ((t, i, _), made) in tokens.iter().zip(made.chunks_exact(inner)) {
                for (h, made) in made.chunks_exact(d).enumerate() {
                    q[((t * n_kv_heads + h) * n_used + i) * d..][..d].copy_from_slice(made);
                }
            }
        }
    }

    /// What each expert makes of what its queries found, weighted, expert by expert.
    fn add_outputs(&self, isa: Isa, choice: &Choice, mixed: &[f32], out: &mut [f32]) {
        let (hidden, &Spec { n_used, n_kv_heads, head_dim: d, .. }) = (self.bias.len(), &self.spec);
        out.fill(0.0);
        for (tokens, linear) in choice.tokens.iter().zip(&self.outputs) {
            let found = |&(t, i, _): &(usize, usize, f32)| {
                (0..n_kv_heads).flat_map(move |h| &mixed[((t * n_kv_heads + h) * n_used + i) * d..][..d])
            };
            let rows: Vec<f32> = tokens.iter().flat_map(found).copied().collect();
            let mut made = vec![0.0; tokens.len() * hidden]; // [n, hidden]
            linear.apply(isa, &rows, &mut made);
            for (&(t, _, weight), made) in tokens.iter().zip(made.chunks_exact(hidden)) {
                math::add_scaled(isa, &mut out[t * hidden..][..hidden], weight, made);
            }
        }
        out.chunks_exact_mut(hidden).for_each(|row| math::add(isa, row, &self.bias));
    }
}
