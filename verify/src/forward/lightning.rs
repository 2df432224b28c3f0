//! Lightning attention (MiniMax-01, arXiv 2501.08313, section 2.2), as the plain recurrence over tokens:
//!
//! ```text
//! q, k, v of each head = silu(W_qkv x)
//! S = exp(−slope) S + k ⊗ v;  o = Sᵀ q                               S is [head_dim, head_dim]
//! out = W_o (sigmoid(W_g x) · norm(o))                               one norm over all heads
//! ```

use moepack_convert::spec::{Lightning as Spec, Role};
use moepack_format::Result;
use moepack_quant::{Isa, math};
use rayon::prelude::*;

use super::attention::{PARALLEL_TOKENS, Scratch};
use super::linear::Linear;
use super::norm::Norm;
use super::{Weights, silu_all, sized, tensor};

/// `eps` of the norm over all heads, in the reference.
const NORM_EPS: f32 = 1e-6;

/// The weights of one layer.
pub(super) struct Lightning {
    head_dim: usize,
    /// What a state is multiplied by at every token. `[n_heads]`
    decays: Vec<f32>,
    /// Query, key and value of each head. `[3 · n_heads · head_dim, hidden]`
    qkv: Linear,
    norm: Norm,
    /// `[n_heads · head_dim, hidden]`
    gate: Linear,
    /// `[hidden, n_heads · head_dim]`
    o: Linear,
}

impl Lightning {
    pub(super) fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Lightning> {
        let (l, hidden, inner) = (Some(layer), weights.spec().hidden, spec.inner());
        let linear = |role, n, k| Linear::load(weights, l, (role, None), n, k);
        Ok(Lightning {
            head_dim: spec.head_dim,
            decays: spec.slopes.iter().map(|slope| math::exp(-slope)).collect(),
            qkv: linear(Role::MixerIn, 3 * inner, hidden)?,
            norm: Norm::rms(tensor(weights, l, Role::MixerNorm, &[inner])?, NORM_EPS),
            gate: linear(Role::AttnGate, inner, hidden)?,
            o: linear(Role::MixerOut, hidden, inner)?,
        })
    }

    /// One window, `[len, hidden]` to the same.
    pub(super) fn window<'s>(&self, isa: Isa, x: &[f32], scratch: &'s mut Scratch) -> &'s mut [f32] {
        let (len, d, inner) = (x.len() / self.o.n(), self.head_dim, self.o.k());
        let Scratch { q, gates, heads, mixed, out, .. } = scratch;
        let qkv = sized(q, len * 3 * inner); // [len, n_heads, 3, head_dim]
        self.qkv.apply(isa, x, qkv);
        silu_all(isa, qkv);
        let heads = sized(heads, len * inner); // [n_heads, len, head_dim]
        let one = |(h, out): (usize, &mut [f32])| self.head(isa, h, qkv, out);
        if len < PARALLEL_TOKENS {
            heads.chunks_exact_mut(len * d).enumerate().for_each(one);
        } else {
            heads.par_chunks_exact_mut(len * d).enumerate().for_each(one);
        }
        let mixed = sized(mixed, len * inner); // [len, n_heads, head_dim]
        for (t, row) in mixed.chunks_exact_mut(inner).enumerate() {
            for (h, to) in row.chunks_exact_mut(d).enumerate() {
                to.copy_from_slice(&heads[(h * len + t) * d..][..d]);
            }
        }
        self.norm.apply_in_place(isa, mixed);
        let gates = sized(gates, len * inner); // [len, n_heads, head_dim]
        self.gate.apply(isa, x, gates);
        math::sigmoid_all(isa, gates);
        mixed.iter_mut().zip(&*gates).for_each(|(o, g)| *o *= g);
        let out = sized(out, x.len()); // [len, hidden]
        self.o.apply(isa, mixed, out);
        out
    }

    /// One head over all tokens: `out` is `[len, head_dim]`.
    fn head(&self, isa: Isa, head: usize, qkv: &[f32], out: &mut [f32]) {
        let (d, decay) = (self.head_dim, self.decays[head]);
        let mut state = vec![0.0; d * d]; // [head_dim, head_dim]
        for (row, out) in qkv.chunks_exact(3 * self.o.k()).zip(out.chunks_exact_mut(d)) {
            let of_head = &row[3 * d * head..][..3 * d];
            let (q, kv) = of_head.split_at(d);
            let (k, v) = kv.split_at(d);
            out.fill(0.0);
            for ((&k, &q), state) in k.iter().zip(q).zip(state.chunks_exact_mut(d)) {
                state.iter_mut().for_each(|s| *s *= decay);
                math::add_scaled(isa, state, k, v);
                math::add_scaled(isa, out, q, state);
            }
        }
    }
}
