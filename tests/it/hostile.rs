//! Checkpoints of strangers: each fault gets its own message and exit code, and nothing half-written remains.
//!
//! A fault is a row: what is wrong, the fixture it starts from, the exit code, phrases of the message, and what
//! makes it. Each runs `inspect` and `quantize` where the fault shows in headers and configuration, else `quantize`
//! alone, with little address space and processor time, so that a length taken on trust is noticed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{Run, confined, fixture, listing, moepack};
use damage::{INDEX, Model, Tensor, WEIGHTS, find, zeros};

mod allowed;
mod configs;
pub mod damage;
mod encodings;
mod files;
mod headers;
mod list;
mod tensors;

/// One fault.
struct Fault {
    what: &'static str,
    of: &'static str,
    exit: i32,
    says: &'static [&'static str],
    make: fn(&Model),
}

const QWEN3: &str = "random/qwen3_moe";
const SHARDED: &str = "random/qwen3_moe_sharded";
const FP8: &str = "random/deepseek_v3_fp8";
const MXFP4: &str = "random/gpt_oss_mxfp4";

const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const NORM: &str = "model.norm.weight";
const GATE: &str = "model.layers.1.mlp.experts.2.gate_proj.weight";
const SECOND: &str = "model-00002-of-00003.safetensors";

const QUANTIZE: &[&str] = &["quantize", "model", "-o", "out.moepack", "--codec", "int8"];
const INSPECT: &[&str] = &["inspect", "model"];
/// Keeps what was released quantized.
const KEEP: &[&str] = &["quantize", "model", "-o", "out.moepack", "--codec", "native"];

#[test]
fn a_damaged_file_is_refused() {
    each(files::FILES, &[INSPECT, QUANTIZE]);
}

#[test]
fn a_lying_header_is_refused() {
    each(headers::HEADERS, &[INSPECT, QUANTIZE]);
}

#[test]
fn an_index_that_does_not_fit_is_refused() {
    each(configs::INDEXES, &[INSPECT, QUANTIZE]);
}

#[test]
fn a_config_that_does_not_fit_is_refused() {
    each(configs::CONFIGS, &[INSPECT, QUANTIZE]);
}

#[test]
fn a_missing_or_foreign_tensor_is_refused() {
    each(tensors::TENSORS, &[INSPECT, QUANTIZE]);
}

#[test]
fn a_value_that_no_codec_can_hold_is_refused() {
    each(tensors::VALUES, &[QUANTIZE]);
}

#[test]
fn a_quantized_release_that_does_not_fit_together_is_refused() {
    each(encodings::HEADERS, &[INSPECT, QUANTIZE, KEEP]);
}

#[test]
fn a_quantized_release_whose_scales_mean_nothing_is_refused() {
    each(encodings::VALUES, &[QUANTIZE, KEEP]);
}

#[test]
fn shards_without_an_index_are_read() {
    let work = Work::new("random/qwen3_moe_sharded");
    fs::remove_file(work.model.path(INDEX)).unwrap();
    work.succeeds();
}

#[test]
fn a_shard_that_the_index_does_not_name_is_mentioned() {
    let work = Work::new("random/qwen3_moe_sharded");
    fs::copy(fixture("random/qwen3_moe/golden.safetensors"), work.model.path("stray.safetensors")).unwrap();
    let run = work.succeeds();
    assert!(run.stderr.contains("stray.safetensors"), "{}", run.stderr);
}

