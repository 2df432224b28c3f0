//! `moepack quantize`: the main job.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use moepack_convert::{Model, ModelSpec};
use moepack_format::manifest::{Manifest, PartCodecs};
use moepack_format::{Error, Result, storage};
use moepack_quant::solve::solver;
use moepack_verify::report::DriftReport;
use serde::Serialize;

use super::options::{Calibrated, Given, OpenArgs, RecipeArgs};
use super::{Command, parse};
use crate::commands::verify::{GateArgs, drift_report, refuse_findings};
use crate::engine::budget::{Budget, within_memory};
use crate::engine::coverage::{ExpertRow, coverage, expert_rows};
use crate::engine::prediction::{Prediction, predict};
use crate::engine::quantize::{Job, Outcome, quantize};
use crate::engine::space::check_space;
use crate::engine::stats::Stats;
use crate::engine::workspace::refuse_existing;
use crate::engine::writer::bits_each;
use crate::memory::peak_rss_bytes;
use crate::output::{print, print_json, refuse_existing_file, say, table, warn, write_file};
use crate::session::Session;
use crate::size::human;
use crate::text::{WindowArgs, windows_of_text};

/// The table row.
pub const COMMAND: Command = Command {
    name: "quantize",
    about: "Turn a checkpoint into a bundle: code every routed expert, keep everything else as it is",
    examples: &[
        "moepack quantize Qwen3-30B-A3B -o Qwen3-30B-A3B.moepack",
        "moepack quantize DeepSeek-V3 -o v3.moepack --codec int4-g64 --calibrate calib.txt --verify eval.txt",
        "moepack quantize gpt-oss-120b -o gpt-oss.moepack",
        "moepack quantize Qwen3-30B-A3B -o q4.moepack --codec q4_k --imatrix imatrix.gguf",
        "moepack quantize Qwen3-30B-A3B -o q.moepack --recipe recipe.toml --max-kld 0.02 --verify eval.txt",
    ],
    args: Arguments::augment_args,
    run: |matches, session| run(&parse(matches)?, session),
};

#[derive(Args, Debug)]
struct Arguments {
    /// Checkpoint directory or Hugging Face cache directory
    checkpoint: PathBuf,
    /// The bundle to write
    #[arg(short, long, value_name = "BUNDLE")]
    output: PathBuf,
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Text to calibrate on: what goes into each expert decides which errors matter
    #[arg(long, value_name = "TEXT", conflicts_with = "stats")]
    calibrate: Option<PathBuf>,
    /// Stats of an earlier `calibrate`, or an importance matrix of llama.cpp (GGUF or .dat)
    #[arg(long, value_name = "STATS", visible_alias = "imatrix")]
    stats: Option<PathBuf>,
    /// Text to measure drift on, in the same pass
    #[arg(long, value_name = "TEXT")]
    verify: Option<PathBuf>,
    #[command(flatten)]
    windows: WindowArgs,
    #[command(flatten)]
    gates: GateArgs,
    /// Go on with unfinished work (the same command does so anyway)
    #[arg(long)]
    resume: bool,
    /// Replace a bundle or a report that is there
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    open: OpenArgs,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    bundle: String,
    resumed: bool,
    seconds: f64,
    peak_rss_bytes: u64,
    bundle_bytes: u64,
    expert_payload_bytes: u64,
    padding_bytes: u64,
    trunk_bytes: u64,
    bpw_experts: f64,
    bpw_total: f64,
    predicted: Prediction,
    layers: &'a [moepack_format::manifest::LayerEntry],
    experts: Vec<ExpertRow<'a>>,
    drift: Option<&'a DriftReport>,
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    let started = Instant::now();
    check_places(&args.checkpoint, &args.output)?;
    refuse_existing(&args.output, args.overwrite)?;
    args.gates.report.iter().try_for_each(|path| refuse_existing_file(path, args.overwrite))?;
    if args.verify.is_none() && args.gates.any() {
        return Err(
            Error::usage("gates and a report need a text to measure drift on").hint("give --verify TEXT")
        );
    }
    let model = args.open.open(&args.checkpoint)?;
    if model.bundle().is_some() {
        return Err(Error::usage("the input is a bundle already")
            .in_file(&args.checkpoint)
            .hint("quantize its checkpoint"));
    }
    let stats = args.stats.as_ref().map(|p| Stats::open(p, &model)).transpose()?;
    stats.iter().flat_map(Stats::warnings).for_each(|w| warn(w));
    let windows =
        |text: &Option<PathBuf>| text.as_ref().map(|t| windows_of_text(&model, t, &args.windows)).transpose();
    let (calibration, evaluation) = (windows(&args.calibrate)?, windows(&args.verify)?);
    let stats_tokens = stats.as_ref().map(Stats::n_tokens);
    let given = Given { text: calibration.as_ref(), stats_tokens };
    let prepared = args.recipe.prepare(session, &model, given)?;
    prepared.check_calibrated(Calibrated::by(args.calibrate.is_some(), args.stats.is_some()))?;
    let hessians = solver(&prepared.recipe.solver)?.needs_hessian();
    let budget = |threads| {
        let calibration = (calibration.as_ref(), hessians);
        Budget::of(&model, &prepared.sizes, threads, calibration, evaluation.as_ref())
    };
    let (session, budget) = within_memory(session, budget)?;
    check_space(&args.output, prepared.sizes.bundle_bytes(), prepared.sizes.largest_file_bytes())?;
    let plan = prepared.plan(&model, calibration.as_ref(), evaluation.as_ref(), started);
    let predicted = predict(&session, plan, &budget)?;
    let job = Job {
        model: &model,
        recipe: &prepared.recipe,
        choices: &prepared.choices,
        sizes: &prepared.sizes,
        target: &args.output,
        overwrite: args.overwrite,
        calibration,
        stats: stats.as_ref(),
        evaluation,
    };
    let outcome = session.in_pool(|| quantize(&session, job))?;
    finish(args, &session, &model, outcome, (started, predicted))
}

