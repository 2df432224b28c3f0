//! Gated delta rule (Yang et al. 2024, arXiv 2412.06464), as the plain recurrence over tokens.
//!
//! ```text
//! u = silu(causal convolution, channel by channel, of W_qkv x);  q, k, v of each head from u;  q, k to length 1
//! beta = sigmoid(W_b x),  g = exp(−exp(A) · softplus(W_a x + dt))                of each value head; with Kimi's variant
//!                                                                                g of each channel of its keys, and
//!                                                                                bounded: exp(b · sigmoid(exp(A) · …))
//! S = g S;  S += k ⊗ beta (v − kᵀ S);  o = Sᵀ q / √k_dim                           S is [k_dim, v_dim]
//! out = W_o (norm(o) · silu(W_z x))
//! ```
//!
//! Each key head serves equally many consecutive value heads.

use moepack_convert::spec::{Delta as Spec, DeltaProjections, Role};
use moepack_format::Result;
use moepack_quant::{Isa, math};
use rayon::prelude::*;

use super::attention::{PARALLEL_TOKENS, Scratch};
use super::convolution::Convolution;
use super::linear::Linear;
use super::norm::Norm;
use super::router::{softplus, vector};
use super::{Weights, silu_all, sized, tensor};

/// Added to the squared length of queries and keys, in the reference.
const LENGTH_EPS: f32 = 1e-6;

/// The weights of one layer.
pub(super) struct Delta {
    spec: Spec,
    projections: Projections,
    conv: Convolution,
    /// −exp(A), for each decay.
    decay: Vec<f32>,
    /// One for each decay.
    dt: Vec<f32>,
    norm: Norm,
    /// `[hidden, n_v_heads · v_dim]`
    o: Linear,
}

/// What a token's input becomes.
struct Projections {
    /// All queries, all keys, all values. `[channels, hidden]`
    qkv: Linear,
    /// To `n_v_heads · v_dim`.
    z: Chain,
    /// `[n_v_heads, hidden]`
    b: Linear,
    /// To one for each decay.
    a: Chain,
}

/// One linear map, or two after another.
struct Chain(Linear, Option<Linear>);

impl Chain {
    fn apply(&self, isa: Isa, x: &[f32], out: &mut [f32]) {
        let Chain(first, second) = self;
        let Some(second) = second else { return first.apply(isa, x, out) };
        let mut inner = vec![0.0; x.len() / first.k() * first.n()]; // [len, rank]
        first.apply(isa, x, &mut inner);
        second.apply(isa, &inner, out);
    }
}

impl Projections {
    fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Projections> {
        let (l, hidden) = (Some(layer), weights.spec().hidden);
        let (values, heads) = (spec.n_v_heads * spec.v_dim, spec.n_v_heads);
        let linear = |role, n| Linear::load(weights, l, (role, None), n, hidden);
        match spec.projections {
            DeltaProjections::Grouped => return Projections::ungroup(weights, layer, spec),
            DeltaProjections::Separate => {}
            DeltaProjections::LowRank | DeltaProjections::FullRank => {
                let d = spec.v_dim;
                let chain = |whole, a, b| -> Result<Chain> {
                    if spec.projections == DeltaProjections::FullRank {
                        return Ok(Chain(linear(whole, values)?, None));
                    }
                    Ok(Chain(linear(a, d)?, Some(Linear::load(weights, l, (b, None), values, d)?)))
                };
                let part = |role| tensor(weights, l, role, &[values, hidden]);
                let qkv = [part(Role::Q)?, part(Role::K)?, part(Role::V)?].concat();
                return Ok(Projections {
                    qkv: Linear::new(&qkv, None, spec.n_channels(), hidden).watched(weights.tap(l, Role::Q)),
                    z: chain(Role::AttnGate, Role::DeltaGateA, Role::DeltaGateB)?,
                    b: linear(Role::DeltaB, heads)?,
                    a: chain(Role::DeltaA, Role::DeltaDecayA, Role::DeltaDecayB)?,
                });
            }
        }
        Ok(Projections {
            qkv: linear(Role::DeltaQkv, spec.n_channels())?,
            z: Chain(linear(Role::DeltaZ, values)?, None),
            b: linear(Role::DeltaB, heads)?,
            a: Chain(linear(Role::DeltaA, heads)?, None),
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
            qkv: linear(&qkv, spec.n_channels()).watched(weights.tap(l, Role::DeltaQkvz)),
            z: Chain(linear(&part(2 * k_dim + v, v), values), None),
            b: linear(&take(&ba, 2 * each, 0, each), spec.n_v_heads),
            a: Chain(linear(&take(&ba, 2 * each, each, each), spec.n_v_heads), None),
        })
    }
}

