//! Gated delta rule (Yang et al. 2024, arXiv 2412.06464), as the plain recurrence over tokens.
//!
//! ```text
//! u = silu(causal convolution, channel by channel, of W_qkv x);  q, k, v of each head from u;  q, k to length 1
//! beta = sigmoid(W_b x),  g = exp(−exp(A) · softplus(W_a x + dt))                one of each for a value head
//! S = g S;  S += k ⊗ beta (v − kᵀ S);  o = Sᵀ q / √k_dim                           S is [k_dim, v_dim]
//! out = W_o (norm(o) · silu(W_z x))
//! ```
//!
//! Each key head serves equally many consecutive value heads.

use moepack_convert::spec::{Delta as Spec, Role};
use moepack_format::Result;
use moepack_quant::{Isa, math};
use rayon::prelude::*;

use super::attention::{PARALLEL_TOKENS, Scratch};
use super::linear::Linear;
use super::norm::Norm;
use super::router::softplus;
use super::{Weights, sized, tensor};

/// Added to the squared length of queries and keys, in the reference.
const LENGTH_EPS: f32 = 1e-6;

/// The weights of one layer.
pub(super) struct Delta {
    spec: Spec,
    projections: Projections,
    /// `[channels, kernel]`
    conv: Vec<f32>,
    /// −exp(A). `[n_v_heads]`
    decay: Vec<f32>,
    /// `[n_v_heads]`
    dt: Vec<f32>,
    norm: Norm,
    /// `[hidden, n_v_heads · v_dim]`
    o: Linear,
}

/// What a token's input becomes.
struct Projections {
    /// All queries, all keys, all values. `[channels, hidden]`
    qkv: Linear,
    /// `[n_v_heads · v_dim, hidden]`
    z: Linear,
    /// `[n_v_heads, hidden]`
    b: Linear,
    /// `[n_v_heads, hidden]`
    a: Linear,
}

impl Projections {
    fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Projections> {
        let (l, hidden) = (Some(layer), weights.spec().hidden);
        let (values, heads) = (spec.n_v_heads * spec.v_dim, spec.n_v_heads);
        if spec.grouped {
            return Projections::ungroup(weights, layer, spec);
        }
        let linear = |role, n| Linear::load(weights, l, (role, None), n, hidden);
        Ok(Projections {
            qkv: linear(Role::DeltaQkv, spec.n_channels())?,
            z: linear(Role::DeltaZ, values)?,
            b: linear(Role::DeltaB, heads)?,
            a: linear(Role::DeltaA, heads)?,
        })
    }

    /// From rows that are grouped by key heads: its query, its key, its values, their gates; and of the second matrix
    /// its betas and its decays.
    fn ungroup(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Projections> {
        let (l, hidden) = (Some(layer), weights.spec().hidden);
        let (n_k, k_dim, values) = (spec.n_k_heads, spec.k_dim, spec.n_v_heads * spec.v_dim);
        let each = spec.n_v_heads / n_k;
        let qkvz = tensor(weights, l, Role::DeltaQkvz, &[spec.n_channels() + values, hidden])?;
        let ba = tensor(weights, l, Role::DeltaBa, &[2 * spec.n_v_heads, hidden])?;
        // Rows `from .. from + n` of each of the groups, each of `size` rows.
        let take = |matrix: &[f32], size: usize, from: usize, n: usize| -> Vec<f32> {
            let groups = matrix.chunks_exact(size * hidden);
            groups.flat_map(|g| &g[from * hidden..(from + n) * hidden]).copied().collect()
        };
        let (size, v) = (2 * k_dim + 2 * each * spec.v_dim, each * spec.v_dim);
        let part = |from, n| take(&qkvz, size, from, n);
        let qkv = [part(0, k_dim), part(k_dim, k_dim), part(2 * k_dim, v)].concat();
        let linear = |rows: &[f32], n| Linear::new(rows, None, n, hidden);
        Ok(Projections {
            qkv: linear(&qkv, spec.n_channels()),
            z: linear(&part(2 * k_dim + v, v), values),
            b: linear(&take(&ba, 2 * each, 0, each), spec.n_v_heads),
            a: linear(&take(&ba, 2 * each, each, each), spec.n_v_heads),
        })
    }
}

impl Delta {
    pub(super) fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Delta> {
        let (l, hidden, heads) = (Some(layer), weights.spec().hidden, spec.n_v_heads);
        let mut decay = tensor(weights, l, Role::DeltaDecay, &[heads])?;
        decay.iter_mut().for_each(|a| *a = -libm::exp(f64::from(*a)) as f32);
        let norm = tensor(weights, l, Role::DeltaNorm, &[spec.v_dim])?;
        Ok(Delta {
            projections: Projections::load(weights, layer, spec)?,
            conv: tensor(weights, l, Role::DeltaConv, &[spec.n_channels(), 1, spec.kernel])?,
            decay,
            dt: tensor(weights, l, Role::DeltaStep, &[heads])?,
            norm: Norm::rms(norm, weights.spec().norm.eps()),
            o: Linear::load(weights, l, (Role::DeltaOut, None), hidden, heads * spec.v_dim)?,
            spec: spec.clone(),
        })
    }

