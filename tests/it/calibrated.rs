//! Calibrated runs: every expert is there, none is worse than plain rounding, and the reports say how each was coded.

use std::path::Path;

use serde_json::Value;

use crate::support::{fixture, moepack, succeeds, text};

const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

fn tiny() -> String {
    fixture("tiny-deepseek-v3").display().to_string()
}

/// Quantizes and gives the rows of `experts`, after looking at what holds for all of them.
fn experts(dir: &Path, calibration: &Path, args: &[&str]) -> Vec<Value> {
    let (tiny, calibration) = (tiny(), calibration.display().to_string());
    let fixed = ["quantize", &tiny, "-o", "q", "--calibrate", &calibration, "--json", "--overwrite"];
    let run = succeeds(dir, &[&fixed[..], args].concat());
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    let rows = report["experts"].as_array().unwrap().clone();
    let places: Vec<_> = rows.iter().map(|r| (r["layer"].as_u64(), r["expert"].as_u64())).collect();
    assert!(places.is_sorted() && rows.len() == 3 * 16 * 3, "{} rows", rows.len());
    for row in &rows {
        assert!(row["bits"].as_f64().unwrap() > 0.0, "{row}");
        let error = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} is no number in {row}"));
        let (solved, rounded) = (error("heldout_error"), error("heldout_error_rtn"));
        assert!((0.0..1.0).contains(&solved) && solved <= rounded, "{row}");
        let fallback = row["fallback"].as_str();
        assert!(fallback.is_none() || fallback == Some("rtn") && solved == rounded, "{row}");
        let source = row["hessian_source"].as_str().unwrap();
        assert!(row["tokens"] != 0 || source == "pooled", "{row}");
        assert!(["own", "shrunk", "pooled"].contains(&source), "{row}");
    }
    succeeds(dir, &["check", "q"]);
    assert_eq!(rows, manifest_rows(dir), "the manifest says something else");
    rows
}

