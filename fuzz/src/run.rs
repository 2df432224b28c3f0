//! Hands inputs to a reader and looks at what comes of each: a panic, too much time, too much memory.
//!
//! Time is that of the processor, so that a busy machine makes no findings; a reader that waits without working is found by
//! the clock on the wall. A crash ends the process, and with it this code: [`drive`](crate::drive) sees to that.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use moepack_format::{Context, Error, Result};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::MEMORY;
use crate::corpus::Corpus;
use crate::targets::{Ready, Target};

/// Time that one input may take.
pub const TIME_MAX: Duration = Duration::from_secs(1);
/// Time that one input may take on the wall.
const WALL_MAX: Duration = Duration::from_secs(30);
/// Bytes that may be held at once because of one input.
pub const MEMORY_MAX: u64 = 1 << 30;
/// Address space of the process: what asks for much more is refused by the system, as on a small machine.
const ADDRESS_SPACE: u64 = 8 << 30;
/// Stack of the thread that reads, that of a worker thread.
const STACK_BYTES: usize = 2 << 20;

/// Which inputs, and where to say what came of them.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the first input.
    pub first: u64,
    /// Number behind the last one.
    pub end: u64,
    /// A directory that is the run's own.
    pub scratch: PathBuf,
}

impl Plan {
    /// The file whose first eight bytes are the number of the input that is being read.
    pub fn at_path(&self) -> PathBuf {
        self.scratch.join("at")
    }

    /// The file with the [`Report`].
    pub fn report_path(&self) -> PathBuf {
        self.scratch.join("report.json")
    }
}

/// What came of some inputs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Inputs that were read.
    pub n_inputs: u64,
    /// Those that the reader did not refuse.
    pub n_accepted: u64,
    /// Seconds of the processor, making the inputs included.
    pub seconds: f64,
    /// The longest that one took, and which.
    pub slowest: (f64, u64),
    /// The most memory that one took, and which.
    pub largest: (u64, u64),
    /// What ended the run early.
    pub finding: Option<Finding>,
}

/// A fault.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// Number of the input.
    pub at: u64,
    /// `panic`, `hang`, `memory` or `crash`.
    pub verdict: String,
    /// What is known of it.
    pub what: String,
}

/// Prepares a target in a directory.
///
/// # Errors
/// What its preparation says.
pub fn prepare(target: &'static Target, dir: &Path) -> Result<(Ready, Corpus)> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io(&e, "create", dir))?;
    let mut ready = (target.start)(dir)?;
    let corpus = Corpus::new(target.name, target.shape, std::mem::take(&mut ready.seeds));
    Ok((ready, corpus))
}

/// Reads the inputs of a plan until the first finding, and leaves a report.
///
/// # Errors
/// A target that cannot be prepared, a report that cannot be written.
pub fn run(target: &'static Target, plan: &Plan) -> Result<()> {
    limit();
    remember_panics();
    let watched = plan.clone();
    std::thread::spawn(move || watch(&watched));
    let plan = plan.clone();
    let reader = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
        let report = read_all(target, &plan)?;
        write_report(&plan, &report)
    });
    let reader = reader.map_err(|e| Error::io(&e, "start a thread", Path::new("")))?;
    reader
        .join()
        .unwrap_or_else(|_| Err(Error::bad_data(format!("cannot prepare {}: {}", target.name, last_panic()))))
}

/// One thread for what readers do on several, and an end to memory.
fn limit() {
    let _ = rayon::ThreadPoolBuilder::new().num_threads(1).stack_size(STACK_BYTES).build_global();
    let _ = setrlimit(Resource::As, Rlimit { current: Some(ADDRESS_SPACE), maximum: Some(ADDRESS_SPACE) });
}

fn read_all(target: &'static Target, plan: &Plan) -> Result<Report> {
    let (ready, corpus) = prepare(target, &plan.scratch.join("files"))?;
    let at_path = plan.at_path();
    let at_file = std::fs::File::create(&at_path).map_err(|e| Error::io(&e, "create", &at_path))?;
    let (start, mut report) = (cpu(), Report::default());
    for at in plan.first..plan.end {
        std::os::unix::fs::FileExt::write_all_at(&at_file, &at.to_le_bytes(), 0)
            .map_err(|e| Error::io(&e, "write", &at_path))?;
        let (from, bytes) = corpus.input(plan.seed, at);
        let outcome = read_one(&ready, at, from, &bytes);
        report.n_inputs += 1;
        report.n_accepted += u64::from(outcome.accepted);
        report.slowest = max(report.slowest, (outcome.seconds, at));
        report.largest = max(report.largest, (outcome.bytes, at));
        if let Some((verdict, what)) = outcome.finding() {
            report.finding = Some(Finding { at, verdict: verdict.to_owned(), what });
            break;
        }
    }
    report.seconds = cpu().saturating_sub(start).as_secs_f64();
    Ok(report)
}

