//! `moepack worker`: does one shard of a plan.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use moepack_format::Result;
use serde::Serialize;

use super::{Command, parse};
use crate::cluster::environment::shard;
use crate::cluster::folder::PlanFolder;
use crate::cluster::plan::Plan;
use crate::cluster::worker::{self, Outcome};
use crate::memory::peak_rss_bytes;
use crate::output::{print, print_json};
use crate::session::Session;

/// The table row.
pub const COMMAND: Command = Command {
    name: "worker",
    about: "Do one shard of a plan; at once where it is done already",
    examples: &[
        "moepack worker --plan v4.plan --shard 3",
        "moepack worker --plan v4.plan --shard auto",
        "moepack worker --plan v4.plan --shard auto --shard-offset 1000",
    ],
    args: Arguments::augment_args,
    run: |matches, session| run(&parse(matches)?, session),
};

#[derive(Args, Debug)]
struct Arguments {
    /// The plan: its directory, or the plan.json in it
    #[arg(long, value_name = "PLAN")]
    plan: PathBuf,
    /// Which shard, from 0; auto reads the variable by which a scheduler numbers the tasks of an array
    #[arg(long, value_name = "N|auto")]
    shard: String,
    /// Added to the number, for arrays that are shorter than the plan
    #[arg(long, value_name = "K", default_value_t = 0)]
    shard_offset: usize,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    plan: &'a str,
    shard: usize,
    done_before: bool,
    n_experts: u64,
    source_bytes: u64,
    seconds: f64,
    peak_rss_bytes: u64,
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    let started = Instant::now();
    let index = shard(&args.shard, args.shard_offset, |name| std::env::var(name).ok())?;
    let folder = PlanFolder::of(&args.plan);
    let plan = Plan::read(&folder)?;
    let outcome = worker::run(session, &folder, &plan, index)?;
    let shard = plan.shard(index)?;
    let report = Report {
        schema: "moepack.worker/1",
        plan: &plan.id,
        shard: index,
        done_before: outcome == Outcome::DoneBefore,
        n_experts: shard.n_experts,
        source_bytes: shard.source_bytes,
        seconds: started.elapsed().as_secs_f64(),
        peak_rss_bytes: peak_rss_bytes().unwrap_or(0),
    };
    if session.json {
        return print_json(&report);
    }
    let how = if report.done_before { "was done before" } else { "done" };
    print(&format!("shard {index} {how}: {} experts, in {:.1} s\n", report.n_experts, report.seconds))
}