/// The rows as the manifest has them: a column for each figure, one value where all experts have the same.
fn manifest_rows(dir: &Path) -> Vec<Value> {
    let text = std::fs::read(dir.join("q/manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&text).unwrap();
    let mut rows = Vec::new();
    for layer in manifest["layers"].as_array().unwrap() {
        for expert in 0..layer["n_experts"].as_u64().unwrap() {
            for projection in PROJECTIONS {
                let of = |key: &str| match &layer["experts"][projection][key] {
                    Value::Array(each) => each[expert as usize].clone(),
                    same => same.clone(),
                };
                rows.push(serde_json::json!({
                    "layer": layer["layer"],
                    "expert": expert,
                    "projection": projection,
                    "bits": of("bits"),
                    "tokens": layer["usage"][expert as usize],
                    "hessian_source": of("hessian_source"),
                    "heldout_error": of("heldout_error"),
                    "heldout_error_rtn": of("heldout_error_rtn"),
                    "fallback": of("fallback"),
                }));
            }
        }
    }
    rows
}

fn count(rows: &[Value], key: &str, value: &str) -> usize {
    rows.iter().filter(|r| r[key] == value).count()
}

#[test]
fn a_short_text_starves_nobody() {
    let dir = tempfile::tempdir().unwrap();
    // About 2000 tokens for 16 experts a layer.
    let calibration = text(dir.path(), "calibration.txt", 6_000);
    for codec in ["int2-g64", "int4-g32", "mxfp4", "bf16"] {
        let rows = experts(dir.path(), &calibration, &["--codec", codec, "--ctx", "64"]);
        assert!(count(&rows, "hessian_source", "shrunk") > 50, "{codec}");
        let gain =
            |r: &Value| r["heldout_error"].as_f64().unwrap() / r["heldout_error_rtn"].as_f64().unwrap();
        let better = rows.iter().filter(|r| gain(r) < 0.9).count();
        assert!(codec == "bf16" || better > 120, "{codec}: {better} of 144 matrices gain");
    }
}

#[test]
fn an_expert_without_tokens_has_the_layers() {
    let dir = tempfile::tempdir().unwrap();
    let calibration = dir.path().join("one.txt");
    // One domain, a few tokens: most experts see none of it.
    std::fs::write(&calibration, "for i in range(10):\n    print(i)\n").unwrap();
    let rows = experts(dir.path(), &calibration, &["--codec", "int3-g64"]);
    assert!(rows.iter().any(|r| r["tokens"] == 0) && count(&rows, "hessian_source", "pooled") > 0);
    let shown = succeeds(dir.path(), &["inspect", "q", "--experts"]).stdout;
    assert!(shown.contains("pooled") && shown.lines().count() > 144, "{shown}");
}

#[test]
fn a_text_of_one_domain_is_enough() {
    let dir = tempfile::tempdir().unwrap();
    let calibration = dir.path().join("code.txt");
    let line = |i: usize| format!("    total_{i} = total_{} * {i} + values[{}]\n", i / 2, i % 7);
    std::fs::write(&calibration, (0..400).map(line).collect::<String>()).unwrap();
    experts(dir.path(), &calibration, &["--codec", "int3-g64"]);
}

#[test]
fn hessians_come_from_a_text_and_are_the_default_there() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let calibration = text(at, "calibration.txt", 4_000).display().to_string();
    succeeds(at, &["calibrate", &tiny(), "--text", &calibration, "-o", "stats"]);
    let args = ["quantize", &tiny(), "-o", "q", "--codec", "int4", "--stats", "stats"];
    let run = moepack(at, &[&args[..], &["--solver", "gptq"]].concat());
    assert_eq!(run.code, Some(2), "{}", run.stderr);
    assert!(run.stderr.contains("stats files have none") && run.stderr.contains("hint:"), "{}", run.stderr);
    let solver = |args: &[&str]| {
        succeeds(at, &[args, &["--overwrite"]].concat());
        let manifest: Value =
            serde_json::from_slice(&std::fs::read(at.join("q/manifest.json")).unwrap()).unwrap();
        manifest["recipe"]["recipe"]["solver"].as_str().unwrap().to_owned()
    };
    assert_eq!(solver(&args), "weighted");
    assert_eq!(
        solver(&["quantize", &tiny(), "-o", "q", "--codec", "int4", "--calibrate", &calibration]),
        "gptq"
    );
    assert_eq!(solver(&["quantize", &tiny(), "-o", "q", "--codec", "int4"]), "rtn");
}

#[test]
fn the_text_report_says_how_far_calibration_reached() {
    let dir = tempfile::tempdir().unwrap();
    let calibration = text(dir.path(), "calibration.txt", 3_000).display().to_string();
    let args = [
        "quantize",
        &tiny(),
        "-o",
        "q",
        "--codec",
        "int3",
        "--calibrate",
        &calibration,
        "--verify",
        &calibration,
    ];
    let shown = succeeds(dir.path(), &args).stdout;
    for said in [
        "shrunk towards the layer's",
        "fell back to plain rounding",
        "worst over held-out inputs",
        "fallback",
    ] {
        assert!(shown.contains(said), "{said:?} is not said\n{shown}");
    }
}

#[test]
fn records_of_different_sizes_are_read_checked_and_paged() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let rule = |tensor: &str, codec: &str| format!("[[rule]]\ntensor = \"{tensor}\"\ncodec = \"{codec}\"\n");
    let recipe = format!(
        "schema = 1\nsolver = \"gptq\"\nalign = 4096\n{}{}{}",
        rule("layers.*.experts.*.*", "int3-g64"),
        rule("layers.2.experts.1*.*", "int8-g32"),
        rule("layers.3.experts.7.down_proj", "native"),
    );
    std::fs::write(at.join("r.toml"), recipe).unwrap();
    let calibration = text(at, "calibration.txt", 4_000).display().to_string();
    succeeds(at, &["quantize", &tiny(), "-o", "q", "--recipe", "r.toml", "--calibrate", &calibration]);
    succeeds(at, &["check", "q"]);
    succeeds(at, &["check", "q", "--against", &tiny()]);
    let args = ["bench", "q", "--reads", "60", "--verify", "--json", "--threads", "2"];
    let bench: Value = serde_json::from_str(&succeeds(at, &args).stdout).unwrap();
    assert_eq!(bench["experts"], 48, "{bench}");
    let shown: Value =
        serde_json::from_str(&succeeds(at, &["inspect", "q", "--experts", "--json"]).stdout).unwrap();
    let bits = |i: usize| shown["experts"][i]["bits"].as_f64().unwrap();
    assert_eq!((bits(0), bits(3 * (16 + 12)), bits(3 * (32 + 7) + 2)), (3.25, 8.5, 16.0));
    assert!(shown["experts"][3 * (32 + 7) + 2]["heldout_error"].is_null(), "native is not judged");
}
