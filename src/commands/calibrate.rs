//! `moepack calibrate`: run a text through the reference and keep what each expert's inputs are like.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use moepack_convert::Model;
use moepack_format::Result;
use moepack_quant::Isa;
use moepack_verify::forward::{LayerWeights, RoutedSum, ordered};
use moepack_verify::tokens::Windows;
use serde::Serialize;

use super::options::OpenArgs;
use super::{Command, parse};
use crate::engine::budget::Budget;
use crate::engine::calibration::{Calibration, Observed, observe_expert};
use crate::engine::stats::{About, SCHEMA, StatsWriter, config_sha256, tokens_sha256};
use crate::output::{print, print_json, refuse_existing_file};
use crate::session::Session;
use crate::text::{InputArgs, WindowArgs};

/// The table row.
pub const COMMAND: Command = Command {
    name: "calibrate",
    about: "Run a text through the reference and keep what each expert's inputs are like",
    examples: &["moepack calibrate Qwen3-30B-A3B --text calib.txt -o qwen3.stats"],
    args: Arguments::augment_args,
    run: |matches, session| run(&parse(matches)?, session),
};

#[derive(Args, Debug)]
struct Arguments {
    /// Checkpoint
    checkpoint: PathBuf,
    #[command(flatten)]
    input: InputArgs,
    #[command(flatten)]
    windows: WindowArgs,
    /// The stats file to write
    #[arg(short, long, value_name = "STATS")]
    output: PathBuf,
    /// Replace that file if it is there
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    open: OpenArgs,
}

#[derive(Debug, Serialize)]
struct Report {
    schema: &'static str,
    stats: String,
    n_tokens: u64,
    /// Experts that no token reached, as layer and expert.
    experts_without_tokens: Vec<(usize, usize)>,
    seconds: f64,
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    refuse_existing_file(&args.output, args.overwrite)?;
    let started = Instant::now();
    let model = args.open.open(&args.checkpoint)?;
    let windows = args.input.windows(&model, &args.windows)?;
    Budget::of_text(&[&model], session.threads, &windows).check(session.memory)?;
    let n_tokens = windows.tokens.len() as u64;
    let about = About {
        schema: SCHEMA.to_owned(),
        family: model.spec().family.to_owned(),
        config_sha256: config_sha256(&model)?,
        n_tokens,
        tokens_sha256: tokens_sha256(&windows),
        window_tokens: windows.lens.iter().max().map(|&n| n as u64),
    };
    let writer = StatsWriter::create(&args.output, &model, &about)?;
    let experts_without_tokens = calibrate(session, &model, windows, writer)?;
    let report = Report {
        schema: "moepack.calibrate/1",
        stats: args.output.display().to_string(),
        n_tokens,
        experts_without_tokens,
        seconds: started.elapsed().as_secs_f64(),
    };
    if session.json { print_json(&report) } else { print(&text(&report)) }
}

/// Pushes the text through every layer; gives the experts that no token reached.
fn calibrate(
    session: &Session,
    model: &Model,
    windows: Windows,
    mut writer: StatsWriter,
) -> Result<Vec<(usize, usize)>> {
    let isa = Isa::get();
    let progress = session.progress("calibrate", 0, model.spec().n_experts());
    let mut calibration = Calibration::begin(isa, model, windows)?;
    let mut starved = Vec::new();
    for (l, layer) in model.spec().layers.iter().enumerate() {
        session.stop.check()?;
        let weights = LayerWeights::load(isa, model, l)?;
        calibration.enter(&weights)?;
        let Some(moe) = layer.mlp.moe() else { continue };
        let pass = calibration.route(&weights)?;
        let mut sum = RoutedSum::new(&pass);
        let mut stats: Vec<Observed> = Vec::with_capacity(moe.n_experts);
        let work = |e: usize| {
            session.stop.check()?;
            let mlp = weights.pack_expert(&model.expert(l, e)?.decode(isa)?)?;
            observe_expert(isa, &pass, e, &mlp, (pass.width(), moe.inter))
        };
        ordered(moe.n_experts, work, |e, (output, expert)| {
            sum.add(&output);
            if expert.weighted.input.n_tokens == 0 {
                starved.push((l, e));
            }
            stats.push(expert);
            progress.add(0, 1);
            Ok(())
        })?;
        let delta = pass.finish(sum)?;
        calibration.leave(&delta);
        writer.write(l, &stats)?;
    }
    writer.finish()?;
    Ok(starved)
}

fn text(r: &Report) -> String {
    let starved: Vec<String> = r.experts_without_tokens.iter().map(|(l, e)| format!("{l}.{e}")).collect();
    let starved = match starved.len() {
        0 => "every expert saw tokens".to_owned(),
        n => format!("{n} experts saw no token (layer.expert): {}", starved.join(" ")),
    };
    format!("{}: {} tokens in {:.1} s; {starved}\n", r.stats, r.n_tokens, r.seconds)
}
