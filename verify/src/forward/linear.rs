//! A linear map with an optional bias: y = W x + b.

use std::sync::Arc;

use moepack_convert::spec::Role;
use moepack_format::Result;
use moepack_quant::gemm::{PackedWeights, Rows};
use moepack_quant::{Isa, math};
use rayon::prelude::*;

use super::{Tap, Weights, of_shape, tensor};

/// From this many rows on, one product is split among threads; below, callers have windows or blocks to split.
const PARALLEL_ROWS: usize = 1024;
/// Rows of such a part.
const PART_ROWS: usize = 384;

/// Values of a long matrix, such as the head, that are decoded at a time: 128 MiB.
const PART_VALUES: usize = 32 << 20;

/// `[n, k]` packed, and `[n]`.
pub(super) struct Linear {
    weights: PackedWeights,
    bias: Option<Vec<f32>>,
    tap: Option<Arc<Tap>>,
}

impl Linear {
    /// The matrix `role` of shape `[n, k]` and, where named, the bias `[n]`.
    pub(super) fn load(
        source: &dyn Weights,
        layer: Option<usize>,
        (role, bias): (Role, Option<Role>),
        n: usize,
        k: usize,
    ) -> Result<Linear> {
        let bias = bias.map(|role| tensor(source, layer, role, &[n])).transpose()?;
        if n * k <= PART_VALUES {
            let linear = Linear::new(&tensor(source, layer, role, &[n, k])?, bias, n, k);
            return Ok(linear.watched(source.tap(layer, role)));
        }
        let mut weights = PackedWeights::zeros(n, k);
        let n_rows = (PART_VALUES / k).next_multiple_of(16);
        for first in (0..n).step_by(n_rows) {
            let rows = first..n.min(first + n_rows);
            let part = source.trunk_rows(layer, role, rows.clone())?; // [rows, k]
            let part = of_shape(part, layer, role, &[rows.len(), k])?;
            weights.set_rows(first, Rows { data: &part, stride: k }, rows.len());
        }
        Ok(Linear { weights, bias, tap: source.tap(layer, role) })
    }

    /// From `[n, k]` and `[n]`, whose lengths were checked.
    pub(super) fn new(weights: &[f32], bias: Option<Vec<f32>>, n: usize, k: usize) -> Linear {
        Linear { weights: PackedWeights::pack(weights, n, k), bias, tap: None }
    }

    /// The same, its inputs watched.
    pub(super) fn watched(self, tap: Option<Arc<Tap>>) -> Linear {
        Linear { tap, ..self }
    }

    /// Number of outputs.
    pub(super) fn n(&self) -> usize {
        self.weights.n()
    }

    /// Number of inputs.
    pub(super) fn k(&self) -> usize {
        self.weights.k()
    }

    /// `out[t, n] = x[t, k] · Wᵀ + b`
    pub(super) fn apply(&self, isa: Isa, x: &[f32], out: &mut [f32]) {
        let (n, k) = (self.n(), self.k());
        if out.len() < PARALLEL_ROWS * n {
            return self.apply_part(isa, x, out);
        }
        let parts = x.par_chunks(PART_ROWS * k).zip(out.par_chunks_mut(PART_ROWS * n));
        parts.for_each(|(x, out)| self.apply_part(isa, x, out));
    }

    fn apply_part(&self, isa: Isa, x: &[f32], out: &mut [f32]) {
        if let Some(tap) = &self.tap {
            tap.see(x);
        }
        self.weights.matmul(isa, x, out);
        if let Some(bias) = &self.bias {
            out.chunks_exact_mut(bias.len()).for_each(|row| math::add(isa, row, bias));
        }
    }
}
