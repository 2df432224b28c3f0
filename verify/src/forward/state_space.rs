//! Selective state spaces, as the plain recurrence over tokens: Mamba 2 (Dao and Gu 2024, arXiv 2405.21060) and Mamba (Gu
//! and Dao 2023, arXiv 2312.00752) with normed steps as Jamba has it.
//!
//! ```text
//! Mamba 2   z, u, d = W x;   u = silu(conv(u));   x, b, c = u                  b and c of each group of heads
//! Mamba     x, z = W x;      x = silu(conv(x));   d, b, c = norms of W_s x;   d = W_d d
//! step = clamp(softplus(d + bias))                                              of each head; in Mamba of each channel
//! S = exp(−exp(A) · step) S + b ⊗ (step · x);   y = Sᵀ c + D x                   S is [state_dim, channels]
//! Mamba 2   out = W_o norm(y · silu(z)), a norm over each group
//! Mamba     out = W_o (y · silu(z))
//! ```

use std::ops::Range;

use moepack_convert::spec::{Role, StateSpace as Spec};
use moepack_format::Result;
use moepack_quant::{Isa, math};
use rayon::prelude::*;

use super::attention::{PARALLEL_TOKENS, Scratch};
use super::convolution::Convolution;
use super::linear::Linear;
use super::norm::Norm;
use super::router::softplus;
use super::{Weights, silu_all, sized, tensor};

/// Channels that are run together where each has a step of its own.
const BLOCK_CHANNELS: usize = 64;

/// The weights of one layer.
pub(super) struct StateSpace {
    spec: Spec,
    /// `[n_projected, hidden]`
    input: Linear,
    conv: Convolution,
    selection: Selection,
    /// Added to steps before softplus. `[n_heads]`
    step_bias: Vec<f32>,
    /// −exp(A). `[n_heads]`; in Mamba `[state_dim, channels]`
    rates: Vec<f32>,
    /// D. `[n_heads]`
    skip: Vec<f32>,
    /// `[hidden, channels]`
    output: Linear,
}

/// Where steps, b and c come from, and what is normed.
enum Selection {
    /// From the token's projection; a norm at the end.
    Projected {
        /// `[channels]`
        norm: Vec<f32>,
        eps: f32,
    },
    /// From the convolved channels.
    LowRank {
        /// `[step_rank + 2 · state_dim, channels]`
        select: Linear,
        /// `[channels, step_rank]`
        step_up: Linear,
        /// Of steps, b and c.
        norms: Box<[Norm; 3]>,
    },
}

/// What the recurrence takes, for all tokens of a window.
struct Selected<'a> {
    /// `[len, n_channels]`, the heads' channels first.
    u: &'a [f32],
    /// `[len, n_heads]`
    steps: Vec<f32>,
    /// `[len, n_groups, state_dim]`
    b: Vec<f32>,
    /// The same.
    c: Vec<f32>,
}

impl StateSpace {
    pub(super) fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<StateSpace> {
        let (l, hidden, inner) = (Some(layer), weights.spec().hidden, spec.inner());
        let biased = |role, bias, n, k| Linear::load(weights, l, (role, spec.bias.then_some(bias)), n, k);
        let of_heads = |role| tensor(weights, l, role, &[spec.n_heads]);
        Ok(StateSpace {
            input: biased(Role::MixerIn, Role::MixerInBias, spec.n_projected(), hidden)?,
            conv: Convolution::load(weights, layer, [spec.n_channels(), spec.kernel], spec.conv_bias)?,
            selection: Selection::load(weights, layer, spec)?,
            step_bias: of_heads(Role::StateStep)?,
            rates: rates(weights, layer, spec)?,
            skip: of_heads(Role::StateSkip)?,
            output: biased(Role::MixerOut, Role::MixerOutBias, hidden, inner)?,
            spec: spec.clone(),
        })
    }

