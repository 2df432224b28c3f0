//! `moepack submit`: hands the shards of a plan to a scheduler.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use moepack_format::{Error, Result};
use serde::Serialize;

use super::{Command, parse};
use crate::cluster::folder::PlanFolder;
use crate::cluster::plan::Plan;
use crate::cluster::reports::{missing, ranges};
use crate::cluster::submit::{Array, Options, Script, Submitted, kubernetes, parallel, slurm, write};
use crate::output::{print, print_json};
use crate::session::Session;

/// The table row.
pub const COMMAND: Command = Command {
    name: "submit",
    about: "Hand the shards of a plan to Slurm, or write files for Kubernetes or GNU parallel",
    examples: &[
        "moepack submit --plan v4.plan --engine slurm --cpus 32 --sbatch=--partition=cpu",
        "moepack submit --plan v4.plan --engine slurm --retry-failed",
        "moepack submit --plan v4.plan --engine k8s --image registry/moepack --mount models:/models",
        "moepack submit --plan v4.plan --engine print",
    ],
    args: Arguments::augment_args,
    run: |matches, session| run(&parse(matches)?, session),
};

#[derive(Args, Debug)]
struct Arguments {
    /// The plan: its directory, or the plan.json in it
    #[arg(long, value_name = "PLAN")]
    plan: PathBuf,
    /// slurm submits jobs; k8s and parallel write a file into the plan; print prints the commands
    #[arg(long, value_enum)]
    engine: Engine,
    /// Write the scripts, but submit nothing
    #[arg(long)]
    dry_run: bool,
    /// Submit what neither is done nor waits nor runs
    #[arg(long)]
    retry_failed: bool,
    /// Tasks at a time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    at_once: Option<u32>,
    /// CPUs of a task
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Option<u32>,
    /// One more option of sbatch, such as --partition=cpu
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    sbatch: Vec<String>,
    /// Image of the pods' container
    #[arg(long, value_name = "IMAGE", default_value = concat!("moepack:", env!("CARGO_PKG_VERSION")))]
    image: String,
    /// Volume of the pods, which sees plan and checkpoint where they are here [default: moepack:DIRECTORY_OF_PLAN]
    #[arg(long, value_name = "CLAIM:PATH", value_parser = mount)]
    mount: Vec<(String, String)>,
    /// Where the merged bundle goes [default: beside the plan]
    #[arg(short, long, value_name = "BUNDLE")]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Engine {
    Slurm,
    K8s,
    Parallel,
    Print,
}

#[derive(Debug, Serialize)]
struct Report {
    schema: &'static str,
    plan: String,
    engine: String,
    dry_run: bool,
    shards: String,
    files: Vec<String>,
    arrays: Vec<Array>,
    merge_job: Option<u64>,
    commands: Option<String>,
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    let folder = PlanFolder::of(&args.plan);
    let plan = Plan::read(&folder)?;
    let options = options(args, &folder, &plan)?;
    let scripts: Vec<Script> = match args.engine {
        Engine::Slurm => slurm::scripts(&folder, &plan, &options)?,
        Engine::K8s => vec![kubernetes::script(&folder, &plan, &options)?],
        Engine::Parallel => vec![parallel::script(&folder, &options)?],
        Engine::Print => Vec::new(),
    };
    let commands = (args.engine == Engine::Print).then(|| parallel::lines(&folder, &options)).transpose()?;
    let files = write(&folder, &scripts)?;
    let submits = args.engine == Engine::Slurm && !args.dry_run;
    let Submitted { arrays, merge } =
        if submits { slurm::submit(&folder, &options)? } else { Submitted::default() };
    let report = Report {
        schema: "moepack.submit/1",
        plan: plan.id.clone(),
        engine: args.engine.to_possible_value().map_or(String::new(), |v| v.get_name().to_owned()),
        dry_run: !submits,
        shards: ranges(&options.missing),
        files: files.iter().map(|path| path.display().to_string()).collect(),
        arrays,
        merge_job: merge,
        commands,
    };
    if session.json { print_json(&report) } else { print(&text(&report)) }
}

fn options(args: &Arguments, folder: &PlanFolder, plan: &Plan) -> Result<Options> {
    let mut missing = missing(folder, plan)?;
    if args.engine == Engine::Slurm && !args.dry_run {
        let queued = slurm::queued(folder)?;
        if !queued.is_empty() && !args.retry_failed {
            let queued: Vec<usize> = queued.into_iter().collect();
            return Err(Error::usage(format!("shards {} wait or run already", ranges(&queued)))
                .hint("--retry-failed submits the others that are not done; `moepack status` shows how far they are"));
        }
        missing.retain(|shard| !queued.contains(shard));
    }
    let count = |n: Option<u32>| n.and_then(|n| usize::try_from(n).ok());
    Ok(Options {
        missing,
        at_once: count(args.at_once),
        cpus: count(args.cpus),
        sbatch: args.sbatch.clone(),
        image: args.image.clone(),
        mounts: if args.mount.is_empty() { vec![mount_default(folder)?] } else { args.mount.clone() },
        bundle: args.output.clone(),
    })
}

/// The directory that the plan lies in.
fn mount_default(folder: &PlanFolder) -> Result<(String, String)> {
    let path = std::path::absolute(folder.path()).map_err(|e| Error::io(&e, "find", folder.path()))?;
    let parent = path.parent().map_or_else(|| "/".to_owned(), |p| p.display().to_string());
    Ok(("moepack".to_owned(), parent))
}

fn mount(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once(':') {
        Some((claim, path)) if !claim.is_empty() && path.starts_with('/') => Ok((claim.into(), path.into())),
        _ => Err(format!("{text:?}, expected a claim, a colon and an absolute path: models:/models")),
    }
}

fn text(r: &Report) -> String {
    if let Some(commands) = &r.commands {
        return commands.clone();
    }
    let mut lines: Vec<String> = r.files.iter().map(|file| format!("wrote {file}")).collect();
    let job = |a: &Array| format!("submitted job {}: indices {} and {}", a.job, a.indices, a.offset);
    lines.extend(r.arrays.iter().map(job));
    lines.extend(r.merge_job.map(|job| format!("submitted job {job}: merges when they are done")));
    lines.join("\n") + "\n"
}
