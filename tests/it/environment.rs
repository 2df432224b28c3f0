//! What the world around a run can refuse, and what the run then says and leaves.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::{assert_same, fixture, listing, moepack, succeeds, text};

#[test]
fn a_file_that_outgrows_its_limit_is_temporary_and_goes_on_later() {
    let work = tempfile::tempdir().unwrap();
    // 500 KiB: the trunk does not fit.
    let output = under("ulimit -f 1000", work.path(), &quantize("out.moepack"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(75), "{said}");
    assert!(said.contains("File too large") && said.contains("hint:"), "{said}");
    assert!(!work.path().join("out.moepack").exists());
    succeeds(work.path(), &quantize("out.moepack"));
    succeeds(work.path(), &quantize("whole.moepack"));
    assert_same(
        &work.path().join("whole.moepack"),
        &work.path().join("out.moepack"),
        "after a refused write",
    );
}

#[test]
fn few_file_descriptors_are_enough() {
    let work = tempfile::tempdir().unwrap();
    let output = under("ulimit -n 32", work.path(), &quantize("out.moepack"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_reader_that_went_away_is_no_error() {
    let work = tempfile::tempdir().unwrap();
    let model = fixture("tiny-deepseek-v3");
    let pipe = format!(
        "set -o pipefail; '{}' inspect '{}' --json | true",
        env!("CARGO_BIN_EXE_moepack"),
        model.display()
    );
    let output = Command::new("bash").args(["-c", &pipe]).current_dir(work.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!said.contains("panicked") && !said.contains("bug in moepack"), "{said}");
    assert!(!said.contains("error:"), "{said}");
}

#[test]
fn an_output_that_cannot_be_created_is_refused_before_any_work() {
    let work = tempfile::tempdir().unwrap();
    std::fs::write(work.path().join("file"), "in the way").unwrap();
    let before = listing(work.path());
    for (output, exit) in [("nowhere/out.moepack", 73), ("file/out.moepack", 73), ("file", 73)] {
        let run = moepack(work.path(), &quantize(output));
        assert_eq!(run.code, Some(exit), "{output}: {}", run.stderr);
        assert!(run.stderr.contains(output.split('/').next().unwrap()), "{}", run.stderr);
        assert_eq!(listing(work.path()), before, "{output} left something");
    }
}

#[test]
fn an_output_inside_the_input_is_wrong_usage() {
    let work = tempfile::tempdir().unwrap();
    let model = work.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture("random/qwen3_moe").join(file), model.join(file)).unwrap();
    }
    let before = listing(work.path());
    for output in ["model", "model/out.moepack", "model/../model/out.moepack"] {
        let run =
            moepack(work.path(), &["quantize", "model", "-o", output, "--codec", "int8", "--overwrite"]);
        assert_eq!(run.code, Some(2), "{output}: {}", run.stderr);
        assert_eq!(listing(work.path()), before, "{output} left something");
    }
}

#[test]
fn what_someone_else_keeps_is_never_removed() {
    let work = tempfile::tempdir().unwrap();
    // A directory that happens to have the name of unfinished work, and a web page, which has a manifest.json too.
    for (dir, file, text) in [
        ("out.moepack.partial", "diary.txt", "dear"),
        ("out.moepack", "manifest.json", r#"{"name": "page"}"#),
    ] {
        let dir = work.path().join(dir);
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join(file), text).unwrap();
        let before = listing(work.path());
        let run = moepack(work.path(), &[quantize("out.moepack"), vec!["--overwrite".into()]].concat());
        assert_eq!(run.code, Some(73), "{}", run.stderr);
        assert!(run.stderr.contains(file) && run.stderr.contains("hint:"), "{}", run.stderr);
        assert_eq!(listing(work.path()), before);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

#[test]
fn a_step_that_takes_long_ends_soon_after_the_signal_and_leaves_nothing() {
    let work = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(fixture("text/eval.txt")).unwrap().repeat(100);
    std::fs::write(work.path().join("long.txt"), text).unwrap();
    let model = fixture("tiny-deepseek-v3");
    for (signal, exit) in [("INT", 130), ("TERM", 75)] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_moepack"))
            .args(["calibrate", model.to_str().unwrap(), "--text", "long.txt", "-o", "stats"])
            .current_dir(work.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(300));
        let asked = Instant::now();
        assert!(
            Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap().success()
        );
        let code = child.wait().unwrap().code();
        // 2 s by design; a busy machine gets twice that.
        assert!(asked.elapsed() < Duration::from_secs(4), "it took {:?} to stop", asked.elapsed());
        assert_eq!(code, Some(exit), "SIG{signal}");
        assert_eq!(listing(work.path()), [Path::new("long.txt")]);
    }
}

#[test]
fn a_budget_that_cannot_be_met_names_the_nearest_that_can() {
    let work = tempfile::tempdir().unwrap();
    let with = |option: &str, value: &str| {
        moepack(work.path(), &["plan", fixture("tiny-deepseek-v3").to_str().unwrap(), option, value])
    };
    for (option, value) in [("--bits", "0.9"), ("--target-size", "1MiB")] {
        let refused = with(option, value);
        assert_eq!(refused.code, Some(78), "{}", refused.stderr);
        let nearest = refused.stderr.trim().rsplit(' ').next().unwrap().to_owned();
        assert_eq!(with(option, &nearest).code, Some(0), "{option} {nearest}: {}", refused.stderr);
    }
}

#[test]
fn less_memory_than_a_run_takes_is_refused_with_the_minimum() {
    let work = tempfile::tempdir().unwrap();
    let calibration = text(work.path(), "calibration.txt", 100_000);
    let calibrated =
        [quantize("out.moepack"), vec!["--calibrate".into(), calibration.to_str().unwrap().into()]].concat();
    let refused =
        moepack(work.path(), &[calibrated.clone(), vec!["--memory".into(), "20MiB".into()]].concat());
    assert_eq!(refused.code, Some(78), "{}", refused.stderr);
    assert!(refused.stderr.contains("this run takes about"), "{}", refused.stderr);
    // Address space goes for stacks and arenas too, so it may end only when something is allocated.
    for kib in [60_000, 120_000, 160_000] {
        let output = under(&format!("ulimit -v {kib}"), work.path(), &calibrated);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(75 | 78)), "{kib} KiB: {:?} {said}", output.status);
        assert!(!work.path().join("out.moepack").exists());
    }
}

/// Runs the binary after a shell command that sets a limit.
fn under(limit: &str, dir: &Path, args: &[String]) -> Output {
    let script = format!("{limit} && exec \"$0\" \"$@\"");
    let mut command = Command::new("sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_moepack")]).args(args).current_dir(dir).output().unwrap()
}

fn quantize(out: &str) -> Vec<String> {
    let model = fixture("tiny-deepseek-v3");
    let args = ["quantize", model.to_str().unwrap(), "-o", out, "--codec", "int4"];
    args.into_iter().map(str::to_owned).collect()
}
