//! Models written for other programs: the release again byte for byte, codecs moved without rounding, refusals by name.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::goldens::nlls;
use crate::hostile::damage::parse;
use crate::support::{Run, assert_same, contents, fixture, moepack, succeeds};

/// Random models that were released in BF16 or F32: each way in which experts are stored.
const PLAIN: &[&str] =
    &["qwen3_moe_sharded", "gpt_oss", "gpt_oss_mxfp4", "dbrx", "mixtral", "deepseek_v4_release"];
const QWEN: &str = "random/qwen3_moe";

/// Type, shape and bytes of every tensor of a directory.
type Tensors = BTreeMap<String, (String, Vec<u64>, Vec<u8>)>;

fn tensors(dir: &Path) -> Tensors {
    let files = contents(dir).into_iter().filter(|(path, _)| {
        let name = path.to_str().unwrap();
        name.starts_with("model") && name.ends_with(".safetensors")
    });
    let all = files.flat_map(|(_, bytes)| parse(&bytes));
    all.map(|t| (t.name, (t.dtype, t.shape, t.bytes))).collect()
}

fn convert(dir: &Path, from: &str, to: &str, more: &[&str]) -> Run {
    moepack(dir, &[&["convert", from, "--to", to, "-o", "out", "--quiet"], more].concat())
}

fn converts(dir: &Path, from: &str, to: &str, more: &[&str]) -> Run {
    let run = convert(dir, from, to, more);
    assert_eq!(run.code, Some(0), "{from} --to {to}: {}", run.stderr);
    run
}

/// A bundle of a fixture.
fn quantized(fixture_name: &str, codec: &str) -> tempfile::TempDir {
    let work = tempfile::tempdir().unwrap();
    let model = fixture(fixture_name);
    succeeds(work.path(), &["quantize", model.to_str().unwrap(), "-o", "q", "--codec", codec, "--quiet"]);
    work
}

fn windows() -> Value {
    json!([(0..40).map(|i| i * 37 % 60).collect::<Vec<u64>>()])
}

#[test]
fn every_release_comes_back_from_its_bundle_byte_for_byte() {
    let encodings = fs::read_dir(fixture("encodings")).unwrap().map(|e| e.unwrap().file_name());
    let encodings = encodings.map(|name| format!("encodings/{}", name.to_str().unwrap()));
    let all: Vec<String> = encodings.chain(PLAIN.iter().map(|name| format!("random/{name}"))).collect();
    for name in &all {
        let work = quantized(name, "native");
        converts(work.path(), "q", "safetensors", &["--max-shard-size", "100KB"]);
        let (released, written) = (tensors(&fixture(name)), tensors(&work.path().join("out")));
        assert_eq!(
            released.keys().collect::<Vec<_>>(),
            written.keys().collect::<Vec<_>>(),
            "{name}: other tensors"
        );
        for (tensor, value) in &released {
            assert!(*value == written[tensor], "{name}: {tensor} differs");
        }
        let config = |dir: &Path| fs::read(dir.join("config.json")).unwrap();
        assert!(config(&fixture(name)) == config(&work.path().join("out")), "{name}: config.json");
    }
}

#[test]
fn bf16_has_the_names_and_shapes_of_plain_releases_and_scores_as_the_bundle() {
    for (name, codec) in
        [(QWEN, "int8-g32"), ("random/gpt_oss_mxfp4", "native"), ("random/deepseek_v3_fp8", "native")]
    {
        let work = quantized(name, codec);
        converts(work.path(), "q", "safetensors", &["--dequantize"]);
        let written = tensors(&work.path().join("out"));
        assert!(written.keys().all(|n| !n.ends_with("_scale_inv") && !n.ends_with("_blocks")), "{name}");
        let config: Value =
            serde_json::from_slice(&fs::read(work.path().join("out/config.json")).unwrap()).unwrap();
        assert!(config.get("quantization_config").is_none(), "{name}");
        let [bundle, plain] = ["q", "out"].map(|dir| nlls(&work.path().join(dir), &windows()));
        let mean = |all: &[Vec<f64>]| all[0].iter().sum::<f64>() / all[0].len() as f64;
        // BF16 rounds each weight by up to 2^-9.
        assert!((mean(&bundle) - mean(&plain)).abs() < 1e-2, "{name}");
    }
}

/// The exported directory is a checkpoint of the same numbers: our own reader, which is tested against others', says so.
#[test]
fn codecs_move_into_compressed_tensors_without_rounding() {
    for codec in ["int4-g32", "int8-g64", "mxfp4", "nvfp4-div", "fp8-block-32x32"] {
        let work = quantized(QWEN, codec);
        converts(work.path(), "q", "compressed-tensors", &[]);
        let [bundle, export] = ["q", "out"].map(|dir| nlls(&work.path().join(dir), &windows()));
        assert_eq!(bundle, export, "{codec}");
        let inspected = succeeds(work.path(), &["inspect", "out", "--json"]);
        let inspected: Value = serde_json::from_str(&inspected.stdout).unwrap();
        assert_eq!(inspected["kind"], "checkpoint");
    }
}

