//! `inspect` of what other programs wrote: GGUF files, whole, split and broken, and compressed-tensors directories.

use std::path::{Path, PathBuf};
use std::process::Command;

use moepack_convert::gguf::file::write;
use moepack_convert::gguf::{TensorInfo, Type, Value, value};
use serde_json::{Value as Json, json};

use crate::support::{fixture, moepack, succeeds};

/// A model of two stacked experts, in files of one tensor each if it is to be split.
fn model(dir: &Path, split: Option<u64>) -> Vec<PathBuf> {
    let info = |name: &str, codec: &str, dims: &[u64]| TensorInfo {
        name: name.to_owned(),
        dims: dims.to_vec(),
        kind: Type::of_codec(codec).unwrap(),
    };
    let tensors = [
        info("token_embd.weight", "f32", &[256, 4]),
        info("blk.0.ffn_down_exps.weight", "q4_k", &[256, 8, 2]),
        info("blk.0.ffn_up_exps.weight", "q4_k", &[256, 8, 2]),
    ];
    let text = |t: &str| Value::String(t.to_owned());
    let keys = [
        ("general.architecture", text("qwen3moe")),
        ("general.name", text("two\u{202e}experts\n")),
        ("qwen3moe.block_count", Value::U32(1)),
        ("qwen3moe.expert_count", Value::U32(2)),
        ("qwen3moe.rope.freq_base", Value::F32(1e-6)),
        ("tokenizer.ggml.tokens", Value::strings((0..40).map(|i| i.to_string()))),
        ("tokenizer.chat_template", text(&"x".repeat(3000))),
    ];
    let keys = keys.map(|(key, value)| (key.to_owned(), value));
    let data = |i: usize, sink: &mut moepack_convert::gguf::file::Sink<'_>| {
        sink(&vec![0; tensors[i].bytes()? as usize])
    };
    write(dir, "m", &keys, &tensors, split, data).unwrap()
}

fn inspected(dir: &Path, path: &Path, more: &[&str]) -> Json {
    let args = [&["inspect", path.to_str().unwrap(), "--json"], more].concat();
    serde_json::from_str(&succeeds(dir, &args).stdout).unwrap()
}

#[test]
fn a_gguf_file_tells_architecture_counts_types_and_keys() {
    let dir = tempfile::tempdir().unwrap();
    let shown = inspected(dir.path(), &model(dir.path(), None)[0], &[]);
    for (key, expected) in [
        ("schema", json!("moepack.inspect-gguf/1")),
        ("kind", json!("gguf")),
        ("version", json!(3)),
        ("alignment", json!(32)),
        ("architecture", json!("qwen3moe")),
        ("n_layers", json!(1)),
        ("n_experts", json!(2)),
        ("n_experts_used", json!(null)),
        ("n_keys", json!(7)),
        ("n_tensors", json!(3)),
        ("weights", json!(1024 + 8192)),
        ("expert_weights", json!(8192)),
        ("tensor_bytes", json!(4096 + 4608)),
        ("expert_bytes", json!(4608)),
        ("bpw_experts", json!(4.5)),
        (
            "types",
            json!([
                {"type": "f32", "tensors": 1, "weights": 1024, "bytes": 4096, "bpw": 32.0},
                {"type": "q4_k", "tensors": 2, "weights": 8192, "bytes": 4608, "bpw": 4.5},
            ]),
        ),
        ("tensors", json!(null)),
    ] {
        assert_eq!(shown[key], expected, "{key}");
    }
    assert_eq!(shown["bpw_total"], json!(8.0 * 8704.0 / 9216.0));
    let key =
        |name: &str| shown["keys"].as_array().unwrap().iter().find(|k| k["key"] == name).unwrap().clone();
    let tokens = key("tokenizer.ggml.tokens");
    assert_eq!((&tokens["type"], &tokens["length"]), (&json!("[str]"), &json!(40)));
    assert_eq!(tokens["value"], json!(["0", "1", "2", "3", "4", "5", "6", "7"]));
    assert_eq!(key("qwen3moe.rope.freq_base")["value"].to_string(), "1e-6");
    assert_eq!(key("tokenizer.chat_template")["value"].as_str().unwrap().chars().count(), 1001);
}

#[test]
fn people_see_the_same_and_a_stranger_cannot_write_to_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None).remove(0);
    let path = path.to_str().unwrap();
    let text = succeeds(dir.path(), &["inspect", path]).stdout;
    for expected in [
        "architecture   \"qwen3moe\"",
        "experts        2 a layer, ? used by a token",
        "4.50 KiB, 0.01 M weights, 4.5000 bits each",
        "two\\u{202e}experts\\n",
        "[\"0\", \"1\", \"2\", \"3\", …] of 40",
        "1 file",
    ] {
        assert!(text.contains(expected), "{expected}\n{text}");
    }
    let listed = succeeds(dir.path(), &["inspect", path, "--tensors"]).stdout;
    assert!(!text.contains("256 x 8 x 2") && listed.contains("256 x 8 x 2"), "{listed}");
    for (args, hint) in
        [(&["inspect", path, "--experts"][..], "--tensors"), (&["inspect", ".", "--tensors"], "--experts")]
    {
        let run = moepack(dir.path(), args);
        assert!(run.code == Some(2) && run.stderr.contains(hint), "{args:?}: {}", run.stderr);
    }
}

