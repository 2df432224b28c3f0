//! The drift report as one HTML file: no script, nothing loaded from elsewhere, light and dark.
//!
//! Names come from a stranger's model and are escaped; a content security policy forbids the rest.

use std::fmt::Write as _;

use moepack_format::error::printable;

use super::experts::{EXPERT_COLUMNS, bits, expert_cells};
use super::{DriftReport, Estimate, Unit, number, percent};

/// Experts in the table, the worst first.
const EXPERTS_SHOWN: usize = 50;

/// The whole page.
pub fn page(report: &DriftReport) -> String {
    let sections = [
        heading(report),
        verdict(report),
        figures(report),
        baseline(report),
        layers(report),
        experts(report),
        method(report),
    ];
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>Drift of {}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{}</body>\n</html>\n",
        escape(&report.bundle),
        sections.concat()
    )
}

const STYLE: &str = "
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1f24; --muted: #57606a; --line: #d0d7de; --bar: #2563c9;
  --good: #116329; --bad: #a40e26; --panel: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --bg: #0f1318; --fg: #e6e9ee; --muted: #9aa4b0; --line: #323a44;
  --bar: #6ea8ff; --good: #57d27d; --bad: #ff7b86; --panel: #171d24 } }
body { background: var(--bg); color: var(--fg); font: 16px/1.5 system-ui, sans-serif; max-width: 58rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
p.verdict { border-left: .4rem solid var(--muted); background: var(--panel); padding: .7rem 1rem; font-weight: 600 }
p.verdict.passed { border-color: var(--good) } p.verdict.failed { border-color: var(--bad) }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { font-weight: 600 } td.text, th.text { text-align: left; white-space: normal }
.muted { color: var(--muted) } code { overflow-wrap: anywhere }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--muted); font: 11px system-ui, sans-serif }
svg line { stroke: var(--line) } svg rect { fill: var(--bar) }
";

fn heading(report: &DriftReport) -> String {
    let names = format!(
        "<p>Bundle <code>{}</code><br>against <code>{}</code></p>\n",
        escape(&report.bundle),
        escape(&report.reference)
    );
    let sizes = match (report.bpw_experts, report.bpw_total) {
        (Some(experts), Some(total)) => {
            format!(" The bundle takes {experts:.4} bits per weight of its experts and {total:.4} in all.")
        }
        _ => String::new(),
    };
    format!(
        "<h1>Drift report</h1>\n{names}<p class=\"muted\">{} tokens scored in {} windows of at most {} tokens.{sizes}</p>\n",
        report.tokens_scored, report.n_windows, report.ctx
    )
}

fn verdict(report: &DriftReport) -> String {
    let class = match (report.gates.is_empty(), report.passed()) {
        (true, _) => "none",
        (false, true) => "passed",
        (false, false) => "failed",
    };
    let mut html = format!("<p class=\"verdict {class}\">{}</p>\n", escape(&report.verdict()));
    if !report.gates.is_empty() {
        let rows = report.gates.iter().map(|gate| {
            let (limit, value) = gate.shown();
            let result = if gate.passed { "passed" } else { "FAILED" };
            vec![escape(&gate.name), limit, value, result.to_owned()]
        });
        html += &table(&["gate", "limit", "value", "result"], rows, 1);
    }
    html
}

fn figures(report: &DriftReport) -> String {
    let meanings = [
        "Information lost per token, on average; 0 is no loss.",
        "One token in a hundred is worse than this.",
        "One token in a thousand is worse than this.",
        "The worst token of this text.",
        "How often both models find the same next token most likely.",
        "How surprised the original is by this text; lower is better.",
        "How surprised the bundle is by this text.",
        "1 is no loss; 1.01 is 1 % more surprise.",
    ];
    let rows = report.figures().into_iter().zip(meanings).map(|((name, e, show), meaning)| {
        let Estimate { value, ci: [low, high] } = e;
        vec![name.to_owned(), show(value), format!("{} … {}", show(low), show(high)), meaning.to_owned()]
    });
    let head = ["figure", "value", "95 % interval", "what it means"];
    format!("<h2>What the bundle predicts differently</h2>\n{}", table_with_text_end(&head, rows))
}

