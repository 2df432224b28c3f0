//! Reports: the values that `verify` and `perplexity` print, as JSON for programs and as tables for people.
//!
//! A number that does not exist (NaN, infinite) is `null` in JSON.

use serde::{Deserialize, Deserializer, Serialize};

use crate::drift::{Estimate, ExpertDrift, LayerDrift, LogitSummary, Unit, intervals};
use crate::gates::{Gate, Limits};

mod experts;
pub mod html;
mod table;

/// Name and version of the JSON of [`DriftReport`].
pub const DRIFT_SCHEMA: &str = "moepack.verify/1";
/// Name and version of the JSON of [`PerplexityReport`].
pub const PERPLEXITY_SCHEMA: &str = "moepack.perplexity/1";

/// What was compared with what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReferenceKind {
    /// An upstream checkpoint, run beside the bundle.
    #[default]
    Checkpoint,
    /// A baseline file: stored predictions of a checkpoint.
    Baseline,
    /// Another bundle.
    Bundle,
}

/// Everything `verify` measures. Each `…_ci` is the 95 % interval of the figure above it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the names are those of the JSON, explained where they are measured")]
pub struct DriftReport {
    /// [`DRIFT_SCHEMA`].
    pub schema: String,
    /// Path of the bundle.
    pub bundle: String,
    /// Path of the reference.
    pub reference: String,
    pub reference_kind: ReferenceKind,
    pub tokens_scored: usize,
    pub n_windows: usize,
    /// Tokens of the longest window.
    pub ctx: usize,
    /// What the intervals take as independent: windows, or tokens if there is one window only.
    pub ci_unit: Unit,
    /// Nats. Against a baseline: estimated without bias from its sampled tail, see `kld_bound`; the other KLD figures
    /// are then those of the kept tokens and the tail as one token.
    #[serde(deserialize_with = "nan_for_null")]
    pub kld_mean: f64,
    #[serde(deserialize_with = "nans_for_nulls")]
    pub kld_mean_ci: [f64; 2],
    #[serde(deserialize_with = "nan_for_null")]
    pub kld_p99: f64,
    #[serde(deserialize_with = "nans_for_nulls")]
    pub kld_p99_ci: [f64; 2],
    #[serde(deserialize_with = "nan_for_null")]
    pub kld_p999: f64,
    #[serde(deserialize_with = "nans_for_nulls")]
    pub kld_p999_ci: [f64; 2],
    #[serde(deserialize_with = "nan_for_null")]
    pub kld_max: f64,
    #[serde(deserialize_with = "nans_for_nulls")]
    pub kld_max_ci: [f64; 2],
    /// Share, 0 to 1.
    #[serde(deserialize_with = "nan_for_null")]
    pub top1_agreement: f64,
    #[serde(deserialize_with = "nans_for_nulls")]
    pub top1_agreement_ci: [f64; 2],
    #[serde(deserialize_with = "nan_for_null")]
    pub perplexity_reference: f64,
    #[serde(deserialize_with = "nans_for_nulls")]
    pub perplexity_reference_ci: [f64; 2],
    #[serde(deserialize_with = "nan_for_null")]
    pub perplexity_bundle: f64,
    #[serde(deserialize_with = "nans_for_nulls")]
    pub perplexity_bundle_ci: [f64; 2],
    /// Bundle over reference.
    #[serde(deserialize_with = "nan_for_null")]
    pub perplexity_ratio: f64,
    #[serde(deserialize_with = "nans_for_nulls")]
    pub perplexity_ratio_ci: [f64; 2],
    /// What the baseline leaves open; none against a checkpoint.
    pub kld_bound: Option<KldBound>,
    /// One row a layer; none against a baseline, which does not know the inside of the model.
    pub layers: Vec<LayerDrift>,
    /// One row an expert; none against a baseline.
    pub experts: Vec<ExpertDrift>,
    /// Bits per weight of the routed experts, all overhead but padding counted.
    pub bpw_experts: Option<f64>,
    /// Bits per weight of the whole bundle.
    pub bpw_total: Option<f64>,
    pub gates: Vec<Gate>,
}

