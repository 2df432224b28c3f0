//! Checkpoints in their released form of families whose forward pass is not described: read, planned, packed, compared,
//! and refused by name where tokens would have to pass through.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::{fixture, moepack, succeeds};

const V41: &str = "released/deepseek_v41";

#[test]
fn deepseek_v41_is_packed_without_loss_and_to_fewer_bits() {
    let work = tempfile::tempdir().unwrap();
    let model = fixture(V41);
    let model = model.to_str().unwrap();
    let inspected = succeeds(work.path(), &["inspect", model, "--json"]).stdout;
    let inspected: Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(inspected["family"], "deepseek_v41");
    let carried: Vec<&String> = inspected["carried"].as_object().unwrap().keys().collect();
    for place in
        ["aligner", "image_start", "layers.*.attn", "layers.*.engram", "mtp.*.ffn", "vision.blocks.*.attn"]
    {
        assert!(carried.iter().any(|c| *c == place), "{place} is not among {carried:?}");
    }
    succeeds(work.path(), &["plan", model]);
    for codec in [&[][..], &["--codec", "int4-g32"]] {
        succeeds(work.path(), &[&["quantize", model, "-o", "out.moepack", "--overwrite"], codec].concat());
        succeeds(work.path(), &["check", "out.moepack", "--against", model]);
        let kept = tensors(&work.path().join("out.moepack"));
        let experts = |name: &String| name.starts_with("layers.") && name.contains(".ffn.experts.");
        let expected: Vec<_> = tensors(Path::new(model)).into_iter().filter(|n| !experts(n)).collect();
        assert_eq!(kept, expected, "every tensor but the experts is in the trunk");
    }
    let fewer = ["quantize", model, "-o", "three.moepack", "--bits", "3", "--align", "4096"];
    succeeds(work.path(), &fewer);
    succeeds(work.path(), &["check", "three.moepack", "--against", model]);
}

#[test]
fn what_needs_a_forward_pass_refuses_deepseek_v41_by_name() {
    let work = tempfile::tempdir().unwrap();
    let model = fixture(V41);
    let model = model.to_str().unwrap();
    fs::write(work.path().join("text.txt"), "some words").unwrap();
    fs::write(work.path().join("windows.json"), "[[1, 2, 3]]").unwrap();
    succeeds(work.path(), &["quantize", model, "-o", "out.moepack"]);
    let commands: &[&[&str]] = &[
        &["perplexity", model, "--tokens", "windows.json"],
        &["perplexity", "out.moepack", "--tokens", "windows.json"],
        &["calibrate", model, "--text", "text.txt", "-o", "stats"],
        &["baseline", model, "--tokens", "windows.json", "-o", "baseline"],
        &["verify", "out.moepack", "--reference", model, "--tokens", "windows.json"],
        &["quantize", model, "-o", "other.moepack", "--codec", "int4", "--calibrate", "text.txt"],
        &["quantize", model, "-o", "other.moepack", "--verify", "text.txt"],
    ];
    for command in commands {
        let run = moepack(work.path(), command);
        assert_eq!(run.code, Some(65), "{command:?}: {}", run.stderr);
        assert!(run.stderr.contains("the forward pass of deepseek_v41 is not implemented"), "{}", run.stderr);
    }
    assert!(!work.path().join("other.moepack").exists() && !work.path().join("stats").exists());
}

#[test]
fn a_tensor_of_deepseek_v41_that_nobody_knows_or_misses_is_refused() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("model");
    let model = crate::hostile::damage::Model::copy(&fixture(V41), dir);
    let scale = "layers.1.engram.embed.scale";
    let index: Value =
        serde_json::from_slice(&fs::read(model.path("model.safetensors.index.json")).unwrap()).unwrap();
    let file = index["weight_map"][scale].as_str().unwrap();
    model.tensors(file, |tensors| crate::hostile::damage::find(tensors, scale).bytes[3] = 255);
    let run = moepack(work.path(), &["quantize", "model", "-o", "out.moepack"]);
    assert_eq!(run.code, Some(65), "{}", run.stderr);
    for said in ["scale 3 is 255, which is NaN", scale, file] {
        assert!(run.stderr.contains(said), "{said}: {}", run.stderr);
    }
}

/// Names of all tensors in the safetensors files of a directory, those of banks left aside, sorted.
fn tensors(dir: &Path) -> Vec<String> {
    let files = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let trunk = |p: &std::path::PathBuf| {
        let name = p.file_name().unwrap().to_str().unwrap();
        name.ends_with(".safetensors") && !name.starts_with("experts-")
    };
    let names = |p| crate::hostile::damage::parse(&fs::read(p).unwrap()).into_iter().map(|t| t.name);
    let mut all: Vec<String> = files.filter(trunk).flat_map(names).filter(|n| !n.starts_with("__")).collect();
    all.sort();
    all
}