fn max<T: PartialOrd>(a: (T, u64), b: (T, u64)) -> (T, u64) {
    if b.0 > a.0 { b } else { a }
}

struct Outcome {
    accepted: bool,
    panic: Option<String>,
    seconds: f64,
    bytes: u64,
}

impl Outcome {
    fn finding(&self) -> Option<(&'static str, String)> {
        if let Some(panic) = &self.panic {
            return Some(("panic", panic.clone()));
        }
        if self.bytes > MEMORY_MAX {
            return Some(("memory", format!("{} bytes at once", self.bytes)));
        }
        (self.seconds > TIME_MAX.as_secs_f64()).then(|| ("hang", format!("{:.1} s", self.seconds)))
    }
}

/// Reads one input. What a refusal says is written out too: a message can be what fails.
fn read_one(ready: &Ready, at: u64, from: &str, bytes: &[u8]) -> Outcome {
    MEMORY.reset_peak_usage();
    let (before, start) = (MEMORY.current_usage(), cpu());
    SINCE.store(start.as_nanos() as u64, Ordering::Relaxed);
    AT.store(at, Ordering::Release);
    let result = catch_unwind(AssertUnwindSafe(|| (ready.read)(from, bytes).map_err(|e| e.to_string())));
    AT.store(IDLE, Ordering::Release);
    Outcome {
        accepted: matches!(result, Ok(Ok(()))),
        panic: result.err().map(|_| last_panic()),
        seconds: cpu().saturating_sub(start).as_secs_f64(),
        bytes: MEMORY.peak_usage().saturating_sub(before) as u64,
    }
}

/// Reads one input in this process and says what came of it.
///
/// # Errors
/// The refusal.
pub fn once(ready: &Ready, from: &str, bytes: &[u8]) -> Result<()> {
    let start = Instant::now();
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    let result = (ready.read)(from, bytes);
    let mebibytes = MEMORY.peak_usage().saturating_sub(before) >> 20;
    eprintln!(
        "{} bytes made from {from:?}: {:.3} s, {mebibytes} MiB",
        bytes.len(),
        start.elapsed().as_secs_f64()
    );
    result
}

/// The number of the input that is being read, or [`IDLE`].
static AT: AtomicU64 = AtomicU64::new(IDLE);
/// When it began, in nanoseconds of the process.
static SINCE: AtomicU64 = AtomicU64::new(0);
const IDLE: u64 = u64::MAX;

fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Ends the process when one input takes too long.
fn watch(plan: &Plan) {
    let mut seen = (IDLE, Instant::now());
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let at = AT.load(Ordering::Acquire);
        if at != seen.0 {
            seen = (at, Instant::now());
        }
        let used = cpu().saturating_sub(Duration::from_nanos(SINCE.load(Ordering::Relaxed)));
        let wall = seen.1.elapsed();
        // Twice the time: one that ends soon after is told with how long it took.
        let long = wall > Duration::from_millis(100) && used > 2 * TIME_MAX || wall > WALL_MAX;
        if at != IDLE && long && AT.load(Ordering::Acquire) == at {
            let what = format!("not done after {:.1} s", used.as_secs_f64());
            let finding = Some(Finding { at, verdict: "hang".to_owned(), what });
            let _ =
                write_report(plan, &Report { n_inputs: at - plan.first + 1, finding, ..Report::default() });
            std::process::exit(1);
        }
    }
}

fn write_report(plan: &Plan, report: &Report) -> Result<()> {
    let path = plan.report_path();
    let text = serde_json::to_vec(report).map_err(|e| Error::bad_data(e.to_string())).in_file(&path)?;
    std::fs::write(&path, text).map_err(|e| Error::io(&e, "write", &path))
}

static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

fn remember_panics() {
    std::panic::set_hook(Box::new(|panic| {
        *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = panic.to_string();
    }));
}

fn last_panic() -> String {
    LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner).clone()
}