fn baseline(report: &DriftReport) -> String {
    let Some(b) = &report.kld_bound else { return String::new() };
    format!(
        "<p>The reference is a baseline file. It keeps the most likely tokens; {} of the probability lies in the \
         rest. The mean KLD is estimated without bias from a sample of the rest; with the rest as one token it is {}, and \
         so are the other KLD figures taken. The true mean is at least {} and at most {}.</p>\n",
        percent(b.tail_mass_mean),
        number(b.coarse),
        number(b.lower),
        number(b.upper)
    )
}

fn layers(report: &DriftReport) -> String {
    if report.layers.is_empty() {
        return String::new();
    }
    let errors: Vec<(usize, f64)> = report.layers.iter().map(|l| (l.layer, l.rel_error)).collect();
    let overlaps: Vec<(usize, f64)> =
        report.layers.iter().filter_map(|l| Some((l.layer, l.routing_overlap?))).collect();
    let rows = report.layers.iter().map(|l| {
        let overlap = l.routing_overlap.map_or("dense".to_owned(), percent);
        vec![l.layer.to_string(), number(l.rel_error), overlap, bits(l.bits)]
    });
    format!(
        "<h2>Where in the model it comes from</h2>\n\
         <p>Relative error of the residual stream behind each layer. It adds up from layer to layer; a jump points \
         at a layer that was coded too coarsely.</p>\n{}\
         <p>Routing overlap: the share of a token's experts that both models choose.</p>\n{}\
         <details><summary>As a table</summary>\n{}</details>\n",
        chart("relative error by layer", &errors, number),
        chart("routing overlap by layer", &overlaps, percent),
        table(&["layer", "rel. error", "routing overlap", "bits"], rows, 0)
    )
}

fn experts(report: &DriftReport) -> String {
    let worst = report.worst_experts(EXPERTS_SHOWN);
    if worst.is_empty() {
        return String::new();
    }
    let starved = report.experts.iter().filter(|e| e.tokens == 0).count();
    let rows = worst.iter().map(|(e, error)| expert_cells(e, *error).iter().map(|c| escape(c)).collect());
    format!(
        "<h2>Which experts lost most</h2>\n\
         <p>Error of an expert's output relative to its size, over the tokens that the original sends to it; the \
         chart has the worst expert of each layer. {starved} of {} experts got no token of this text, so nothing is \
         known about them.</p>\n{}{}",
        report.experts.len(),
        chart("largest relative error of an expert by layer", &worst_by_layer(report), number),
        table(&EXPERT_COLUMNS, rows, 0)
    )
}

fn worst_by_layer(report: &DriftReport) -> Vec<(usize, f64)> {
    let mut by_layer = std::collections::BTreeMap::<usize, f64>::new();
    for e in &report.experts {
        let Some(error) = e.rel_error else { continue };
        let worst = by_layer.entry(e.layer).or_insert(error);
        if error > *worst || error.is_nan() {
            *worst = error;
        }
    }
    by_layer.into_iter().collect()
}

fn method(report: &DriftReport) -> String {
    let unit = match report.ci_unit {
        Unit::Window => {
            "Intervals take windows as independent of each other, since tokens of one window are not."
        }
        Unit::Token => {
            "There is one window only, so intervals take its tokens as independent; they are not, and the intervals \
             are too narrow."
        }
    };
    format!(
        "<h2>How it was measured</h2>\n<p class=\"muted\">The original and the bundle read the same windows of text. \
         After each token both give a probability for every possible next token; KLD is the Kullback-Leibler \
         divergence of the bundle's from the original's in nats, and perplexity is e to the mean negative log \
         probability of the tokens that did follow. {unit}</p>\n"
    )
}

