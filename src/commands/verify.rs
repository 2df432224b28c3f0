//! `moepack verify`: the drift of a bundle against its checkpoint or a baseline, with gates for CI.

use std::path::{Path, PathBuf};

use clap::Args;
use moepack_convert::Model;
use moepack_format::manifest::Manifest;
use moepack_format::{Error, Kind, Result, storage};
use moepack_verify::baseline::Baseline;
use moepack_verify::gates::{Limits, parse_nats, parse_percent};
use moepack_verify::report::{DriftReport, ReferenceKind};

use super::options::OpenArgs;
use super::{Command, parse};
use crate::engine::baseline::against_baseline;
use crate::engine::budget::Budget;
use crate::engine::coverage::{ExpertRow, expert_rows};
use crate::engine::pair::Drift;
use crate::engine::stats::config_sha256;
use crate::engine::verify::compare;
use crate::output::{print, print_json, refuse_existing_file, write_file};
use crate::session::Session;
use crate::text::{InputArgs, WindowArgs};

/// The table row.
pub const COMMAND: Command = Command {
    name: "verify",
    about: "Measure what a bundle lost: KL divergence, top-1 agreement, perplexity, per layer and per expert",
    examples: &[
        "moepack verify q.moepack --reference Qwen3-30B-A3B --text eval.txt",
        "moepack verify q.moepack --reference eval.baseline --max-kld 0.02 --max-ppl-increase 1% --min-top1 97%",
        "moepack verify q.moepack --reference Qwen3-30B-A3B --text eval.txt --report drift.html",
    ],
    args: Arguments::augment_args,
    run: |matches, session| run(&parse(matches)?, session),
};

#[derive(Args, Debug)]
struct Arguments {
    /// The bundle
    bundle: PathBuf,
    /// The checkpoint it was made from, or a baseline file
    #[arg(long, value_name = "CHECKPOINT|BASELINE")]
    reference: PathBuf,
    /// UTF-8 text; a baseline has its own tokens
    #[arg(long, value_name = "FILE", conflicts_with = "tokens")]
    text: Option<PathBuf>,
    /// JSON list of windows (lists of token ids) instead of a text
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    #[command(flatten)]
    windows: WindowArgs,
    #[command(flatten)]
    gates: GateArgs,
    /// Replace the report file if it is there
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    open: OpenArgs,
}

/// Gates and the report file.
#[derive(Args, Clone, Debug)]
pub struct GateArgs {
    /// Fail (exit code 1) if the mean KL divergence is above this many nats
    #[arg(long, value_name = "X", value_parser = nats)]
    max_kld: Option<f64>,
    /// Fail if perplexity grows by more than this
    #[arg(long, value_name = "P%", value_parser = percent)]
    max_ppl_increase: Option<f64>,
    /// Fail if the most likely token agrees less often than this
    #[arg(long, value_name = "P%", value_parser = share)]
    min_top1: Option<f64>,
    /// Write the report as one HTML file
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,
}

impl GateArgs {
    /// Whether anything is asked for.
    pub fn any(&self) -> bool {
        self.limits() != Limits::default() || self.report.is_some()
    }

    /// The limits asked for.
    pub fn limits(&self) -> Limits {
        Limits { max_kld: self.max_kld, max_ppl_increase: self.max_ppl_increase, min_top1: self.min_top1 }
    }
}

fn nats(text: &str) -> std::result::Result<f64, String> {
    parse_nats(text).map_err(|e| e.to_string())
}

/// A percentage that something can reach.
fn share(text: &str) -> std::result::Result<f64, String> {
    percent(text).and_then(|p| if p <= 1.0 { Ok(p) } else { Err("no more than 100% can agree".to_owned()) })
}

fn percent(text: &str) -> std::result::Result<f64, String> {
    parse_percent(text).map_err(|e| e.to_string())
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    args.gates.report.iter().try_for_each(|path| refuse_existing_file(path, args.overwrite))?;
    let bundle = args.open.open(&args.bundle)?;
    let mut report = if storage::is_dir(&args.reference) {
        with_model(args, session, &bundle)?
    } else {
        with_baseline(args, session, &bundle)?
    };
    report.judge(&args.gates.limits());
    if let Some(path) = &args.gates.report {
        write_file(path, &report.to_html())?;
    }
    if session.json {
        print_json(&report)?
    } else {
        print(&report.to_text())?
    }
    refuse_findings(&report, &args.bundle)
}

fn with_model(args: &Arguments, session: &Session, bundle: &Model) -> Result<DriftReport> {
    let reference = args.open.open(&args.reference)?;
    let input = InputArgs { text: args.text.clone(), tokens: args.tokens.clone() };
    let windows = input.windows(&reference, &args.windows)?;
    Budget::of_text(&[&reference, bundle], session.threads, &windows).check(session.memory)?;
    let drift = compare(session, &reference, bundle, windows)?;
    let names = (args.bundle.display().to_string(), args.reference.display().to_string());
    let mut report = drift_report(drift, &names.0, &names.1, bundle.bundle().map(|b| &b.manifest));
    if reference.bundle().is_some() {
        report.reference_kind = ReferenceKind::Bundle;
    }
    Ok(report)
}

