//! `bench` reads random experts under a budget, with any number of threads.

use serde_json::Value;

use crate::support::{fixture, moepack, succeeds};

#[test]
fn experts_are_paged_with_any_number_of_threads() {
    let work = bundle();
    for threads in ["1", "2", "5"] {
        let args = ["bench", "out.moepack", "--reads", "50", "--verify", "--json", "--threads", threads];
        let report: Value = serde_json::from_str(&succeeds(work.path(), &args).stdout).unwrap();
        assert!(report["bytes_per_second"].as_f64().unwrap() > 0.0, "{threads} threads: {report}");
        let of = |key: &str| report["pager"][key].as_u64().unwrap();
        assert_eq!(of("hits") + of("misses"), 50, "{threads} threads: {report}");
    }
}

#[test]
fn a_budget_for_all_experts_reads_each_once() {
    let work = bundle();
    let args = ["bench", "out.moepack", "--reads", "200", "--budget", "64MiB", "--threads", "1", "--json"];
    let report: Value = serde_json::from_str(&succeeds(work.path(), &args).stdout).unwrap();
    assert_eq!(report["pager"]["reads"], report["experts"], "{report}");
    assert_eq!(report["pager"]["evictions"], 0, "{report}");
}

#[test]
fn a_budget_below_one_expert_is_impossible() {
    let work = bundle();
    let run = moepack(work.path(), &["bench", "out.moepack", "--budget", "4KiB"]);
    assert_eq!(run.code, Some(78), "{}", run.stderr);
    assert!(run.stderr.contains("hint: "), "{}", run.stderr);
}

fn bundle() -> tempfile::TempDir {
    let work = tempfile::tempdir().unwrap();
    let model = fixture("random/qwen3_moe_sharded");
    succeeds(work.path(), &["quantize", model.to_str().unwrap(), "-o", "out.moepack", "--codec", "int8"]);
    work
}