/// What a baseline leaves open about the mean KLD, in nats. `BASELINE.md` has the mathematics.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct KldBound {
    /// Mean probability of the tokens that the baseline does not keep.
    #[serde(deserialize_with = "nan_for_null")]
    pub tail_mass_mean: f64,
    /// The mean KLD with the tail taken as one token, which is never more than the whole.
    #[serde(deserialize_with = "nan_for_null")]
    pub coarse: f64,
    /// The true mean over this text is no less: `coarse` less `rounding`.
    #[serde(deserialize_with = "nan_for_null")]
    pub lower: f64,
    /// The true mean over this text is no more, whatever the tail looks like.
    #[serde(deserialize_with = "nan_for_null")]
    pub upper: f64,
    /// How far rounding in the file may have moved `coarse`, either way.
    #[serde(deserialize_with = "nan_for_null")]
    pub rounding: f64,
}

impl Default for DriftReport {
    fn default() -> Self {
        let nothing = crate::drift::LogitDrift::default().summary();
        DriftReport::new(&nothing, 0)
    }
}

impl DriftReport {
    /// The report of the predictions' drift; the caller fills in names, layers, experts and sizes.
    pub fn new(summary: &LogitSummary, ctx: usize) -> DriftReport {
        let tail = summary.tail.as_ref();
        let kld_mean = tail.map_or(&summary.kld_mean, |t| &t.estimate);
        DriftReport {
            schema: DRIFT_SCHEMA.to_owned(),
            bundle: String::new(),
            reference: String::new(),
            reference_kind: if tail.is_some() { ReferenceKind::Baseline } else { ReferenceKind::Checkpoint },
            tokens_scored: summary.tokens_scored,
            n_windows: summary.n_windows,
            ctx,
            ci_unit: summary.ci_unit,
            kld_mean: kld_mean.value,
            kld_mean_ci: kld_mean.ci,
            kld_p99: summary.kld_p99.value,
            kld_p99_ci: summary.kld_p99.ci,
            kld_p999: summary.kld_p999.value,
            kld_p999_ci: summary.kld_p999.ci,
            kld_max: summary.kld_max.value,
            kld_max_ci: summary.kld_max.ci,
            top1_agreement: summary.top1_agreement.value,
            top1_agreement_ci: summary.top1_agreement.ci,
            perplexity_reference: summary.perplexity_reference.value,
            perplexity_reference_ci: summary.perplexity_reference.ci,
            perplexity_bundle: summary.perplexity_bundle.value,
            perplexity_bundle_ci: summary.perplexity_bundle.ci,
            perplexity_ratio: summary.perplexity_ratio.value,
            perplexity_ratio_ci: summary.perplexity_ratio.ci,
            kld_bound: tail.map(|t| KldBound {
                tail_mass_mean: t.tail_mass,
                coarse: summary.kld_mean.value,
                lower: t.lower,
                upper: t.upper,
                rounding: t.rounding,
            }),
            layers: Vec::new(),
            experts: Vec::new(),
            bpw_experts: None,
            bpw_total: None,
            gates: Vec::new(),
        }
    }

    /// Judges the report by `limits`; `false` means that the command ends with exit code 1.
    pub fn judge(&mut self, limits: &Limits) -> bool {
        self.gates = limits.gates(self);
        self.passed()
    }

    /// Whether every gate passed.
    pub fn passed(&self) -> bool {
        self.gates.iter().all(|g| g.passed)
    }

    /// The gates that do not hold, with value and limit, in one line; nothing if all do.
    pub fn findings(&self) -> Option<String> {
        let failed: Vec<String> = self.gates.iter().filter(|g| !g.passed).map(Gate::finding).collect();
        let (n, f) = (self.gates.len(), failed.len());
        (f > 0).then(|| format!("{f} of {n} gates do not hold: {}", failed.join("; ")))
    }

    /// The report in one line.
    pub fn verdict(&self) -> String {
        match (self.gates.len(), self.findings()) {
            (0, _) => "verdict: no gate was set (--max-kld, --max-ppl-increase, --min-top1)".to_owned(),
            (n, None) => format!("verdict: passed, {n} of {n} gates hold"),
            (_, Some(findings)) => format!("verdict: FAILED, {findings}"),
        }
    }

    /// The report as tables for people.
    pub fn to_text(&self) -> String {
        table::of(self)
    }

    /// The report as one HTML file that needs nothing else.
    pub fn to_html(&self) -> String {
        html::page(self)
    }

