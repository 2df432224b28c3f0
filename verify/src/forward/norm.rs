//! Norms of a row: RMS, x · rsqrt(mean(x²) + eps) · w, and layer norm, (x − mean) · rsqrt(variance + eps) · w + b.

use moepack_convert::spec::{Norm as Kind, Role};
use moepack_format::Result;
use moepack_quant::{Isa, math};

use super::{Weights, tensor};

/// Values that [`Norm::notes`] leaves of a row: its mean and its factor.
pub(super) const NOTES: usize = 2;

/// A norm with its weights.
#[derive(Clone, Debug)]
pub(super) struct Norm {
    /// `[width]`
    weight: Vec<f32>,
    /// `[width]`
    bias: Option<Vec<f32>>,
    /// The mean is subtracted.
    centred: bool,
    eps: f32,
}

impl Norm {
    /// The model's kind of norm: weight and, where it has one, bias.
    pub(super) fn load(
        source: &dyn Weights,
        layer: Option<usize>,
        (weight, bias): (Role, Role),
        width: usize,
    ) -> Result<Norm> {
        let mut norm = Norm::load_with(source, layer, weight, width, None)?;
        if let Kind::Layer { bias: true, .. } = source.spec().norm {
            norm.bias = Some(tensor(source, layer, bias, &[width])?);
        }
        Ok(norm)
    }

    /// The model's kind of norm without a bias, and with an `eps` of its own if one is given.
    pub(super) fn load_with(
        source: &dyn Weights,
        layer: Option<usize>,
        role: Role,
        width: usize,
        eps: Option<f32>,
    ) -> Result<Norm> {
        let kind = source.spec().norm;
        let mut weight = tensor(source, layer, role, &[width])?;
        if let Kind::RmsPlusOne { .. } = kind {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        let centred = matches!(kind, Kind::Layer { .. });
        Ok(Norm { weight, bias: None, centred, eps: eps.unwrap_or(kind.eps()) })
    }

    /// RMS with these weights, whatever the model's kind is.
    pub(super) fn rms(weight: Vec<f32>, eps: f32) -> Norm {
        Norm { weight, bias: None, centred: false, eps }
    }

    /// RMS without weights, whatever the model's kind is.
    pub(super) fn unweighted(width: usize, eps: f32) -> Norm {
        Norm { weight: vec![1.0; width], bias: None, centred: false, eps }
    }

    /// A layer norm, whatever the model's kind is.
    pub(super) fn layer(weight: Vec<f32>, bias: Option<Vec<f32>>, eps: f32) -> Norm {
        Norm { weight, bias, centred: true, eps }
    }

    /// The same with another `eps`, if there is one.
    pub(super) fn with_eps(self, eps: Option<f32>) -> Norm {
        Norm { eps: eps.unwrap_or(self.eps), ..self }
    }

    /// Length of a row.
    pub(super) fn width(&self) -> usize {
        self.weight.len()
    }

    /// Norm of each row of `x` into `out`, both `[t, width]`.
    pub(super) fn apply(&self, isa: Isa, x: &[f32], out: &mut [f32]) {
        let mut notes = [0.0; NOTES];
        for (x, out) in x.chunks_exact(self.width()).zip(out.chunks_exact_mut(self.width())) {
            self.notes(isa, x, &mut notes);
            self.apply_noted(isa, x, &notes, out);
        }
    }

    /// Norm of each row of `x`, `[t, width]`, in place.
    pub(super) fn apply_in_place(&self, isa: Isa, x: &mut [f32]) {
        let mut notes = [0.0; NOTES];
        for row in x.chunks_exact_mut(self.width()) {
            self.notes(isa, row, &mut notes);
            self.apply_noted_in_place(isa, row, &notes);
        }
    }

    /// What [`Norm::apply_noted`] needs to repeat the norm of this row without summing again.
    pub(super) fn notes(&self, isa: Isa, row: &[f32], notes: &mut [f32]) {
        let (mean, factor) = match self.centred {
            false => (0.0, math::rms_factor(isa, row, self.eps)),
            true => moments(row, self.eps),
        };
        notes.copy_from_slice(&[mean, factor]);
    }

    /// Norm of a row whose notes are known.
    pub(super) fn apply_noted(&self, isa: Isa, row: &[f32], notes: &[f32], out: &mut [f32]) {
        if self.centred {
            out.copy_from_slice(row);
            return self.apply_noted_in_place(isa, out, notes);
        }
        math::scaled(isa, row, notes[1], &self.weight, out);
    }

    /// The same in place.
    pub(super) fn apply_noted_in_place(&self, isa: Isa, row: &mut [f32], notes: &[f32]) {
        if self.centred {
            row.iter_mut().for_each(|v| *v -= notes[0]);
        }
        math::scale(isa, row, notes[1], &self.weight);
        if let Some(bias) = &self.bias {
            math::add(isa, row, bias);
        }
    }
}

/// Mean and rsqrt(variance + eps) of a row: sums in f64, one value after the other.
fn moments(row: &[f32], eps: f32) -> (f32, f32) {
    let n = row.len().max(1) as f64;
    let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let variance = row.iter().map(|&v| (f64::from(v) - mean) * (f64::from(v) - mean)).sum::<f64>() / n;
    (mean as f32, (1.0 / (variance + f64::from(eps)).sqrt()) as f32)
}