#[test]
fn mlx_experts_are_stacked_and_configured_by_path() {
    let work = quantized(QWEN, "int4-g32");
    converts(work.path(), "q", "mlx", &["--base-model", "org/name"]);
    let written = tensors(&work.path().join("out"));
    let stem = "model.layers.1.mlp.switch_mlp.down_proj";
    let shape =
        |ending: &str| (&*written[&format!("{stem}.{ending}")].0, &*written[&format!("{stem}.{ending}")].1);
    assert_eq!(shape("weight"), ("U32", &[4, 64, 8][..]));
    assert_eq!(shape("scales"), ("F16", &[4, 64, 2][..]));
    assert_eq!(shape("biases"), ("F16", &[4, 64, 2][..]));
    let config: Value =
        serde_json::from_slice(&fs::read(work.path().join("out/config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization"][stem], json!({"group_size": 32, "bits": 4, "mode": "affine"}));
    let card = fs::read_to_string(work.path().join("out/README.md")).unwrap();
    assert!(card.starts_with("---\nbase_model: \"org/name\"\nbase_model_relation: quantized\n"), "{card}");
}

#[test]
fn what_a_target_cannot_hold_is_refused_with_the_recipe_that_works() {
    let work = quantized(QWEN, "int4-g64-asym");
    let run = convert(work.path(), "q", "compressed-tensors", &[]);
    assert_eq!(run.code, Some(78), "{}", run.stderr);
    for said in [
        "layer 0, down_proj, gate_proj, up_proj of experts 0-3: int4-g64-asym has zero points",
        "layer 1,",
        "codec = \"int4-g64\"",
        "--requantize int4-g64",
    ] {
        assert!(run.stderr.contains(said), "{said}: {}", run.stderr);
    }
    assert!(!work.path().join("out").exists() && !work.path().join("out.partial").exists());
    let run = converts(work.path(), "q", "compressed-tensors", &["--requantize", "int8-g32", "--json"]);
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    let anew = report["requantized"].as_array().unwrap();
    assert_eq!(anew.len(), 2 * 4 * 3);
    assert!(anew.iter().all(|m| m["error"].as_f64().unwrap() < 1e-4 && m["to"] == "int8-g32"), "{anew:?}");
}

#[test]
fn experts_of_several_codecs_have_no_place_in_one_tensor() {
    let work = tempfile::tempdir().unwrap();
    let recipe = "schema = 1\nsolver = \"rtn\"\n[[rule]]\ntensor = \"layers.*.experts.*.*\"\ncodec = \"int4-g64\"\n\
                  [[rule]]\ntensor = \"layers.1.experts.2.up_proj\"\ncodec = \"int8-g64\"\n";
    fs::write(work.path().join("recipe.toml"), recipe).unwrap();
    let model = fixture(QWEN);
    let args = ["quantize", model.to_str().unwrap(), "-o", "q", "--recipe", "recipe.toml", "--quiet"];
    succeeds(work.path(), &args);
    let run = convert(work.path(), "q", "mlx", &[]);
    let said = "layer 1, up_proj of experts 2: int8-g64 int4-g64 is that of other experts in the same tensor";
    assert!(run.code == Some(78) && run.stderr.contains(said), "{}", run.stderr);
    assert!(!run.stderr.contains("layer 0"), "{}", run.stderr);
}

#[test]
fn the_same_bytes_come_out_for_any_number_of_threads_and_nothing_is_overwritten_unasked() {
    let work = quantized(QWEN, "int4-g64");
    let args = ["--to", "mlx", "--max-shard-size", "60KB", "--quiet"];
    for (out, threads) in [("one", "1"), ("three", "3")] {
        succeeds(work.path(), &[&["convert", "q", "-o", out, "--threads", threads], &args[..]].concat());
    }
    assert_same(&work.path().join("one"), &work.path().join("three"), "threads");
    let again = [&["convert", "q", "-o", "one"], &args[..]].concat();
    assert_eq!(moepack(work.path(), &again).code, Some(73));
    succeeds(work.path(), &[&again[..], &["--overwrite"]].concat());
    assert_same(&work.path().join("one"), &work.path().join("three"), "overwritten");
    fs::write(work.path().join("one/thesis.txt"), "mine").unwrap();
    let refused = moepack(work.path(), &[&again[..], &["--overwrite"]].concat());
    assert!(refused.code == Some(73) && refused.stderr.contains("thesis.txt"), "{}", refused.stderr);
}
