//! What is exported is read back by the strict reader: names, shapes, keys, tokens and bytes.

use std::fs;

use moepack_format::Kind;
use serde_json::{Value as Json, json};

use super::*;
use crate::gguf::{Gguf, Value};
use crate::model::OpenOptions;
use crate::testing::fixture;

/// A random model with changed keys of config.json, and a tokenizer where one is given.
fn checkpoint(dir: &Path, name: &str, changes: Json, tokenizer: Option<Json>) -> Model {
    let source = fixture("random").join(name);
    let text = fs::read(source.join("config.json")).unwrap();
    let mut config: Json = serde_json::from_slice(&text).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::copy(source.join("model.safetensors"), dir.join("model.safetensors")).unwrap();
    if let Some(tokenizer) = tokenizer {
        fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    }
    Model::open(dir, &OpenOptions::default()).unwrap()
}

fn exported(model: &Model, dir: &Path) -> Gguf {
    let written = export(model, dir, "out", None).unwrap();
    assert_eq!((written.files.len(), written.left_out.len()), (1, 0), "{:?}", written.left_out);
    Gguf::open(&written.files[0]).unwrap()
}

fn refused(name: &str, changes: Json, tokenizer: Option<Json>) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let model = checkpoint(dir.path(), name, changes, tokenizer);
    let error = export(&model, dir.path(), "out", None).unwrap_err();
    assert!(!dir.path().join("out.gguf").exists(), "{error}");
    error
}

/// GPT-2's way of cutting, three tokens and one that is special.
fn tokenizer() -> Json {
    json!({
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
        "added_tokens": [{"id": 0, "content": "<s>", "special": true}],
        "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]},
    })
}

#[test]
fn tensors_have_the_names_shapes_and_bytes_that_llama_cpp_wants() {
    let dir = tempfile::tempdir().unwrap();
    let model = checkpoint(dir.path(), "qwen3_moe", json!({}), None);
    let gguf = exported(&model, dir.path());
    let found: Vec<(&str, &[u64])> = gguf.tensors.iter().map(|(t, _)| (&*t.name, &*t.dims)).collect();
    let whole =
        [("token_embd.weight", &[64, 96][..]), ("output_norm.weight", &[64]), ("output.weight", &[64, 96])];
    assert_eq!(found[..3], whole);
    let layer = [
        ("blk.0.attn_norm.weight", &[64][..]),
        ("blk.0.attn_q.weight", &[64, 96]),
        ("blk.0.attn_k.weight", &[64, 48]),
        ("blk.0.attn_v.weight", &[64, 48]),
        ("blk.0.attn_output.weight", &[96, 64]),
        ("blk.0.attn_q_norm.weight", &[24]),
        ("blk.0.attn_k_norm.weight", &[24]),
        ("blk.0.ffn_norm.weight", &[64]),
        ("blk.0.ffn_gate_inp.weight", &[64, 4]),
        ("blk.0.ffn_gate_exps.weight", &[64, 64, 4]),
        ("blk.0.ffn_up_exps.weight", &[64, 64, 4]),
        ("blk.0.ffn_down_exps.weight", &[64, 64, 4]),
    ];
    assert_eq!(found[3..15], layer);
    assert!(gguf.tensors.iter().all(|(t, _)| t.kind.name == "f32") && found.len() == 3 + 2 * layer.len());

    let (_, start) = gguf.tensors.iter().find(|(t, _)| t.name == "blk.1.ffn_down_exps.weight").unwrap();
    let expert = model.expert(1, 2).unwrap();
    let plane = &expert.part(Part::Down).unwrap().planes[0];
    let at = *start as usize + 2 * plane.len();
    assert!(fs::read(&gguf.path).unwrap()[at..at + plane.len()] == plane[..]);
}

#[test]
fn keys_say_what_the_graph_needs() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = exported(&checkpoint(dir.path(), "qwen2_moe", json!({}), None), dir.path());
    let numbers = [
        ("block_count", 2),
        ("embedding_length", 64),
        ("vocab_size", 96),
        ("feed_forward_length", 80),
        ("expert_feed_forward_length", 32),
        ("expert_shared_feed_forward_length", 96),
        ("expert_count", 5),
        ("expert_used_count", 2),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 16),
        ("rope.dimension_count", 16),
    ];
    for (key, n) in numbers {
        assert_eq!(gguf.metadata[&format!("qwen2moe.{key}")], Value::U32(n), "{key}");
    }
    assert_eq!(gguf.metadata["general.architecture"].as_str(), Some("qwen2moe"));
    assert_eq!(gguf.metadata["qwen2moe.rope.freq_base"], Value::F32(1e4));
    assert_eq!(gguf.metadata["tokenizer.ggml.model"].as_str(), Some("no_vocab"));
    let dims = |name: &str| gguf.tensors.iter().find(|(t, _)| t.name == name).map(|(t, _)| &*t.dims);
    assert_eq!(dims("blk.0.ffn_gate_inp_shexp.weight"), Some(&[64][..]));
    assert_eq!(dims("blk.0.attn_k.bias"), Some(&[32][..]));
}

