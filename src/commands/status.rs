//! `moepack status`: how far the shards of a plan are.

use std::path::PathBuf;

use clap::Args;
use moepack_format::Result;

use super::{Command, parse};
use crate::cluster::folder::PlanFolder;
use crate::cluster::plan::Plan;
use crate::cluster::status::{Status, status};
use crate::output::{print, print_json, table};
use crate::session::Session;
use crate::size::human;

/// The table row.
pub const COMMAND: Command = Command {
    name: "status",
    about: "Show how far the shards of a plan are, who is at them, and how long the rest takes",
    examples: &[
        "moepack status --plan v4.plan",
        "moepack status --plan v4.plan --json",
        "moepack status --plan v4.plan --slurm-array",
    ],
    args: Arguments::augment_args,
    run: |matches, session| run(&parse(matches)?, session),
};

#[derive(Args, Debug)]
struct Arguments {
    /// The plan: its directory, or the plan.json in it
    #[arg(long, value_name = "PLAN")]
    plan: PathBuf,
    /// Print only the shards that are not done, as `sbatch --array` takes them: 3,7-9
    #[arg(long, conflicts_with = "json")]
    slurm_array: bool,
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    let folder = PlanFolder::of(&args.plan);
    let status = status(&folder, &Plan::read(&folder)?)?;
    match () {
        () if args.slurm_array => print(&format!("{}\n", status.missing)),
        () if session.json => print_json(&status),
        () => print(&text(&status)),
    }
}

fn text(s: &Status) -> String {
    let mut rows =
        vec![["shard", "state", "attempts", "experts", "read", "host", ""].map(String::from).to_vec()];
    for shard in &s.shards {
        rows.push(vec![
            shard.shard.to_string(),
            shard.state.to_owned(),
            shard.attempts.to_string(),
            format!("{}/{}", shard.experts_done, shard.n_experts),
            format!("{} of {}", human(shard.bytes_done), human(shard.bytes)),
            shard.host.clone().unwrap_or_else(|| "-".to_owned()),
            shard.message.clone().unwrap_or_default(),
        ]);
    }
    let rest = match (s.merged, s.eta_seconds) {
        (true, _) => "merged".to_owned(),
        (false, _) if s.missing.is_empty() => "all shards are done: run `moepack merge`".to_owned(),
        (false, Some(seconds)) => format!("about {seconds:.0} s left, not done: {}", s.missing),
        (false, None) => format!("not done: {}", s.missing),
    };
    let (done, all, percent) = (s.n_done, s.n_shards, 100.0 * s.fraction);
    format!("{}\n{done} of {all} shards, {percent:.1} % of the work; {rest}\n", table(&rows))
}
