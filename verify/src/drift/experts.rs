//! Drift of each expert: its output for the tokens that the reference routed to it, coded against uncoded.
//!
//! √(Σ‖y_q − y‖² / Σ‖y‖²) over those tokens, both experts fed with the same inputs.

use moepack_quant::Isa;
use serde::{Deserialize, Serialize};

use super::stream::SquareSums;

/// Drift of one expert, as the report has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExpertDrift {
    /// Index of the layer in the backbone.
    pub layer: usize,
    /// Index of the expert in its layer.
    pub expert: usize,
    /// Tokens that the reference routed to it.
    pub tokens: u64,
    /// Relative error of its output over these tokens; none if there are none.
    pub rel_error: Option<f64>,
    /// Bits per weight of its matrices, where the bundle knows them.
    pub bits: Option<f64>,
    /// Calibration tokens that were routed to it, where it was calibrated.
    pub calibration_tokens: Option<u64>,
    /// Its projections that were not coded by the recipe's solver, since plain rounding was better; none if there are none.
    pub fallback: Option<String>,
}

/// Sums of one expert's error. Fed in token order.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ExpertError {
    /// Tokens seen.
    pub tokens: u64,
    /// Squares of the error and of the reference output.
    pub sums: SquareSums,
}

impl ExpertError {
    /// Adds the outputs of `n_tokens` tokens, not weighted by the router. `[n_tokens, hidden]`
    pub fn add(&mut self, isa: Isa, n_tokens: usize, reference: &[f32], bundle: &[f32]) {
        self.tokens += n_tokens as u64;
        self.sums.add(&SquareSums::of(isa, reference, bundle));
    }

    /// Adds what was summed over later tokens.
    pub fn merge(&mut self, later: &ExpertError) {
        self.tokens += later.tokens;
        self.sums.add(&later.sums);
    }

    /// The row of the report.
    pub fn drift(&self, layer: usize, expert: usize) -> ExpertDrift {
        let rel_error = (self.tokens > 0).then(|| self.sums.rel_error());
        ExpertDrift { layer, expert, tokens: self.tokens, rel_error, ..ExpertDrift::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_without_tokens_has_no_error() {
        assert_eq!(ExpertError::default().drift(3, 5).rel_error, None);
    }

    #[test]
    fn errors_of_all_tokens_are_pooled() {
        let mut error = ExpertError::default();
        error.add(Isa::get(), 2, &[3.0, 0.0, 0.0, 4.0], &[3.0, 0.0, 0.0, 4.5]);
        let mut later = ExpertError::default();
        later.add(Isa::get(), 1, &[0.0, 0.0], &[0.0, 0.0]);
        error.merge(&later);
        let row = error.drift(1, 2);
        assert_eq!((row.layer, row.expert, row.tokens, row.rel_error), (1, 2, 3, Some(0.1)));
    }
}
