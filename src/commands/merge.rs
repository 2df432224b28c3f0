//! `moepack merge`: makes a bundle of the shards of a plan.

use std::path::PathBuf;

use clap::Args;
use moepack_format::Result;
use serde::Serialize;

use super::{Command, parse};
use crate::cluster::folder::PlanFolder;
use crate::cluster::merge::{self, Options};
use crate::cluster::plan::Plan;
use crate::output::{print, print_json};
use crate::session::Session;
use crate::size::human;

/// The table row.
pub const COMMAND: Command = Command {
    name: "merge",
    about: "Make a bundle of a plan's finished shards: writes the manifest, copies nothing",
    examples: &["moepack merge --plan v4.plan", "moepack merge --plan v4.plan -o V4-Pro.moepack --verify"],
    args: Arguments::augment_args,
    run: |matches, session| run(&parse(matches)?, session),
};

#[derive(Args, Debug)]
struct Arguments {
    /// The plan: its directory, or the plan.json in it
    #[arg(long, value_name = "PLAN")]
    plan: PathBuf,
    /// The bundle, on the plan's file system [default: the plan's name with .moepack, beside it]
    #[arg(short, long, value_name = "BUNDLE")]
    output: Option<PathBuf>,
    /// Hash every file again instead of trusting the reports
    #[arg(long)]
    verify: bool,
    /// Replace a bundle that is there
    #[arg(long)]
    overwrite: bool,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    plan: &'a str,
    bundle: String,
    bundle_bytes: u64,
    bpw_experts: f64,
    bpw_total: f64,
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    let folder = PlanFolder::of(&args.plan);
    let plan = Plan::read(&folder)?;
    let target = args.output.clone().map_or_else(|| folder.bundle_default(), Ok)?;
    let options = Options { target: &target, overwrite: args.overwrite, verify: args.verify };
    let manifest = merge::merge(&folder, &plan, options, &session.stop)?;
    let totals = &manifest.totals;
    let report = Report {
        schema: "moepack.merge/1",
        plan: &plan.id,
        bundle: target.display().to_string(),
        bundle_bytes: totals.bundle_bytes,
        bpw_experts: totals.bpw_experts,
        bpw_total: totals.bpw_total,
    };
    if session.json {
        return print_json(&report);
    }
    let (bundle, bytes) = (&report.bundle, human(report.bundle_bytes));
    print(&format!("bundle {bundle}: {bytes}, {:.4} bits per weight\n", report.bpw_total))
}
