//! `moepack check`: every checksum, every invariant, all damage at once; and what is damaged made whole again.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::Args;
use moepack_convert::{Model, OpenOptions};
use moepack_format::check::{CheckLevel, CheckOptions, CheckProgress, Damage, Sample, check, read_manifest};
use moepack_format::file::CHUNK_BYTES;
use moepack_format::manifest::Manifest;
use moepack_format::{Error, Kind, Result, storage};
use serde::Serialize;

use super::{Command, parse};
use crate::engine::against::against;
use crate::engine::budget::Budget;
use crate::engine::repair::{Repaired, kept_options};
use crate::output::{print, print_json, refuse_existing_file, write_file};
use crate::session::Session;
use crate::text::WindowArgs;

mod repair;
mod statement;

/// The table row.
pub const COMMAND: Command = Command {
    name: "check",
    about: "Look for damage in a bundle: every checksum and invariant; compare it with its checkpoint, or repair it from there",
    examples: &[
        "moepack check q.moepack",
        "moepack check q.moepack --quick",
        "moepack check q.moepack --sample 5%",
        "moepack check q.moepack --against Qwen3-30B-A3B",
        "moepack check q.moepack --repair Qwen3-30B-A3B --calibrate calib.txt",
        "moepack check q.moepack --statement q.intoto.json --sha256sums q.sha256",
    ],
    args: Arguments::augment_args,
    run: |matches, session| run(&parse(matches)?, session),
};

#[derive(Args, Debug)]
struct Arguments {
    /// The bundle
    bundle: PathBuf,
    #[command(flatten)]
    how: How,
    /// Draws another sample
    #[arg(long, value_name = "N", default_value_t = 0, requires = "sample")]
    sample_seed: u64,
    /// Text that the bundle was calibrated on; needed where something is damaged that was coded by it
    #[arg(long, value_name = "TEXT", requires = "repair", conflicts_with = "stats")]
    calibrate: Option<PathBuf>,
    /// Stats or importance matrix that the bundle was made by; needed in the same way
    #[arg(long, value_name = "STATS", visible_alias = "imatrix", requires = "repair")]
    stats: Option<PathBuf>,
    #[command(flatten)]
    windows: WindowArgs,
    /// Write the sha256 of every file of a sound bundle as the statement that OpenSSF model signing signs (in-toto JSON)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "sample"])]
    statement: Option<PathBuf>,
    /// The same as a list for `sha256sum -c`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "sample"])]
    sha256sums: Option<PathBuf>,
    /// Replace a statement or list that is there
    #[arg(long)]
    overwrite: bool,
}

