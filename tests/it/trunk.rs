//! A trunk that is coded too: what it is made of, what it loses, and that nothing else is touched.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{assert_same, fixture, moepack, moepack_with, succeeds, text};

/// Codecs of every kind.
const CODECS: &[&[&str]] = &[
    &["int8-g64"],
    &["int4-g64"],
    &["int6"],
    &["mxfp4"],
    &["nvfp4"],
    &["fp8-block"],
    &["tcq8", "--trunk-bits", "4.25"],
];

#[test]
fn the_drift_that_quantize_tells_is_that_of_the_bundle() {
    let work = Work::new("tiny-deepseek-v3");
    for codec in CODECS {
        let told = work.quantize("out", &[*codec, &["--verify", "eval.txt"]].concat(), &[]);
        let measured = work.json(&["verify", "out", "--reference", &work.model, "--text", "eval.txt"]);
        for key in ["kld_mean", "kld_max", "top1_agreement", "perplexity_bundle"] {
            assert_eq!(told["drift"][key], measured[key], "{codec:?}: {key}");
        }
        assert!(number(&measured, "kld_mean") > 0.0, "{codec:?} lost nothing, so nothing was coded");
        let alone = work.json(&["perplexity", "out", "--text", "eval.txt"]);
        // The same numbers, added up in another order.
        let ratio = number(&alone, "perplexity") / number(&measured, "perplexity_bundle");
        assert!((ratio - 1.0).abs() < 1e-8, "{codec:?}: {ratio}");
        succeeds(work.path(), &["check", "out", "--against", &work.model]);
        fs::remove_dir_all(work.path().join("out")).unwrap();
    }
}

#[test]
fn only_the_matrices_of_the_trunk_are_coded() {
    let work = Work::new("tiny-deepseek-v3");
    let manifest = work.manifest("out", &["int8-g64"]);
    let coded: Vec<&String> = manifest["trunk_codecs"].as_object().unwrap().keys().collect();
    let endings = [
        "q_a_proj.weight",
        "q_b_proj.weight",
        "kv_a_proj_with_mqa.weight",
        "kv_b_proj.weight",
        "o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "shared_experts.gate_proj.weight",
        "shared_experts.up_proj.weight",
        "shared_experts.down_proj.weight",
    ];
    // Four layers of attention, one dense MLP, three layers with shared experts.
    assert_eq!(coded.len(), 4 * 5 + 3 + 3 * 3, "{coded:?}");
    assert!(coded.iter().all(|name| endings.iter().any(|e| name.ends_with(e))), "{coded:?}");
    let inspected = work.json(&["inspect", "out"]);
    assert!(number(&inspected["trunk_dtypes"], "int8-g64") > 0.0, "{inspected}");
    assert_eq!(inspected["trunk_weights"], work.json(&["inspect", &work.model])["trunk_weights"]);
}

#[test]
fn an_fp8_trunk_is_narrowed_but_never_widened() {
    let work = Work::new("random/deepseek_v3_fp8");
    let wide = work.manifest("wide", &["int8-g64"]);
    let coded = wide["trunk_codecs"].as_object().unwrap();
    assert!(coded.is_empty(), "8.25 bits are more than FP8 takes: {coded:?}");
    let narrow = work.manifest("narrow", &["int4-g64"]);
    let coded = narrow["trunk_codecs"].as_object().unwrap();
    assert!(!coded.is_empty());
    // The MTP layer comes behind the backbone's two.
    assert!(coded.keys().all(|name| !name.starts_with("model.layers.2.")), "{coded:?}");
    let left_out: Vec<&str> =
        narrow["left_out"].as_array().unwrap().iter().map(|l| l["name"].as_str().unwrap()).collect();
    for name in coded.keys() {
        let scales = name.replace(".weight", ".weight_scale_inv");
        assert!(left_out.contains(&scales.as_str()), "{scales} is neither there nor left out");
    }
    succeeds(work.path(), &["check", "narrow", "--against", &work.model]);
}

#[test]
fn threads_and_instruction_sets_do_not_change_a_trunk() {
    let work = Work::new("tiny-deepseek-v3");
    for codec in [CODECS[0], CODECS[6]] {
        let of = |name: &str, environment: &[(&str, &str)], threads: &str| {
            let out = format!("{}-{name}", codec[0]);
            work.quantize_with(&out, environment, &[codec, &["--threads", threads]].concat());
            work.path().join(out)
        };
        let one = of("one", &[], "1");
        assert_same(&one, &of("seven", &[], "7"), "7 threads");
        for isa in ["scalar", "avx2"] {
            assert_same(&one, &of(isa, &[("MOEPACK_ISA", isa)], "2"), isa);
        }
    }
}

