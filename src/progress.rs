//! Progress on stderr: a bar on a terminal, else a plain line every few seconds.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::output::say;
use crate::size::human;

/// How often a plain line appears where stderr is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

/// Progress of one stage in bytes and experts, with the time left.
#[derive(Debug)]
pub struct Progress {
    label: String,
    total_bytes: u64,
    total_experts: u64,
    quiet: bool,
    bar: Option<ProgressBar>,
    done: Mutex<Done>,
}

#[derive(Debug)]
struct Done {
    bytes: u64,
    experts: u64,
    started: Instant,
    last_line: Instant,
}

impl Progress {
    /// Progress towards `total_bytes` and `total_experts`; silent if `quiet`.
    pub fn new(label: &str, total_bytes: u64, total_experts: u64, quiet: bool) -> Progress {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            // Where bytes say nothing, experts are the measure.
            let bar = ProgressBar::new(if total_bytes > 0 { total_bytes } else { total_experts });
            let bytes = "{prefix} {wide_bar} {bytes}/{total_bytes} {msg} {bytes_per_sec} ETA {eta}";
            let template = if total_bytes > 0 { bytes } else { "{prefix} {wide_bar} {msg} ETA {eta}" };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_prefix(label.to_owned());
            bar
        });
        let now = Instant::now();
        let done = Mutex::new(Done { bytes: 0, experts: 0, started: now, last_line: now });
        Progress { label: label.to_owned(), total_bytes, total_experts, quiet, bar, done }
    }

    /// Some more is done.
    pub fn add(&self, bytes: u64, experts: u64) {
        self.update(|done| {
            done.bytes += bytes;
            done.experts += experts;
        });
    }

    /// So many bytes are done in all.
    pub fn reach(&self, bytes: u64) {
        self.update(|done| done.bytes = done.bytes.max(bytes));
    }

    fn update(&self, change: impl FnOnce(&mut Done)) {
        let Ok(mut done) = self.done.lock() else { return };
        change(&mut done);
        if let Some(bar) = &self.bar {
            bar.set_position(if self.total_bytes > 0 { done.bytes } else { done.experts });
            if self.total_experts > 0 {
                bar.set_message(format!("{}/{} experts", done.experts, self.total_experts));
            }
        } else if !self.quiet && done.last_line.elapsed() > PLAIN_INTERVAL {
            done.last_line = Instant::now();
            say(&self.line(&done));
        }
    }

    /// Bytes and experts that are done.
    pub fn done(&self) -> (u64, u64) {
        self.done.lock().map_or((0, 0), |done| (done.bytes, done.experts))
    }

    /// Bytes and experts in all.
    pub fn totals(&self) -> (u64, u64) {
        (self.total_bytes, self.total_experts)
    }

    /// Takes the bar off the terminal.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn line(&self, done: &Done) -> String {
        let seconds = done.started.elapsed().as_secs_f64();
        let experts = match self.total_experts {
            0 => self.label.clone(),
            total => format!("{}: {}/{total} experts", self.label, done.experts),
        };
        if self.total_bytes == 0 {
            let left =
                self.total_experts.saturating_sub(done.experts) as f64 * seconds / done.experts.max(1) as f64;
            return format!("{experts}, about {left:.0} s left");
        }
        let rate = done.bytes as f64 / seconds.max(1e-9);
        let left = self.total_bytes.saturating_sub(done.bytes) as f64 / rate.max(1.0);
        let (at, of, rate) = (human(done.bytes), human(self.total_bytes), human(rate as u64));
        format!("{experts}, {at} of {of}, {rate}/s, about {left:.0} s left")
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}
