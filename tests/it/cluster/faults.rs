//! Each call on a file fails, tears, or is the last thing that a worker or a merge does; the same command then goes on.

use std::path::Path;

use super::{plan, workers};
use crate::support::{assert_same, contents, fixture, moepack, moepack_with, succeeds};

/// What happens at a call, taken in turn.
const FAULTS: &[&str] = &["kill", "eio", "torn-kill", "enospc", "killed-after", "eacces"];
/// Calls that a command makes at most.
const CALLS_MAX: usize = 2_000;

#[test]
fn a_worker_that_puts_a_layer_together_may_fail_anywhere() {
    each(&[0, 1, 3], &["worker", "--plan", "p", "--shard", "2", "-q"]);
}

#[test]
fn the_trunks_worker_may_fail_anywhere() {
    each(&[1, 2, 3], &["worker", "--plan", "p", "--shard", "0", "-q"]);
}

#[test]
fn merging_may_fail_anywhere() {
    each(&[0, 1, 2, 3], &["merge", "--plan", "p", "-q"]);
}

/// Runs a command when these shards are done: the trunk, two halves of a layer, and another, with a fault at each of its calls, and then again without.
fn each(done: &[usize], command: &[&str]) {
    let start = tempfile::tempdir().unwrap();
    let model = fixture("random/mixtral").display().to_string();
    succeeds(start.path(), &["quantize", &model, "-o", "one", "--codec", "int4-g32", "-q"]);
    let n = plan(start.path(), &model, "p", &["--codec", "int4-g32", "--shards", "4"]);
    assert_eq!(n, 4);
    workers(start.path(), "p", done.iter().copied());
    let mut happened = 0;
    for n in 1..CALLS_MAX {
        let dir = tempfile::tempdir().unwrap();
        copy(start.path(), dir.path());
        let fault = format!("change:{n}:{}", FAULTS[n % FAULTS.len()]);
        let first = moepack_with(dir.path(), &[("MOEPACK_FAULT", &fault)], command);
        if !first.stderr.contains("MOEPACK_FAULT") {
            assert_eq!(first.code, Some(0), "{}", first.stderr);
            break;
        }
        happened += 1;
        let told = || format!("{command:?} with {fault}: {:?}\n{}", first.code, first.stderr);
        let clean =
            matches!(first.code, Some(0 | 66 | 73 | 74 | 75 | 77)) && !first.stderr.contains("panicked");
        assert!(clean || first.code.is_none() && fault.contains("kill"), "{}", told());
        let again = moepack(dir.path(), command);
        assert_eq!(again.code, Some(0), "{}\nthen {}", told(), again.stderr);
        succeeds(dir.path(), &["merge", "--plan", "p", "-q"]);
        assert_same(&start.path().join("one"), &dir.path().join("p.moepack"), &told());
    }
    assert!((10..CALLS_MAX - 1).contains(&happened), "{happened} calls");
}

fn copy(from: &Path, to: &Path) {
    for name in ["activations", "attempts", "parts", "reports", "status", "submit", "bundle.partial"] {
        std::fs::create_dir_all(to.join("p").join(name)).unwrap();
    }
    for (path, bytes) in contents(&from.join("p")) {
        std::fs::write(to.join("p").join(path), bytes).unwrap();
    }
}
