//! Everything that can happen to a file happens: each call fails, tears, or is the last thing the process does.
//!
//! A debug build counts its calls on files and lets the n-th end as `MOEPACK_FAULT` says (`format/src/storage/fault.rs`). A
//! run is repeated for n = 1, 2, … until it gets through untouched. What must hold after every one: a clean exit code,
//! nothing under the output's name that is not whole, nothing but the kept workspace left, and the same command then
//! makes the bytes of a run that nothing happened to.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::{assert_same, fixture, listing, moepack, moepack_with, succeeds, text};

/// Calls that a run makes at most; more, and the loop does not end.
const CALLS_MAX: usize = 20_000;
/// How a call that changes something fails, taken in turn.
const ERRORS: &[&str] = &["eio", "enospc", "torn-enospc", "edquot", "efbig", "erofs", "eacces"];
/// How a process ends at a call, taken in turn.
const ENDS: &[&str] = &["kill", "torn-kill", "killed-after"];

/// A command, and what it writes.
struct Job {
    args: Vec<String>,
    output: &'static str,
    /// Of so many calls one is tried; `--ignored` tries every one.
    step: usize,
}

#[test]
fn every_call_that_changes_something_may_fail() {
    for job in jobs() {
        each(&job, "change", job.step, |n| ERRORS[n % ERRORS.len()]);
    }
}

#[test]
fn every_call_that_changes_something_may_be_the_last() {
    for job in jobs() {
        each(&job, "change", job.step, |n| ENDS[n % ENDS.len()]);
    }
}

#[test]
fn reads_may_fail() {
    for job in jobs() {
        each(&job, "any", 7 * job.step, |n| if n % 2 == 0 { "eio" } else { "emfile" });
    }
}

#[test]
#[ignore = "takes half an hour: every call, every error, before, in and after it"]
fn everything_happens_everywhere() {
    for job in jobs() {
        for what in ERRORS {
            each(&job, "any", 1, |_| what);
        }
        for what in ENDS {
            each(&job, "any", 1, |_| what);
        }
    }
}

/// The main jobs, on models small enough to do them some hundred times.
fn jobs() -> Vec<Job> {
    let (random, v3) = (model("random/qwen3_moe"), model("tiny-deepseek-v3"));
    let job = |output, step, args: &[&str]| {
        let args = args.iter().map(|&a| a.to_owned()).collect();
        Job { args, output, step }
    };
    vec![
        job("q.moepack", 13, &["quantize", &random, "-o", "q.moepack", "--codec", "int4"]),
        job("out", 23, &["convert", &random, "--to", "mlx", "-o", "out", "--requantize", "int4-g32"]),
        job(
            "c.moepack",
            127,
            &[
                "quantize",
                &v3,
                "-o",
                "c.moepack",
                "--codec",
                "int3",
                "--trunk-codec",
                "int8",
                "--calibrate",
                "calibration.txt",
            ],
        ),
        // Large enough that what was written of a file is kept.
        job("out", 47, &["convert", &v3, "--to", "safetensors", "-o", "out"]),
        job("v3.stats", 47, &["calibrate", &v3, "--text", "calibration.txt", "-o", "v3.stats"]),
    ]
}

fn model(name: &str) -> String {
    fixture(name).to_str().unwrap().to_owned()
}

/// Lets what `what` says happen at every `step`-th call of a kind, until the run gets through.
fn each(job: &Job, calls: &str, step: usize, what: impl Fn(usize) -> &'static str + Sync) {
    let whole = directory();
    succeeds(whole.path(), &job.args);
    let (next, end) = (AtomicUsize::new(0), AtomicUsize::new(CALLS_MAX));
    let work = || {
        let mut codes = BTreeSet::new();
        loop {
            let n = 1 + step * next.fetch_add(1, Ordering::Relaxed);
            if n >= end.load(Ordering::Relaxed) {
                return codes;
            }
            match once(job, &whole.path().join(job.output), calls, n, what(n)) {
                Some(code) => codes.insert(code),
                None => end.fetch_min(n, Ordering::Relaxed) > 0,
            };
        }
    };
    let codes = std::thread::scope(|scope| {
        let other = scope.spawn(work);
        let mut codes = work();
        codes.extend(other.join().unwrap());
        codes
    });
    let end = end.load(Ordering::Relaxed);
    assert!(end > 20 && end < CALLS_MAX, "{:?} ended after {end} calls", job.args);
    assert!(!codes.is_empty(), "nothing happened to {:?}", job.args);
}

/// One run with a fault, and one without that goes on; the exit code of the first, or `None` if nothing happened to it.
#[allow(clippy::option_option, reason = "got through, ended by a signal, exit code")]
fn once(job: &Job, whole: &Path, calls: &str, n: usize, what: &str) -> Option<Option<i32>> {
    let dir = directory();
    let fault = format!("{calls}:{n}:{what}");
    let first = moepack_with(dir.path(), &[("MOEPACK_FAULT", &fault)], &job.args);
    if !first.stderr.contains("MOEPACK_FAULT") {
        assert_eq!(first.code, Some(0), "{}", first.stderr);
        return None;
    }
    let output = dir.path().join(job.output);
    let told = || format!("{:?} with {fault}: {:?}\n{}{}", job.args, first.code, first.stdout, first.stderr);
    if output.exists() {
        same(whole, &output, &told());
    }
    assert!(first.code != Some(0) || output.exists(), "{}", told());
    let clean = matches!(first.code, Some(0 | 66 | 73 | 74 | 75 | 77)) && !first.stderr.contains("panicked");
    let killed = first.code.is_none() && what.contains("kill");
    assert!(clean || killed, "{}", told());
    if !killed {
        assert!(first.code == Some(0) || first.stderr.contains("error: "), "{}", told());
        assert_eq!(leftovers(dir.path(), job), Vec::<PathBuf>::new(), "{}", told());
    }
    let again = moepack(dir.path(), &job.args);
    // Killed after the output got its name, there is nothing left to do.
    let is_done = again.code == Some(73) && again.stderr.contains("the output exists") && output.exists();
    assert!(again.code == Some(0) || is_done, "{}\nthen {:?}\n{}", told(), again.code, again.stderr);
    same(whole, &output, &told());
    assert_eq!(leftovers(dir.path(), job), Vec::<PathBuf>::new(), "{}", told());
    Some(first.code)
}

fn same(a: &Path, b: &Path, told: &str) {
    if a.is_dir() {
        assert_same(a, b, told);
    } else {
        assert!(std::fs::read(a).unwrap() == std::fs::read(b).unwrap(), "{told}");
    }
}

fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "calibration.txt", 3_000);
    dir
}

/// What lies about that is neither the text, the output, nor work that is kept.
fn leftovers(dir: &Path, job: &Job) -> Vec<PathBuf> {
    let kept = format!("{}.partial", job.output);
    let ours = |path: &PathBuf| {
        let first = path.components().next().unwrap().as_os_str();
        let is_temporary = path.file_name().unwrap().to_string_lossy().contains(".tmp-");
        (first == "calibration.txt" || first == job.output || first == kept.as_str()) && !is_temporary
    };
    listing(dir).into_iter().filter(|path| !ours(path)).collect()
}
