//! Drift of the residual stream: how far each layer's output is from the reference's.
//!
//! ‖h_bundle − h_reference‖ / ‖h_reference‖, both norms over all tokens together.

use moepack_quant::Isa;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::rows;

/// Values summed as one piece: pieces are fixed, so that their sums do not depend on threads.
const PIECE: usize = 1 << 16;

/// Drift of one layer, as the report has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerDrift {
    /// Index of the layer in the backbone.
    pub layer: usize,
    /// Relative error of the residual stream behind this layer.
    #[serde(deserialize_with = "crate::report::nan_for_null")]
    pub rel_error: f64,
    /// Mean over tokens of the share of experts chosen by both; none in a dense layer.
    pub routing_overlap: Option<f64>,
    /// Bits per weight of its experts; none in a dense layer.
    #[serde(default)]
    pub bits: Option<f64>,
}

/// ‖b − a‖² and ‖a‖², to be added up over pieces in a fixed order.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SquareSums {
    /// Σ (b − a)²
    pub difference: f64,
    /// Σ a²
    pub reference: f64,
}

impl SquareSums {
    /// The sums over one slice, on this thread.
    pub fn of(isa: Isa, reference: &[f32], bundle: &[f32]) -> SquareSums {
        debug_assert_eq!(reference.len(), bundle.len());
        let (difference, reference) = rows::square_sums(isa, reference, bundle);
        SquareSums { difference, reference }
    }

    /// The sums over a long slice, spread over the threads of the pool; the same bits for any number of them.
    pub fn of_stream(isa: Isa, reference: &[f32], bundle: &[f32]) -> SquareSums {
        let pieces = reference.par_chunks(PIECE).zip(bundle.par_chunks(PIECE));
        let sums: Vec<SquareSums> = pieces.map(|(a, b)| SquareSums::of(isa, a, b)).collect();
        let mut total = SquareSums::default();
        sums.iter().for_each(|s| total.add(s));
        total
    }

    /// Adds a later piece.
    pub fn add(&mut self, later: &SquareSums) {
        self.difference += later.difference;
        self.reference += later.reference;
    }

    /// Σ (b − a)² / Σ a²: what a codec loses. 0 where there is nothing to lose.
    pub fn relative(&self) -> f64 {
        if self.reference > 0.0 { self.difference / self.reference } else { 0.0 }
    }

    /// ‖b − a‖ / ‖a‖; 0 where both are nothing, infinite where only the reference is.
    pub fn rel_error(&self) -> f64 {
        if self.difference == 0.0 && self.reference == 0.0 {
            return 0.0;
        }
        (self.difference / self.reference).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rel_error(a: &[f32], b: &[f32]) -> f64 {
        SquareSums::of_stream(Isa::get(), a, b).rel_error()
    }

    #[test]
    fn small_cases_by_hand() {
        assert_eq!(rel_error(&[3.0, 4.0], &[3.0, 5.0]), 0.2);
        assert_eq!(rel_error(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(rel_error(&[0.0], &[0.0]), 0.0);
        assert_eq!(rel_error(&[0.0], &[1.0]), f64::INFINITY);
        assert!(rel_error(&[1.0], &[f32::NAN]).is_nan());
    }

    #[test]
    fn threads_do_not_change_bits() {
        let a: Vec<f32> = (0..5 * PIECE + 7).map(|i| (i as f32 * 0.1).sin()).collect();
        let b: Vec<f32> = a.iter().map(|v| v + v * v * 0.01).collect();
        let with = |n| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            pool.install(|| rel_error(&a, &b).to_bits())
        };
        assert_eq!(with(1), with(3));
    }
}
