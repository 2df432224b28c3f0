//! A run that was stopped leaves no bundle, and the same command then makes the bundle of a run that was not.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{assert_same, fixture, moepack, succeeds, text};

/// How often a run may finish before the signal reaches it.
const TRIES: usize = 20;

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    interrupted("KILL", None);
}

#[test]
fn a_terminated_run_says_so_and_goes_on_to_the_same_bytes() {
    interrupted("TERM", Some(75));
}

#[test]
fn an_interrupted_run_stops_soon_and_goes_on_to_the_same_bytes() {
    interrupted("INT", Some(130));
}

#[test]
fn unfinished_work_of_another_recipe_is_refused_with_the_difference() {
    let work = tempfile::tempdir().unwrap();
    stop_within(work.path(), "KILL");
    let run = moepack(work.path(), &["quantize", model().as_str(), "-o", "out.moepack", "--codec", "int8"]);
    assert_eq!(run.code, Some(78), "{}", run.stderr);
    for said in ["int3", "int8", "out.moepack.partial", "hint:"] {
        assert!(run.stderr.contains(said), "{said:?} is not said\n{}", run.stderr);
    }
    assert!(!work.path().join("out.moepack").exists());
}

#[test]
fn unfinished_work_on_a_source_that_changed_is_refused() {
    let work = tempfile::tempdir().unwrap();
    stop_within(work.path(), "KILL");
    // The journal knows the files by length and time of change; a copy has another time.
    let (from, copy) = (fixture("tiny-deepseek-v3"), work.path().join("copy"));
    std::fs::create_dir(&copy).unwrap();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::write(copy.join(file), std::fs::read(from.join(file)).unwrap()).unwrap();
    }
    let mut again = args("out.moepack");
    again[1] = "copy".to_owned();
    let run = moepack(work.path(), &again);
    assert_eq!(run.code, Some(78), "{}", run.stderr);
    assert!(run.stderr.contains("model.safetensors") || run.stderr.contains("sources"), "{}", run.stderr);
    again.push("--overwrite".to_owned());
    succeeds(work.path(), &again);
}

/// Stops a run by a signal, looks at what it says, goes on, and compares with a run of its own.
fn interrupted(signal: &str, exit: Option<i32>) {
    let work = tempfile::tempdir().unwrap();
    let code = stop_within(work.path(), signal);
    assert_eq!(code, exit, "exit code after SIG{signal}");
    assert!(!work.path().join("out.moepack").exists(), "an unfinished bundle appeared");
    let again = succeeds(work.path(), &args("out.moepack"));
    assert!(!work.path().join("out.moepack.partial").exists(), "{}", again.stderr);
    succeeds(work.path(), &args("whole.moepack"));
    assert_same(&work.path().join("whole.moepack"), &work.path().join("out.moepack"), "interrupted");
}

/// Starts the run and stops it once a bank is finished; returns its exit code, `None` if the signal ended it.
fn stop_within(work: &Path, signal: &str) -> Option<i32> {
    text(work, "calibration.txt", 60_000);
    for _ in 0..TRIES {
        let child = Command::new(env!("CARGO_BIN_EXE_moepack"))
            .args(args("out.moepack"))
            .current_dir(work)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let bank = work.join("out.moepack.partial/output/experts-00001.safetensors");
        if let Some(code) = stop_when(child, signal, || bank.exists()) {
            return code;
        }
        std::fs::remove_dir_all(work.join("out.moepack")).unwrap();
    }
    panic!("{TRIES} runs finished before the signal");
}

/// Ends the process by a signal as soon as it is ready; `None` if it finished first.
#[allow(clippy::option_option, reason = "finished first, ended by the signal, exit code")]
pub fn stop_when(mut child: Child, signal: &str, ready: impl Fn() -> bool) -> Option<Option<i32>> {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing appeared");
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            return None;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    let asked = Instant::now();
    let sent = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap();
    let status = child.wait().unwrap();
    if status.success() {
        return None;
    }
    assert!(sent.success());
    assert!(asked.elapsed() < Duration::from_secs(10), "it took {:?} to stop", asked.elapsed());
    Some(status.code())
}

fn args(out: &str) -> Vec<String> {
    let model = model();
    let args = [
        "quantize",
        &model,
        "-o",
        out,
        "--codec",
        "int3",
        "--trunk-codec",
        "int8",
        "--calibrate",
        "calibration.txt",
    ];
    args.into_iter().map(str::to_owned).collect()
}

fn model() -> String {
    fixture("tiny-deepseek-v3").to_str().unwrap().to_owned()
}