#[test]
fn a_split_model_is_one_whichever_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let paths = model(dir.path(), Some(4096));
    assert_eq!(paths.len(), 3);
    let whole = inspected(dir.path(), &paths[0], &["--tensors"]);
    let mut other = inspected(dir.path(), &paths[2], &["--tensors"]);
    other["model"] = whole["model"].clone();
    assert_eq!(whole, other);
    let row = json!({"name": "blk.0.ffn_up_exps.weight", "type": "q4_k", "dims": [256, 8, 2], "bytes": 2304, "file": 2});
    for (key, expected) in row.as_object().unwrap() {
        assert_eq!(&whole["tensors"][2][key], expected, "{key}");
    }
    assert_eq!(whole["files"].as_array().unwrap().len(), 3);
    std::fs::remove_file(&paths[1]).unwrap();
    let run = moepack(dir.path(), &["inspect", "m-00001-of-00003.gguf"]);
    assert_eq!(run.code, Some(66), "{}", run.stderr);
    assert!(run.stderr.contains("m-00002-of-00003.gguf"), "{}", run.stderr);
}

/// Magic, version, counts of tensors and keys, and what follows.
fn file(version: u32, n_tensors: u64, n_keys: u64, rest: &[&[u8]]) -> Vec<u8> {
    let counts = [n_tensors, n_keys].map(u64::to_le_bytes).concat();
    [&b"GGUF"[..], &version.to_le_bytes(), &counts, &rest.concat(), &[0; 256]].concat()
}

fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&(name.len() as u64).to_le_bytes(), name.as_bytes(), &kind.to_le_bytes(), value].concat()
}

fn tensor(name: &str, dims: &[u64], id: u32, offset: u64) -> Vec<u8> {
    let dims: Vec<u8> = dims.iter().flat_map(|d| d.to_le_bytes()).collect();
    let n_dims = (dims.len() as u32 / 8).to_le_bytes();
    let name = [&(name.len() as u64).to_le_bytes(), name.as_bytes()].concat();
    [&name[..], &n_dims, &dims, &id.to_le_bytes(), &offset.to_le_bytes()].concat()
}

/// Each fault, and what the message says of it besides the file.
fn faults() -> Vec<(&'static str, Vec<u8>, &'static [&'static str])> {
    let alignment = |n: u32| file(3, 0, 1, &[&key("general.alignment", 4, &n.to_le_bytes())]);
    let array = |kind: u32, n: u64| [&kind.to_le_bytes()[..], &n.to_le_bytes()].concat();
    let one = |t: Vec<u8>| file(3, 1, 0, &[&t]);
    let two = |a: Vec<u8>, b: Vec<u8>| file(3, 2, 0, &[&a, &b]);
    let f32s = |name: &str, offset| tensor(name, &[4], 0, offset);
    vec![
        ("empty", Vec::new(), &["the file ends", "byte 0"]),
        ("bad magic", b"GGML".repeat(20), &["not with \"GGUF\"", "byte 0"]),
        ("version 1", file(1, 0, 0, &[]), &["version 1, expected 3", "byte 4"]),
        ("version 4", file(4, 0, 0, &[]), &["version 4, expected 3", "byte 4"]),
        ("big-endian", file(3u32.swap_bytes(), 0, 0, &[]), &["big-endian", "gguf-convert-endian"]),
        ("alignment 0", alignment(0), &["general.alignment", "power of two"]),
        ("alignment 3", alignment(3), &["general.alignment", "power of two"]),
        ("alignment 2^31", alignment(1 << 31), &["general.alignment", "power of two"]),
        ("type -1", one(tensor("t", &[4], u32::MAX, 0)), &["unknown type 4294967295", "tensor t", "byte 24"]),
        ("type 999", one(tensor("t", &[4], 999, 0)), &["unknown type 999", "tensor t", "byte 24"]),
        ("2^60 keys", file(3, 0, 1 << 60, &[]), &["1152921504606846976 keys", "byte 16"]),
        ("2^60 tensors", file(3, 1 << 60, 0, &[]), &["1152921504606846976 tensors", "byte 16"]),
        (
            "a string of 2^63",
            file(3, 0, 1, &[&key("k", value::STRING, &(1u64 << 63).to_le_bytes())]),
            &["key \"k\"", "9223372036854775808 bytes of a string", "byte 37"],
        ),
        (
            "a key twice",
            file(3, 0, 2, &[&key("k", 0, &[1]), &key("k", 0, &[1])]),
            &["key \"k\" is said twice", "byte 38"],
        ),
        ("a kind of value", file(3, 0, 1, &[&key("k", 13, &[])]), &["key \"k\"", "unknown kind 13"]),
        ("5 dimensions", one(tensor("t", &[1; 5], 0, 0)), &["5 dimensions", "tensor t", "byte 24"]),
        (
            "an array of arrays",
            file(3, 0, 1, &[&key("k", value::ARRAY, &array(value::ARRAY, 1))]),
            &["key \"k\"", "array of arrays"],
        ),
        (
            "2^60 elements",
            file(3, 0, 1, &[&key("k", value::ARRAY, &array(4, 1 << 60))]),
            &["key \"k\"", "elements"],
        ),
        ("a tensor twice", two(f32s("t", 0), f32s("t", 32)), &["second tensor", "tensor t"]),
        ("tensors overlap", two(tensor("t", &[12], 0, 0), f32s("u", 32)), &["inside of another", "tensor u"]),
        ("a hole", two(f32s("t", 0), f32s("u", 64)), &["behind a hole", "tensor u"]),
        ("an odd offset", one(f32s("t", 4)), &["multiple of 32", "tensor t"]),
        ("beyond the file", one(tensor("t", &[1 << 20], 0, 0)), &["beyond the file", "tensor t"]),
        ("2^80 numbers", one(tensor("t", &[1 << 40, 1 << 40], 0, 0)), &["more than can be", "tensor t"]),
        ("half a block", one(tensor("t", &[33], 8, 0)), &["blocks of q8_0 have 32", "tensor t"]),
        ("bytes behind", one(f32s("t", 0)), &["bytes behind the last tensor"]),
    ]
}

/// Exit code 65, and the message says file, key or tensor, and byte.
#[test]
fn a_broken_gguf_file_is_refused_for_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes, expected) in faults() {
        std::fs::write(dir.path().join("bad.gguf"), &bytes).unwrap();
        let run = moepack(dir.path(), &["inspect", "bad.gguf", "--json"]);
        assert_eq!((run.code, run.stdout.as_str()), (Some(65), ""), "{name}: {}", run.stderr);
        for words in expected.iter().chain(&["bad.gguf", "hint:"]) {
            assert!(run.stderr.contains(words), "{name}: no {words:?} in {}", run.stderr);
        }
    }
}