    /// The figures that have an interval, in the order of the JSON: name, value, interval.
    fn figures(&self) -> [Figure; 8] {
        let e = |value, ci| Estimate { value, ci };
        [
            ("KLD mean, nats", e(self.kld_mean, self.kld_mean_ci), number),
            ("KLD 99 %, nats", e(self.kld_p99, self.kld_p99_ci), number),
            ("KLD 99.9 %, nats", e(self.kld_p999, self.kld_p999_ci), number),
            ("KLD max, nats", e(self.kld_max, self.kld_max_ci), number),
            ("top-1 agreement", e(self.top1_agreement, self.top1_agreement_ci), percent),
            ("perplexity reference", e(self.perplexity_reference, self.perplexity_reference_ci), number),
            ("perplexity bundle", e(self.perplexity_bundle, self.perplexity_bundle_ci), number),
            ("perplexity ratio", e(self.perplexity_ratio, self.perplexity_ratio_ci), ratio),
        ]
    }

    /// The experts with the largest error, largest first; those of equal error by layer and index.
    fn worst_experts(&self, n: usize) -> Vec<(&ExpertDrift, f64)> {
        let mut rows: Vec<_> = self.experts.iter().filter_map(|e| Some((e, e.rel_error?))).collect();
        rows.sort_by(|a, b| b.1.total_cmp(&a.1));
        rows.truncate(n);
        rows
    }
}

/// Name, value with interval, and how people want it written.
type Figure = (&'static str, Estimate, fn(f64) -> String);

/// What `perplexity` measures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PerplexityReport {
    /// [`PERPLEXITY_SCHEMA`].
    pub schema: String,
    /// Scored positions.
    pub tokens_scored: usize,
    /// Windows they come from.
    pub n_windows: usize,
    /// Tokens of the longest window.
    pub ctx: usize,
    /// Mean NLL of the scored tokens, nats.
    #[serde(deserialize_with = "nan_for_null")]
    pub nll_mean: f64,
    /// e^`nll_mean`.
    #[serde(deserialize_with = "nan_for_null")]
    pub perplexity: f64,
    /// 95 % interval of the perplexity.
    #[serde(deserialize_with = "nans_for_nulls")]
    pub perplexity_ci: [f64; 2],
    /// What the interval takes as independent.
    pub ci_unit: Unit,
    /// Tokens run through the model per second, scored or not.
    #[serde(deserialize_with = "nan_for_null")]
    pub tokens_per_second: f64,
    /// Most memory the process had.
    pub peak_rss_bytes: u64,
}

impl PerplexityReport {
    /// From the NLLs of the scored tokens of each window; `n_tokens` were run in `seconds`.
    pub fn new(nlls: &[Vec<f64>], ctx: usize, n_tokens: usize, seconds: f64, peak_rss_bytes: u64) -> Self {
        let tokens_scored = nlls.iter().map(Vec::len).sum();
        let perplexity = intervals::exp_mean(nlls);
        PerplexityReport {
            schema: PERPLEXITY_SCHEMA.to_owned(),
            tokens_scored,
            n_windows: nlls.len(),
            ctx,
            nll_mean: nlls.iter().flatten().sum::<f64>() / tokens_scored as f64,
            perplexity: perplexity.value,
            perplexity_ci: perplexity.ci,
            ci_unit: intervals::unit(nlls.len()),
            tokens_per_second: n_tokens as f64 / seconds,
            peak_rss_bytes,
        }
    }

    /// The report for people.
    pub fn to_text(&self) -> String {
        table::of_perplexity(self)
    }
}

/// The NLLs of `--nll-out`: a JSON list of windows, one a line, each the list of the NLLs of its scored tokens with
/// as many digits as tell two numbers apart.
pub fn nll_json(nlls: &[Vec<f64>]) -> String {
    let json = |v: &f64| if v.is_finite() { format!("{v:?}") } else { "null".to_owned() };
    let window = |w: &Vec<f64>| format!("[{}]", w.iter().map(json).collect::<Vec<_>>().join(", "));
    format!("[\n{}\n]\n", nlls.iter().map(window).collect::<Vec<_>>().join(",\n"))
}