    /// Attention of one window, `[len, hidden]` to the same.
    pub(super) fn window<'s>(&self, isa: Isa, x: &[f32], scratch: &'s mut Scratch) -> &'s mut [f32] {
        let spec = &self.spec;
        let (len, n) = (x.len() / self.o.n(), spec.n_v_heads * spec.v_dim);
        let Scratch { q, k, v, gates, heads, mixed, out, .. } = scratch;
        let projected = sized(q, len * spec.n_channels()); // [len, channels]
        self.projections.qkv.apply(isa, x, projected);
        let u = sized(k, projected.len()); // [len, channels]
        self.convolve(isa, projected, u);
        self.normalise(isa, u);
        let (betas, decays) = self.gates(isa, x);
        let heads = sized(heads, len * n); // [n_v_heads, len, v_dim]
        let one = |(h, out): (usize, &mut [f32])| self.head(isa, h, u, (&betas, &decays), out);
        if len < PARALLEL_TOKENS {
            heads.chunks_exact_mut(len * spec.v_dim).enumerate().for_each(one);
        } else {
            heads.par_chunks_exact_mut(len * spec.v_dim).enumerate().for_each(one);
        }
        self.norm.apply_in_place(isa, heads);
        let mixed = sized(mixed, len * n); // [len, n_v_heads, v_dim]
        for (t, row) in mixed.chunks_exact_mut(n).enumerate() {
            for (h, to) in row.chunks_exact_mut(spec.v_dim).enumerate() {
                to.copy_from_slice(&heads[(h * len + t) * spec.v_dim..][..spec.v_dim]);
            }
        }
        let z = sized(gates, len * n); // [len, n_v_heads, v_dim]
        self.projections.z.apply(isa, x, z);
        let gated = sized(v, len * n); // silu(z) · o
        gated.copy_from_slice(z);
        math::silu_mul(isa, gated, mixed);
        let out = sized(out, x.len()); // [len, hidden]
        self.o.apply(isa, gated, out);
        out
    }

    /// Causal convolution of each channel with its own kernel, then silu. Both are `[len, channels]`.
    fn convolve(&self, isa: Isa, x: &[f32], out: &mut [f32]) {
        let (n, kernel) = (self.spec.n_channels(), self.spec.kernel);
        for (t, out) in out.chunks_exact_mut(n).enumerate() {
            out.fill(0.0);
            for j in 0..kernel.min(t + 1) {
                // The last weight of a kernel is that of the token itself.
                let row = &x[(t - j) * n..][..n];
                let weights = self.conv.chunks_exact(kernel).map(|w| w[kernel - 1 - j]);
                out.iter_mut().zip(row).zip(weights).for_each(|((o, v), w)| *o += v * w);
            }
            let mut gates = out.to_vec();
            math::sigmoid_all(isa, &mut gates);
            out.iter_mut().zip(gates).for_each(|(v, g)| *v *= g);
        }
    }

    /// Queries and keys of length 1, queries divided by the root of their dimensions.
    fn normalise(&self, isa: Isa, u: &mut [f32]) {
        let (spec, width) = (&self.spec, self.spec.n_k_heads * self.spec.k_dim);
        let root = (spec.k_dim as f32).sqrt();
        for row in u.chunks_exact_mut(spec.n_channels()) {
            for (i, head) in row[..2 * width].chunks_exact_mut(spec.k_dim).enumerate() {
                let length = (math::sum_squares(isa, head) + LENGTH_EPS).sqrt();
                let factor = if i < spec.n_k_heads { length * root } else { length };
                head.iter_mut().for_each(|v| *v /= factor);
            }
        }
    }

    /// Betas and decays, `[len, n_v_heads]`.
    fn gates(&self, isa: Isa, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let heads = self.spec.n_v_heads;
        let len = x.len() / self.o.n();
        let (mut betas, mut decays) = (vec![0.0; len * heads], vec![0.0; len * heads]);
        self.projections.b.apply(isa, x, &mut betas);
        math::sigmoid_all(isa, &mut betas);
        self.projections.a.apply(isa, x, &mut decays);
        for row in decays.chunks_exact_mut(heads) {
            for ((a, dt), decay) in row.iter_mut().zip(&self.dt).zip(&self.decay) {
                *a = decay * softplus(*a + dt);
            }
        }
        math::exp_all(isa, &mut decays);
        (betas, decays)
    }

    /// One value head over all tokens: `out` is `[len, v_dim]`.
    fn head(&self, isa: Isa, head: usize, u: &[f32], (betas, decays): (&[f32], &[f32]), out: &mut [f32]) {
        let Spec { n_k_heads, n_v_heads, k_dim, v_dim, .. } = self.spec;
        let k_head = head / (n_v_heads / n_k_heads);
        let mut state = vec![0.0; k_dim * v_dim]; // [k_dim, v_dim]
        let mut delta = vec![0.0; v_dim];
        for (t, (row, out)) in
            u.chunks_exact(self.spec.n_channels()).zip(out.chunks_exact_mut(v_dim)).enumerate()
        {
            let q = &row[k_head * k_dim..][..k_dim];
            let k = &row[(n_k_heads + k_head) * k_dim..][..k_dim];
            let v = &row[2 * n_k_heads * k_dim + head * v_dim..][..v_dim];
            let (beta, decay) = (betas[t * n_v_heads + head], decays[t * n_v_heads + head]);
            state.iter_mut().for_each(|s| *s *= decay);
            delta.fill(0.0);
            for (&k, state) in k.iter().zip(state.chunks_exact(v_dim)) {
                math::add_scaled(isa, &mut delta, k, state);
            }
            delta.iter_mut().zip(v).for_each(|(d, v)| *d = (v - *d) * beta);
            out.fill(0.0);
            for ((&k, &q), state) in k.iter().zip(q).zip(state.chunks_exact_mut(v_dim)) {
                math::add_scaled(isa, state, k, &delta);
                math::add_scaled(isa, out, q, state);
            }
        }
    }
}
