//! Every storage scheme that quantized releases come in: read, run, packed without loss, and compared.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::goldens::{distance, golden_nlls, nlls};
use crate::support::{fixture, moepack, succeeds};

/// NLLs of decoded weights in f32 against f32, nats.
const NLL_MAX: f64 = 1e-4;

/// The checkpoints that `fixtures/goldens/encodings.py` makes, one a scheme.
fn schemes() -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(fixture("encodings")).unwrap().map(|e| e.unwrap());
    let mut dirs: Vec<_> = entries.map(|e| (e.file_name().into_string().unwrap(), e.path())).collect();
    dirs.sort();
    assert!(dirs.len() >= 20, "only {} schemes", dirs.len());
    dirs
}

#[test]
fn every_scheme_scores_as_its_decoded_weights_in_transformers() {
    for (name, dir) in schemes() {
        let (windows, expected) = golden_nlls(&dir.join("golden.safetensors"));
        let distance = distance(&nlls(&dir, &windows), &expected);
        println!("{name}: {distance:.1e}");
        assert!(distance <= NLL_MAX, "{name}: {distance:.2e} nats apart");
    }
}

/// Without any option a quantized release is kept bit by bit: `check` compares every plane, and nothing drifts.
#[test]
fn every_scheme_is_packed_without_loss_where_nothing_else_is_asked_for() {
    for (name, dir) in schemes() {
        let work = tempfile::tempdir().unwrap();
        let model = dir.to_str().unwrap();
        succeeds(work.path(), &["quantize", model, "-o", "out.moepack"]);
        assert_eq!(recipe(work.path())["rule"][0]["codec"], "native", "{name}");
        succeeds(work.path(), &["check", "out.moepack", "--against", model]);
        let drift = verify(work.path(), model);
        assert_eq!((&drift["kld_max"], &drift["top1_agreement"]), (&0.0.into(), &1.0.into()), "{name}");
    }
}

#[test]
fn a_plane_that_differs_from_the_release_is_found() {
    for (name, ending) in [("gptq_v1", ".g_idx"), ("awq", ".qzeros"), ("ct_nvfp4", ".weight_global_scale")] {
        let work = tempfile::tempdir().unwrap();
        let model = copy(&fixture("encodings").join(name), work.path());
        succeeds(work.path(), &["quantize", "model", "-o", "out.moepack"]);
        // Another release of the same model.
        let bytes = fs::read(model.join("model.safetensors")).unwrap();
        let mut tensors = crate::hostile::damage::parse(&bytes);
        let tensor = format!("model.layers.1.mlp.experts.2.up_proj{ending}");
        let tensor = tensors.iter_mut().find(|t| t.name == tensor).unwrap();
        tensor.bytes[0] ^= 1;
        fs::write(model.join("model.safetensors"), crate::hostile::damage::unparse(&tensors)).unwrap();
        let check = moepack(work.path(), &["check", "out.moepack", "--against", "model"]);
        assert_eq!(check.code, Some(1), "{name}: {}{}", check.stdout, check.stderr);
        assert!(
            check.stdout.contains("up_proj: kept as released") && check.stdout.contains("layer 1, expert 2,"),
            "{name}: {}",
            check.stdout
        );
    }
}

#[test]
fn a_budget_or_a_codec_is_still_what_is_asked_for() {
    let work = tempfile::tempdir().unwrap();
    let model = fixture("encodings/gptq_v1");
    let model = model.to_str().unwrap();
    let quantize = ["quantize", model, "-o", "out.moepack", "--overwrite"];
    succeeds(work.path(), &[&quantize[..], &["--codec", "int8-g32"]].concat());
    assert_eq!(recipe(work.path())["rule"][0]["codec"], "int8-g32");
    succeeds(work.path(), &[&quantize[..], &["--codec", "int8-g32", "--trunk-codec", "int8-g32"]].concat());
    let drift = verify(work.path(), model);
    assert!(drift["kld_mean"].as_f64().unwrap() < 1e-3, "{drift}");
    succeeds(work.path(), &["check", "out.moepack", "--against", model]);
    let plain = fixture("random/qwen3_moe");
    succeeds(work.path(), &["quantize", plain.to_str().unwrap(), "-o", "out.moepack", "--overwrite"]);
    assert_eq!(recipe(work.path())["rule"][0]["codec"], "int4-g64");
}

/// The recipe in a bundle's manifest.
fn recipe(work: &Path) -> Value {
    let manifest = fs::read(work.join("out.moepack/manifest.json")).unwrap();
    serde_json::from_slice::<Value>(&manifest).unwrap()["recipe"]["recipe"].take()
}

fn verify(work: &Path, model: &str) -> Value {
    let windows: Vec<Vec<u64>> = (0..4).map(|n| (0..30).map(|i| (n * 7 + i * 37) % 64).collect()).collect();
    fs::write(work.join("windows.json"), serde_json::to_vec(&windows).unwrap()).unwrap();
    let args = ["verify", "out.moepack", "--reference", model, "--tokens", "windows.json", "--json"];
    serde_json::from_str(&succeeds(work, &args).stdout).unwrap()
}

fn copy(from: &Path, work: &Path) -> PathBuf {
    let to = work.join("model");
    fs::create_dir(&to).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
    to
}