/// A header that is as large as its caps allow, and claims of more, fit into 200 MiB.
#[test]
fn large_claims_take_little_memory() {
    const KIB: u64 = 200 << 10;
    let dir = tempfile::tempdir().unwrap();
    let array = |kind: u32, n: u64| [&kind.to_le_bytes()[..], &n.to_le_bytes()].concat();
    let many: Vec<u8> = (0..65_000)
        .flat_map(|i| key(&i.to_string(), value::ARRAY, &array(value::STRING, 8)).into_iter().chain([0; 64]))
        .collect();
    for (bytes, code) in [
        (file(3, 0, 1, &[&key("k", value::ARRAY, &array(value::STRING, 1 << 26))]), 65),
        (file(3, 0, 1, &[&key("k", value::ARRAY, &array(0, 1 << 26))]), 65),
        (file(3, 0, 4, &[&key("k", value::STRING, &(16u64 << 20).to_le_bytes())]), 65),
        (file(3, 65_536, 0, &[]), 65),
        (file(3, 0, 65_000, &[&many])[..24 + many.len()].to_vec(), 0),
    ] {
        let path = dir.path().join("large.gguf");
        std::fs::write(&path, &bytes).unwrap();
        if code != 0 {
            std::fs::File::options().write(true).open(&path).unwrap().set_len(1 << 30).unwrap();
        }
        let script = format!("ulimit -v {KIB} && exec \"$0\" inspect large.gguf --threads 1");
        let run = Command::new("sh")
            .args(["-c", &script, env!("CARGO_BIN_EXE_moepack")])
            .current_dir(&dir)
            .output()
            .unwrap();
        assert_eq!(run.status.code(), Some(code), "{}", String::from_utf8_lossy(&run.stderr));
    }
}

#[test]
fn a_compressed_tensors_directory_tells_its_scheme() {
    let dir = tempfile::tempdir().unwrap();
    for (name, scheme, codec) in [
        ("ct_int4", "compressed-tensors, pack-quantized, int4", "affine4-g32-bf16"),
        ("ct_nvfp4", "compressed-tensors, nvfp4-pack-quantized, float4", "nvfp4-div"),
        ("ct_fp8_block", "compressed-tensors, float-quantized, float8", "fp8-block-16x32-bf16"),
        ("gptq_v1", "gptq, int4", "affine4"),
    ] {
        let path = fixture("encodings").join(name);
        let text = succeeds(dir.path(), &["inspect", path.to_str().unwrap()]).stdout;
        assert!(text.contains(&format!("quantization   {scheme}")), "{name}: {text}");
        let shown = inspected(dir.path(), &path, &[]);
        let method = scheme.split(',').next().unwrap();
        assert_eq!(shown["quantization"]["method"], method, "{name}");
        assert!(
            shown["layers"][0]["codecs"]["gate_proj"].as_str().unwrap().starts_with(codec),
            "{name}: {shown:#}"
        );
    }
    let plain = inspected(dir.path(), &fixture("tiny-deepseek-v4"), &[]);
    assert_eq!(plain["quantization"], Json::Null);
}
