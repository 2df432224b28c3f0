//! `convert --to gguf`: files are split, resumed and the same for any number of threads; what ggml cannot hold is refused with
//! what would work. That llama.cpp reads them, and computes the same, is for `tests/peers/test_gguf.py`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use moepack_convert::gguf::{Gguf, Value};
use serde_json::{Value as Json, json};

use crate::resume::stop_when;
use crate::support::{Run, assert_same, contents, fixture, moepack, succeeds};

const V3: &str = "tiny-deepseek-v3";
/// How often a run may finish before the signal reaches it.
const TRIES: usize = 20;

/// Type and bytes of every tensor of all files.
type Tensors = BTreeMap<String, (&'static str, Vec<u8>)>;

fn files(dir: &Path) -> Vec<PathBuf> {
    let all = contents(dir).into_keys().filter(|path| path.extension().is_some_and(|e| e == "gguf"));
    all.map(|path| dir.join(path)).collect()
}

fn tensors(dir: &Path) -> Tensors {
    let of = |path: PathBuf| {
        let bytes = fs::read(&path).unwrap();
        let one = move |(info, at): (moepack_convert::gguf::TensorInfo, u64)| {
            let (at, len) = (at as usize, info.bytes().unwrap() as usize);
            (info.name, (info.kind.name, bytes[at..at + len].to_vec()))
        };
        Gguf::open(&path).unwrap().tensors.into_iter().map(one)
    };
    files(dir).into_iter().flat_map(of).collect()
}

fn gguf(work: &Path, model: &str, more: &[&str]) -> Run {
    moepack(work, &[&["convert", model, "--to", "gguf", "-o", "out", "--quiet"], more].concat())
}

/// A bundle of a fixture, `q`.
fn quantized(model: &str, options: &[&str]) -> tempfile::TempDir {
    let work = tempfile::tempdir().unwrap();
    let model = fixture(model);
    let args = ["quantize", model.to_str().unwrap(), "-o", "q", "--solver", "rtn", "--quiet"];
    succeeds(work.path(), &[&args, options].concat());
    work
}

#[test]
fn split_files_say_which_they_are_and_hold_the_same_tensors() {
    let work = quantized(V3, &["--codec", "q8_0"]);
    let run = succeeds(work.path(), &["convert", "q", "--to", "gguf", "-o", "whole", "--json"]);
    let report: Json = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((&report["kind"], &report["requantized"]), (&json!("GGUF"), &json!([])));
    succeeds(work.path(), &["convert", "q", "--to", "gguf", "-o", "split", "--split-max-size", "600KB"]);
    let (whole, split) = (files(&work.path().join("whole")), files(&work.path().join("split")));
    assert_eq!(whole, [work.path().join("whole/q.gguf")]);
    let n = split.len();
    assert!(n > 5, "{n} files");
    let n_tensors = Gguf::open(&whole[0]).unwrap().tensors.len();
    for (i, path) in split.iter().enumerate() {
        let name = format!("q-{:05}-of-{n:05}.gguf", i + 1);
        assert_eq!(path.file_name().unwrap().to_str().unwrap(), name);
        let found = Gguf::open(path).unwrap();
        assert_eq!(found.metadata["split.no"], Value::U16(i as u16));
        assert_eq!(found.metadata["split.count"], Value::U16(n as u16));
        assert_eq!(found.metadata["split.tensors.count"], Value::I32(n_tensors as i32));
        assert_eq!(found.metadata.len() > 3, i == 0, "keys of file {i}");
        assert!(fs::metadata(path).unwrap().len() < 900_000, "{name}");
    }
    assert!(tensors(&work.path().join("whole")) == tensors(&work.path().join("split")));
}

#[test]
fn experts_are_the_bytes_of_the_bundle() {
    let work = quantized(V3, &["--codec", "iq4_nl", "--trunk-codec", "q8_0"]);
    assert_eq!(gguf(work.path(), "q", &[]).code, Some(0));
    let model = moepack_convert::Model::open(&work.path().join("q"), &Default::default()).unwrap();
    let found = tensors(&work.path().join("out"));
    let (kind, bytes) = &found["blk.2.ffn_down_exps.weight"];
    let part = |e| model.expert(2, e).unwrap().part(moepack_convert::Part::Down).unwrap().planes[0].clone();
    assert!(*kind == "iq4_nl" && *bytes == (0..16).flat_map(part).collect::<Vec<u8>>());
    // Queries keep the blocks that the bundle has; what makes keys is turned, which blocks cannot be.
    let kinds = ["attn_q_b", "attn_k_b", "attn_v_b", "attn_kv_a_norm", "ffn_gate_inp"];
    let kinds = kinds.map(|name| found[&format!("blk.2.{name}.weight")].0);
    assert_eq!(kinds, ["q8_0", "f32", "f32", "f32", "f32"]);
}

#[test]
fn the_same_bytes_come_out_for_any_number_of_threads() {
    let work = quantized(V3, &["--codec", "int4-g64"]);
    for (out, threads) in [("one", "1"), ("three", "3")] {
        let args = ["convert", "q", "--to", "gguf", "-o", out, "--threads", threads, "--quiet"];
        succeeds(work.path(), &[&args[..], &["--split-max-size", "300KB"]].concat());
    }
    assert_same(&work.path().join("one"), &work.path().join("three"), "threads");
}

#[test]
fn a_killed_run_goes_on_after_the_last_finished_file() {
    let work = tempfile::tempdir().unwrap();
    let model = fixture(V3);
    let args = |out| {
        ["convert", model.to_str().unwrap(), "--to", "gguf", "-o", out, "--split-max-size", "1B", "--json"]
    };
    let third = |suffix: &str, ending: &str| -> Option<PathBuf> {
        let listed = fs::read_dir(work.path().join(format!("out{suffix}"))).ok()?;
        let mut paths = listed.filter_map(|e| Some(e.ok()?.path()));
        paths.find(|p| p.to_str().is_some_and(|p| p.contains("-00003-of-") && p.ends_with(ending)))
    };
    // A file is finished when a note says so.
    let noted = || third(".partial", ".gguf.note.json").is_some();
    let stopped = (0..TRIES).any(|_| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moepack"));
        command.args(args("out")).current_dir(work.path()).stdout(Stdio::null()).stderr(Stdio::null());
        let stopped = stop_when(command.spawn().unwrap(), "KILL", noted).is_some();
        if !stopped {
            fs::remove_dir_all(work.path().join("out")).unwrap();
        }
        stopped
    });
    assert!(stopped, "{TRIES} runs finished before the signal");
    assert!(!work.path().join("out").exists());
    let kept = fs::metadata(third(".partial/output", ".gguf").unwrap()).unwrap().modified().unwrap();
    let again = succeeds(work.path(), &args("out"));
    let report: Json = serde_json::from_str(&again.stdout).unwrap();
    assert_eq!(report["resumed"], true);
    assert_eq!(
        fs::metadata(third("", ".gguf").unwrap()).unwrap().modified().unwrap(),
        kept,
        "a finished file was written anew"
    );
    succeeds(work.path(), &args("whole"));
    assert_same(&work.path().join("whole"), &work.path().join("out"), "resumed");
}

