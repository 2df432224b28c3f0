//! More than one machine: the bytes of a bundle depend neither on how a job is cut, nor on order, overlap or accidents.

use std::path::Path;

use serde_json::Value;

use crate::support::{Run, assert_same, fixture, moepack, moepack_with, succeeds};

mod accidents;
mod calibrated;
mod faults;
mod submitted;

/// A model of 3 layers of 16 experts behind a dense one.
pub fn tiny() -> String {
    fixture("tiny-deepseek-v3").display().to_string()
}

/// Makes a plan of `model` called `plan`, cut into shards, and gives how many there are.
pub fn plan(at: &Path, model: &str, plan: &str, args: &[&str]) -> usize {
    succeeds(at, &[&["plan", model, "-o", plan, "-q"], args].concat());
    let plan: Value =
        serde_json::from_slice(&std::fs::read(at.join(plan).join("plan.json")).unwrap()).unwrap();
    plan["shards"].as_array().unwrap().len()
}

/// Does a shard.
pub fn worker(at: &Path, plan: &str, shard: usize) -> Run {
    moepack(at, &["worker", "--plan", plan, "--shard", &shard.to_string(), "-q"])
}

/// Does these shards in this order, all well.
pub fn workers(at: &Path, plan: &str, shards: impl IntoIterator<Item = usize>) {
    for shard in shards {
        let run = worker(at, plan, shard);
        assert_eq!(run.code, Some(0), "shard {shard}: {}", run.stderr);
    }
}

/// Numbers below `n` in an order that is none.
pub fn shuffled(n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_key(|i| (i * 7919 + 3) % 101);
    order
}

/// Cuts a job into so many shards, does them in some order, and compares the bundle with a run on one machine.
fn same_bytes(at: &Path, model: &str, n_shards: usize, args: &[&str]) {
    let name = format!("p{n_shards}");
    let n = plan(at, model, &name, &[&["--shards", &n_shards.to_string()], args].concat());
    assert_eq!(n, n_shards);
    workers(at, &name, shuffled(n));
    let merged = succeeds(at, &["merge", "--plan", &name, "-q"]);
    assert!(merged.stdout.contains(&format!("bundle {name}.moepack")), "{}", merged.stdout);
    assert_same(&at.join("one"), &at.join(format!("{name}.moepack")), &format!("{n_shards} shards"));
}

#[test]
fn a_job_may_be_cut_into_any_number_of_shards() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["--codec", "int4-g64"];
    succeeds(dir.path(), &[&["quantize", &tiny(), "-o", "one"], &args[..]].concat());
    for n_shards in [1, 2, 5, 49] {
        same_bytes(dir.path(), &tiny(), n_shards, &args);
    }
    succeeds(dir.path(), &["check", "p49.moepack", "--against", &tiny()]);
    let left: Vec<_> =
        std::fs::read_dir(dir.path().join("p5")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(
        left.iter().all(|name| name != "activations" && name != "parts" && name != "attempts"),
        "{left:?}"
    );
}

#[test]
fn there_may_be_far_more_shards_than_layers() {
    let dir = tempfile::tempdir().unwrap();
    // Five layers of 16 experts.
    let (model, args) = (fixture("tiny-deepseek-v4").display().to_string(), ["--codec", "int4-g32"]);
    succeeds(dir.path(), &[&["quantize", &model, "-o", "one"], &args[..]].concat());
    same_bytes(dir.path(), &model, 61, &args);
}

#[test]
fn a_budget_met_on_one_machine_is_met_by_many() {
    let dir = tempfile::tempdir().unwrap();
    // Filled up in the manifest, with a coded trunk.
    let args = ["--target-size", "3400KiB", "--trunk-codec", "int8"];
    succeeds(dir.path(), &[&["quantize", &tiny(), "-o", "one"], &args[..]].concat());
    same_bytes(dir.path(), &tiny(), 6, &args);
}

#[test]
fn every_engine_tells_a_worker_its_shard() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    plan(at, &tiny(), "p", &["--codec", "int4", "--shards", "3"]);
    let auto = |environment: &[(&str, &str)], offset: &str| {
        let args =
            ["worker", "--plan", "p/plan.json", "--shard", "auto", "--shard-offset", offset, "--json", "-q"];
        moepack_with(at, environment, &args)
    };
    let shard = |run: &Run| serde_json::from_str::<Value>(&run.stdout).unwrap()["shard"].as_u64().unwrap();
    assert_eq!(shard(&auto(&[("SLURM_ARRAY_TASK_ID", "1")], "0")), 1);
    assert_eq!(shard(&auto(&[("PARALLEL_SEQ", "1")], "2")), 2);
    assert_eq!(auto(&[], "0").code, Some(2));
    assert_eq!(auto(&[("SLURM_ARRAY_TASK_ID", "2")], "1").code, Some(2), "no shard 3");
}
