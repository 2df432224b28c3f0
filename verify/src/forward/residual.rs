//! How a sublayer (attention or MLP) takes its input from the residual stream and gives its output back.
//!
//! ```text
//! plain     x += f(norm(x))                       scaled    x += factor · f(norm(x))
//! post      x += norm(f(x))                       sandwich  x += norm(f(norm(x)))
//! parallel  x += attention(norm(x)) + mlp(norm(x))
//! single    x += f(norm(x)), where f is attention or an MLP and there is no other sublayer
//! of normed x = a · norm(x) + b · f(norm(x))
//! hyper     y = Σ_j pre_j X_j;  X'_k = post_k f(norm(y)) + Σ_j C_jk X_j            n streams X a token
//! ```
//!
//! What a token needs on its way in and out is computed once and kept in its *notes*: the factors of its norm, and with
//! hyper-connections pre, post and C. So inputs can be made again for the few tokens of an expert.

use moepack_convert::spec::{Across, Hyper as HyperSpec, Residual, Role};
use moepack_format::Result;
use moepack_quant::{Isa, math};
use rayon::prelude::*;

use super::gated::{Gated, GatedRoles};
use super::linear::Linear;
use super::norm::{NOTES as NORM_NOTES, Norm};
use super::{ROWS, Stream, Weights, sized, tensor};

/// One sublayer's way in and out of the stream.
pub(super) struct Sublayer {
    hidden: usize,
    norm: Option<Norm>,
    post_norm: Option<Norm>,
    scale: f32,
    /// What leaves the layer is multiplied by this.
    pub(super) layer_scale: Option<f32>,
    /// What is normed stays in the stream, times this.
    keeps_normed: Option<f32>,
    hyper: Option<Hyper>,
    gated: Option<Gated>,
}

/// The roles of a sublayer's tensors.
pub(super) struct Roles {
    is_mlp: bool,
    norm: (Role, Role),
    post_norm: Role,
    mix: [Role; 3],
    gated: GatedRoles,
}

/// Of attention.
pub(super) const ATTENTION: Roles = Roles {
    is_mlp: false,
    norm: (Role::AttnNorm, Role::AttnNormBias),
    post_norm: Role::AttnPostNorm,
    mix: [Role::AttnMix, Role::AttnMixBase, Role::AttnMixScale],
    gated: GatedRoles {
        gates: [Role::AttnGateNorm, Role::AttnGateDown, Role::AttnGateUp],
        inject: Some(Role::AttnInject),
    },
};

/// Of the MLP.
pub(super) const MLP: Roles = Roles {
    is_mlp: true,
    norm: (Role::MlpNorm, Role::MlpNormBias),
    post_norm: Role::MlpPostNorm,
    mix: [Role::MlpMix, Role::MlpMixBase, Role::MlpMixScale],
    gated: GatedRoles {
        gates: [Role::MlpGateNorm, Role::MlpGateDown, Role::MlpGateUp],
        inject: Some(Role::MlpInject),
    },
};

impl Sublayer {
    pub(super) fn load(
        weights: &dyn Weights,
        l: usize,
        residual: Residual,
        roles: &Roles,
    ) -> Result<Sublayer> {
        let hidden = weights.spec().hidden;
        // A norm that sublayers share is that of attention.
        let (norm, bias) = if residual.shares_norm() { ATTENTION.norm } else { roles.norm };
        let norm = residual.has_pre_norm().then(|| Norm::load(weights, Some(l), (norm, bias), hidden));
        let post_norm = residual
            .has_post_norm()
            .then(|| Norm::load_with(weights, Some(l), roles.post_norm, hidden, None));
        let hyper = match residual {
            Residual::Hyper(spec) if !residual.is_gated() => {
                Some(Hyper::load(weights, Some(l), spec, roles.mix, spec.n_mixes())?)
            }
            _ => None,
        };
        let gated = match residual {
            Residual::Hyper(spec) => Gated::load(weights, Some(l), spec, &roles.gated)?,
            _ => None,
        };
        let (keeps_normed, scale) = match residual {
            Residual::Scaled(factor) => (None, factor),
            Residual::OfNormed { attention, mlp } => {
                let [a, b] = if roles.is_mlp { mlp } else { attention };
                (Some(a), b)
            }
            _ => (None, 1.0),
        };
        Ok(Sublayer {
            hidden,
            norm: norm.transpose()?,
            post_norm: post_norm.transpose()?,
            layer_scale: None,
            scale,
            keeps_normed,
            hyper,
            gated,
        })
    }

