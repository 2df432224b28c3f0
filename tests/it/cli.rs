//! The command line: exit codes, streams, keys of the JSON that other programs read, recipes, budgets.

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::{Run, fixture, moepack, succeeds, text};

fn tiny() -> String {
    fixture("tiny-deepseek-v3").display().to_string()
}

fn json(run: &Run) -> Value {
    serde_json::from_str(&run.stdout).unwrap_or_else(|e| panic!("{e}\n{}", run.stdout))
}

/// Every key is there and not null.
fn has(value: &Value, keys: &[&str]) {
    for key in keys {
        assert!(!value.get(key).unwrap_or(&Value::Null).is_null(), "{key} is missing in {value:#}");
    }
}

#[test]
fn wrong_usage_is_exit_code_2_and_says_what_is_right() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        &["quantize"][..],
        &["nonsense"],
        &["quantize", "x", "-o", "y", "--bits", "3", "--target-size", "1GiB"],
        &["quantize", "x", "-o", "y", "--memory", "3 bananas"],
        &["perplexity", "x"],
        &["verify", "x", "--reference", "y", "--max-kld", "-1"],
        &["verify", "x", "--reference", "y", "--min-top1", "101%"],
    ] {
        let run = moepack(dir.path(), args);
        assert_eq!((run.code, run.stdout.as_str()), (Some(2), ""), "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains("error:"), "{args:?}: {}", run.stderr);
    }
    let run = moepack(dir.path(), &["quantize", &tiny(), "-o", "q", "--codec", "int40"]);
    assert_eq!(run.code, Some(2), "{}", run.stderr);
    assert!(run.stderr.contains("int40") && run.stderr.contains("mxfp4"), "{}", run.stderr);
}

#[test]
fn help_shows_examples_first_and_goes_to_stdout() {
    let dir = tempfile::tempdir().unwrap();
    for command in
        ["inspect", "plan", "quantize", "calibrate", "perplexity", "verify", "baseline", "check", "bench"]
    {
        let run = succeeds(dir.path(), &[command, "--help"]);
        let (examples, usage) = (run.stdout.find("Examples:"), run.stdout.find("Usage:"));
        assert!(examples.is_some() && examples < usage, "{command}\n{}", run.stdout);
        let about: String = run.stdout.chars().take(20).collect();
        assert!(succeeds(dir.path(), &["--help"]).stdout.contains(&about), "{command}: {about}");
    }
    assert!(succeeds(dir.path(), &["completions", "bash"]).stdout.contains("moepack"));
    assert!(succeeds(dir.path(), &["man"]).stdout.starts_with(".ie"), "roff");
}

#[test]
fn json_has_the_keys_that_other_programs_read() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "eval.txt", 9000);
    let at = dir.path();
    let inspected = json(&succeeds(at, &["inspect", &tiny(), "--json"]));
    has(&inspected, &["schema", "family", "n_layers", "n_experts", "expert_bytes", "bpw_experts", "layers"]);
    let quantized = json(&succeeds(at, &["quantize", &tiny(), "-o", "q", "--codec", "int8", "--json"]));
    has(&quantized, &["schema", "bundle_bytes", "bpw_experts", "bpw_total", "layers"]);
    let perplexity = json(&succeeds(at, &["perplexity", "q", "--text", "eval.txt", "--ctx", "64", "--json"]));
    has(
        &perplexity,
        &["tokens_scored", "nll_mean", "perplexity", "ctx", "tokens_per_second", "peak_rss_bytes"],
    );
    let args = [
        "verify",
        "q",
        "--reference",
        &tiny(),
        "--text",
        "eval.txt",
        "--ctx",
        "64",
        "--max-kld",
        "1",
        "--json",
    ];
    let verified = json(&succeeds(at, &args));
    has(&verified, &["kld_mean", "kld_p99", "kld_p999", "kld_max", "top1_agreement", "perplexity_ratio"]);
    has(&verified, &["perplexity_reference", "perplexity_bundle", "kld_mean_ci", "perplexity_ratio_ci"]);
    has(&verified, &["layers", "experts", "bpw_experts", "bpw_total", "gates"]);
    has(&verified["layers"][1], &["rel_error", "routing_overlap"]);
    has(&verified["experts"][0], &["layer", "expert", "tokens", "rel_error"]);
    has(&verified["gates"][0], &["name", "limit", "value", "passed"]);
    let bench = json(&succeeds(at, &["bench", "q", "--reads", "20", "--json"]));
    has(&bench, &["bytes_per_second", "latency_us_p50", "latency_us_p99", "pager"]);
    assert_eq!(json(&succeeds(at, &["check", "q", "--json"]))["ok"], true);
}