/// Prints what came of it, and judges the gates.
fn finish(
    args: &Arguments,
    session: &Session,
    model: &Model,
    outcome: Outcome,
    (started, predicted): (Instant, Prediction),
) -> Result<()> {
    outcome.notes.iter().for_each(|note| say(&format!("note: {note}")));
    let manifest = &outcome.manifest;
    let (reference, bundle) = (args.checkpoint.display().to_string(), args.output.display().to_string());
    let mut drift = outcome.drift.map(|d| drift_report(d, &bundle, &reference, Some(manifest)));
    if let Some(drift) = &mut drift {
        drift.judge(&args.gates.limits());
    }
    let seconds = started.elapsed().as_secs_f64();
    if let (Some(path), Some(drift)) = (&args.gates.report, &drift) {
        write_file(path, &drift.to_html())?;
    }
    if session.json {
        let totals = &manifest.totals;
        print_json(&Report {
            schema: "moepack.quantize/1",
            bundle,
            resumed: outcome.resumed,
            seconds,
            peak_rss_bytes: peak_rss_bytes().unwrap_or(0),
            bundle_bytes: totals.bundle_bytes,
            expert_payload_bytes: totals.expert_payload_bytes,
            padding_bytes: totals.padding_bytes,
            trunk_bytes: totals.trunk_bytes,
            bpw_experts: totals.bpw_experts,
            bpw_total: totals.bpw_total,
            predicted,
            layers: &manifest.layers,
            experts: expert_rows(&manifest.layers),
            drift: drift.as_ref(),
        })?;
    } else {
        print(&text(manifest, model.spec(), &bundle, seconds))?;
        print(&against(&predicted, manifest, seconds, drift.as_ref()))?;
        print(&coverage(&manifest.layers))?;
        drift.as_ref().map(|d| print(&format!("\n{}", d.to_text()))).transpose()?;
    }
    let refused = drift.as_ref().map(|d| refuse_findings(d, &args.output)).transpose();
    refused.map(drop).map_err(|e| e.hint("the bundle is written; the recipe decides what it loses"))
}

fn text(manifest: &Manifest, spec: &ModelSpec, bundle: &str, seconds: f64) -> String {
    let mut rows =
        vec![["layer", "experts", "codec", "bpw", "bytes", "rel. sq. error"].map(String::from).to_vec()];
    for (layer, (_, moe)) in manifest.layers.iter().zip(spec.moe_layers()) {
        let weights = layer.n_experts as u64 * moe.weights_each(spec.hidden);
        let mut codecs: Vec<&str> = layer
            .codecs
            .iter()
            .filter(|(part, _)| !part.ends_with("_bias"))
            .map(|(_, c)| if let PartCodecs::Same(name) = c { name.as_str() } else { "mixed" })
            .collect();
        codecs.dedup();
        rows.push(vec![
            layer.layer.to_string(),
            layer.n_experts.to_string(),
            codecs.join(","),
            format!("{:.4}", bits_each(layer.payload_bytes, weights)),
            human(layer.payload_bytes),
            layer.error.map_or_else(|| "-".to_owned(), |e| format!("{e:.3e}")),
        ]);
    }
    let totals = &manifest.totals;
    let experts =
        format!("experts {}, {:.4} bits per weight", human(totals.expert_payload_bytes), totals.bpw_experts);
    let rest = format!("trunk {}, padding {}", human(totals.trunk_bytes), human(totals.padding_bytes));
    let all =
        format!("bundle {bundle}: {}, {:.4} bits per weight", human(totals.bundle_bytes), totals.bpw_total);
    format!("{}\n{experts}\n{rest}\n{all}, in {seconds:.1} s\n", table(&rows))
}

/// Prediction against outcome.
fn against(predicted: &Prediction, manifest: &Manifest, seconds: f64, drift: Option<&DriftReport>) -> String {
    let bytes = manifest.to_text().map_or(0, |text| text.len() as u64) + manifest.totals.bundle_bytes;
    let mut rows = vec![["", "predicted", "came out"].map(String::from).to_vec()];
    let mut row = |name: &str, was: String, is: String| rows.push(vec![name.to_owned(), was, is]);
    row("bundle", human(predicted.bundle_bytes), human(bytes));
    row("peak memory", human(predicted.peak_rss_bytes), human(peak_rss_bytes().unwrap_or(0)));
    row("time", format!("{:.1} s", predicted.seconds), format!("{seconds:.1} s"));
    let kld = drift.map_or_else(|| "not measured".to_owned(), |d| format!("{:.3e}", d.kld_mean));
    row("mean KLD", format!("{:.3e} ({})", predicted.kld_mean, predicted.kld_basis), kld);
    table(&rows)
}

/// Refuses an output that is the input or lies in it.
///
/// # Errors
/// Kind `Usage`.
pub fn check_places(input: &Path, output: &Path) -> Result<()> {
    let parent = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let (Ok(input_real), Ok(parent)) = (storage::canonicalize(input), storage::canonicalize(parent)) else {
        return Ok(());
    };
    let target = parent.join(output.file_name().unwrap_or_default());
    if target.starts_with(&input_real) || input_real.starts_with(&target) {
        return Err(Error::usage("output and input are the same or one lies in the other")
            .in_file(output)
            .hint("write the bundle somewhere else"));
    }
    Ok(())
}
