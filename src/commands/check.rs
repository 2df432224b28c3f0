//! `moepack check`: every checksum, every invariant, all damage at once.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::Args;
use moepack_convert::{Model, OpenOptions};
use moepack_format::check::{CheckLevel, CheckOptions, CheckProgress, Damage, check};
use moepack_format::file::CHUNK_BYTES;
use moepack_format::{Error, Kind, Result, storage};
use serde::Serialize;

use super::{Command, parse};
use crate::engine::against::against;
use crate::engine::budget::Budget;
use crate::output::{print, print_json};
use crate::session::Session;

/// The table row.
pub const COMMAND: Command = Command {
    name: "check",
    about: "Look for damage in a bundle: every checksum and invariant; or compare it with its checkpoint",
    examples: &[
        "moepack check q.moepack",
        "moepack check q.moepack --quick",
        "moepack check q.moepack --against Qwen3-30B-A3B",
    ],
    args: Arguments::augment_args,
    run: |matches, session| run(&parse(matches)?, session),
};

#[derive(Args, Debug)]
struct Arguments {
    /// The bundle
    bundle: PathBuf,
    /// Structure only: manifest, sizes, headers, indexes
    #[arg(long, conflicts_with = "against")]
    quick: bool,
    /// Compare with the checkpoint too: what was kept must be the same to the bit, what was quantized within its error
    #[arg(long, value_name = "CHECKPOINT")]
    against: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Report {
    schema: &'static str,
    bundle: String,
    level: &'static str,
    ok: bool,
    damage: Vec<Damage>,
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    let damage = find(args, session)?;
    let level = match (&args.against, args.quick) {
        (Some(_), _) => "against",
        (None, true) => "quick",
        (None, false) => "full",
    };
    let n = damage.len();
    let report = Report {
        schema: "moepack.check/1",
        bundle: args.bundle.display().to_string(),
        level,
        ok: n == 0,
        damage,
    };
    if session.json {
        print_json(&report)?
    } else {
        print(&text(&report))?
    }
    if n == 0 {
        Ok(())
    } else {
        Err(Error::new(Kind::Finding, format!("{n} findings")).in_file(&args.bundle))
    }
}

/// All damage; the checkpoint is compared only with a bundle that is whole.
fn find(args: &Arguments, session: &Session) -> Result<Vec<Damage>> {
    let level = if args.quick { CheckLevel::Quick } else { CheckLevel::Full };
    Budget::of_bytes((session.threads * CHUNK_BYTES) as u64).check(session.memory)?;
    let progress = session.progress("check", bytes_of(&args.bundle), 0);
    let tick = |at: CheckProgress| {
        progress.reach(at.bytes_done);
        if session.stop.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let outcome = check(&args.bundle, CheckOptions { level, threads: session.threads }, &tick);
    session.stop.check()?;
    let mut damage = outcome?;
    if let Some(checkpoint) = args.against.as_ref().filter(|_| damage.is_empty()) {
        let open = |path| Model::open(path, &OpenOptions::default());
        let (bundle, checkpoint) = (open(&args.bundle)?, open(checkpoint)?);
        Budget::of_comparison([&bundle, &checkpoint], session.threads).check(session.memory)?;
        damage = against(session, &bundle, &checkpoint)?;
    }
    Ok(damage)
}

/// Bytes of all files, for the display of progress only.
fn bytes_of(bundle: &Path) -> u64 {
    let paths = storage::list(bundle, usize::MAX).unwrap_or_default();
    paths.iter().filter_map(|path| storage::metadata(path).ok()).map(|m| m.len()).sum()
}

fn text(r: &Report) -> String {
    let lines: String = r.damage.iter().map(|d| format!("{d}\n")).collect();
    let verdict = if r.ok { "no damage found" } else { "damaged" };
    format!("{lines}{}: {verdict} ({} check)\n", r.bundle, r.level)
}