impl Delta {
    pub(super) fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Delta> {
        let (l, hidden, heads) = (Some(layer), weights.spec().hidden, spec.n_v_heads);
        let is_kimi = spec.projections.is_kimi();
        let each = if is_kimi { spec.k_dim } else { 1 }; // decays of a head
        let decay = vector(weights, layer, Role::DeltaDecay, heads)?;
        let rates = decay.iter().map(|&a| -libm::exp(f64::from(a)) as f32);
        let norm = tensor(weights, l, Role::DeltaNorm, &[spec.v_dim])?;
        let o = if is_kimi { Role::O } else { Role::DeltaOut };
        Ok(Delta {
            projections: Projections::load(weights, layer, spec)?,
            conv: convolution(weights, layer, spec)?,
            decay: rates.flat_map(|rate| std::iter::repeat_n(rate, each)).collect(),
            dt: tensor(weights, l, Role::DeltaStep, &[heads * each])?,
            norm: Norm::rms(norm, weights.spec().norm.eps()),
            o: Linear::load(weights, l, (o, None), hidden, heads * spec.v_dim)?,
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
        self.conv.apply(projected, u);
        silu_all(isa, u);
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
        if spec.sigmoid_gate {
            math::sigmoid_all(isa, gated);
            gated.iter_mut().zip(&*mixed).for_each(|(g, o)| *g *= o);
        } else {
            math::silu_mul(isa, gated, mixed);
        }
        let out = sized(out, x.len()); // [len, hidden]
        self.o.apply(isa, gated, out);
        out
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

    /// Betas `[len, n_v_heads]`, and decays, one or `k_dim` a head.
    fn gates(&self, isa: Isa, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let heads = self.spec.n_v_heads;
        let len = x.len() / self.o.n();
        let (mut betas, mut decays) = (vec![0.0; len * heads], vec![0.0; len * self.dt.len()]);
        self.projections.b.apply(isa, x, &mut betas);
        math::sigmoid_all(isa, &mut betas);
        self.projections.a.apply(isa, x, &mut decays);
        for row in decays.chunks_exact_mut(self.dt.len()) {
            for ((a, dt), decay) in row.iter_mut().zip(&self.dt).zip(&self.decay) {
                *a = match self.spec.decay_bound {
                    None => decay * softplus(*a + dt),
                    Some(bound) => bound * math::sigmoid(-decay * (*a + dt)),
                };
            }
        }
        math::exp_all(isa, &mut decays);
        (betas, decays)
    }

    /// One value head over all tokens: `out` is `[len, v_dim]`.
    fn head(&self, isa: Isa, head: usize, u: &[f32], (betas, decays): (&[f32], &[f32]), out: &mut [f32]) {
        let Spec { n_k_heads, n_v_heads, k_dim, v_dim, .. } = self.spec;
        let (k_head, each) = (head / (n_v_heads / n_k_heads), self.dt.len() / n_v_heads);
        let mut state = vec![0.0; k_dim * v_dim]; // [k_dim, v_dim]
        let mut delta = vec![0.0; v_dim];
        for (t, (row, out)) in
            u.chunks_exact(self.spec.n_channels()).zip(out.chunks_exact_mut(v_dim)).enumerate()
        {
            let q = &row[k_head * k_dim..][..k_dim];
            let k = &row[(n_k_heads + k_head) * k_dim..][..k_dim];
            let v = &row[2 * n_k_heads * k_dim + head * v_dim..][..v_dim];
            let beta = betas[t * n_v_heads + head];
            let decay = &decays[(t * n_v_heads + head) * each..][..each];
            for (state, decay) in state.chunks_exact_mut(k_dim / each * v_dim).zip(decay) {
                state.iter_mut().for_each(|s| *s *= decay);
            }
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

/// The kernels of all channels.
fn convolution(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Convolution> {
    let part = |role, n| tensor(weights, Some(layer), role, &[n, 1, spec.kernel]);
    let (keys, values) = (spec.n_k_heads * spec.k_dim, spec.n_v_heads * spec.v_dim);
    let kernels = if spec.projections.is_kimi() {
        [part(Role::DeltaConvQ, keys)?, part(Role::DeltaConvK, keys)?, part(Role::DeltaConvV, values)?]
            .concat()
    } else {
        part(Role::DeltaConv, spec.n_channels())?
    };
    Ok(Convolution::new(&kernels, spec.n_channels(), 1))
}
