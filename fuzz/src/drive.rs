//! Runs targets in processes of their own, so that one may die, and keeps the inputs that were too much for them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use moepack_format::{Error, Result};

use crate::run::{Finding, Plan, Report};
use crate::targets::Target;

/// A target with so many findings has told enough.
const FINDINGS_MAX: usize = 10;

/// Space that must be free where files live in memory: containers have little of it.
const SCRATCH_BYTES: u64 = 1 << 30;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Inputs of a target whose cost is one.
    pub n_inputs: u64,
    /// Seed of the run.
    pub seed: u64,
    /// Processes at a time.
    pub n_jobs: usize,
    /// Where inputs of findings go.
    pub findings: PathBuf,
}

/// What came of a target.
#[derive(Debug)]
pub struct Outcome {
    /// The target.
    pub target: &'static Target,
    /// Sums over all its processes.
    pub report: Report,
    /// The faults, each with the file that its input was kept in.
    pub findings: Vec<(Finding, PathBuf)>,
}

/// Runs the targets, several at a time; outcomes are in the order of the targets.
///
/// # Errors
/// A target that cannot be prepared, or what the operating system says.
pub fn drive(targets: &[&'static Target], options: &Options) -> Result<Vec<Outcome>> {
    let todo = Mutex::new(targets.iter().enumerate());
    let done = Mutex::new(Vec::new());
    let next = || todo.lock().ok().and_then(|mut todo| todo.next());
    std::thread::scope(|scope| {
        for _ in 0..options.n_jobs.max(1) {
            scope.spawn(|| {
                while let Some((n, target)) = next() {
                    let outcome = run_target(target, options);
                    eprintln!("{}", line(target, outcome.as_ref()));
                    if let Ok(mut done) = done.lock() {
                        done.push((n, outcome));
                    }
                }
            });
        }
    });
    let mut done = done.into_inner().map_err(|e| Error::bad_data(e.to_string()))?;
    done.sort_by_key(|(n, _)| *n);
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

/// One line about a target.
fn line(target: &Target, outcome: std::result::Result<&Outcome, &Error>) -> String {
    let Outcome { report: r, findings, .. } = match outcome {
        Ok(outcome) => outcome,
        Err(e) => return format!("{}: {e}", target.name),
    };
    let per_second = r.n_inputs as f64 / r.seconds.max(1e-9);
    let accepted = 100.0 * r.n_accepted as f64 / r.n_inputs.max(1) as f64;
    format!(
        "{:<17} {:>9} inputs {:>8.0} a second of CPU, {accepted:>5.1} % accepted, slowest {:>4.0} ms (input {}), largest {:>4} MiB (input {}), {} findings",
        target.name,
        r.n_inputs,
        per_second,
        r.slowest.0 * 1e3,
        r.slowest.1,
        r.largest.0 >> 20,
        r.largest.1,
        findings.len()
    )
}

fn run_target(target: &'static Target, options: &Options) -> Result<Outcome> {
    let mut outcome = Outcome { target, report: Report::default(), findings: Vec::new() };
    let (mut first, end) = (0, options.n_inputs.div_ceil(target.cost));
    while first < end && outcome.findings.len() < FINDINGS_MAX {
        let report = in_process(target, first, end, options.seed)?;
        outcome.add(&report);
        let Some(finding) = report.finding else { break };
        first = finding.at + 1;
        let path = keep(target, &finding, options)?;
        eprintln!("{}", told(target, &finding, &path, options.seed));
        outcome.findings.push((finding, path));
    }
    Ok(outcome)
}

impl Outcome {
    fn add(&mut self, more: &Report) {
        let sum = &mut self.report;
        sum.n_inputs += more.n_inputs;
        sum.n_accepted += more.n_accepted;
        sum.seconds += more.seconds;
        if more.slowest.0 > sum.slowest.0 {
            sum.slowest = more.slowest;
        }
        if more.largest.0 > sum.largest.0 {
            sum.largest = more.largest;
        }
    }
}

/// Runs inputs in a process; one that dies is a finding.
fn in_process(target: &Target, first: u64, end: u64, seed: u64) -> Result<Report> {
    let scratch = scratch()?;
    let plan = Plan { seed, first, end, scratch: scratch.path().to_path_buf() };
    let numbers = [first, end, seed].map(|n| n.to_string());
    let mut child = this_program()?;
    child.args([
        "--target",
        target.name,
        "--first",
        &numbers[0],
        "--end",
        &numbers[1],
        "--seed",
        &numbers[2],
    ]);
    child.arg("--scratch").arg(scratch.path()).stdout(Stdio::null()).stderr(Stdio::piped());
    let output = child.output().map_err(|e| Error::io(&e, "run", Path::new(target.name)))?;
    let text = std::fs::read(plan.report_path()).unwrap_or_default();
    if let Ok(report) = serde_json::from_slice::<Report>(&text) {
        return Ok(report);
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let at =
        std::fs::read(plan.at_path()).ok().and_then(|b| b.first_chunk().copied()).map(u64::from_le_bytes);
    let Some(at) = at.filter(|_| output.status.code().is_none()) else {
        return Err(Error::bad_data(format!("{}: {}: {said}", target.name, output.status)));
    };
    let what = format!("{}: {said}", output.status);
    let finding = Some(Finding { at, verdict: "crash".to_owned(), what });
    Ok(Report { n_inputs: at - first + 1, finding, ..Report::default() })
}

fn this_program() -> Result<Command> {
    let path = std::env::current_exe().map_err(|e| Error::io(&e, "find", Path::new("this program")))?;
    Ok(Command::new(path))
}

/// Files live in memory where that is to be had: millions of them are written.
///
/// # Errors
/// No directory can be made.
pub fn scratch() -> Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    let free = rustix::fs::statvfs(memory).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize));
    let in_memory = if free >= SCRATCH_BYTES { tempfile::tempdir_in(memory).ok() } else { None };
    let made = in_memory.map_or_else(tempfile::tempdir, Ok);
    made.map_err(|e| Error::io(&e, "create a directory in", &std::env::temp_dir()))
}

/// Keeps the input of a finding.
fn keep(target: &Target, finding: &Finding, options: &Options) -> Result<PathBuf> {
    let dir = &options.findings;
    std::fs::create_dir_all(dir).map_err(|e| Error::io(&e, "create", dir))?;
    let path = dir.join(format!("{}-{}-{}-{}", target.name, finding.verdict, options.seed, finding.at));
    let numbers = [finding.at, options.seed].map(|n| n.to_string());
    let mut child = this_program()?;
    child.args(["--target", target.name, "--at", &numbers[0], "--seed", &numbers[1], "--write"]).arg(&path);
    let status = child.stdout(Stdio::null()).status().map_err(|e| Error::io(&e, "run", &path))?;
    if status.success() {
        Ok(path)
    } else {
        Err(Error::bad_data("the input could not be made again").in_file(path))
    }
}

/// A finding and how to see it again.
fn told(target: &Target, finding: &Finding, path: &Path, seed: u64) -> String {
    let Finding { at, verdict, what } = finding;
    let (name, path) = (target.name, path.display());
    format!(
        "{verdict} in {name}: {what}\n  kept in {path}\n  again: cargo run --release -p moepack-fuzz -- --target {name} --seed {seed} --at {at}"
    )
}
