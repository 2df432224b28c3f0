//! What is no fault of a file by itself: things that may pass where they are asked for, links, files of other models.

use std::fs;

use serde_json::Value;

use super::*;
use crate::support::{contents, succeeds};

#[test]
fn a_tensor_twice_is_read_once_where_that_is_asked_for() {
    let work = Work::new(SHARDED);
    let norm = || {
        let third = fs::read(work.model.path("model-00003-of-00003.safetensors")).unwrap();
        damage::parse(&third).into_iter().find(|t| t.name == NORM).unwrap()
    };
    work.model.tensors(SECOND, |tensors| tensors.push(norm()));
    let dir = work.dir.path();
    let refused = moepack(dir, QUANTIZE);
    assert_eq!(refused.code, Some(65), "{}", refused.stderr);
    assert!(refused.stderr.contains("--allow-duplicate-identical"), "{}", refused.stderr);
    let allowed = [QUANTIZE, &["--allow-duplicate-identical"]].concat();
    let run = succeeds(dir, &allowed);
    assert!(run.stderr.contains("1 tensors are in two files, the same byte for byte"), "{}", run.stderr);
    fs::remove_dir_all(dir.join("out.moepack")).unwrap();
    // One bit, and it is the same no more.
    work.model.tensors(SECOND, |tensors| find(tensors, NORM).bytes[0] ^= 1);
    let run = moepack(dir, &allowed);
    assert_eq!(run.code, Some(65), "{}", run.stderr);
    assert!(run.stderr.contains("also in"), "{}", run.stderr);
}

#[test]
fn weights_that_are_no_numbers_are_zero_where_that_is_asked_for() {
    let work = Work::new(QWEN3);
    work.model.tensor(GATE, |t| t.set_f32(77, f32::NAN));
    work.model.tensor(NORM, |t| t.set_f32(5, f32::INFINITY));
    let dir = work.dir.path();
    let refused = moepack(dir, QUANTIZE);
    assert_eq!(refused.code, Some(65), "{}", refused.stderr);
    assert!(refused.stderr.contains("--nan-policy zero"), "{}", refused.stderr);
    let run = succeeds(dir, &[QUANTIZE, &["--nan-policy", "zero"]].concat());
    assert!(
        run.stderr.contains("2 weights of 2 tensors are NaN or infinite and were read as 0"),
        "{}",
        run.stderr
    );
    let manifest: Value =
        serde_json::from_slice(&fs::read(dir.join("out.moepack/manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["recipe"]["nan_policy"], "zero");
    // The same bundle but for the manifest, as from a checkpoint that has the zeros itself.
    let clean = Work::new(QWEN3);
    clean.model.tensor(GATE, |t| t.set_f32(77, 0.0));
    clean.model.tensor(NORM, |t| t.set_f32(5, 0.0));
    clean.succeeds();
    let files = |dir: &Path| {
        let mut all = contents(&dir.join("out.moepack"));
        all.remove(Path::new("manifest.json"));
        all
    };
    assert!(files(dir) == files(clean.dir.path()), "the weights are those with zeros");
}

#[test]
fn nothing_is_written_through_a_hard_link() {
    let work = Work::new(QWEN3);
    let (dir, kept) = (work.dir.path(), work.dir.path().join("kept"));
    work.succeeds();
    // Everything of the checkpoint and of the bundle has a second name.
    fs::create_dir(&kept).unwrap();
    for (n, of) in ["model", "out.moepack"].iter().enumerate() {
        for file in listing(&dir.join(of)) {
            fs::hard_link(dir.join(of).join(&file), kept.join(format!("{n}-{}", file.display()))).unwrap();
        }
    }
    let before = contents(&kept);
    let again = ["quantize", "model", "-o", "out.moepack", "--codec", "int4", "--overwrite"];
    succeeds(dir, &again);
    assert!(contents(&kept) == before, "what has another name is as it was");
}

#[test]
fn a_bank_of_another_model_is_found() {
    let (one, other) = (Work::new(QWEN3), Work::new(QWEN3));
    other.model.tensor(GATE, |t| t.set_f32(0, 0.25));
    one.succeeds();
    other.succeeds();
    let bank = "out.moepack/experts-00001.safetensors";
    let [from, to] = [&other, &one].map(|w| w.dir.path().join(bank));
    assert_eq!(fs::metadata(&from).unwrap().len(), fs::metadata(&to).unwrap().len(), "banks of one shape");
    fs::copy(from, to).unwrap();
    let run = moepack(one.dir.path(), &["check", "out.moepack"]);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(
        run.stdout.contains("experts-00001.safetensors") && run.stdout.contains("sha256"),
        "{}",
        run.stdout
    );
}

#[test]
fn stats_of_another_model_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str| fixture(name).display().to_string();
    let tokens = of("goldens/imatrix/tokens.json");
    succeeds(dir.path(), &["calibrate", &of(QWEN3), "--tokens", &tokens, "-o", "stats"]);
    let run = moepack(dir.path(), &["quantize", &of("random/olmoe"), "-o", "q", "--stats", "stats"]);
    assert_eq!(run.code, Some(65), "{}", run.stderr);
    assert!(
        run.stderr.contains("stats of another model") && run.stderr.contains("qwen3_moe"),
        "{}",
        run.stderr
    );
}
