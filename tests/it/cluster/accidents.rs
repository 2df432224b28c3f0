//! What goes wrong on clusters: workers die, shards are missing or foreign, checkpoints and plans change.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::{plan, tiny, worker, workers};
use crate::resume::stop_when;
use crate::support::{assert_same, contents, fixture, moepack, succeeds, text};

/// How often a worker may finish before the signal reaches it.
const TRIES: usize = 20;

const CODEC: [&str; 2] = ["--codec", "int3"];

#[test]
fn a_killed_worker_is_begun_again_to_the_same_bytes() {
    for (signal, exit) in [("KILL", None), ("USR1", Some(75))] {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        let calibration = text(at, "calibration.txt", 30_000).display().to_string();
        let args = [&CODEC[..], &["--calibrate", &calibration]].concat();
        succeeds(at, &[&["quantize", &tiny(), "-o", "one"], &args[..]].concat());
        let code = (0..TRIES).find_map(|_| {
            plan(at, &tiny(), "p", &[&args[..], &["--shards", "2", "--overwrite"]].concat());
            let worker = Command::new(env!("CARGO_BIN_EXE_moepack"))
                .args(["worker", "--plan", "p", "--shard", "1"])
                .current_dir(at)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            stop_when(worker, signal, || at.join("p/bundle.partial/experts-00001.safetensors").exists())
        });
        assert_eq!(code, Some(exit), "SIG{signal}");
        let run = moepack(at, &["merge", "--plan", "p"]);
        assert_eq!(run.code, Some(75), "{}", run.stderr);
        assert!(run.stderr.contains("2 of 2 shards are not done: 0-1"), "{}", run.stderr);
        workers(at, "p", [1, 0]);
        succeeds(at, &["merge", "--plan", "p"]);
        assert_same(&at.join("one"), &at.join("p.moepack"), "a killed worker");
    }
}

#[test]
fn a_published_shard_is_done_at_once_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    plan(at, &tiny(), "p", &[&CODEC[..], &["--shards", "3"]].concat());
    workers(at, "p", [1]);
    let before = contents(&at.join("p"));
    let started = Instant::now();
    let run = worker(at, "p", 1);
    assert!(run.code == Some(0) && run.stdout.contains("was done before"), "{}{}", run.stdout, run.stderr);
    assert!(started.elapsed().as_secs_f64() < 1.0, "{:?}", started.elapsed());
    assert!(contents(&at.join("p")) == before);
    // Nor does a late one after merging.
    workers(at, "p", [0, 2]);
    succeeds(at, &["merge", "--plan", "p", "-o", "elsewhere"]);
    assert!(worker(at, "p", 2).stdout.contains("was done before"));
    succeeds(at, &["merge", "--plan", "p", "-o", "elsewhere"]);
    assert_eq!(
        moepack(at, &["merge", "--plan", "p", "-o", "again"]).code,
        Some(73),
        "there is nothing to merge"
    );
}

#[test]
fn other_bytes_of_another_attempt_are_a_loud_error() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    plan(at, &tiny(), "p", &CODEC);
    workers(at, "p", 0..4);
    let bank = at.join("p/bundle.partial/experts-00002.safetensors");
    let mut bytes = std::fs::read(&bank).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&bank, &bytes).unwrap();
    let run = moepack(at, &["merge", "--plan", "p", "--verify"]);
    assert!(run.code == Some(65) && run.stderr.contains("experts-00002"), "{}", run.stderr);
    // Its report is lost, so it is made again.
    std::fs::remove_file(at.join("p/reports/experts-00002.json")).unwrap();
    let run = worker(at, "p", 2);
    assert_eq!(run.code, Some(65), "{}", run.stderr);
    assert!(run.stderr.contains("another attempt") && run.stderr.contains("hint:"), "{}", run.stderr);
    std::fs::remove_file(&bank).unwrap();
    workers(at, "p", [2]);
    succeeds(at, &["merge", "--plan", "p"]);
    succeeds(at, &["check", "p.moepack"]);
}

#[test]
fn a_foreign_shard_and_a_foreign_file_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    plan(at, &tiny(), "p", &CODEC);
    plan(at, &tiny(), "other", &["--codec", "int4"]);
    workers(at, "p", 0..4);
    workers(at, "other", [3]);
    let report = at.join("p/reports/experts-00003.json");
    let own = std::fs::read(&report).unwrap();
    std::fs::copy(at.join("other/reports/experts-00003.json"), &report).unwrap();
    for run in [moepack(at, &["merge", "--plan", "p"]), worker(at, "p", 3)] {
        assert!(run.code == Some(65) && run.stderr.contains("experts-00003.json"), "{}", run.stderr);
    }
    std::fs::write(&report, own).unwrap();
    std::fs::write(at.join("p/bundle.partial/diary.txt"), "dear").unwrap();
    let run = moepack(at, &["merge", "--plan", "p"]);
    assert!(run.code == Some(65) && run.stderr.contains("diary.txt"), "{}", run.stderr);
    std::fs::remove_file(at.join("p/bundle.partial/diary.txt")).unwrap();
    succeeds(at, &["merge", "--plan", "p"]);
}

#[test]
fn a_changed_checkpoint_and_a_changed_plan_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    std::fs::create_dir(at.join("m")).unwrap();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        copy(file, at);
    }
    plan(at, "m", "p", &CODEC);
    // Another time, the same bytes.
    copy("model.safetensors", at);
    workers(at, "p", [1]);
    let weights = at.join("m/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let run = worker(at, "p", 2);
    assert!(run.code == Some(65) && run.stderr.contains("source changed since plan"), "{}", run.stderr);
    let path = at.join("p/plan.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("int3-g64", "int2-g64").replace("\"int3\"", "\"int2\"")).unwrap();
    for args in [&["worker", "--shard", "2", "--plan", "p"][..], &["merge", "--plan", "p"]] {
        let run = moepack(at, args);
        assert!(run.code == Some(65) && run.stderr.contains("id is"), "{}", run.stderr);
    }
    assert_eq!(moepack(at, &["merge", "--plan", "m"]).code, Some(66), "no plan");
}

fn copy(file: &str, at: &Path) {
    let bytes = std::fs::read(fixture("tiny-deepseek-v3").join(file)).unwrap();
    std::fs::write(at.join("m").join(file), bytes).unwrap();
}