#[test]
fn tokens_and_the_way_of_cutting_come_from_the_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let said = json!({"add_bos_token": true, "bos_token": {"content": "<s>"}, "chat_template": "{{ x }}"});
    fs::write(dir.path().join("tokenizer_config.json"), said.to_string()).unwrap();
    let gguf = exported(&checkpoint(dir.path(), "qwen3_moe", json!({}), Some(tokenizer())), dir.path());
    let texts = (4..96).map(|id| format!("[PAD{id}]"));
    let texts = ["<s>", "a", "b", "ab"].map(str::to_owned).into_iter().chain(texts);
    assert_eq!(gguf.metadata["tokenizer.ggml.tokens"], Value::strings(texts));
    let Value::Array(_, kinds) = &gguf.metadata["tokenizer.ggml.token_type"] else { panic!("no array") };
    assert_eq!(kinds[..5], [3, 1, 1, 1, 5].map(Value::I32));
    assert_eq!(gguf.metadata["tokenizer.ggml.merges"], Value::strings(["a b".to_owned()]));
    assert_eq!(gguf.metadata["tokenizer.ggml.pre"].as_str(), Some("gpt-2"));
    assert_eq!(gguf.metadata["tokenizer.ggml.add_bos_token"], Value::Bool(true));
    assert_eq!(gguf.metadata["tokenizer.ggml.bos_token_id"], Value::U32(0));
    assert_eq!(gguf.metadata["tokenizer.chat_template"].as_str(), Some("{{ x }}"));
}

#[test]
fn what_llama_cpp_would_compute_or_cut_otherwise_is_refused() {
    let with = |key: &str, value: Json| {
        let mut changed = tokenizer();
        changed[key] = value;
        Some(changed)
    };
    let ids_twice = json!({"type": "BPE", "vocab": {"a": 1, "b": 1}, "merges": []});
    let beyond = json!({"type": "BPE", "vocab": {"a": 96}, "merges": []});
    let cases = [
        ("dbrx", json!({}), None, Kind::Plan, "dbrx is not exported to GGUF"),
        ("olmoe", json!({}), None, Kind::Plan, "layer 0 is not as llama.cpp's olmoe computes it"),
        ("qwen3_moe", json!({"norm_topk_prob": false}), None, Kind::Plan, "llama.cpp's qwen3moe"),
        ("qwen3_moe", json!({"partial_rotary_factor": 0.5}), None, Kind::Plan, "llama.cpp's qwen3moe"),
        ("qwen3_moe", json!({}), with("pre_tokenizer", Json::Null), Kind::Plan, "cut by null"),
        ("qwen3_moe", json!({}), with("model", json!({"type": "WordPiece"})), Kind::Plan, "is no BPE"),
        ("qwen3_moe", json!({}), with("model", ids_twice), Kind::BadData, "both have id 1"),
        ("qwen3_moe", json!({}), with("model", beyond), Kind::BadData, "the embedding has 96 rows"),
    ];
    for (name, changes, tokenizer, kind, expected) in cases {
        let e = refused(name, changes, tokenizer);
        assert!(e.kind() == kind && e.what().contains(expected), "expected {expected}: {e}");
    }
    let rope = json!({"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0});
    let e = refused("qwen2_moe", json!({"rope_parameters": rope}), None);
    assert!(e.what().contains("RoPE is stretched"), "{e}");
}

#[test]
fn olmoe_without_its_clamp_is_exported() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = exported(&checkpoint(dir.path(), "olmoe", json!({"clip_qkv": null}), None), dir.path());
    assert_eq!(gguf.metadata["olmoe.feed_forward_length"], Value::U32(32));
    let norm = gguf.tensors.iter().find(|(t, _)| t.name == "blk.1.attn_k_norm.weight").unwrap();
    assert_eq!(norm.0.dims, [32]);
}
