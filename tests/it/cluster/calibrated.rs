//! Calibrated jobs: every worker learns what a run on one machine learns.

use std::path::Path;
use std::process::{Command, Stdio};

use super::{plan, shuffled, tiny, workers};
use crate::support::{assert_same, fixture, succeeds, text};

/// Quantizes on one machine and by a plan of so many shards and units, in some order, and compares.
fn same_bytes(at: &Path, model: &str, cuts: &[(&str, &str)], args: &[&str]) {
    succeeds(at, &[&["quantize", model, "-o", "one", "--overwrite", "-q"], args].concat());
    for (n_shards, n_units) in cuts {
        let cut = ["--shards", n_shards, "--calibration-shards", n_units, "--overwrite"];
        let n = plan(at, model, "p", &[&cut[..], args].concat());
        workers(at, "p", shuffled(n));
        succeeds(at, &["merge", "--plan", "p", "--overwrite", "-q"]);
        assert_same(&at.join("one"), &at.join("p.moepack"), &format!("{model} {args:?} {n_shards} shards"));
        std::fs::remove_dir_all(at.join("p")).unwrap();
    }
}

#[test]
fn hessians_do_not_depend_on_who_makes_them() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let calibration = text(at, "calibration.txt", 4_000).display().to_string();
    let with = |args: &[&str], cuts: &[(&str, &str)]| {
        let args = [&["--calibrate", &calibration, "--ctx", "64"], args].concat();
        same_bytes(at, &tiny(), cuts, &args);
    };
    with(&["--codec", "int3-g64", "--trunk-codec", "int8"], &[("1", "1"), ("4", "3"), ("11", "16")]);
    with(&["--codec", "tcq256", "--bits", "3"], &[("5", "2")]);
    with(&["--codec", "int4", "--solver", "weighted"], &[("7", "2")]);
    with(&["--codec", "mxfp4", "--solver", "rtn"], &[("2", "1")]);
}

#[test]
fn stats_of_an_earlier_calibration_travel_with_the_plan() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let calibration = text(at, "calibration.txt", 4_000).display().to_string();
    succeeds(at, &["calibrate", &tiny(), "--text", &calibration, "-o", "stats"]);
    same_bytes(at, &tiny(), &[("5", "1")], &["--codec", "int4", "--stats", "stats"]);
}

#[test]
fn hyper_connections_travel_between_layers() {
    let dir = tempfile::tempdir().unwrap();
    let calibration = text(dir.path(), "calibration.txt", 3_000).display().to_string();
    let model = fixture("tiny-deepseek-v4").display().to_string();
    let args = ["--codec", "int4-g32", "--calibrate", &calibration, "--ctx", "64"];
    same_bytes(dir.path(), &model, &[("4", "3")], &args);
}

#[test]
fn workers_share_the_text_and_may_come_twice() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let calibration = text(at, "calibration.txt", 6_000).display().to_string();
    let args = ["--codec", "int3", "--calibrate", &calibration, "--ctx", "64"];
    succeeds(at, &[&["quantize", &tiny(), "-o", "one"], &args[..]].concat());
    let n = plan(at, &tiny(), "p", &[&args[..], &["--shards", "6", "--calibration-shards", "4"]].concat());
    let twice = (0..n).rev().chain(0..n);
    let spawn = |shard: usize| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moepack"));
        command.args(["worker", "--plan", "p", "--threads", "1", "-q", "--shard", &shard.to_string()]);
        command.current_dir(at).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    // All at once, each shard by two workers.
    for worker in twice.map(spawn).collect::<Vec<_>>() {
        let output = worker.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    succeeds(at, &["merge", "--plan", "p", "--verify"]);
    assert_same(&at.join("one"), &at.join("p.moepack"), "overlapping workers");
}
