//! How far calibration reached: for each matrix of each expert how it was coded, and a summary for people.

use moepack_convert::Part;
use moepack_format::manifest::LayerEntry;
use serde::Serialize;

use crate::output::table;
use crate::recipe::MATRICES;

/// Matrices named, those with the largest held-out error first.
const WORST_NAMED: usize = 5;
/// Experts without a token that are named.
const STARVED_NAMED: usize = 12;

/// How one matrix of an expert was coded, as the manifest knows it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ExpertRow<'a> {
    /// Index of the layer.
    pub layer: u32,
    /// Index of the expert in its layer.
    pub expert: usize,
    /// `gate_proj`, `up_proj` or `down_proj`.
    pub projection: &'static str,
    /// Bits per weight.
    pub bits: f64,
    /// Calibration tokens that were routed to the expert; null without calibration.
    pub tokens: Option<u64>,
    /// `own`, `shrunk` or `pooled`; null where the solver had no Hessian.
    pub hessian_source: Option<&'a str>,
    /// Relative squared error of the output over held-out inputs.
    pub heldout_error: Option<f64>,
    /// The same for plain rounding with the same codec.
    pub heldout_error_rtn: Option<f64>,
    /// The solver that was used instead of the recipe's.
    pub fallback: Option<&'a str>,
}

/// A row for each matrix: layers, experts and projections ascending. None of layers whose manifest does not say.
pub fn expert_rows(layers: &[LayerEntry]) -> Vec<ExpertRow<'_>> {
    let experts = layers.iter().flat_map(|l| (0..l.n_experts as usize).map(move |e| (l, e)));
    experts.flat_map(|(layer, e)| MATRICES.into_iter().filter_map(move |m| row(layer, e, m.name()))).collect()
}

fn row<'a>(layer: &'a LayerEntry, expert: usize, projection: &'static str) -> Option<ExpertRow<'a>> {
    let entry = layer.experts.get(projection)?;
    Some(ExpertRow {
        layer: layer.layer,
        expert,
        projection,
        bits: *entry.bits.of(expert)?,
        tokens: layer.usage.as_ref().and_then(|u| u.get(expert).copied()),
        hessian_source: entry.hessian_source.of(expert)?.as_deref(),
        heldout_error: *entry.heldout_error.of(expert)?,
        heldout_error_rtn: *entry.heldout_error_rtn.of(expert)?,
        fallback: entry.fallback.of(expert)?.as_deref(),
    })
}

/// How far calibration reached, for people; nothing where no solver worked with Hessians.
pub fn coverage(layers: &[LayerEntry]) -> String {
    let rows = expert_rows(layers);
    if rows.iter().all(|r| r.hessian_source.is_none()) {
        return String::new();
    }
    let count = |of: &dyn Fn(&ExpertRow<'_>) -> bool| rows.iter().filter(|r| of(r)).count().to_string();
    let source = |name: &'static str| count(&move |r| r.hessian_source == Some(name));
    let line = |what: &str, n: String| vec![what.to_owned(), n];
    let mut text = table(&[
        line("calibration", "matrices".to_owned()),
        line("Hessian of the expert's own tokens", source("own")),
        line("shrunk towards the layer's", source("shrunk")),
        line("the layer's alone", source("pooled")),
        line("fell back to plain rounding", count(&|r| r.fallback.is_some())),
    ]);
    text += &starved(&rows);
    text + &worst(rows)
}

fn starved(rows: &[ExpertRow<'_>]) -> String {
    let starved: Vec<String> = rows
        .iter()
        .filter(|r| r.tokens == Some(0) && r.projection == Part::Down.name())
        .map(|r| format!("{}.{}", r.layer, r.expert))
        .collect();
    let more = if starved.len() > STARVED_NAMED { " …" } else { "" };
    let named = starved.iter().take(STARVED_NAMED).map(String::as_str).collect::<Vec<_>>().join(" ");
    match starved.len() {
        0 => "every expert got tokens\n".to_owned(),
        n => format!("{n} experts got no token (layer.expert): {named}{more}\n"),
    }
}

fn worst(mut rows: Vec<ExpertRow<'_>>) -> String {
    rows.retain(|r| r.heldout_error.is_some());
    rows.sort_by(|a, b| b.heldout_error.unwrap_or(0.0).total_cmp(&a.heldout_error.unwrap_or(0.0)));
    rows.truncate(WORST_NAMED);
    format!("worst over held-out inputs\n{}", expert_table(&rows))
}

/// Rows for people.
pub fn expert_table(rows: &[ExpertRow<'_>]) -> String {
    let head = ["layer", "expert", "projection", "bits", "tokens", "Hessian", "error", "rounded", "fallback"];
    let head = head.map(str::to_owned).to_vec();
    table(&std::iter::once(head).chain(rows.iter().map(ExpertRow::cells)).collect::<Vec<_>>())
}

impl ExpertRow<'_> {
    /// Of a matrix of which only the bits are known.
    pub fn of_bits(layer: u32, expert: usize, projection: &'static str, bits: f64) -> ExpertRow<'static> {
        ExpertRow {
            layer,
            expert,
            projection,
            bits,
            tokens: None,
            hessian_source: None,
            heldout_error: None,
            heldout_error_rtn: None,
            fallback: None,
        }
    }

    fn cells(&self) -> Vec<String> {
        let number = |e: Option<f64>| e.map_or_else(|| "-".to_owned(), |e| format!("{e:.3e}"));
        vec![
            self.layer.to_string(),
            self.expert.to_string(),
            self.projection.to_owned(),
            format!("{:.4}", self.bits),
            self.tokens.map_or_else(|| "-".to_owned(), |n| n.to_string()),
            self.hessian_source.unwrap_or("-").to_owned(),
            number(self.heldout_error),
            number(self.heldout_error_rtn),
            self.fallback.unwrap_or("-").to_owned(),
        ]
    }
}
