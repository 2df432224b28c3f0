//! Budgets: met from below to a tenth of a percent, the same bundle from the recipe that allocation wrote, and what a plan
//! predicts.

use std::path::Path;

use serde_json::Value;

use crate::support::{assert_same, fixture, moepack, succeeds, text};

fn tiny() -> String {
    fixture("tiny-deepseek-v3").display().to_string()
}

/// Runs a command with `--json`, and gives the document.
fn json(dir: &Path, args: &[&str]) -> Value {
    let run = succeeds(dir, &[args, &["--json"]].concat());
    serde_json::from_str(&run.stdout).unwrap_or_else(|e| panic!("{e}\n{}", run.stdout))
}

fn directory_bytes(dir: &Path) -> u64 {
    std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum()
}

#[track_caller]
fn assert_met(met: f64, asked: f64) {
    assert!(met <= asked, "{met} is more than {asked}");
    assert!(met >= asked * 0.999, "{met} is {:.3} % below {asked}", (1.0 - met / asked) * 100.0);
}

#[test]
fn bits_are_met_from_below() {
    let dir = tempfile::tempdir().unwrap();
    for (bits, codec) in [("1.31", "tcq256"), ("2.777", "tcq8"), ("3.06", "tcq64"), ("5.93", "tcq8")] {
        let args = [
            "quantize",
            &tiny(),
            "-o",
            "q",
            "--codec",
            codec,
            "--bits",
            bits,
            "--align",
            "4096",
            "--overwrite",
        ];
        let met = json(dir.path(), &args)["bpw_experts"].as_f64().unwrap();
        assert_met(met, bits.parse().unwrap());
    }
}

#[test]
fn sizes_are_met_from_below_with_every_byte_counted() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "calibration.txt", 20_000);
    for (i, target) in ["3012345", "3333333", "3400001", "3777777", "4156789"].iter().enumerate() {
        let mut args = vec!["quantize", "TINY", "-o", "q", "--codec", "tcq8", "--target-size", target];
        args.extend(["--align", "4096", "--overwrite"]);
        // The manifest tells more of a calibrated bundle.
        args.extend(if i % 2 == 1 { &["--calibrate", "calibration.txt"][..] } else { &[] });
        let tiny = tiny();
        let args: Vec<&str> = args.into_iter().map(|a| if a == "TINY" { tiny.as_str() } else { a }).collect();
        let report = json(dir.path(), &args);
        let (bytes, asked) = (directory_bytes(&dir.path().join("q")) as f64, target.parse().unwrap());
        assert_met(bytes, asked);
        let predicted = report["predicted"]["bundle_bytes"].as_f64().unwrap();
        assert!((predicted / bytes - 1.0).abs() < 5e-3, "{predicted} predicted, {bytes} came out");
        succeeds(dir.path(), &["check", "q"]);
    }
}

#[test]
fn a_recipe_that_allocation_wrote_makes_the_same_bundle() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    text(at, "calibration.txt", 20_000);
    let budget =
        ["--codec", "tcq8", "--target-size", "3500000", "--align", "4096", "--calibrate", "calibration.txt"];
    let per_expert = [&budget[..], &["--per-expert"]].concat();
    for budget in [&budget[..], &per_expert] {
        succeeds(at, &[&["plan", &tiny(), "-o", "r.toml", "--overwrite"], budget].concat());
        succeeds(at, &[&["quantize", &tiny(), "-o", "a", "--overwrite"], budget].concat());
        let by_recipe = ["--recipe", "r.toml", "--calibrate", "calibration.txt", "--overwrite"];
        succeeds(at, &[&["quantize", &tiny(), "-o", "b"][..], &by_recipe].concat());
        assert_same(&at.join("a"), &at.join("b"), "by options and by recipe");
    }
}

#[test]
fn drift_and_memory_come_out_near_what_was_predicted() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "calibration.txt", 60_000);
    text(dir.path(), "eval.txt", 20_000);
    let texts = ["--calibrate", "calibration.txt", "--verify", "eval.txt"];
    let report =
        json(dir.path(), &[&["quantize", &tiny(), "-o", "q", "--codec", "int3-g64"][..], &texts].concat());
    let near = |predicted: &Value, found: &Value, within: f64| {
        let ratio = predicted.as_f64().unwrap() / found.as_f64().unwrap();
        assert!(ratio < within && ratio > 1.0 / within, "{predicted} predicted, {found} came out");
    };
    let predicted = &report["predicted"];
    assert_eq!(predicted["kld_basis"], "measured");
    near(&predicted["kld_mean"], &report["drift"]["kld_mean"], 1.5);
    near(&predicted["peak_rss_bytes"], &report["peak_rss_bytes"], 1.5);
}

#[test]
fn bits_of_a_fixed_rate_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let run = moepack(dir.path(), &["quantize", &tiny(), "-o", "q", "--codec", "int4", "--bits", "3"]);
    assert_eq!(run.code, Some(2), "{}", run.stderr);
    assert!(run.stderr.contains("codec int4 has a fixed rate"), "{}", run.stderr);
    let rule = "schema = 1\nsolver = \"rtn\"\n[[rule]]\ntensor = \"layers.*.experts.*.*\"\n";
    std::fs::write(dir.path().join("r.toml"), format!("{rule}codec = \"mxfp4\"\nbits = 3.0\n")).unwrap();
    let run = moepack(dir.path(), &["quantize", &tiny(), "-o", "q", "--recipe", "r.toml"]);
    assert_eq!(run.code, Some(78), "{}", run.stderr);
    assert!(run.stderr.contains("codec mxfp4 has a fixed rate"), "{}", run.stderr);
    let run = moepack(dir.path(), &["quantize", &tiny(), "-o", "q", "--bits", "3", "--per-expert"]);
    assert_eq!(run.code, Some(2), "{}", run.stderr);
}