/// A bar for each layer. What is no number has no bar, but a label.
fn chart(name: &str, bars: &[(usize, f64)], show: fn(f64) -> String) -> String {
    const WIDTH: f64 = 720.0;
    const LEFT: f64 = 56.0;
    const TOP: f64 = 10.0;
    const HEIGHT: f64 = 140.0;
    if bars.is_empty() {
        return String::new();
    }
    let max = bars.iter().map(|b| b.1).filter(|v| v.is_finite()).fold(0.0, f64::max);
    let max = if max > 0.0 { max } else { 1.0 };
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} 180\" role=\"img\" aria-label=\"{}\">\n", escape(name));
    for part in [0.0, 0.5, 1.0] {
        let y = TOP + HEIGHT * (1.0 - part);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{WIDTH}\" y2=\"{y:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 6.0,
            y + 4.0,
            show(max * part)
        );
    }
    let step = (WIDTH - LEFT) / bars.len() as f64;
    let every = bars.len().div_ceil(16);
    for (i, &(layer, value)) in bars.iter().enumerate() {
        let x = LEFT + step * i as f64;
        let height = if value.is_finite() { HEIGHT * (value / max).max(0.0) } else { 0.0 };
        let _ = writeln!(
            svg,
            "<rect x=\"{:.2}\" y=\"{:.2}\" width=\"{:.2}\" height=\"{height:.2}\"><title>layer {layer}: {}</title></rect>",
            x + step * 0.1,
            TOP + HEIGHT - height,
            step * 0.8,
            show(value)
        );
        if i % every == 0 || !value.is_finite() {
            let label = if value.is_finite() { layer.to_string() } else { format!("{layer}: {value}") };
            let _ = writeln!(
                svg,
                "<text x=\"{:.2}\" y=\"168\" text-anchor=\"middle\">{label}</text>",
                x + step * 0.5
            );
        }
    }
    svg + "</svg>\n"
}

/// A table of cells that are HTML already; the first `n_text` columns are text, the others numbers.
fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>, n_text: usize) -> String {
    let is_text = |i: usize| i < n_text;
    table_of(head, rows, is_text)
}

fn table_with_text_end(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let last = head.len().saturating_sub(1);
    table_of(head, rows, |i| i == 0 || i == last)
}

fn table_of(
    head: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
    is_text: impl Fn(usize) -> bool,
) -> String {
    let class = |i: usize| if is_text(i) { " class=\"text\"" } else { "" };
    let line = |tag: &str, cells: &[String]| {
        let cells = cells.iter().enumerate().map(|(i, c)| format!("<{tag}{}>{c}</{tag}>", class(i)));
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    };
    let head: Vec<String> = head.iter().map(|h| (*h).to_owned()).collect();
    let body: String = rows.map(|r| line("td", &r)).collect();
    format!("<div class=\"scroll\"><table>\n{}{body}</table></div>\n", line("th", &head))
}

/// Text as HTML shows it, with nothing left that could be markup.
fn escape(text: &str) -> String {
    let mut out = String::new();
    for c in printable(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::*;
    use crate::gates::Limits;

    #[test]
    fn a_hostile_name_stays_text() {
        let mut report = example();
        report.bundle = "</title><script>alert(1)</script>\u{202e}".to_owned();
        report.reference = "\" onload='x' & <img src=//evil>".to_owned();
        report.gates = vec![crate::gates::Gate { name: "<b>".into(), limit: 1.0, value: 0.0, passed: false }];
        let html = page(&report);
        for bad in ["<script", "<img", "<b>", "\u{202e}"] {
            assert!(!html.contains(bad), "{bad}");
        }
        assert!(html.contains("&lt;script&gt;alert(1)&lt;/script&gt;\\u{202e}"));
        assert!(html.contains("&quot; onload=&#39;x&#39; &amp; &lt;img src=//evil&gt;"));
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        let html = page(&example());
        for bad in ["http:", "https:", "src=", "href=", "url(", "@import", "<script"] {
            assert!(!html.contains(bad), "{bad}");
        }
        assert!(html.contains("prefers-color-scheme: dark"));
    }

    #[test]
    fn every_element_is_closed() {
        let mut report = example();
        report.judge(&Limits { max_kld: Some(0.5), ..Limits::default() });
        report.layers[1].rel_error = f64::NAN;
        let html = page(&report);
        for tag in "html head body title style h1 h2 p table tr th td div svg rect text details summary code"
            .split(' ')
        {
            let opened =
                html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
            let closed = html.matches(&format!("</{tag}>")).count();
            assert!(opened > 0 && opened == closed, "{tag}: {opened} opened, {closed} closed");
        }
        assert!(html.contains("1: NaN"), "a layer without a number is named");
    }

    #[test]
    fn the_page_says_what_the_gates_found() {
        let mut report = example();
        assert!(page(&report).contains("verdict none"));
        report.judge(&Limits { max_kld: Some(0.5), ..Limits::default() });
        assert!(page(&report).contains("verdict passed"));
        report.judge(&Limits { max_kld: Some(0.0), ..Limits::default() });
        assert!(page(&report).contains("verdict failed") && page(&report).contains("FAILED"));
    }
}
