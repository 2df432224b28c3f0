//! Drift is zero where nothing was lost, small where little was, and a gate fails where it is too much.

use std::path::Path;

use serde_json::Value;

use crate::support::{Run, fixture, moepack, succeeds, text};

#[test]
fn a_passthrough_bundle_is_the_model_itself() {
    for model in [
        "tiny-deepseek-v3",
        "tiny-deepseek-v4",
        "random/deepseek_v3_fp8",
        "random/deepseek_v4_release",
        "random/gpt_oss_mxfp4",
        "random/llama4",
        "random/dbrx",
        "random/llama",
        "random/nemotron_h_latent",
        "random/longcat_flash",
    ] {
        let work = Work::new(model);
        work.quantize("native", &[]);
        let drift = work.verify(&[]);
        for key in ["kld_mean", "kld_p99", "kld_p999", "kld_max"] {
            assert_eq!(drift[key], 0.0, "{model}: {key}");
        }
        assert_eq!(drift["top1_agreement"], 1.0, "{model}");
        assert_eq!(drift["perplexity_ratio"], 1.0, "{model}");
    }
}

#[test]
fn int8_loses_next_to_nothing_in_every_family() {
    for model in [
        "tiny-deepseek-v3",
        "random/qwen3_moe",
        "random/mixtral",
        "random/olmoe",
        "random/qwen2_moe",
        "random/gpt_oss",
        "tiny-deepseek-v4",
        "random/llama4",
        "random/cohere2_moe",
        "random/granitemoeshared",
        "random/afmoe",
        "random/nemotron_h",
        "random/jamba",
        "random/minimax",
        "random/longcat_flash",
        "random/jetmoe",
    ] {
        let work = Work::new(model);
        work.quantize("int8", &[]);
        let kld = number(&work.verify(&[]), "kld_mean");
        assert!((0.0..1e-3).contains(&kld), "{model}: KLD {kld}");
    }
}

#[test]
fn calibration_lowers_the_drift_of_int4() {
    let work = Work::new("tiny-deepseek-v3");
    let kld = |args: &[&str]| {
        work.quantize("int4", args);
        number(&work.verify(&[]), "kld_mean")
    };
    let calibration = text(work.path(), "calibration.txt", 60_000);
    let (without, with) = (kld(&[]), kld(&["--calibrate", calibration.to_str().unwrap()]));
    assert!(with < without, "KLD {with} with calibration, {without} without");
}

