//! Norm of a row: x · rsqrt(mean(x²) + eps) · w.

use moepack_convert::spec::{Norm as Kind, Role};
use moepack_format::Result;
use moepack_quant::{Isa, math};

use super::{Weights, tensor};

/// An RMS norm with its weight.
pub(super) struct Norm {
    /// `[width]`
    weight: Vec<f32>,
    eps: f32,
}

impl Norm {
    pub(super) fn load(source: &dyn Weights, layer: Option<usize>, role: Role, width: usize) -> Result<Norm> {
        let Kind::Rms { eps } = source.spec().norm;
        Norm::load_with(source, layer, role, width, eps)
    }

    /// With an `eps` of its own.
    pub(super) fn load_with(
        source: &dyn Weights,
        layer: Option<usize>,
        role: Role,
        width: usize,
        eps: f32,
    ) -> Result<Norm> {
        Ok(Norm { weight: tensor(source, layer, role, &[width])?, eps })
    }

    /// Length of a row.
    pub(super) fn width(&self) -> usize {
        self.weight.len()
    }

    /// Norm of each row of `x` into `out`, both `[t, width]`.
    pub(super) fn apply(&self, isa: Isa, x: &[f32], out: &mut [f32]) {
        for (x, out) in x.chunks_exact(self.width()).zip(out.chunks_exact_mut(self.width())) {
            math::rms_norm(isa, x, &self.weight, self.eps, out);
        }
    }

    /// Norm of each row of `x`, `[t, width]`, in place.
    pub(super) fn apply_in_place(&self, isa: Isa, x: &mut [f32]) {
        for row in x.chunks_exact_mut(self.width()) {
            let factor = self.factor(isa, row);
            math::scale(isa, row, factor, &self.weight);
        }
    }

    /// What [`Norm::with_factor`] needs to repeat the norm of this row without summing again.
    pub(super) fn factor(&self, isa: Isa, row: &[f32]) -> f32 {
        math::rms_factor(isa, row, self.eps)
    }

    /// Norm of a row whose factor is known.
    pub(super) fn with_factor(&self, isa: Isa, row: &[f32], factor: f32, out: &mut [f32]) {
        math::scaled(isa, row, factor, &self.weight, out);
    }
}