#[test]
fn a_hub_cache_of_symlinks_is_read() {
    let work = Work::new("random/qwen3_moe_sharded");
    let cache = work.dir.path().join("models--some--model");
    let (blobs, snapshot) = (cache.join("blobs"), cache.join("snapshots/0123abcd"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(cache.join("refs")).unwrap();
    fs::write(cache.join("refs/main"), "0123abcd").unwrap();
    for (n, file) in listing(&work.model.dir).iter().enumerate() {
        fs::rename(work.model.dir.join(file), blobs.join(n.to_string())).unwrap();
        symlink(Path::new("../../blobs").join(n.to_string()), snapshot.join(file)).unwrap();
    }
    for model in ["models--some--model", "models--some--model/snapshots/0123abcd"] {
        let run = moepack(work.dir.path(), &["inspect", model]);
        assert_eq!(run.code, Some(0), "{model}: {}", run.stderr);
    }
}

#[test]
fn an_expert_of_zeros_is_kept_as_zeros() {
    let work = Work::new("random/qwen3_moe");
    work.model.tensors(WEIGHTS, |tensors| {
        for t in tensors.iter_mut().filter(|t| t.name.contains("layers.0.mlp.experts.1.")) {
            t.bytes.fill(0);
        }
    });
    work.succeeds();
    let bank = fs::read(work.dir.path().join("out.moepack/experts-00000.safetensors")).unwrap();
    let of_expert = damage::parse(&bank).into_iter().filter(|t| t.name.contains("experts.1."));
    let mut n_tensors = 0;
    for t in of_expert {
        // int8 stores level + 128; a group of zeros has scale 0.
        let expected = if t.name.ends_with("scales") { 0 } else { 128 };
        assert!(t.bytes.iter().all(|&b| b == expected), "{} is not {expected} everywhere", t.name);
        n_tensors += 1;
    }
    assert!(n_tensors >= 3, "the bank has {n_tensors} tensors of expert 1");
}

#[test]
fn rows_that_no_block_divides_are_refused_before_any_work() {
    let work = Work::new("random/qwen2_moe_mixed");
    let run = moepack(work.dir.path(), &["quantize", "model", "-o", "out.moepack", "--codec", "mxfp4"]);
    assert_eq!(run.code, Some(78), "{}", run.stderr);
    for said in ["48 columns, but mxfp4 needs a multiple of 32", "down_proj", "hint:"] {
        assert!(run.stderr.contains(said), "{said:?} is not said\n{}", run.stderr);
    }
    assert_eq!(listing(work.dir.path()).len(), 1 + listing(&work.model.dir).len());
}

#[test]
fn the_names_of_a_stranger_cannot_write_to_the_terminal() {
    let work = Work::new("random/qwen3_moe");
    work.model.with("evil\u{1b}[31m\u{202e}name", &[1]);
    let run = moepack(work.dir.path(), QUANTIZE);
    assert_eq!(run.code, Some(65), "{}", run.stderr);
    assert!(!run.stderr.contains(['\u{1b}', '\u{202e}']), "{:?}", run.stderr);
    assert!(run.stderr.contains("evil\\u{1b}"), "{}", run.stderr);
}

/// A damaged model in a directory of its own.
struct Work {
    dir: tempfile::TempDir,
    model: Model,
}

impl Work {
    fn new(of: &str) -> Work {
        let dir = tempfile::tempdir().unwrap();
        let model = Model::copy(&fixture(of), dir.path().join("model"));
        Work { dir, model }
    }

    /// Quantizes, and the bundle passes its check.
    fn succeeds(&self) -> Run {
        let run = moepack(self.dir.path(), QUANTIZE);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        let check = moepack(self.dir.path(), &["check", "out.moepack"]);
        assert_eq!(check.code, Some(0), "{}{}", check.stdout, check.stderr);
        run
    }
}

/// Makes each fault, runs each command, and tells of all that went wrong at once.
fn each(faults: &[Fault], commands: &[&[&str]]) {
    let mut wrong = Vec::new();
    for fault in faults {
        let work = Work::new(fault.of);
        (fault.make)(&work.model);
        let before = listing(work.dir.path());
        for command in commands {
            let run = confined(work.dir.path(), command);
            let complaints = complaints(fault, &run, &before, &listing(work.dir.path()));
            if !complaints.is_empty() {
                let n_chars = run.stderr.char_indices().nth(1500).map_or(run.stderr.len(), |(at, _)| at);
                wrong.push(format!(
                    "{} ({}): {}\n{}",
                    fault.what,
                    command[0],
                    complaints.join("; "),
                    &run.stderr[..n_chars]
                ));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {} runs\n\n{}",
        wrong.len(),
        faults.len() * commands.len(),
        wrong.join("\n\n")
    );
}

fn complaints(
    fault: &Fault,
    run: &Run,
    before: &[std::path::PathBuf],
    after: &[std::path::PathBuf],
) -> Vec<String> {
    let mut out = Vec::new();
    if run.code != Some(fault.exit) {
        out.push(format!("exit code {:?}, expected {}", run.code, fault.exit));
    }
    if !run.stderr.lines().any(|line| line.starts_with("error: ")) {
        out.push("no line starts with \"error: \"".to_owned());
    }
    if run.stderr.contains("panicked") || run.stderr.contains("bug in moepack") {
        out.push("it panicked".to_owned());
    }
    out.extend(fault.says.iter().filter(|s| !run.stderr.contains(*s)).map(|s| format!("{s:?} is not said")));
    out.extend(
        after.iter().filter(|p| !before.contains(p)).map(|p| format!("{} was left behind", p.display())),
    );
    out
}
