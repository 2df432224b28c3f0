//! Streams that pass gates of each channel (Qwen4's low-rank hyper-connections).
//!
//! ```text
//! z = norm of each stream;  g = sigmoid(W_up silu(W_down z / n));  y = mean_j g_j z_j
//! X'_k = X_k + 2 sigmoid(W_k z / n) f(y)
//! ```

use moepack_convert::spec::{Across, Hyper, Norm as Kind, Role};
use moepack_format::Result;
use moepack_quant::{Isa, math};

use super::linear::Linear;
use super::norm::NOTES as NORM_NOTES;
use super::{Weights, silu_all, tensor};

/// The roles of the tensors.
pub(super) struct GatedRoles {
    /// Norm, down and up.
    pub(super) gates: [Role; 3],
    /// Weights with which an output joins each stream; the head has none.
    pub(super) inject: Option<Role>,
}

/// The weights of one sublayer, or of the head.
pub(super) struct Gated {
    pub(super) n_streams: usize,
    norm: GroupNorm,
    /// `[rank, n_streams · hidden]`
    down: Linear,
    /// `[n_streams · hidden, rank]`
    up: Linear,
    /// `[n_streams, n_streams · hidden]`
    inject: Option<Linear>,
}

impl Gated {
    /// The weights, where streams do pass gates.
    pub(super) fn load(
        weights: &dyn Weights,
        layer: Option<usize>,
        spec: Hyper,
        roles: &GatedRoles,
    ) -> Result<Option<Gated>> {
        let Across::Gated(rank) = spec.across else { return Ok(None) };
        let (width, [norm, down, up]) = (weights.spec().width(), roles.gates);
        let inject = |role| Linear::load(weights, layer, (role, None), spec.n_streams, width);
        Ok(Some(Gated {
            n_streams: spec.n_streams,
            norm: GroupNorm::load(weights, layer, norm)?,
            down: Linear::load(weights, layer, (down, None), rank, width)?,
            up: Linear::load(weights, layer, (up, None), width, rank)?,
            inject: roles.inject.map(inject).transpose()?,
        }))
    }

    /// Values of a token between two layers.
    pub(super) fn width(&self) -> usize {
        self.up.n()
    }

    /// Notes `[t, n_notes]` of rows of the stream `[t, width]`: behind those of a norm, the weights with which an output joins
    /// each stream, then the input `[hidden]`.
    pub(super) fn notes(&self, isa: Isa, rows: &[f32], hidden: usize, notes: &mut [f32], n_notes: usize) {
        let (t, n) = (rows.len() / self.width(), self.n_streams);
        let mut z = rows.to_vec(); // [t, width]
        self.norm.apply_in_place(isa, &mut z);
        let mut inject = vec![0.0; t * n]; // [t, n_streams]
        if let Some(linear) = &self.inject {
            linear.apply(isa, &z, &mut inject);
        }
        inject.iter_mut().for_each(|v| *v /= n as f32);
        math::sigmoid_all(isa, &mut inject);
        let mut inputs = vec![0.0; t * hidden]; // [t, hidden]
        self.mean(isa, &z, &mut inputs);
        let parts = inject.chunks_exact(n).zip(inputs.chunks_exact(hidden));
        for (notes, (inject, input)) in notes.chunks_exact_mut(n_notes).zip(parts) {
            let (post, rest) = notes[NORM_NOTES..].split_at_mut(n);
            post.iter_mut().zip(inject).for_each(|(p, i)| *p = 2.0 * i);
            rest.copy_from_slice(input);
        }
    }

    /// The streams' mean `[t, hidden]` behind their gates, of rows `[t, width]`.
    pub(super) fn collapse(&self, isa: Isa, rows: &[f32], out: &mut [f32]) {
        let mut z = rows.to_vec(); // [t, width]
        self.norm.apply_in_place(isa, &mut z);
        self.mean(isa, &z, out);
    }

    /// The same of normed rows.
    fn mean(&self, isa: Isa, z: &[f32], out: &mut [f32]) {
        let (t, width, n) = (z.len() / self.width(), self.width(), self.n_streams as f32);
        let mut latent = vec![0.0; t * self.down.n()]; // [t, rank]
        self.down.apply(isa, z, &mut latent);
        latent.iter_mut().for_each(|v| *v /= n);
        silu_all(isa, &mut latent);
        let mut gates = vec![0.0; t * width]; // [t, width]
        self.up.apply(isa, &latent, &mut gates);
        math::sigmoid_all(isa, &mut gates);
        gates.iter_mut().zip(z).for_each(|(g, z)| *g *= z);
        let hidden = width / self.n_streams;
        for (gated, out) in gates.chunks_exact(width).zip(out.chunks_exact_mut(hidden)) {
            out.fill(0.0);
            gated.chunks_exact(hidden).for_each(|stream| math::add(isa, out, stream));
            out.iter_mut().for_each(|v| *v /= n);
        }
    }
}

/// RMS of each stream on its own, with weights of all of them.
pub(super) struct GroupNorm {
    /// `[n_streams · hidden]`
    weight: Vec<f32>,
    hidden: usize,
    eps: f32,
}

impl GroupNorm {
    pub(super) fn load(weights: &dyn Weights, layer: Option<usize>, role: Role) -> Result<GroupNorm> {
        let spec = weights.spec();
        let mut weight = tensor(weights, layer, role, &[spec.width()])?;
        if let Kind::RmsPlusOne { .. } = spec.norm {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        Ok(GroupNorm { weight, hidden: spec.hidden, eps: spec.norm.eps() })
    }

    /// Norm of rows `[t, n_streams · hidden]`.
    pub(super) fn apply_in_place(&self, isa: Isa, rows: &mut [f32]) {
        for row in rows.chunks_exact_mut(self.weight.len()) {
            for (x, weight) in row.chunks_exact_mut(self.hidden).zip(self.weight.chunks_exact(self.hidden)) {
                let factor = math::rms_factor(isa, x, self.eps);
                math::scale(isa, x, factor, weight);
            }
        }
    }
}