#[test]
fn what_ggml_cannot_hold_is_refused_with_what_works() {
    let refused = |work: &Path, options: &[&str], said: &[&str]| {
        let run = gguf(work, "q", options);
        assert_eq!(run.code, Some(78), "{}{}", run.stdout, run.stderr);
        said.iter().for_each(|s| assert!(run.stderr.contains(s), "{s}: {}", run.stderr));
        assert!(!work.join("out").exists() && !work.join("out.partial").exists());
    };
    let work = quantized(V3, &["--codec", "int4-g64-asym"]);
    let no_type = "layer 1, down_proj, gate_proj, up_proj of experts 0-15: int4-g64-asym has no type in ggml";
    // 128 columns are no super-block.
    let works = "codec = \"iq4_nl\"; --requantize iq4_nl";
    refused(work.path(), &[], &[no_type, "layer 3,", works]);
    let blocks = "q4_k 128 columns are no whole blocks of 256, as q4_k has them";
    refused(work.path(), &["--requantize", "q4_k"], &[blocks, works]);
    let run = gguf(work.path(), "q", &["--requantize", "q8_0", "--json"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let report: Json = serde_json::from_str(&run.stdout).unwrap();
    let anew = report["requantized"].as_array().unwrap();
    assert!(anew.len() == 3 * 16 * 3 && anew.iter().all(|m| m["error"].as_f64().unwrap() < 1e-4), "{anew:?}");

    let work = tempfile::tempdir().unwrap();
    let rule = |tensor: &str, codec: &str| format!("[[rule]]\ntensor = \"{tensor}\"\ncodec = \"{codec}\"\n");
    let recipe = "schema = 1\nsolver = \"rtn\"\n".to_owned()
        + &rule("layers.*.experts.*.*", "q4_0")
        + &rule("layers.2.experts.5.down_proj", "q8_0");
    fs::write(work.path().join("recipe.toml"), recipe).unwrap();
    let model = fixture(V3);
    succeeds(
        work.path(),
        &["quantize", model.to_str().unwrap(), "-o", "q", "--recipe", "recipe.toml", "--quiet"],
    );
    let mixed = "layer 2, down_proj of experts 5: q8_0 q4_0 is that of other experts in the same tensor";
    refused(work.path(), &[], &[mixed, works]);
}

/// A model in FP8 and BF16, with positions that llama.cpp can compute.
#[test]
fn fp8_becomes_f32_or_where_that_is_asked_for_bf16() {
    let (work, from) = (tempfile::tempdir().unwrap(), fixture("random/deepseek_v3_fp8"));
    fs::create_dir(work.path().join("q")).unwrap();
    for (name, bytes) in contents(&from) {
        fs::write(work.path().join("q").join(name), bytes).unwrap();
    }
    let path = work.path().join("q/config.json");
    let mut config: Json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["rope_scaling"]["mscale_all_dim"] = json!(1.0);
    fs::write(&path, config.to_string()).unwrap();
    for (more, kind, note) in
        [(None, "f32", "become BF16 or F32"), (Some("--dequantize"), "bf16", "BF16, which rounds")]
    {
        let more: Vec<&str> = more.into_iter().chain(["--overwrite"]).collect();
        let run = gguf(work.path(), "q", &more);
        assert!(run.code == Some(0) && run.stderr.contains(note), "{}", run.stderr);
        let found = tensors(&work.path().join("out"));
        for name in ["attn_q_b", "attn_k_b", "ffn_up_exps", "ffn_gate_shexp"] {
            assert_eq!(found[&format!("blk.1.{name}.weight")].0, kind, "{name} {more:?}");
        }
        assert_eq!(found["token_embd.weight"].0, "bf16");
    }
}
