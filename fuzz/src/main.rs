//! `fuzz`: runs targets, or one input of one target.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use moepack_format::{Error, Result};
use moepack_fuzz::drive::{Options, drive, scratch};
use moepack_fuzz::run::{Plan, once, prepare, run};
use moepack_fuzz::targets::{TARGETS, Target, named};

/// Every reader of moepack against damaged, forged and random files.
#[derive(Parser, Debug)]
struct Arguments {
    /// Only these targets
    #[arg(long, value_name = "NAME")]
    target: Vec<String>,
    /// Inputs a target; those of slow readers get a part of it, see --list
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    inputs: u64,
    /// Inputs of all targets together, instead
    #[arg(long, value_name = "N", conflicts_with = "inputs")]
    total: Option<u64>,
    /// Another seed makes other inputs
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Processes at a time
    #[arg(long, value_name = "N", default_value_t = 2)]
    jobs: usize,
    /// Directory for inputs of findings
    #[arg(long, value_name = "DIR", default_value = "target/fuzz")]
    findings: PathBuf,
    /// The targets and what they read
    #[arg(long)]
    list: bool,
    /// Only this input, in this process
    #[arg(long, value_name = "N")]
    at: Option<u64>,
    /// Write that input to a file instead of reading it
    #[arg(long, value_name = "FILE", requires = "at")]
    write: Option<PathBuf>,
    /// Only this file as an input, in this process; --of says which seed it was made from
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Name of a seed
    #[arg(long, value_name = "SEED", requires = "file", default_value = "")]
    of: String,
    #[arg(long, hide = true, default_value_t = 0)]
    first: u64,
    #[arg(long, hide = true)]
    end: Option<u64>,
    #[arg(long, hide = true)]
    scratch: Option<PathBuf>,
}

fn main() -> ExitCode {
    match work(&Arguments::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(n) => {
            eprintln!("{n} findings");
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::from(e.kind().exit_code())
        }
    }
}

/// Gives the number of findings.
fn work(args: &Arguments) -> Result<usize> {
    if args.list {
        TARGETS.iter().for_each(|t| println!("{:<17} {:>3}  {}", t.name, t.cost, t.about));
        return Ok(0);
    }
    let targets = args.target.iter().map(|name| named(name)).collect::<Result<Vec<_>>>()?;
    if let (Some(end), Some(scratch)) = (args.end, &args.scratch) {
        let plan = Plan { seed: args.seed, first: args.first, end, scratch: scratch.clone() };
        return run(only(&targets)?, &plan).map(|()| 0);
    }
    if args.at.is_some() || args.file.is_some() {
        return single(args, only(&targets)?).map(|()| 0);
    }
    all(args, if targets.is_empty() { TARGETS.iter().collect() } else { targets })
}

fn only(targets: &[&'static Target]) -> Result<&'static Target> {
    let [target] = targets else { return Err(Error::usage("one --target is needed")) };
    Ok(target)
}

fn single(args: &Arguments, target: &'static Target) -> Result<()> {
    let scratch = scratch()?;
    let (ready, corpus) = prepare(target, scratch.path())?;
    let at = || corpus.input(args.seed, args.at.unwrap_or(0));
    let (from, bytes) = match &args.file {
        Some(file) => (&*args.of, std::fs::read(file).map_err(|e| Error::io(&e, "read", file))?),
        None => at(),
    };
    match &args.write {
        Some(path) => std::fs::write(path, bytes).map_err(|e| Error::io(&e, "write", path)),
        None => once(&ready, from, &bytes),
    }
}

fn all(args: &Arguments, targets: Vec<&'static Target>) -> Result<usize> {
    let shares: f64 = targets.iter().map(|t| 1.0 / t.cost as f64).sum();
    let n_inputs = args.total.map_or(args.inputs, |total| (total as f64 / shares.max(1e-9)).ceil() as u64);
    let options = Options { n_inputs, seed: args.seed, n_jobs: args.jobs, findings: args.findings.clone() };
    let outcomes = drive(&targets, &options)?;
    let n: u64 = outcomes.iter().map(|o| o.report.n_inputs).sum();
    println!("{n} inputs over {} targets", outcomes.len());
    Ok(outcomes.iter().map(|o| o.findings.len()).sum())
}