    /// One window, `[len, hidden]` to the same.
    pub(super) fn window<'s>(&self, isa: Isa, x: &[f32], scratch: &'s mut Scratch) -> &'s mut [f32] {
        let (len, inner) = (x.len() / self.output.n(), self.spec.inner());
        let Scratch { q, k, v, gates, heads, out, .. } = scratch;
        let projected = sized(q, len * self.input.n()); // [len, n_projected]
        self.input.apply(isa, x, projected);
        let u = sized(v, len * self.spec.n_channels()); // [len, n_channels]
        self.convolved(isa, projected, sized(k, u.len()), u);
        let selected = self.select(isa, projected, u);
        // Blocks of channels one after the other: [inner / block, len, block]
        let block = if self.spec.step_rank.is_some() { BLOCK_CHANNELS } else { self.spec.head_dim };
        let heads = sized(heads, len * inner);
        let one = |(i, out): (usize, &mut [f32])| {
            let first = i * block;
            self.block(isa, first..first + out.len() / len, &selected, out);
        };
        if len < PARALLEL_TOKENS {
            heads.chunks_mut(len * block).enumerate().for_each(one);
        } else {
            heads.par_chunks_mut(len * block).enumerate().for_each(one);
        }
        let gated = sized(gates, len * inner); // [len, inner], silu(z) · y
        let z_at = if self.spec.step_rank.is_some() { inner } else { 0 };
        let rows = projected.chunks_exact(self.input.n()).zip(gated.chunks_exact_mut(inner));
        let mut y = vec![0.0; inner];
        for (t, (row, gated)) in rows.enumerate() {
            gated.copy_from_slice(&row[z_at..][..inner]);
            for (i, y) in y.chunks_mut(block).enumerate() {
                y.copy_from_slice(&heads[i * block * len + t * y.len()..][..y.len()]);
            }
            math::silu_mul(isa, gated, &y);
        }
        self.norm(isa, gated);
        let out = sized(out, x.len()); // [len, hidden]
        self.output.apply(isa, gated, out);
        out
    }

    /// Convolution of the channels in `projected`, then silu; both buffers are `[len, n_channels]`.
    fn convolved(&self, isa: Isa, projected: &[f32], buffer: &mut [f32], u: &mut [f32]) {
        let (n, first) =
            (self.spec.n_channels(), if self.spec.step_rank.is_some() { 0 } else { self.spec.inner() });
        for (row, to) in projected.chunks_exact(self.input.n()).zip(buffer.chunks_exact_mut(n)) {
            to.copy_from_slice(&row[first..][..n]);
        }
        self.conv.apply(buffer, u);
        silu_all(isa, u);
    }

    /// Steps, what goes into states and what is read from them.
    fn select<'a>(&self, isa: Isa, projected: &[f32], u: &'a [f32]) -> Selected<'a> {
        let Spec { n_heads, state_dim, n_groups, .. } = self.spec;
        let (n, inner, shared) = (self.spec.n_channels(), self.spec.inner(), n_groups * state_dim);
        let part = |rows: &[f32], width: usize, range: Range<usize>| -> Vec<f32> {
            rows.chunks_exact(width).flat_map(|row| &row[range.clone()]).copied().collect()
        };
        let mut selected = match &self.selection {
            Selection::Projected { .. } => {
                let width = self.input.n();
                let steps = part(projected, width, width - n_heads..width);
                let (b, c) = (inner..inner + shared, inner + shared..n);
                Selected { u, steps, b: part(u, n, b), c: part(u, n, c) }
            }
            Selection::LowRank { select, step_up, norms } => {
                let (len, width, rank) = (u.len() / n, select.n(), step_up.k());
                let mut all = vec![0.0; len * width]; // [len, step_rank + 2 · state_dim]
                select.apply(isa, u, &mut all);
                let normed = |norm: &Norm, range| {
                    let mut part = part(&all, width, range);
                    norm.apply_in_place(isa, &mut part);
                    part
                };
                let [of_steps, of_b, of_c] = &**norms;
                let low = normed(of_steps, 0..rank);
                let mut steps = vec![0.0; len * n_heads]; // [len, n_heads]
                step_up.apply(isa, &low, &mut steps);
                let (b, c) = (rank..rank + state_dim, rank + state_dim..width);
                Selected { u, steps, b: normed(of_b, b), c: normed(of_c, c) }
            }
        };
        let [least, most] = self.spec.steps;
        for row in selected.steps.chunks_exact_mut(n_heads) {
            row.iter_mut()
                .zip(&self.step_bias)
                .for_each(|(s, bias)| *s = softplus(*s + bias).max(least).min(most));
        }
        selected
    }

    /// The recurrence over all tokens for some channels, of one head unless each channel is one: `out` is
    /// `[len, channels.len()]`.
    fn block(&self, isa: Isa, channels: Range<usize>, selected: &Selected<'_>, out: &mut [f32]) {
        let Spec { n_heads, head_dim, n_groups, state_dim, .. } = self.spec;
        let (width, n) = (channels.len(), self.spec.n_channels());
        let heads = channels.start / head_dim..channels.end.div_ceil(head_dim);
        let group = heads.start / (n_heads / n_groups);
        let mut state = vec![0.0; state_dim * width]; // [state_dim, channels]
        let (mut decays, mut input) = (vec![0.0; width], vec![0.0; width]);
        for (t, out) in out.chunks_exact_mut(width).enumerate() {
            let x = &selected.u[t * n..][channels.clone()];
            let steps = &selected.steps[t * n_heads..][heads.clone()];
            let of_group = (t * n_groups + group) * state_dim..(t * n_groups + group + 1) * state_dim;
            let bc = selected.b[of_group.clone()].iter().zip(&selected.c[of_group]);
            let step = |i: usize| steps[if steps.len() == 1 { 0 } else { i }];
            input.iter_mut().zip(x).enumerate().for_each(|(i, (to, x))| *to = step(i) * x);
            if head_dim > 1 || self.spec.step_rank.is_none() {
                decays.fill(math::exp(self.rates[heads.start] * steps[0]));
            }
            out.fill(0.0);
            for ((i, state), (&b, &c)) in state.chunks_exact_mut(width).enumerate().zip(bc) {
                if self.spec.step_rank.is_some() {
                    let rates = &self.rates[i * n_heads..][channels.clone()];
                    decays.iter_mut().zip(rates).zip(steps).for_each(|((d, rate), step)| *d = rate * step);
                    math::exp_all(isa, &mut decays);
                }
                state.iter_mut().zip(&decays).for_each(|(s, decay)| *s *= decay);
                math::add_scaled(isa, state, b, &input);
                math::add_scaled(isa, out, c, state);
            }
            let skip = |i: usize| self.skip[heads.start + i / head_dim];
            out.iter_mut().zip(x).enumerate().for_each(|(i, (y, x))| *y += skip(i) * x);
        }
    }

    /// The norm over each group of channels of every token, `[len, inner]`.
    fn norm(&self, isa: Isa, rows: &mut [f32]) {
        let Selection::Projected { norm, eps } = &self.selection else { return };
        let size = self.spec.inner() / self.spec.n_groups;
        for row in rows.chunks_exact_mut(norm.len()) {
            for (group, weight) in row.chunks_exact_mut(size).zip(norm.chunks_exact(size)) {
                let factor = math::rms_factor(isa, group, *eps);
                math::scale(isa, group, factor, weight);
            }
        }
    }
}

