//! A bounded run of every target, and the alarms.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::path::Path;
use std::process::{Command, Output};

use moepack_fuzz::drive::scratch;
use moepack_fuzz::run::prepare;
use moepack_fuzz::targets::{ALARMS, TARGETS};

/// Inputs of a fast target: all targets together take some twenty seconds on two cores.
const N_INPUTS: &str = "30000";

fn fuzz(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fuzz")).args(args).arg("--findings").arg(dir).output().unwrap()
}

#[test]
fn no_reader_fails_on_thousands_of_inputs() {
    let dir = tempfile::tempdir().unwrap();
    let run = fuzz(dir.path(), &["--inputs", N_INPUTS]);
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    let kept = dir.keep();
    assert!(run.status.success(), "{said}\ninputs are kept in {}", kept.display());
    std::fs::remove_dir_all(kept).unwrap();
}

#[test]
fn readers_take_the_files_that_inputs_are_made_from() {
    for target in TARGETS {
        let dir = scratch().unwrap();
        let (ready, corpus) = prepare(target, dir.path()).unwrap_or_else(|e| panic!("{}: {e}", target.name));
        assert!(corpus.n_seeds() > 0, "{} has no seeds", target.name);
        let seeds = (0..corpus.n_seeds() as u64).map(|n| corpus.input(1, n));
        let taken = seeds.filter(|(from, bytes)| (ready.read)(from, bytes).is_ok()).count();
        assert!(taken > 0, "{} takes none of its seeds", target.name);
    }
}

#[test]
fn every_alarm_rings() {
    for alarm in ALARMS {
        let dir = tempfile::tempdir().unwrap();
        let run = fuzz(dir.path(), &["--target", alarm.name, "--inputs", "2"]);
        let said = String::from_utf8_lossy(&run.stderr).into_owned();
        let verdict = alarm.name.strip_prefix("alarm_").unwrap();
        assert_eq!(run.status.code(), Some(1), "{}: {said}", alarm.name);
        assert!(said.contains(&format!("{verdict} in {}", alarm.name)), "{said}");
        let kept = dir.path().join(format!("{}-{verdict}-1-1", alarm.name));
        assert_eq!(std::fs::read(kept).unwrap().len(), 1001, "the input that it fails on");
    }
}
