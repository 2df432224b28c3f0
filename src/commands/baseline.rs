//! `moepack baseline`: keep what a checkpoint predicts, so that CI can verify bundles without it.

use std::path::PathBuf;

use clap::Args;
use moepack_format::{InputFile, Result};
use moepack_verify::baseline::Meta;
use serde::Serialize;

use super::options::OpenArgs;
use super::{Command, parse};
use crate::engine::baseline::write_baseline;
use crate::engine::budget::Budget;
use crate::engine::stats::config_sha256;
use crate::output::{print, print_json, refuse_existing_file};
use crate::session::Session;
use crate::size::human;
use crate::text::{InputArgs, WindowArgs};

/// The table row.
pub const COMMAND: Command = Command {
    name: "baseline",
    about: "Keep what a checkpoint predicts on a text, so that CI can verify bundles without the checkpoint",
    examples: &["moepack baseline Qwen3-30B-A3B --text eval.txt -o eval.baseline"],
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
    /// The baseline file to write
    #[arg(short, long, value_name = "BASELINE")]
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
    baseline: String,
    bytes: u64,
    tokens_scored: usize,
    /// Bytes of the same logits in f16.
    full_f16_bytes: u64,
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    refuse_existing_file(&args.output, args.overwrite)?;
    let model = args.open.open(&args.checkpoint)?;
    let windows = args.input.windows(&model, &args.windows)?;
    Budget::of_text(&[&model], session.threads, &windows).check(session.memory)?;
    let text_sha256 = args.input.text.as_ref().map(|t| InputFile::open(t)?.sha256(&|| false)).transpose()?;
    let meta = Meta {
        tool: format!("moepack {}", env!("CARGO_PKG_VERSION")),
        model: args.checkpoint.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        family: model.spec().family.to_owned(),
        config_sha256: config_sha256(&model)?,
        text_sha256,
        bos: args.windows.bos,
    };
    let bytes = write_baseline(session, &model, &windows, &args.output, &meta)?;
    let tokens_scored = windows.n_scored();
    let full_f16_bytes = 2 * tokens_scored as u64 * model.spec().vocab as u64;
    let baseline = args.output.display().to_string();
    let report = Report { schema: "moepack.baseline/1", baseline, bytes, tokens_scored, full_f16_bytes };
    if session.json { print_json(&report) } else { print(&text(&report)) }
}

fn text(r: &Report) -> String {
    let share = 100.0 * r.bytes as f64 / r.full_f16_bytes.max(1) as f64;
    format!(
        "{}: {}, {} positions, {share:.2} % of the full logits in f16\n",
        r.baseline,
        human(r.bytes),
        r.tokens_scored
    )
}