fn with_baseline(args: &Arguments, session: &Session, bundle: &Model) -> Result<DriftReport> {
    let baseline = Baseline::open(&args.reference)?;
    let (expected, found) = (&baseline.meta().config_sha256, config_sha256(bundle)?);
    if *expected != found {
        let what = format!(
            "a baseline of another model: its config.json has sha256 {expected}, the bundle's {found}"
        );
        return Err(Error::bad_data(what)
            .in_file(&args.reference)
            .hint("make a baseline of the bundle's own checkpoint"));
    }
    if args.text.is_some() || args.tokens.is_some() {
        check_same_tokens(args, bundle, &baseline)?;
    }
    Budget::of_text(&[bundle], session.threads, baseline.windows()).check(session.memory)?;
    let (logits, ctx) = against_baseline(session, bundle, &baseline)?;
    let mut report = DriftReport::new(&logits.summary(), ctx);
    report.reference_kind = ReferenceKind::Baseline;
    name(&mut report, &args.bundle.display().to_string(), &args.reference.display().to_string());
    sizes(&mut report, bundle.bundle().map(|b| &b.manifest));
    Ok(report)
}

/// A baseline has its own tokens; a text that is given all the same must be the one it was made from.
fn check_same_tokens(args: &Arguments, bundle: &Model, baseline: &Baseline) -> Result<()> {
    let input = InputArgs { text: args.text.clone(), tokens: args.tokens.clone() };
    // How the windows were cut is in the baseline.
    let (ctx, bos) = (baseline.windows().ctx(), baseline.meta().bos);
    if input.windows(bundle, &WindowArgs { ctx, bos })? == *baseline.windows() {
        return Ok(());
    }
    let file = args.text.as_ref().or(args.tokens.as_ref()).unwrap_or(&args.reference);
    Err(Error::bad_data("these are not the tokens that the baseline was made from")
        .in_file(file)
        .hint("leave --text and --tokens out: a baseline has its own tokens"))
}

/// The error of a report whose gates do not all hold.
///
/// # Errors
/// Kind `Finding`, with the gates.
pub fn refuse_findings(report: &DriftReport, bundle: &Path) -> Result<()> {
    match report.findings() {
        Some(findings) => Err(Error::new(Kind::Finding, findings).in_file(bundle)),
        None => Ok(()),
    }
}

/// The report of a run of both models.
pub fn drift_report(drift: Drift, bundle: &str, reference: &str, manifest: Option<&Manifest>) -> DriftReport {
    let mut report = DriftReport::new(&drift.logits.summary(), drift.windows.ctx());
    report.layers = drift.layers;
    report.experts = drift.experts;
    name(&mut report, bundle, reference);
    sizes(&mut report, manifest);
    manifest.into_iter().for_each(|m| coding(&mut report, m));
    report
}

/// What the bundle says of how its layers and experts were coded.
fn coding(report: &mut DriftReport, manifest: &Manifest) {
    let rows = expert_rows(&manifest.layers);
    // Rows are in order of layers, then experts.
    let of_layer = |layer: usize| {
        let start = rows.partition_point(|r| (r.layer as usize) < layer);
        let rows = rows.get(start..).unwrap_or_default();
        rows.get(..rows.partition_point(|r| r.layer as usize == layer)).unwrap_or_default()
    };
    for layer in &mut report.layers {
        layer.bits = mean_bits(of_layer(layer.layer));
    }
    for expert in &mut report.experts {
        let layer = of_layer(expert.layer);
        let start = layer.partition_point(|r| r.expert < expert.expert);
        let own: Vec<ExpertRow<'_>> =
            layer.iter().skip(start).take_while(|r| r.expert == expert.expert).copied().collect();
        expert.bits = mean_bits(&own);
        expert.calibration_tokens = own.iter().find_map(|r| r.tokens);
        let fallen: Vec<&str> = own.iter().filter(|r| r.fallback.is_some()).map(|r| r.projection).collect();
        expert.fallback = (!fallen.is_empty()).then(|| fallen.join(" "));
    }
}

/// Of projections, which have as many weights as each other.
fn mean_bits(rows: &[ExpertRow<'_>]) -> Option<f64> {
    let sum: f64 = rows.iter().map(|r| r.bits).sum();
    (!rows.is_empty()).then(|| sum / rows.len() as f64)
}

fn name(report: &mut DriftReport, bundle: &str, reference: &str) {
    bundle.clone_into(&mut report.bundle);
    reference.clone_into(&mut report.reference);
}

fn sizes(report: &mut DriftReport, manifest: Option<&Manifest>) {
    report.bpw_experts = manifest.map(|m| m.totals.bpw_experts);
    report.bpw_total = manifest.map(|m| m.totals.bpw_total);
}