/// What makes each command print its document, in the directory of a bundle `q`, a plan `p` and a text `eval.txt`.
const DOCUMENTS: &[(&str, &[&str])] = &[
    ("inspect", &["q"]),
    ("plan", &["TINY"]),
    ("quantize", &["TINY", "-o", "q2"]),
    ("calibrate", &["TINY", "--text", "eval.txt", "--ctx", "64", "-o", "stats"]),
    ("perplexity", &["q", "--text", "eval.txt", "--ctx", "64"]),
    ("baseline", &["TINY", "--text", "eval.txt", "--ctx", "64", "-o", "b"]),
    ("verify", &["q", "--reference", "b"]),
    ("check", &["q"]),
    ("convert", &["q", "--to", "mlx", "-o", "mlx"]),
    ("bench", &["q", "--reads", "9"]),
    ("worker", &["--plan", "p", "--shard", "0"]),
    ("status", &["--plan", "p"]),
    ("submit", &["--plan", "p", "--engine", "print"]),
    ("merge", &["--plan", "p"]),
];

#[test]
fn every_json_document_has_a_schema_with_a_version() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "eval.txt", 2000);
    succeeds(dir.path(), &["quantize", &tiny(), "-o", "q", "--codec", "int8"]);
    succeeds(dir.path(), &["plan", &tiny(), "-o", "p", "--codec", "int8", "--shards", "1"]);
    let (tiny, scripts) = (tiny(), ["completions", "man"]);
    for command in moepack::commands::COMMANDS.iter().filter(|c| !scripts.contains(&c.name)) {
        assert!(DOCUMENTS.iter().any(|(name, _)| *name == command.name), "{} has no row", command.name);
    }
    for (name, args) in DOCUMENTS {
        let args = args.iter().map(|a| if *a == "TINY" { tiny.as_str() } else { *a });
        let args: Vec<&str> = [*name, "--json", "--quiet"].into_iter().chain(args).collect();
        let run = succeeds(dir.path(), &args);
        assert_eq!(json(&run)["schema"], format!("moepack.{name}/1"));
        assert_eq!(run.stderr, "", "{name} --quiet talks");
    }
}

#[test]
fn outputs_are_not_overwritten_without_being_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["quantize", &tiny(), "-o", "q", "--codec", "int8"];
    succeeds(dir.path(), &args);
    let again = moepack(dir.path(), &args);
    assert_eq!(again.code, Some(73), "{}", again.stderr);
    assert!(again.stderr.contains("--overwrite"), "{}", again.stderr);
    succeeds(dir.path(), &[&args[..4], &["--codec", "int2", "--overwrite"]].concat());
    assert!(succeeds(dir.path(), &["inspect", "q"]).stdout.contains("int2-g64"));
    std::fs::create_dir(dir.path().join("mine")).unwrap();
    std::fs::write(dir.path().join("mine/diary.txt"), "dear").unwrap();
    let run = moepack(dir.path(), &["quantize", &tiny(), "-o", "mine", "--overwrite"]);
    assert_eq!(run.code, Some(73), "{}", run.stderr);
    assert!(dir.path().join("mine/diary.txt").exists());
    std::fs::write(dir.path().join("mine.txt"), "dear").unwrap();
    for args in [
        &["plan", "TINY", "-o"][..],
        &["calibrate", "TINY", "--text", "t", "-o"],
        &["baseline", "TINY", "--text", "t", "-o"],
        &["perplexity", "TINY", "--text", "t", "--nll-out"],
        &["verify", "q", "--reference", "TINY", "--text", "t", "--report"],
        &["quantize", "TINY", "-o", "new", "--verify", "t", "--report"],
    ] {
        let run = moepack(dir.path(), &[args, &["mine.txt"]].concat());
        assert_eq!(run.code, Some(73), "{args:?}: {}", run.stderr);
        assert_eq!(std::fs::read_to_string(dir.path().join("mine.txt")).unwrap(), "dear");
    }
}

#[test]
fn a_gate_without_a_text_is_wrong_usage() {
    let dir = tempfile::tempdir().unwrap();
    let run = moepack(dir.path(), &["quantize", &tiny(), "-o", "q", "--max-kld", "0.1"]);
    assert_eq!(run.code, Some(2), "{}", run.stderr);
    assert!(run.stderr.contains("--verify"), "{}", run.stderr);
}

#[test]
fn a_solver_without_its_stats_is_wrong_usage_also_in_a_recipe() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    succeeds(at, &["plan", &tiny(), "--solver", "weighted", "-o", "r.toml"]);
    for args in [["--solver", "weighted"], ["--recipe", "r.toml"]] {
        let run = moepack(at, &[&["quantize", &tiny(), "-o", "q"], &args[..]].concat());
        assert_eq!(run.code, Some(2), "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains("weighted needs calibration"), "{}", run.stderr);
    }
}

#[test]
fn a_plan_by_bits_tells_what_each_projection_is_expected_to_lose() {
    let dir = tempfile::tempdir().unwrap();
    succeeds(dir.path(), &["plan", &tiny(), "--bits", "3.5", "-o", "r.toml"]);
    let recipe: toml::Table = std::fs::read_to_string(dir.path().join("r.toml")).unwrap().parse().unwrap();
    for rule in recipe["rule"].as_array().unwrap() {
        assert!(
            rule["expected_loss"].as_float().unwrap() > 0.0 && rule["bytes"].as_integer().unwrap() > 0,
            "{rule}"
        );
    }
}