/// A number with four significant digits, for people.
pub fn number(x: f64) -> String {
    match x.abs() {
        a if !a.is_finite() => x.to_string(),
        0.0 => "0".to_owned(),
        a if a < 1e-4 => format!("{x:.3e}"),
        a if a >= 1e7 => format!("{x:.3e}"),
        a => {
            // libm: the same digits on every platform.
            let magnitude = libm::floor(libm::log10(a)) as i32;
            format!("{x:.*}", usize::try_from(3 - magnitude).unwrap_or(0))
        }
    }
}

/// A ratio near 1, for people.
fn ratio(x: f64) -> String {
    format!("{x:.5}")
}

/// A share as a percentage of up to three decimals, for people. Only all is 100 %, only nothing is 0 %.
pub fn percent(share: f64) -> String {
    let text = format!("{:.3}", share * 100.0);
    let text = text.trim_end_matches('0').trim_end_matches('.');
    match text {
        "100" if share < 1.0 => "99.999 %".to_owned(),
        "0" if share > 0.0 => "0.001 %".to_owned(),
        _ => format!("{text} %"),
    }
}

/// JSON has no NaN: serde_json writes `null`, which is read back as NaN.
pub(crate) fn nan_for_null<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(d)?.unwrap_or(f64::NAN))
}

