//! `moepack bench`: random expert reads of a bundle, as an engine that pages experts does them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use moepack_format::pager::memory_of;
use moepack_format::pager::{Pager, PagerOptions, PagerStats};
use moepack_format::{Bundle, Error, Result};
use serde::Serialize;

use super::{Command, parse};
use crate::engine::budget::Budget;
use crate::output::{print, print_json};
use crate::session::Session;
use crate::size::{human, parse_arg};

/// The table row.
pub const COMMAND: Command = Command {
    name: "bench",
    about: "Measure paging: random expert reads, GB/s, latency percentiles",
    examples: &["moepack bench q.moepack", "moepack bench q.moepack --reads 2000 --budget 2GiB --json"],
    args: Arguments::augment_args,
    run: |matches, session| run(&parse(matches)?, session),
};

#[derive(Args, Debug)]
struct Arguments {
    /// The bundle
    bundle: PathBuf,
    /// Experts to ask for
    #[arg(long, value_name = "N", default_value_t = 500)]
    reads: usize,
    /// Memory for experts; the smaller, the fewer hits [default: enough for one expert a thread]
    #[arg(long, value_name = "SIZE", value_parser = parse_arg)]
    budget: Option<u64>,
    /// Compare the checksum of each record
    #[arg(long)]
    verify: bool,
    /// Read through the page cache
    #[arg(long)]
    buffered: bool,
    /// Which experts, as a seed: the same seed asks for the same ones
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, Serialize)]
struct Report {
    schema: &'static str,
    bundle: String,
    threads: usize,
    experts: usize,
    record_bytes_max: u64,
    seconds: f64,
    bytes_per_second: f64,
    latency_us_p50: f64,
    latency_us_p95: f64,
    latency_us_p99: f64,
    latency_us_max: f64,
    pager: PagerStats,
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    let bundle = Arc::new(Bundle::open(&args.bundle)?);
    let experts: Vec<(u32, u32)> =
        bundle.layers().iter().flat_map(|l| (0..l.n_experts).map(move |e| (l.layer, e))).collect();
    let record_bytes_max = bundle.layers().iter().map(|l| l.max_record_bytes).max().unwrap_or(0);
    if experts.is_empty() {
        return Err(Error::bad_data("the bundle has no routed experts").in_file(&args.bundle));
    }
    let budget_bytes =
        args.budget.unwrap_or(memory_of(record_bytes_max).saturating_mul(session.threads as u64));
    Budget::of_bytes(budget_bytes).check(session.memory)?;
    let options = PagerOptions { budget_bytes, verify: args.verify, direct: !args.buffered, threads: 0 };
    let pager = Pager::new(bundle, options)?;
    let asked = draw(&experts, args.reads, args.seed);
    let started = Instant::now();
    let mut latencies = read(session, &pager, &asked)?;
    let seconds = started.elapsed().as_secs_f64();
    latencies.sort();
    let stats = pager.stats();
    let at = |p: f64| percentile(&latencies, p);
    let report = Report {
        schema: "moepack.bench/1",
        bundle: args.bundle.display().to_string(),
        threads: session.threads,
        experts: experts.len(),
        record_bytes_max,
        seconds,
        bytes_per_second: stats.bytes_read as f64 / seconds,
        latency_us_p50: at(0.5),
        latency_us_p95: at(0.95),
        latency_us_p99: at(0.99),
        latency_us_max: at(1.0),
        pager: stats,
    };
    if session.json { print_json(&report) } else { print(&text(&report)) }
}

/// Asks for the experts, one after the other in each thread; gives the time that each took.
fn read(session: &Session, pager: &Pager, asked: &[(u32, u32)]) -> Result<Vec<Duration>> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut times = Vec::new();
        while let Some(&(layer, expert)) = asked.get(next.fetch_add(1, Ordering::Relaxed)) {
            session.stop.check()?;
            let started = Instant::now();
            pager.get(layer, expert)?;
            times.push(started.elapsed());
        }
        Ok(times)
    };
    let all: Vec<Result<Vec<Duration>>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..session.threads).map(|_| scope.spawn(worker)).collect();
        let died = |_| Err(Error::new(moepack_format::Kind::Io, "a reading thread died"));
        threads.into_iter().map(|t| t.join().unwrap_or_else(died)).collect()
    });
    let mut times = Vec::new();
    for part in all {
        times.extend(part?);
    }
    Ok(times)
}

/// `n` experts drawn with repetition by splitmix64 (Steele, Lea and Flood 2014).
fn draw(experts: &[(u32, u32)], n: usize, seed: u64) -> Vec<(u32, u32)> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let len = experts.len().max(1) as u64;
    (0..n).filter_map(|_| experts.get((next() % len) as usize).copied()).collect()
}

/// The time below which a share `p` of the sorted times lies, in microseconds.
fn percentile(sorted: &[Duration], p: f64) -> f64 {
    let at = (p * sorted.len() as f64).ceil() as usize;
    sorted.get(at.clamp(1, sorted.len().max(1)) - 1).map_or(0.0, |d| d.as_secs_f64() * 1e6)
}

fn text(r: &Report) -> String {
    let way = if r.pager.direct { "past the page cache (O_DIRECT)" } else { "through the page cache" };
    let counts = format!(
        "{} reads, {} hits, {} experts of up to {}",
        r.pager.reads,
        r.pager.hits,
        r.experts,
        human(r.record_bytes_max)
    );
    let speed = format!("{:.3} GB/s with {} threads, {way}", r.bytes_per_second / 1e9, r.threads);
    let (p50, p95, p99, max) = (r.latency_us_p50, r.latency_us_p95, r.latency_us_p99, r.latency_us_max);
    format!("{counts}\n{speed}\nlatency p50 {p50:.0} us, p95 {p95:.0} us, p99 {p99:.0} us, max {max:.0} us\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_occurred() {
        let times: Vec<Duration> = (1..=100).map(Duration::from_micros).collect();
        assert_eq!([0.5, 0.95, 0.99, 1.0].map(|p| percentile(&times, p).round()), [50.0, 95.0, 99.0, 100.0]);
        assert_eq!(percentile(&[], 0.5), 0.0);
    }

    #[test]
    fn a_seed_asks_for_the_same_experts() {
        let experts = [(0, 0), (0, 1), (3, 0)];
        assert_eq!(draw(&experts, 50, 7), draw(&experts, 50, 7));
        assert_ne!(draw(&experts, 50, 7), draw(&experts, 50, 8));
        assert!(experts.iter().all(|e| draw(&experts, 200, 1).contains(e)));
    }
}