    /// Values of a sublayer's input.
    pub(super) fn hidden(&self) -> usize {
        self.hidden
    }

    /// Values of a token between two layers.
    pub(super) fn width(&self) -> usize {
        self.gated
            .as_ref()
            .map_or(self.hidden * self.hyper.as_ref().map_or(1, |h| h.spec.n_streams), Gated::width)
    }

    /// Values of a token's notes.
    pub(super) fn n_notes(&self) -> usize {
        // Gates of each channel are no few numbers: where there are some, the notes have the input itself.
        let gated = self.gated.as_ref().map_or(0, |g| g.n_streams + self.hidden);
        NORM_NOTES + gated + self.hyper.as_ref().map_or(0, |h| h.spec.n_mixes())
    }

    /// Notes `[t, n_notes]` of rows of the stream, `[t, width]`.
    pub(super) fn notes(&self, isa: Isa, rows: &[f32], notes: &mut [f32]) {
        if let Some(gated) = &self.gated {
            return gated.notes(isa, rows, self.hidden, notes, self.n_notes());
        }
        let mut mixes = Vec::new(); // [t, n_mixes]
        if let Some(hyper) = &self.hyper {
            hyper.mixes(isa, rows, &mut mixes);
        }
        let n_mixes = self.n_notes() - NORM_NOTES;
        let mut collapsed = vec![0.0; self.hidden];
        let rows = rows.chunks_exact(self.width()).zip(notes.chunks_exact_mut(self.n_notes()));
        for (t, (row, notes)) in rows.enumerate() {
            let (norm_notes, mix) = notes.split_at_mut(NORM_NOTES);
            mix.copy_from_slice(&mixes[t * n_mixes..][..n_mixes]);
            let Some(norm) = &self.norm else { continue };
            match &self.hyper {
                None => norm.notes(isa, row, norm_notes),
                Some(_) => {
                    collapse(isa, mix, row, &mut collapsed);
                    norm.notes(isa, &collapsed, norm_notes);
                }
            }
        }
    }

    /// The sublayer's input `[hidden]` from a token's row `[width]`.
    pub(super) fn input(&self, isa: Isa, row: &[f32], notes: &[f32], out: &mut [f32]) {
        let (norm_notes, mix) = notes.split_at(NORM_NOTES);
        if let Some(gated) = &self.gated {
            return out.copy_from_slice(&mix[gated.n_streams..]);
        }
        match (&self.hyper, &self.norm) {
            (None, None) => out.copy_from_slice(row),
            (None, Some(norm)) => norm.apply_noted(isa, row, norm_notes, out),
            (Some(_), norm) => {
                collapse(isa, mix, row, out);
                if let Some(norm) = norm {
                    norm.apply_noted_in_place(isa, out, norm_notes);
                }
            }
        }
    }

    /// The inputs `[t, hidden]` of rows `[t, width]`.
    pub(super) fn inputs(&self, isa: Isa, rows: &[f32], notes: &[f32], out: &mut [f32]) {
        let rows = rows.chunks_exact(self.width()).zip(notes.chunks_exact(self.n_notes()));
        for ((row, notes), out) in rows.zip(out.chunks_exact_mut(self.hidden)) {
            self.input(isa, row, notes, out);
        }
    }

    /// What joins the stream, from the sublayer's output `[t, hidden]`, in place.
    pub(super) fn output(&self, isa: Isa, rows: &mut [f32]) {
        if let Some(norm) = &self.post_norm {
            norm.apply_in_place(isa, rows);
        }
        if self.scale != 1.0 {
            rows.iter_mut().for_each(|v| *v *= self.scale);
        }
    }

    /// How these rows join the stream, from the notes of their tokens.
    pub(super) fn joint<'a>(&'a self, notes: &'a [f32]) -> Joint<'a> {
        match (self.mix(), self.keeps_normed, &self.norm) {
            (Some(mix), ..) => Joint::Mix { mix, notes },
            (None, Some(factor), Some(norm)) => Joint::OfNormed { norm, factor, notes },
            _ => Joint::Add,
        }
    }

    /// Where a token's notes say how streams mix.
    fn mix(&self) -> Option<Mix> {
        let n_notes = self.n_notes();
        match (&self.hyper, &self.gated) {
            (Some(hyper), _) => {
                let n_streams = hyper.spec.n_streams;
                let alone = !matches!(hyper.spec.across, Across::Sinkhorn(_));
                Some(Mix { n_streams, n_notes, post: NORM_NOTES + n_streams, alone })
            }
            (None, Some(gated)) => {
                Some(Mix { n_streams: gated.n_streams, n_notes, post: NORM_NOTES, alone: true })
            }
            (None, None) => None,
        }
    }