fn nans_for_nulls<'de, D: Deserializer<'de>>(d: D) -> Result<[f64; 2], D::Error> {
    Ok(<[Option<f64>; 2]>::deserialize(d)?.map(|v| v.unwrap_or(f64::NAN)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drift::{LogitDrift, Position, WindowDrift};

    pub(super) fn example() -> DriftReport {
        let window = |w: u32| {
            let position = |i: u32| Position {
                kld: f64::from(i * w) / 4096.0,
                nll_reference: 2.0 + f64::from(i) / 8.0,
                nll_bundle: 2.0 + f64::from(i + w) / 8.0,
                top1: i != 3,
            };
            WindowDrift { positions: (0..8).map(position).collect(), tail_bounds: Vec::new() }
        };
        let summary = LogitDrift { windows: (0..4).map(window).collect() }.summary();
        let mut report = DriftReport::new(&summary, 9);
        report.bundle = "tiny.moepack".to_owned();
        report.reference = "tiny".to_owned();
        let layer = |layer, rel_error, routing_overlap| LayerDrift {
            layer,
            rel_error,
            routing_overlap,
            bits: routing_overlap.map(|_| 4.25),
        };
        report.layers = vec![layer(0, 0.001, None), layer(1, 0.0125, Some(0.9375))];
        let expert = |expert, tokens, rel_error| ExpertDrift {
            layer: 1,
            expert,
            tokens,
            rel_error,
            bits: Some(4.25),
            calibration_tokens: Some(7 * tokens),
            fallback: (expert == 2).then(|| "up_proj".to_owned()),
        };
        report.experts = vec![expert(0, 20, Some(0.05)), expert(1, 0, None), expert(2, 12, Some(0.07))];
        (report.bpw_experts, report.bpw_total) = (Some(4.25), Some(5.5));
        report
    }

    /// DESIGN.md, "Commands".
    const KEYS: &str = "schema tokens_scored n_windows ctx kld_mean kld_mean_ci kld_p99 kld_p99_ci kld_p999 \
        kld_p999_ci kld_max kld_max_ci top1_agreement top1_agreement_ci perplexity_reference \
        perplexity_reference_ci perplexity_bundle perplexity_bundle_ci perplexity_ratio perplexity_ratio_ci \
        layers experts bpw_experts bpw_total gates";

    #[test]
    fn json_has_every_key_and_comes_back() {
        let mut report = example();
        report.judge(&Limits { max_kld: Some(1.0), ..Limits::default() });
        let json = serde_json::to_value(&report).unwrap();
        for key in KEYS.split_whitespace() {
            assert!(json.get(key).is_some(), "{key} is missing");
        }
        for (list, keys) in [
            ("layers", "layer rel_error routing_overlap bits"),
            ("experts", "layer expert tokens rel_error bits calibration_tokens fallback"),
            ("gates", "name limit value passed"),
        ] {
            for key in keys.split_whitespace() {
                assert!(json[list][0].get(key).is_some(), "{list}[].{key} is missing");
            }
        }
        assert_eq!(json["schema"], DRIFT_SCHEMA);
        assert_eq!(serde_json::from_value::<DriftReport>(json).unwrap(), report);
    }

    #[test]
    fn what_is_no_number_is_null_and_comes_back() {
        let report = DriftReport { kld_mean: f64::NAN, kld_mean_ci: [f64::NAN, 1.0], ..example() };
        let json = serde_json::to_value(&report).unwrap();
        assert!(json["kld_mean"].is_null() && json["kld_mean_ci"][0].is_null());
        let back: DriftReport = serde_json::from_value(json).unwrap();
        assert!(back.kld_mean.is_nan() && back.kld_mean_ci[1] == 1.0);
    }

    #[test]
    fn the_text_is_a_table_and_ends_with_the_verdict() {
        let mut report = example();
        let limits = Limits { max_kld: Some(1e-3), min_top1: Some(0.5), max_ppl_increase: None };
        assert!(!report.judge(&limits));
        let expected = "\
drift of tiny.moepack
against checkpoint tiny
32 tokens scored in 4 windows of at most 9 tokens

figure                   value  95 % interval
KLD mean, nats        0.001282  0.0003259 … 0.005042
KLD 99 %, nats        0.005127  0.003418 … 0.005127
KLD 99.9 %, nats      0.005127  0.005127 … 0.005127
KLD max, nats         0.005127  0.005127 … 0.005127
top-1 agreement         87.5 %  59.931 % … 97.038 %
perplexity reference     11.44  11.44 … 11.44
perplexity bundle        13.80  10.68 … 17.85
perplexity ratio       1.20623  0.93306 … 1.55937

layer  rel. error  routing overlap    bits
    0    0.001000            dense       -
    1     0.01250          93.75 %  4.2500

worst of 3 experts (1 got no token)
layer  expert  tokens  rel. error    bits  calibration  fallback
    1       2      12     0.07000  4.2500           84  up_proj
    1       0      20     0.05000  4.2500          140  -

bits per weight: 4.2500 experts, 5.5000 in all

gate         limit     value  result
max_kld   0.001000  0.001282  FAILED
min_top1      50 %    87.5 %  passed

verdict: FAILED, 1 of 2 gates do not hold: max_kld: 0.001282, the limit is 0.001000
";
        assert_eq!(report.to_text(), expected, "got\n{}", report.to_text());
    }

    #[test]
    fn verdicts() {
        let mut report = example();
        assert!(report.passed() && report.verdict().starts_with("verdict: no gate was set"));
        assert!(report.judge(&Limits { min_top1: Some(0.5), ..Limits::default() }));
        assert_eq!(report.verdict(), "verdict: passed, 1 of 1 gates hold");
    }

    #[test]
    fn perplexity_is_e_to_the_mean_nll() {
        let report = PerplexityReport::new(&[vec![1.0, 2.0], vec![3.0]], 3, 5, 2.0, 1 << 20);
        assert_eq!((report.nll_mean, report.perplexity), (2.0, libm::exp(2.0)));
        assert_eq!((report.tokens_scored, report.n_windows, report.tokens_per_second), (3, 2, 2.5));
        let json = serde_json::to_value(&report).unwrap();
        for key in "schema tokens_scored nll_mean perplexity ctx tokens_per_second peak_rss_bytes".split(' ')
        {
            assert!(json.get(key).is_some(), "{key} is missing");
        }
        assert!(report.to_text().starts_with("perplexity "));
    }

    #[test]
    fn nlls_come_back_to_the_bit() {
        let nlls = vec![vec![0.1 + 0.2, 1e-300, 5.0], vec![std::f64::consts::PI]];
        let json = nll_json(&nlls);
        assert_eq!(serde_json::from_str::<Vec<Vec<f64>>>(&json).unwrap(), nlls);
        assert_eq!(nll_json(&[vec![f64::NAN, 1.0]]), "[\n[null, 1.0]\n]\n");
    }

    #[test]
    fn numbers_have_four_digits_and_all_is_not_nearly_all() {
        let cases =
            [(0.0, "0"), (1234.56, "1235"), (0.012_345, "0.01235"), (4.0, "4.000"), (9.1e-8, "9.100e-8")];
        for (x, text) in cases {
            assert_eq!(number(x), text);
        }
        assert_eq!(number(f64::NAN), "NaN");
        let cases =
            [(1.0, "100 %"), (0.999_999_9, "99.999 %"), (0.0, "0 %"), (1e-9, "0.001 %"), (0.5, "50 %")];
        for (x, text) in cases {
            assert_eq!(percent(x), text);
        }
    }
}