#[test]
fn the_report_has_every_promised_key() {
    let work = Work::new("tiny-deepseek-v3");
    work.quantize("int4", &[]);
    let drift = work.verify(&[]);
    for key in ["kld_mean", "kld_p99", "kld_p999", "kld_max", "top1_agreement"].into_iter().chain([
        "perplexity_reference",
        "perplexity_bundle",
        "perplexity_ratio",
    ]) {
        let ci: [f64; 2] = serde_json::from_value(drift[format!("{key}_ci")].clone()).unwrap();
        let value = number(&drift, key);
        assert!(ci[0] <= value && value <= ci[1], "{key}: {value} is not in {ci:?}");
    }
    let layers = drift["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 4);
    assert!(layers.iter().all(|l| l["rel_error"].is_number()), "{layers:?}");
    assert!(number(&layers[2], "routing_overlap") > 0.9);
    let experts = drift["experts"].as_array().unwrap();
    assert_eq!(experts.len(), 3 * 16);
    assert!(experts.iter().all(|e| e["tokens"].is_u64() && e["rel_error"].is_number()), "{experts:?}");
    assert_eq!(drift["bpw_experts"], 4.25);
    assert!(number(&drift, "bpw_total") > 4.25);
    assert!(drift["schema"].is_string());
}

#[test]
fn a_gate_that_does_not_hold_is_a_finding() {
    let work = Work::new("tiny-deepseek-v3");
    work.quantize("int2", &[]);
    for (gate, strict, lax) in
        [("--max-kld", "1e-6", "9"), ("--max-ppl-increase", "0.001%", "900%"), ("--min-top1", "99.99%", "1%")]
    {
        let failed = work.verify_run(&[gate, strict]);
        assert_eq!(failed.code, Some(1), "{gate} {strict}: {}", failed.stderr);
        let report: Value = serde_json::from_str(&failed.stdout).unwrap();
        assert_eq!(report["gates"].as_array().unwrap().len(), 1);
        for key in ["name", "limit", "value", "passed"] {
            assert!(!report["gates"][0][key].is_null(), "{gate} without {key}");
        }
        assert_eq!(report["gates"][0]["passed"], false);
        let held = work.verify_run(&[gate, lax]);
        assert_eq!(held.code, Some(0), "{gate} {lax}: {}", held.stderr);
    }
}

#[test]
fn a_baseline_replaces_the_checkpoint() {
    let work = Work::new("tiny-deepseek-v3");
    work.quantize("int4", &[]);
    let full = work.verify(&[]);
    succeeds(work.path(), &["baseline", &work.model, "--text", "eval.txt", "-o", "eval.baseline"]);
    let run = succeeds(work.path(), &["verify", "out.moepack", "--reference", "eval.baseline", "--json"]);
    let short: Value = serde_json::from_str(&run.stdout).unwrap();
    let (kld, bound) = (number(&full, "kld_mean"), &short["kld_bound"]);
    let (lower, upper, estimate) =
        (number(bound, "lower"), number(bound, "upper"), number(&short, "kld_mean"));
    assert!(lower <= kld && kld <= upper, "KLD {kld} is not in [{lower}, {upper}]");
    assert!((estimate / kld - 1.0).abs() < 0.1, "KLD {estimate} is estimated from the baseline, it is {kld}");
    let ratio = number(&short, "perplexity_ratio") / number(&full, "perplexity_ratio");
    assert!((ratio - 1.0).abs() < 1e-6, "perplexity ratios differ by {ratio}");
    let with_text = ["verify", "out.moepack", "--reference", "eval.baseline", "--text"];
    succeeds(work.path(), &[&with_text[..], &["eval.txt"]].concat());
    std::fs::write(work.path().join("other.txt"), "These are not the words that the baseline was made from.")
        .unwrap();
    let other = moepack(work.path(), &[&with_text[..], &["other.txt"]].concat());
    assert_eq!(other.code, Some(65), "{}", other.stderr);
    let bytes = std::fs::metadata(work.path().join("eval.baseline")).unwrap().len() as f64;
    let full_f16 = number(&full, "tokens_scored") * 2048.0 * 2.0;
    assert!(bytes < 0.05 * full_f16, "{bytes} bytes, {:.1} % of the logits", 100.0 * bytes / full_f16);
}

/// A checkpoint with an evaluation text or windows, and a bundle to come.
struct Work {
    dir: tempfile::TempDir,
    model: String,
    input: [&'static str; 2],
}

impl Work {
    fn new(model: &str) -> Work {
        let dir = tempfile::tempdir().unwrap();
        let has_tokenizer = fixture(model).join("tokenizer.json").exists();
        let input = if has_tokenizer {
            text(dir.path(), "eval.txt", 25_000);
            ["--text", "eval.txt"]
        } else {
            // Random models have 96 tokens; a step prime to 96 meets them all.
            let window = |n: u64| (0..40).map(|i| (n * 7 + i * 37) % 96).collect::<Vec<u64>>();
            let windows: Vec<_> = (0..8).map(window).collect();
            std::fs::write(dir.path().join("windows.json"), serde_json::to_vec(&windows).unwrap()).unwrap();
            ["--tokens", "windows.json"]
        };
        Work { dir, model: fixture(model).to_str().unwrap().to_owned(), input }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn quantize(&self, codec: &str, more: &[&str]) {
        let args = ["quantize", &self.model, "-o", "out.moepack", "--codec", codec, "--overwrite"];
        succeeds(self.path(), &[&args[..], more].concat());
    }

    fn verify_run(&self, more: &[&str]) -> Run {
        let args = ["verify", "out.moepack", "--reference", &self.model, "--json"];
        moepack(self.path(), &[&args[..], &self.input, more].concat())
    }

    fn verify(&self, more: &[&str]) -> Value {
        let run = self.verify_run(more);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        serde_json::from_str(&run.stdout).expect("one JSON document on stdout")
    }
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} is {}", value[key]))
}
