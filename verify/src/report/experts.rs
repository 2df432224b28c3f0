//! Rows of experts, as the text and the page show them.

use super::number;
use crate::drift::ExpertDrift;

/// What the tables of experts show.
pub(super) const EXPERT_COLUMNS: [&str; 7] =
    ["layer", "expert", "tokens", "rel. error", "bits", "calibration", "fallback"];

/// What one line of them says; `error` is the relative error of the expert's output.
pub(super) fn expert_cells(e: &ExpertDrift, error: f64) -> Vec<String> {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    vec![
        e.layer.to_string(),
        e.expert.to_string(),
        e.tokens.to_string(),
        number(error),
        bits(e.bits),
        or_dash(e.calibration_tokens.map(|n| n.to_string())),
        or_dash(e.fallback.clone()),
    ]
}

/// Bits per weight, for people.
pub(super) fn bits(bits: Option<f64>) -> String {
    bits.map_or_else(|| "-".to_owned(), |b| format!("{b:.4}"))
}