impl Selection {
    fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Selection> {
        let (l, inner, eps) = (Some(layer), spec.inner(), weights.spec().norm.eps());
        let Some(rank) = spec.step_rank else {
            return Ok(Selection::Projected { norm: tensor(weights, l, Role::MixerNorm, &[inner])?, eps });
        };
        let norm = |role, n| Norm::load_with(weights, l, role, n, None);
        let linear = |role, n, k| Linear::load(weights, l, (role, None), n, k);
        Ok(Selection::LowRank {
            select: linear(Role::StateSelect, rank + 2 * spec.state_dim, inner)?,
            step_up: linear(Role::StateStepUp, inner, rank)?,
            norms: Box::new([
                norm(Role::StateStepNorm, rank)?,
                norm(Role::StateInNorm, spec.state_dim)?,
                norm(Role::StateOutNorm, spec.state_dim)?,
            ]),
        })
    }
}

/// −exp(A) of each head; of each channel and value of its state `[state_dim, channels]` where a channel is a head.
fn rates(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Vec<f32>> {
    let (n_heads, n) = (spec.n_heads, spec.state_dim);
    let rate = |&a: &f32| -libm::exp(f64::from(a)) as f32;
    if spec.step_rank.is_none() {
        let a = tensor(weights, Some(layer), Role::StateDecay, &[n_heads])?;
        return Ok(a.iter().map(rate).collect());
    }
    let a = tensor(weights, Some(layer), Role::StateDecay, &[n_heads, n])?; // [channels, state_dim]
    Ok((0..n).flat_map(|i| a.iter().skip(i).step_by(n)).map(rate).collect())
}