#[test]
fn a_flipped_bit_in_a_plane_is_found() {
    let work = Work::new("tiny-deepseek-v3");
    work.quantize("out", &["int4-g64"], &[]);
    let path = work.path().join("out/trunk-00001-of-00001.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let plane = planes(&bytes).into_iter().find(|(name, _)| name.ends_with("o_proj.weight.codes")).unwrap();
    bytes[plane.1] ^= 4;
    fs::write(&path, bytes).unwrap();
    assert_eq!(moepack(work.path(), &["check", "out"]).code, Some(1));
}

#[test]
fn a_matrix_without_its_shape_or_codec_is_refused() {
    let work = Work::new("tiny-deepseek-v3");
    for (file, from, to, said) in [
        ("trunk-00001-of-00001.safetensors", "\"shapes\"", "\"shaped\"", "no trunk file has its shape"),
        ("trunk-00001-of-00001.safetensors", "o_proj.weight.codes", "o_proj.weight.codez", "there is no"),
    ] {
        work.quantize("out", &["int4-g64"], &["--overwrite"]);
        let path = work.path().join("out").join(file);
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(&path, bytes).unwrap();
        let run = moepack(work.path(), &["inspect", "out"]);
        assert_eq!(run.code, Some(65), "{}", run.stderr);
        assert!(run.stderr.contains(said), "{}", run.stderr);
    }
}

#[test]
fn a_budget_counts_the_coded_trunk() {
    let work = Work::new("tiny-deepseek-v3");
    let target = 3_000_000;
    let args = ["int8-g64", "--align", "4096", "--target-size", &target.to_string()];
    work.run("out", &[], &args, &[]);
    let files = fs::read_dir(work.path().join("out")).unwrap();
    let bytes: u64 = files.map(|f| f.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes <= target && bytes as f64 >= target as f64 * 0.999, "{bytes} of {target} bytes");
}

#[test]
fn bits_are_for_codecs_that_have_them() {
    let work = Work::new("tiny-deepseek-v3");
    let refused = |args: &[&str], code: i32| {
        let args = [&["plan", &work.model][..], args].concat();
        let run = moepack(work.path(), &args);
        assert_eq!(run.code, Some(code), "{args:?}: {}", run.stderr);
    };
    refused(&["--trunk-codec", "int8-g64", "--trunk-bits", "4"], 78);
    refused(&["--trunk-codec", "int80"], 2);
    refused(&["--trunk-bits", "4"], 2);
}

/// A model, a directory, and a text in it.
struct Work {
    dir: tempfile::TempDir,
    model: String,
}

impl Work {
    fn new(model: &str) -> Work {
        let dir = tempfile::tempdir().unwrap();
        text(dir.path(), "eval.txt", 6_000);
        Work { dir, model: fixture(model).to_str().unwrap().to_owned() }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Keeps the experts as they are and codes the trunk; the report.
    fn quantize(&self, out: &str, trunk: &[&str], more: &[&str]) -> Value {
        self.run(out, &[], trunk, &[&["--codec", "native"], more].concat())
    }

    fn quantize_with(&self, out: &str, environment: &[(&str, &str)], trunk: &[&str]) {
        self.run(out, environment, trunk, &["--codec", "native"]);
    }

    fn run(&self, out: &str, environment: &[(&str, &str)], trunk: &[&str], more: &[&str]) -> Value {
        let args = [&["quantize", &self.model, "-o", out, "--json", "--trunk-codec"], trunk, more].concat();
        let run = moepack_with(self.path(), environment, &args);
        assert_eq!(run.code, Some(0), "{args:?}: {}", run.stderr);
        serde_json::from_str(&run.stdout).unwrap()
    }

    fn manifest(&self, out: &str, trunk: &[&str]) -> Value {
        self.quantize(out, trunk, &[]);
        let path: PathBuf = self.path().join(out).join("manifest.json");
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&succeeds(self.path(), &[args, &["--json"]].concat()).stdout).unwrap()
    }
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} of {value} is no number"))
}

/// Names of the tensors of a safetensors file, and where they start.
fn planes(bytes: &[u8]) -> Vec<(String, usize)> {
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    let tensors = header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
    let start = |t: &Value| 8 + n + t["data_offsets"][0].as_u64().unwrap() as usize;
    tensors.map(|(name, t)| (name.clone(), start(t))).collect()
}
