//! A trunk that is coded too: what it is made of, what it loses, and that nothing else is touched.

use std::fs;
use std::path::{Path, PathBuf};

use moepack_format::manifest::Manifest;
use serde_json::{Value, json};

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
fn a_text_tells_how_a_trunk_is_coded_best() {
    let work = Work::new("tiny-deepseek-v3");
    text(work.path(), "calibration.txt", 60_000);
    for codec in [CODECS[1], CODECS[6]] {
        let rounded = work.quantize("rounded", codec, &["--verify", "eval.txt"]);
        let solved =
            work.quantize("solved", codec, &["--verify", "eval.txt", "--calibrate", "calibration.txt"]);
        let kld = |report: &Value| number(&report["drift"], "kld_mean");
        assert!(kld(&solved) < 0.8 * kld(&rounded), "{codec:?}: {} {}", kld(&solved), kld(&rounded));
        succeeds(work.path(), &["check", "solved", "--against", &work.model]);
        let manifest = work.manifest_of("solved");
        let names = |key: &str| manifest[key].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(names("trunk_errors"), names("trunk_codecs"));
        a_larger_error_is_found(&work, "solved");
        for out in ["rounded", "solved"] {
            fs::remove_dir_all(work.path().join(out)).unwrap();
        }
    }
}

/// Fused matrices, linear attention, state spaces, latents, two attentions in a layer, groups of outputs.
#[test]
fn trunks_of_every_kind_are_coded() {
    for model in [
        "random/qwen3_next",
        "random/kimi_linear",
        "random/dbrx",
        "random/nemotron_h_latent",
        "random/granitemoehybrid",
        "random/jamba",
        "random/minimax",
        "random/phimoe",
        "random/llama4",
        "tiny-deepseek-v4",
    ] {
        let work = Work::new(model);
        let texts = ["--verify", "eval.txt", "--calibrate", "eval.txt"];
        let told = work.quantize("out", &["int4-g32"], &texts);
        let measured = work.json(&["verify", "out", "--reference", &work.model, "--text", "eval.txt"]);
        assert_eq!(told["drift"]["kld_mean"], measured["kld_mean"], "{model}");
        assert!(number(&measured, "kld_mean") > 0.0, "{model} lost nothing, so nothing was coded");
        succeeds(work.path(), &["check", "out", "--against", &work.model]);
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
    for (codec, solver) in [(CODECS[0], "rtn"), (CODECS[6], "rtn"), (CODECS[6], "gptq")] {
        let learnt: &[&str] = if solver == "gptq" { &["--calibrate", "eval.txt"] } else { &[] };
        let of = |name: &str, environment: &[(&str, &str)], threads: &str| {
            let out = format!("{}-{solver}-{name}", codec[0]);
            work.quantize_with(&out, environment, &[codec, &["--threads", threads], learnt].concat());
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

/// Which is expected to lose less decides; a budget that only a coded trunk leaves experts enough of codes it, too.
#[test]
fn a_tight_budget_codes_the_trunk_and_a_wide_one_does_not() {
    let work = Work::new("tiny-deepseek-v3");
    text(work.path(), "calibration.txt", 20_000);
    let texts = ["--calibrate", "calibration.txt", "--verify", "eval.txt"];
    let of = |target: &str, more: &[&str]| {
        let args =
            ["quantize", &work.model, "-o", "out", "--json", "--align", "4096", "--target-size", target];
        let run = moepack(work.path(), &[&args[..], &["--overwrite"], more].concat());
        assert_eq!(run.code, Some(0), "{target}: {}", run.stderr);
        let report: Value = serde_json::from_str(&run.stdout).unwrap();
        let coded = !work.manifest_of("out")["trunk_codecs"].as_object().is_none_or(|c| c.is_empty());
        (coded, report)
    };
    let (coded, chosen) = of("3100000", &texts);
    let (_, released) = of("3100000", &[&texts[..], &["--trunk-codec", "native"]].concat());
    assert!(coded && number(&chosen["drift"], "kld_mean") < 0.5 * number(&released["drift"], "kld_mean"));
    assert!(!of("4700000", &texts).0, "fine experts gain nothing");
    assert!(of("2700000", &[]).0, "experts alone would have to be too small");
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

/// Has the manifest say that one matrix lost less than it did.
fn a_larger_error_is_found(work: &Work, out: &str) {
    let dir = work.path().join(out);
    let mut manifest = Manifest::read(&dir).unwrap();
    let (name, error) = manifest.trunk_errors.iter_mut().next().unwrap();
    let name = name.clone();
    *error *= 0.99;
    manifest.write(&dir).unwrap();
    let run = moepack(work.path(), &["check", out, "--against", &work.model]);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(run.stdout.contains(&name), "{name} is not named: {}{}", run.stdout, run.stderr);
}

/// A model, a directory, and a text in it.
struct Work {
    dir: tempfile::TempDir,
    model: String,
}

impl Work {
    fn new(model: &str) -> Work {
        let dir = tempfile::tempdir().unwrap();
        let mut model = fixture(model);
        if model.join("tokenizer.json").exists() {
            text(dir.path(), "eval.txt", 6_000);
        } else {
            model = with_tokenizer(&model, dir.path());
        }
        Work { model: model.to_str().unwrap().to_owned(), dir }
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
        self.manifest_of(out)
    }

    fn manifest_of(&self, out: &str) -> Value {
        let path: PathBuf = self.path().join(out).join("manifest.json");
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&succeeds(self.path(), &[args, &["--json"]].concat()).stdout).unwrap()
    }
}

/// A copy of a random model, whose 96 tokens are numbers from now on, and a text of them.
fn with_tokenizer(model: &Path, dir: &Path) -> PathBuf {
    let copy = dir.join("model");
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(model).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    let vocab: serde_json::Map<String, Value> = (0..96).map(|id| (format!("{id}"), id.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "0"},
    });
    fs::write(copy.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let words: Vec<String> = (0..1500_u32).map(|i| format!("{}", (i * i + i / 7) % 96)).collect();
    fs::write(dir.join("eval.txt"), words.join(" ")).unwrap();
    copy
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
