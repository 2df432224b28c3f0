//! `moepack calibrate`: run a text through the reference and keep what each expert's inputs are like.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use moepack_format::Result;
use serde::Serialize;

use super::options::OpenArgs;
use super::{Command, parse};
use crate::engine::budget::Budget;
use crate::engine::calibrate::{Job, calibrate};
use crate::engine::stats::{About, SCHEMA, config_sha256, tokens_sha256};
use crate::engine::workspace::{Form, refuse_existing_as};
use crate::output::{print, print_json};
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
    /// Go on with unfinished work (the same command does so anyway)
    #[arg(long)]
    resume: bool,
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
    refuse_existing_as(Form::File, &args.output, args.overwrite)?;
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
    let job = Job { model: &model, windows, about: &about, target: &args.output, overwrite: args.overwrite };
    let experts_without_tokens = calibrate(session, job)?;
    let report = Report {
        schema: "moepack.calibrate/1",
        stats: args.output.display().to_string(),
        n_tokens,
        experts_without_tokens,
        seconds: started.elapsed().as_secs_f64(),
    };
    if session.json { print_json(&report) } else { print(&text(&report)) }
}

fn text(r: &Report) -> String {
    let starved: Vec<String> = r.experts_without_tokens.iter().map(|(l, e)| format!("{l}.{e}")).collect();
    let starved = match starved.len() {
        0 => "every expert saw tokens".to_owned(),
        n => format!("{n} experts saw no token (layer.expert): {}", starved.join(" ")),
    };
    format!("{}: {} tokens in {:.1} s; {starved}\n", r.stats, r.n_tokens, r.seconds)
}