    /// What the sublayer's outputs `[tokens, hidden]` do to a stream whose tokens have these notes.
    pub(super) fn delta(&self, isa: Isa, mut rows: Vec<f32>, notes: &[f32]) -> Delta {
        rows.par_chunks_mut(ROWS * self.hidden).for_each(|rows| self.output(isa, rows));
        let how = match self.joint(notes) {
            Joint::Add => How::Add,
            Joint::Mix { mix, notes } => How::Mix { mix, notes: notes.to_vec() },
            Joint::OfNormed { norm, factor, notes } => {
                How::OfNormed { norm: norm.clone(), factor, notes: notes.to_vec() }
            }
        };
        Delta { hidden: self.hidden, rows, how, layer_scale: self.layer_scale }
    }
}

/// How outputs join the stream.
#[derive(Clone, Copy)]
pub(super) enum Joint<'a> {
    /// They are added.
    Add,
    /// Streams are mixed.
    Mix { mix: Mix, notes: &'a [f32] },
    /// They are added to what was normed, times a factor.
    OfNormed { norm: &'a Norm, factor: f32, notes: &'a [f32] },
}

/// Where a token's notes say how streams mix.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mix {
    n_streams: usize,
    n_notes: usize,
    /// Where the weights begin with which an output joins each stream.
    post: usize,
    /// Streams go on as they are; else their weights for each other follow.
    alone: bool,
}

impl Joint<'_> {
    /// Changes rows of the stream `[t, width]` by outputs `[t, hidden]`; `first` is the index of the first in the notes.
    pub(super) fn join(self, isa: Isa, rows: &mut [f32], outputs: &[f32], hidden: usize, first: usize) {
        let (Mix { n_streams, n_notes, post, alone }, notes) = match self {
            Joint::Add => return math::add(isa, rows, outputs),
            Joint::Mix { mix, notes } => (mix, notes),
            Joint::OfNormed { norm, factor, notes } => {
                let mut normed = vec![0.0; hidden];
                let notes = notes.chunks_exact(NORM_NOTES).skip(first);
                let rows = rows.chunks_exact_mut(hidden).zip(outputs.chunks_exact(hidden));
                for ((row, output), notes) in rows.zip(notes) {
                    norm.apply_noted(isa, row, notes, &mut normed);
                    row.copy_from_slice(output);
                    math::add_scaled(isa, row, factor, &normed);
                }
                return;
            }
        };
        let mut before = vec![0.0; n_streams * hidden]; // [n_streams, hidden]
        let notes = notes.chunks_exact(n_notes).skip(first);
        let rows = rows.chunks_exact_mut(n_streams * hidden).zip(outputs.chunks_exact(hidden));
        for ((row, output), notes) in rows.zip(notes) {
            before.copy_from_slice(row);
            let (post, across) = notes[post..].split_at(n_streams);
            for (k, stream) in row.chunks_exact_mut(hidden).enumerate() {
                if alone {
                    math::add_scaled(isa, stream, post[k], output);
                    continue;
                }
                stream.fill(0.0);
                math::add_scaled(isa, stream, post[k], output);
                for (j, other) in before.chunks_exact(hidden).enumerate() {
                    math::add_scaled(isa, stream, across[j * n_streams + k], other);
                }
            }
        }
    }
}

/// What a layer's MLP does to the stream: see [`Stream::add`].
#[derive(Clone, Debug)]
pub struct Delta {
    hidden: usize,
    /// `[tokens, hidden]`
    rows: Vec<f32>,
    how: How,
    /// What the stream is multiplied by in the end.
    layer_scale: Option<f32>,
}

/// How the outputs join: a [`Joint`] that owns what it needs.
#[derive(Clone, Debug)]
enum How {
    Add,
    /// Notes are `[tokens, n_notes]`.
    Mix {
        mix: Mix,
        notes: Vec<f32>,
    },
    /// The same.
    OfNormed {
        norm: Norm,
        factor: f32,
        notes: Vec<f32>,
    },
}

