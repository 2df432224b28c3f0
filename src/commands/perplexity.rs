//! `moepack perplexity`: the reference forward pass over a text.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use moepack_format::Result;
use moepack_verify::report::{PerplexityReport, nll_json};

use super::options::OpenArgs;
use super::{Command, parse};
use crate::engine::budget::Budget;
use crate::engine::verify::nll;
use crate::memory::peak_rss_bytes;
use crate::output::{print, print_json, refuse_existing_file, write_file};
use crate::session::Session;
use crate::text::{InputArgs, WindowArgs};

/// The table row.
pub const COMMAND: Command = Command {
    name: "perplexity",
    about: "Measure the perplexity of a checkpoint or bundle on a text",
    examples: &[
        "moepack perplexity Qwen3-30B-A3B.moepack --text eval.txt",
        "moepack perplexity Qwen3-30B-A3B --tokens windows.json --nll-out nll.json",
    ],
    args: Arguments::augment_args,
    run: |matches, session| run(&parse(matches)?, session),
};

#[derive(Args, Debug)]
struct Arguments {
    /// Checkpoint or bundle
    model: PathBuf,
    #[command(flatten)]
    input: InputArgs,
    #[command(flatten)]
    windows: WindowArgs,
    /// Write the NLL (nats) of every scored token: a JSON list of windows
    #[arg(long, value_name = "FILE")]
    nll_out: Option<PathBuf>,
    /// Replace that file if it is there
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    open: OpenArgs,
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    args.nll_out.iter().try_for_each(|path| refuse_existing_file(path, args.overwrite))?;
    let model = args.open.open(&args.model)?;
    let windows = args.input.windows(&model, &args.windows)?;
    Budget::of_text(&[&model], session.threads, &windows).check(session.memory)?;
    let started = Instant::now();
    let nlls = nll(session, &model, &windows)?;
    let seconds = started.elapsed().as_secs_f64();
    if let Some(path) = &args.nll_out {
        write_file(path, &nll_json(&nlls))?;
    }
    let (n_tokens, peak) = (windows.tokens.len(), peak_rss_bytes().unwrap_or(0));
    let report = PerplexityReport::new(&nlls, windows.ctx(), n_tokens, seconds, peak);
    if session.json { print_json(&report) } else { print(&report.to_text()) }
}