/// What is looked at, if not all of it.
#[derive(Args, Debug)]
#[group(multiple = false)]
struct How {
    /// Structure only: manifest, sizes, headers, indexes
    #[arg(long)]
    quick: bool,
    /// The structure, and a share of all records, such as 5%
    #[arg(long, value_name = "SHARE", value_parser = share)]
    sample: Option<u32>,
    /// Compare with the checkpoint too: what was kept must be the same to the bit, what was quantized within its error
    #[arg(long, value_name = "CHECKPOINT")]
    against: Option<PathBuf>,
    /// Make damaged records, tensors and files again from the checkpoint: the same bytes as before, or none
    #[arg(long, value_name = "CHECKPOINT")]
    repair: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Report {
    schema: &'static str,
    bundle: String,
    level: &'static str,
    ok: bool,
    damage: Vec<Damage>,
    /// What was looked at, of a sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    sample: Option<Drawn>,
    /// What was made whole again, with `--repair`.
    #[serde(skip_serializing_if = "Option::is_none")]
    repaired: Option<Vec<Repaired>>,
    /// What is damaged still, with `--repair`.
    #[serde(skip_serializing_if = "Option::is_none")]
    left: Option<Vec<Damage>>,
}

/// What a sample consists of.
#[derive(Debug, Serialize)]
struct Drawn {
    share: f64,
    seed: u64,
    /// Experts of each layer.
    layers: Vec<DrawnLayer>,
    trunk_tensors: usize,
}

#[derive(Debug, Serialize)]
struct DrawnLayer {
    layer: u32,
    experts: Vec<u32>,
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    let outputs = [&args.statement, &args.sha256sums].into_iter().flatten();
    outputs.clone().try_for_each(|path| refuse_existing_file(path, args.overwrite))?;
    let level = match (&args.how, args.how.sample) {
        (How { quick: true, .. }, _) => ("quick", CheckLevel::Quick),
        (_, Some(per_million)) => {
            ("sample", CheckLevel::Sample(Sample { per_million, seed: args.sample_seed }))
        }
        (How { against: Some(_), .. }, _) => ("against", CheckLevel::Full),
        _ => ("full", CheckLevel::Full),
    };
    let damage = find(args, session, level.1)?;
    let mut report = Report {
        schema: "moepack.check/1",
        bundle: args.bundle.display().to_string(),
        level: level.0,
        ok: damage.is_empty(),
        damage,
        sample: drawn(&args.bundle, level.1)?,
        repaired: None,
        left: None,
    };
    let mut failed = None;
    if let Some(checkpoint) = &args.how.repair {
        match repair::repair(args, session, checkpoint, &report.damage) {
            Ok(repaired) => report.repaired = Some(repaired),
            Err(e) => failed = Some(e),
        }
        if failed.is_none() {
            let left = find(args, session, CheckLevel::Quick)?;
            (report.ok, report.left) = (left.is_empty(), Some(left));
        }
    }
    if report.ok && outputs.count() > 0 {
        write_digests(args)?;
    }
    if session.json {
        print_json(&report)?
    } else {
        print(&text(&report))?
    }
    let n = report.left.as_ref().unwrap_or(&report.damage).len();
    match failed {
        Some(e) => Err(e),
        None if report.ok => Ok(()),
        None => Err(Error::new(Kind::Finding, format!("{n} findings")).in_file(&args.bundle)),
    }
}

/// The digests in the forms that were asked for.
fn write_digests(args: &Arguments) -> Result<()> {
    let digests = statement::digests(&args.bundle)?;
    if let Some(path) = &args.statement {
        let statement = statement::statement(&args.bundle, &digests)?;
        write_file(path, &format!("{statement:#}\n"))?;
    }
    args.sha256sums.iter().try_for_each(|path| write_file(path, &statement::list(&digests)))
}

/// All damage; the checkpoint is compared only with a bundle that is whole.
fn find(args: &Arguments, session: &Session, level: CheckLevel) -> Result<Vec<Damage>> {
    Budget::of_bytes((session.threads * CHUNK_BYTES) as u64).check(session.memory)?;
    let progress = session.progress("check", bytes_of(&args.bundle), 0);
    let tick = |at: CheckProgress| {
        progress.reach(at.bytes_done);
        if session.stop.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let outcome = check(&args.bundle, CheckOptions { level, threads: session.threads }, &tick);
    session.stop.check()?;
    let mut damage = outcome?;
    if let Some(checkpoint) = args.how.against.as_ref().filter(|_| damage.is_empty()) {
        let bundle = Model::open(&args.bundle, &OpenOptions::default())?;
        let options = bundle.bundle().map(|b| kept_options(&b.manifest)).unwrap_or_default();
        let checkpoint = Model::open(checkpoint, &options)?;
        Budget::of_comparison([&bundle, &checkpoint], session.threads).check(session.memory)?;
        damage = against(session, &bundle, &checkpoint)?;
    }
    Ok(damage)
}

/// What a sample looked at.
fn drawn(bundle: &Path, level: CheckLevel) -> Result<Option<Drawn>> {
    let CheckLevel::Sample(sample) = level else { return Ok(None) };
    let manifest = read_manifest(bundle)?.manifest;
    Ok(manifest.map(|manifest: Manifest| Drawn {
        share: f64::from(sample.per_million) / 1e6,
        seed: sample.seed,
        trunk_tensors: sample.n_tensors(&manifest),
        layers: manifest
            .layers
            .iter()
            .map(|l| DrawnLayer { layer: l.layer, experts: sample.experts(l) })
            .collect(),
    }))
}

/// A share such as `5%` or `0.05`, in millionths.
fn share(text: &str) -> std::result::Result<u32, String> {
    let (number, whole) = text.strip_suffix('%').map_or((text, 1.0), |percent| (percent, 100.0));
    let share = number.trim().parse::<f64>().ok().map(|n| n / whole);
    let share = share.filter(|s| *s > 0.0 && *s <= 1.0);
    // Between 0 and a million.
    share
        .map(|s| (s * 1e6).ceil() as u32)
        .ok_or_else(|| format!("{text:?}, expected a share such as 5% or 0.05"))
}

/// Bytes of all files, for the display of progress only.
fn bytes_of(bundle: &Path) -> u64 {
    let paths = storage::list(bundle, usize::MAX).unwrap_or_default();
    paths.iter().filter_map(|path| storage::metadata(path).ok()).map(|m| m.len()).sum()
}

fn text(r: &Report) -> String {
    let mut text: String = r.damage.iter().map(|d| format!("{d}\n")).collect();
    if let Some(drawn) = &r.sample {
        text.push_str(&format!("sample of {} %, seed {}:\n", 100.0 * drawn.share, drawn.seed));
        for DrawnLayer { layer, experts } in &drawn.layers {
            let experts: Vec<String> = experts.iter().map(u32::to_string).collect();
            text.push_str(&format!("  layer {layer}: experts {}\n", experts.join(" ")));
        }
        text.push_str(&format!("  {} trunk tensors\n", drawn.trunk_tensors));
    }
    for repaired in r.repaired.iter().flatten() {
        text.push_str(&format!("repaired: {}\n", made_anew(repaired)));
    }
    for left in r.left.iter().flatten() {
        text.push_str(&format!("left: {left}\n"));
    }
    let verdict = match (&r.repaired, r.ok) {
        (Some(repaired), true) if !repaired.is_empty() => "whole again",
        (_, true) => "no damage found",
        (_, false) => "damaged",
    };
    format!("{text}{}: {verdict} ({} check)\n", r.bundle, r.level)
}

/// A file that was made whole, and what of it was coded anew.
fn made_anew(r: &Repaired) -> String {
    let experts: Vec<String> = r.experts.iter().map(u32::to_string).collect();
    let layer = r.layer.map_or(String::new(), |l| format!(", layer {l}"));
    match (experts.is_empty(), r.tensors.is_empty()) {
        (false, _) => format!("{}{layer}, experts {} coded anew", r.file, experts.join(" ")),
        (_, false) => format!("{}, {} coded anew", r.file, r.tensors.join(" ")),
        _ => format!("{}{layer}", r.file),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares() {
        assert_eq!((share("5%"), share("0.05"), share("100 %")), (Ok(50_000), Ok(50_000), Ok(1_000_000)));
        for wrong in ["0", "101%", "-1%", "x", "nan", "1.5"] {
            assert!(share(wrong).is_err(), "{wrong}");
        }
    }
}