#[test]
fn an_output_in_the_input_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in");
    std::fs::create_dir(&input).unwrap();
    let run = moepack(dir.path(), &["quantize", "in", "-o", "in/out"]);
    assert_eq!(run.code, Some(2), "{}", run.stderr);
    assert_eq!(moepack(dir.path(), &["quantize", "in", "-o", "in"]).code, Some(2));
}

#[test]
fn a_planned_recipe_can_be_edited_and_used() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    succeeds(at, &["plan", &tiny(), "--codec", "int4-g32", "-o", "r.toml"]);
    let recipe = std::fs::read_to_string(at.join("r.toml")).unwrap();
    let edited = recipe + "\n[[rule]]\ntensor = \"layers.2.experts.1*.up_proj\"\ncodec = \"native\"\n";
    std::fs::write(at.join("r.toml"), &edited).unwrap();
    succeeds(at, &["quantize", &tiny(), "-o", "q", "--recipe", "r.toml"]);
    let shown = json(&succeeds(at, &["inspect", "q", "--json"]));
    assert_eq!(shown["layers"][1]["codecs"]["up_proj"], "mixed");
    assert_eq!(shown["layers"][0]["codecs"]["up_proj"], "int4-g32");
    succeeds(at, &["check", "q", "--against", &tiny()]);
    std::fs::write(at.join("r.toml"), edited.replace("layers.2.experts.1*", "layers.7.experts.1*")).unwrap();
    let run = moepack(at, &["quantize", &tiny(), "-o", "q2", "--recipe", "r.toml"]);
    assert_eq!(run.code, Some(78), "{}", run.stderr);
    assert!(
        run.stderr.contains("layers.7.experts.1*") && run.stderr.contains("matches no matrix"),
        "{}",
        run.stderr
    );
}

#[test]
fn fixed_rates_come_near_a_budget_from_below() {
    let dir = tempfile::tempdir().unwrap();
    for bits in ["2.3", "3.1", "4.0", "6.5"] {
        let args =
            ["quantize", &tiny(), "-o", "q", "--codec", "int", "--bits", bits, "--overwrite", "--json"];
        let bpw = json(&succeeds(dir.path(), &args))["bpw_experts"].as_f64().unwrap();
        let asked: f64 = bits.parse().unwrap();
        assert!(bpw <= asked && bpw > asked - 0.1, "{bpw} bits for --bits {bits}");
    }
    for (option, value) in [("--bits", "0.9"), ("--target-size", "2MiB")] {
        let run = moepack(dir.path(), &["quantize", &tiny(), "-o", "q3", option, value]);
        assert_eq!(run.code, Some(78), "{}", run.stderr);
        assert!(!dir.path().join("q3").exists() && !dir.path().join("q3.partial").exists());
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let script = format!("{} inspect {} | head -n 1", env!("CARGO_BIN_EXE_moepack"), tiny());
    let run = Command::new("sh").args(["-c", &script]).stderr(Stdio::piped()).output().unwrap();
    assert_eq!((run.status.code(), String::from_utf8_lossy(&run.stderr).as_ref()), (Some(0), ""));
}

#[test]
fn too_little_memory_is_refused_with_the_minimum() {
    let dir = tempfile::tempdir().unwrap();
    let run = moepack(dir.path(), &["quantize", &tiny(), "-o", "q", "--memory", "1MiB"]);
    assert_eq!(run.code, Some(78), "{}", run.stderr);
    assert!(run.stderr.contains("MiB") && run.stderr.contains("hint:"), "{}", run.stderr);
}

#[test]
fn whatever_runs_a_text_obeys_its_memory() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    text(at, "eval.txt", 60_000);
    succeeds(at, &["quantize", &tiny(), "-o", "q", "--codec", "int8"]);
    succeeds(at, &["baseline", &tiny(), "--text", "eval.txt", "-o", "b"]);
    for args in [
        &["perplexity", "q", "--text", "eval.txt"][..],
        &["calibrate", "TINY", "--text", "eval.txt", "-o", "stats"],
        &["baseline", "TINY", "--text", "eval.txt", "-o", "b2"],
        &["verify", "q", "--reference", "TINY", "--text", "eval.txt"],
        &["verify", "q", "--reference", "b"],
    ] {
        let tiny = tiny();
        let args = args.iter().map(|a| if *a == "TINY" { tiny.as_str() } else { *a });
        let args: Vec<&str> = args.chain(["--memory", "40MiB"]).collect();
        let run = moepack(at, &args);
        assert_eq!(run.code, Some(78), "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains("this run takes about"), "{}", run.stderr);
    }
    let args = ["perplexity", "q", "--text", "eval.txt", "--json", "--threads", "2", "--memory", "150MiB"];
    let peak = json(&succeeds(at, &args))["peak_rss_bytes"].as_u64().unwrap();
    assert!(peak <= 150 << 20, "{peak} bytes");
}
