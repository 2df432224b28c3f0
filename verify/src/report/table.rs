//! Reports as aligned plain text. Nothing needs colour to be understood.

use moepack_format::error::printable;

use super::experts::{EXPERT_COLUMNS, bits, expert_cells};
use super::{DriftReport, PerplexityReport, ReferenceKind, Unit, number};

/// Experts shown, the worst first; JSON and HTML have them all or more.
const EXPERTS_SHOWN: usize = 10;

/// The drift report: what was compared, figures, layers, worst experts, gates, verdict.
pub fn of(report: &DriftReport) -> String {
    let mut text = heading(report);
    text.push_str(&figures(report));
    text.push_str(&baseline_note(report));
    text.push_str(&layers(report));
    text.push_str(&experts(report));
    text.push_str(&sizes(report));
    text.push_str(&gates(report));
    text.push_str(&report.verdict());
    text.push('\n');
    text
}

/// The perplexity report.
pub fn of_perplexity(report: &PerplexityReport) -> String {
    let [low, high] = report.perplexity_ci;
    let rows = [
        vec!["perplexity".to_owned(), number(report.perplexity)],
        vec![interval_name(report.ci_unit).to_owned(), format!("{} … {}", number(low), number(high))],
        vec!["mean NLL, nats".to_owned(), format!("{:.6}", report.nll_mean)],
        vec!["tokens scored".to_owned(), report.tokens_scored.to_string()],
        vec!["windows".to_owned(), format!("{} of {} tokens", report.n_windows, report.ctx)],
        vec!["tokens per second".to_owned(), number(report.tokens_per_second)],
        vec!["peak memory".to_owned(), format!("{:.1} MiB", report.peak_rss_bytes as f64 / 1_048_576.0)],
    ];
    align(&rows, "ll")
}

fn heading(report: &DriftReport) -> String {
    let kind = match report.reference_kind {
        ReferenceKind::Checkpoint => "checkpoint",
        ReferenceKind::Baseline => "baseline",
        ReferenceKind::Bundle => "bundle",
    };
    format!(
        "drift of {}\nagainst {kind} {}\n{} tokens scored in {} windows of at most {} tokens\n\n",
        printable(&report.bundle),
        printable(&report.reference),
        report.tokens_scored,
        report.n_windows,
        report.ctx
    )
}

fn interval_name(unit: Unit) -> &'static str {
    match unit {
        Unit::Window => "95 % interval",
        Unit::Token => "95 % interval (too narrow: one window)",
    }
}

fn figures(report: &DriftReport) -> String {
    let mut rows =
        vec![vec!["figure".to_owned(), "value".to_owned(), interval_name(report.ci_unit).to_owned()]];
    for (name, e, show) in report.figures() {
        rows.push(vec![name.to_owned(), show(e.value), format!("{} … {}", show(e.ci[0]), show(e.ci[1]))]);
    }
    align(&rows, "lrl") + "\n"
}

fn baseline_note(report: &DriftReport) -> String {
    let Some(b) = &report.kld_bound else { return String::new() };
    format!(
        "The baseline keeps the most likely tokens; {} of the probability lies in the rest. The mean KLD is\n\
         estimated without bias from a sample of the rest; with the rest as one token it is {}, and so are the other\n\
         KLD figures taken. The true mean is at least {} and at most {}.\n\n",
        super::percent(b.tail_mass_mean),
        number(b.coarse),
        number(b.lower),
        number(b.upper),
    )
}

fn layers(report: &DriftReport) -> String {
    if report.layers.is_empty() {
        return String::new();
    }
    let mut rows = vec![["layer", "rel. error", "routing overlap", "bits"].map(str::to_owned).to_vec()];
    for layer in &report.layers {
        let overlap = layer.routing_overlap.map_or("dense".to_owned(), super::percent);
        rows.push(vec![layer.layer.to_string(), number(layer.rel_error), overlap, bits(layer.bits)]);
    }
    align(&rows, "rrrr") + "\n"
}

fn experts(report: &DriftReport) -> String {
    let worst = report.worst_experts(EXPERTS_SHOWN);
    if worst.is_empty() {
        return String::new();
    }
    let starved = report.experts.iter().filter(|e| e.tokens == 0).count();
    let mut rows = vec![EXPERT_COLUMNS.map(str::to_owned).to_vec()];
    rows.extend(worst.iter().map(|(e, error)| expert_cells(e, *error)));
    let n = report.experts.len();
    format!("worst of {n} experts ({starved} got no token)\n{}\n", align(&rows, "rrrrrrl"))
}

fn sizes(report: &DriftReport) -> String {
    let bpw = |b: f64| format!("{b:.4}");
    match (report.bpw_experts, report.bpw_total) {
        (Some(experts), Some(total)) => {
            format!("bits per weight: {} experts, {} in all\n\n", bpw(experts), bpw(total))
        }
        _ => String::new(),
    }
}

fn gates(report: &DriftReport) -> String {
    if report.gates.is_empty() {
        return String::new();
    }
    let mut rows = vec![["gate", "limit", "value", "result"].map(str::to_owned).to_vec()];
    for gate in &report.gates {
        let (limit, value) = gate.shown();
        let result = if gate.passed { "passed" } else { "FAILED" };
        rows.push(vec![gate.name.clone(), limit, value, result.to_owned()]);
    }
    align(&rows, "lrrl") + "\n"
}

/// Columns padded to their widest cell; `sides` has `l` or `r` for each column.
fn align(rows: &[Vec<String>], sides: &str) -> String {
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..sides.len()).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).zip(sides.chars()).map(|((cell, &w), side)| match side {
            'r' => format!("{cell:>w$}"),
            _ => format!("{cell:<w$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}