impl Stream {
    /// Joins what a sublayer made, and what a parallel attention before it left.
    pub fn add(&mut self, isa: Isa, delta: &Delta) {
        self.shortcut = None;
        let joint = match &delta.how {
            How::Add => Joint::Add,
            How::Mix { mix, notes } => Joint::Mix { mix: *mix, notes },
            How::OfNormed { norm, factor, notes } => Joint::OfNormed { norm, factor: *factor, notes },
        };
        if let Some(pending) = self.pending.take() {
            let parts =
                self.hidden.par_chunks_mut(ROWS * self.width).zip(pending.par_chunks(ROWS * self.width));
            parts.for_each(|(rows, pending)| math::add(isa, rows, pending));
        }
        let rows =
            self.hidden.par_chunks_mut(ROWS * self.width).zip(delta.rows.par_chunks(ROWS * delta.hidden));
        rows.enumerate().for_each(|(block, (rows, outputs))| {
            joint.join(isa, rows, outputs, delta.hidden, block * ROWS);
            if let Some(factor) = delta.layer_scale {
                rows.iter_mut().for_each(|v| *v *= factor);
            }
        });
    }
}

/// Hyper-connections: weights of streams, computed from all of them.
pub(super) struct Hyper {
    spec: HyperSpec,
    /// `[n, n_streams · hidden]`
    linear: Linear,
    /// `[n]`
    base: Vec<f32>,
    /// Of pre, post and C; of pre alone in the head.
    scale: Vec<f32>,
    eps: f32,
}

impl Hyper {
    /// `n` is how many weights there are: pre, post and C, or pre alone.
    pub(super) fn load(
        weights: &dyn Weights,
        layer: Option<usize>,
        spec: HyperSpec,
        [mix, base, scale]: [Role; 3],
        n: usize,
    ) -> Result<Hyper> {
        let n_scales = if n == spec.n_streams { 1 } else { 2 + usize::from(n > 2 * spec.n_streams) };
        Ok(Hyper {
            spec,
            linear: Linear::load(weights, layer, (mix, None), n, weights.spec().width())?,
            base: tensor(weights, layer, base, &[n])?,
            scale: tensor(weights, layer, scale, &[n_scales])?,
            eps: weights.spec().norm.eps(),
        })
    }

    /// Weights `[t, n]` of rows of the stream, `[t, n_streams · hidden]`.
    pub(super) fn mixes(&self, isa: Isa, rows: &[f32], mixes: &mut Vec<f32>) {
        let (n, width, n_streams) = (self.linear.n(), self.linear.k(), self.spec.n_streams);
        let mixes = sized(mixes, rows.len() / width * n);
        self.linear.apply(isa, rows, mixes);
        for (row, mix) in rows.chunks_exact(width).zip(mixes.chunks_exact_mut(n)) {
            // The linear map of the normed row is the normed linear map of the row.
            let factor = math::rms_factor(isa, row, self.eps);
            for (i, (m, base)) in mix.iter_mut().zip(&self.base).enumerate() {
                *m = *m * factor * self.scale[(i / n_streams).min(self.scale.len() - 1)] + base;
            }
            let (pre, rest) = mix.split_at_mut(n_streams);
            math::sigmoid_all(isa, pre);
            pre.iter_mut().for_each(|m| *m += self.spec.eps);
            if rest.is_empty() {
                continue;
            }
            let (post, across) = rest.split_at_mut(n_streams);
            math::sigmoid_all(isa, post);
            match self.spec.across {
                Across::Sinkhorn(steps) => {
                    post.iter_mut().for_each(|m| *m *= 2.0);
                    self.balance(isa, steps, across);
                }
                Across::Gated(_) => {}
                Across::Alone(magnitude) => {
                    post.iter_mut().for_each(|m| *m = magnitude * *m + self.spec.eps);
                }
            }
        }
    }

    /// Makes C `[n_streams, n_streams]` doubly stochastic: softmax of its rows, then columns and rows in turn (Sinkhorn).
    fn balance(&self, isa: Isa, steps: usize, across: &mut [f32]) {
        let (n, eps) = (self.spec.n_streams, self.spec.eps);
        for row in across.chunks_exact_mut(n) {
            math::softmax(isa, row, None);
            row.iter_mut().for_each(|v| *v += eps);
        }
        for step in 0..steps {
            if step > 0 {
                for row in across.chunks_exact_mut(n) {
                    let sum = row.iter().sum::<f32>() + eps;
                    row.iter_mut().for_each(|v| *v /= sum);
                }
            }
            for k in 0..n {
                let sum = across.iter().skip(k).step_by(n).sum::<f32>() + eps;
                across.iter_mut().skip(k).step_by(n).for_each(|v| *v /= sum);
            }
        }
    }
}

/// Σ_j pre_j X_j, `[hidden]`, of a row of streams.
pub(super) fn collapse(isa: Isa, pre: &[f32], row: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    for (&weight, stream) in pre.iter().zip(row.chunks_exact(out.len())) {
        math::add_scaled(isa, out, weight, stream);
    }
}
