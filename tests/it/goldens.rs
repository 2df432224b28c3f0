//! The forward pass agrees with transformers, number by number, through the binary. Where the goldens come from is
//! told in `fixtures/README.md`.

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::support::{fixture, moepack};

/// NLLs of random models in f32 against f32, nats.
const RANDOM_NLL_MAX: f64 = 1e-4;
/// NLLs of the trained model, nats.
const TRAINED_NLL_MAX: f64 = 2e-3;
/// Perplexity of a text, relative.
const PERPLEXITY_MAX: f64 = 1e-4;

#[test]
fn random_models_of_every_family_score_as_in_transformers() {
    let mut wrong = Vec::new();
    let mut n_models = 0;
    for entry in fs::read_dir(fixture("random")).unwrap() {
        let dir = entry.unwrap().path();
        let (windows, expected) = golden_nlls(&dir.join("golden.safetensors"));
        let found = nlls(&dir, &windows);
        let distance = distance(&found, &expected);
        println!("{}: {distance:.1e}", dir.display());
        if distance.is_nan() || distance > RANDOM_NLL_MAX {
            wrong
                .push(format!("{}: {distance:.2e} nats apart, expected {RANDOM_NLL_MAX:.0e}", dir.display()));
        }
        n_models += 1;
    }
    assert!(n_models >= 12, "only {n_models} models were found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn trained_models_score_as_in_transformers() {
    for name in ["tiny-deepseek-v3", "tiny-deepseek-v4"] {
        let golden = json_file(&fixture(name).join("golden.json"));
        let of = |key: &str| -> Vec<Value> {
            golden["windows"].as_array().unwrap().iter().map(|window| window[key].clone()).collect()
        };
        let expected: Vec<Vec<f64>> = serde_json::from_value(of("nll_of_tokens_1_to_127").into()).unwrap();
        let found = nlls(&fixture(name), &of("token_ids").into());
        let distance = distance(&found, &expected);
        assert!(distance < TRAINED_NLL_MAX, "{name}: {distance:.2e} nats apart");
    }
}

#[test]
fn a_text_has_the_perplexity_that_transformers_finds() {
    let golden = json_file(&fixture("goldens/tiny-deepseek-v3-eval.json"));
    let (model, text) = (fixture("tiny-deepseek-v3"), fixture("text/eval.txt"));
    let args = ["perplexity", path(&model), "--text", path(&text), "--json"];
    let run = moepack(Path::new("."), &args);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let report: Value = serde_json::from_str(&run.stdout).expect("one JSON document on stdout");
    assert_eq!(report["ctx"], golden["ctx"]);
    assert_eq!(report["tokens_scored"], golden["tokens_scored"]);
    let ratio = report["perplexity"].as_f64().unwrap() / golden["perplexity"].as_f64().unwrap();
    assert!(
        (ratio - 1.0).abs() < PERPLEXITY_MAX,
        "perplexity {}, expected {}",
        report["perplexity"],
        golden["perplexity"]
    );
}

/// NLLs that `moepack perplexity` writes for windows of token ids.
pub fn nlls(model: &Path, windows: &Value) -> Vec<Vec<f64>> {
    let work = tempfile::tempdir().unwrap();
    fs::write(work.path().join("windows.json"), windows.to_string()).unwrap();
    let args = ["perplexity", path(model), "--tokens", "windows.json", "--nll-out", "nll.json"];
    let run = moepack(work.path(), &args);
    assert_eq!(run.code, Some(0), "{}: {}", model.display(), run.stderr);
    serde_json::from_value(json_file(&work.path().join("nll.json"))).unwrap()
}

/// Windows of a golden file, and the NLLs of their tokens from its logits.
pub fn golden_nlls(file: &Path) -> (Value, Vec<Vec<f64>>) {
    let bytes = fs::read(file).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let (ids, logits) = (golden.tensor("input_ids").unwrap(), golden.tensor("logits").unwrap());
    let (n_tokens, vocab) = (ids.shape()[1], logits.shape()[2]);
    let ids: Vec<i64> = ids.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
    let logits: Vec<f64> =
        logits.data().as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
    let windows = ids.chunks_exact(n_tokens);
    let nlls = windows.clone().zip(logits.chunks_exact(n_tokens * vocab)).map(|(window, logits)| {
        let targets = window[1..].iter().zip(logits.chunks_exact(vocab));
        targets.map(|(&id, row)| nll(row, id as usize)).collect()
    });
    (json!(windows.collect::<Vec<_>>()), nlls.collect())
}

fn nll(logits: &[f64], id: usize) -> f64 {
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    top + logits.iter().map(|l| (l - top).exp()).sum::<f64>().ln() - logits[id]
}

/// The largest difference of two lists of the same shape.
pub fn distance(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    let lens = |x: &[Vec<f64>]| x.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(lens(a), lens(b), "numbers of scored tokens differ");
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
