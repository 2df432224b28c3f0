//! What is exported is read back by the strict reader: names, shapes, keys, tokens and bytes.

use std::fs;
use std::path::Path;

use moepack_format::Kind;
use serde_json::{Value as Json, json};

use super::*;
use crate::gguf::{Gguf, Value};
use crate::model::{Model, OpenOptions};
use crate::spec::Role;
use crate::testing::fixture;
use crate::write::{Target, Wish};

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

fn wish() -> Wish {
    Wish { target: Target::Gguf, dequantize: false, requantize: None, name: "out".to_owned() }
}

fn exported(model: &Model, dir: &Path) -> Gguf {
    let export = Export::of(model, wish()).unwrap();
    let shards = export.shards(u64::MAX).unwrap();
    let mut bytes = shards[0].header.clone();
    bytes.resize(shards[0].bytes as usize, 0);
    for (item, starts) in export.items().iter().zip(&shards[0].offsets) {
        for chunk in (0..item.n_slices).flat_map(|at| export.slice(item, at).unwrap().chunks) {
            let at = (starts[0] + chunk.offset) as usize;
            bytes[at..at + chunk.bytes.len()].copy_from_slice(&chunk.bytes);
        }
    }
    let path = dir.join(export.shard_name(1, 1));
    fs::write(&path, bytes).unwrap();
    Gguf::open(&path).unwrap()
}

fn refused(name: &str, changes: Json, tokenizer: Option<Json>) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let model = checkpoint(dir.path(), name, changes, tokenizer);
    Export::of(&model, wish()).unwrap_err()
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
    let templates =
        json!([{"name": "default", "template": "{{ x }}"}, {"name": "tools", "template": "{{ y }}"}]);
    let said = json!({"add_bos_token": true, "bos_token": {"content": "<s>"}, "chat_template": templates});
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
    // By config.json, which has a number for it.
    assert_eq!(gguf.metadata["tokenizer.ggml.eos_token_id"], Value::U32(1));
    assert_eq!(gguf.metadata["tokenizer.chat_template"].as_str(), Some("{{ x }}"));
    assert_eq!(gguf.metadata["tokenizer.chat_template.tools"].as_str(), Some("{{ y }}"));
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
        // Its clamp, and fewer keys than queries.
        ("olmoe", json!({}), None, Kind::Plan, "layer 0 is not as llama.cpp's olmoe computes it"),
        ("olmoe", json!({"clip_qkv": null}), None, Kind::Plan, "llama.cpp's olmoe"),
        ("qwen3_moe", json!({"norm_topk_prob": false}), None, Kind::Plan, "llama.cpp's qwen3moe"),
        ("qwen3_moe", json!({"partial_rotary_factor": 0.5}), None, Kind::Plan, "llama.cpp's qwen3moe"),
        ("qwen3_moe", json!({}), with("pre_tokenizer", Json::Null), Kind::Plan, "cut by null"),
        ("qwen3_moe", json!({}), with("model", json!({"type": "WordPiece"})), Kind::Plan, "is no BPE"),
        ("mixtral_window", json!({}), None, Kind::Plan, "layer 0 is not as llama.cpp's llama computes it"),
        ("gpt_oss", json!({}), None, Kind::Plan, "layer 0 is not as llama.cpp's gpt-oss computes it"),
        ("deepseek_v3", json!({}), None, Kind::Plan, "mscale 1 and mscale_all_dim 0.8"),
        ("deepseek_v2", json!({}), None, Kind::Plan, "layer 1 is not as llama.cpp's deepseek2 computes it"),
        ("deepseek_v4", json!({}), None, Kind::Plan, "the indexer's heads have 12 dimensions"),
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

/// Rows of heads: queries of Mixtral interleaved, `kv_b` of DeepSeek V3 in two, keys turned.
#[test]
fn heads_are_rearranged_as_llama_cpp_wants_them() {
    let dir = tempfile::tempdir().unwrap();
    let model = checkpoint(dir.path(), "mixtral", json!({}), None);
    let gguf = exported(&model, dir.path());
    let q = model.trunk(Some(1), Role::Q).unwrap();
    let found = f32s(&gguf, "blk.1.attn_q.weight");
    // Heads of 16 rows of 64 columns: row 2 i + j of a head was row 8 j + i.
    let row = |data: &[f32], r: usize| data[r * 64..(r + 1) * 64].to_vec();
    for (r, was) in [(0, 0), (1, 8), (2, 1), (15, 15), (16, 16), (17, 24), (62, 55)] {
        assert_eq!(row(&found, r), row(&q.data, was), "row {r}");
    }
    let model = yarn_of_one_number(dir.path());
    let gguf = exported(&model, dir.path());
    let kv = model.trunk(Some(0), Role::KvB).unwrap();
    let (keys, values) = (f32s(&gguf, "blk.0.attn_k_b.weight"), f32s(&gguf, "blk.0.attn_v_b.weight"));
    // Four heads of 12 rows that make keys and 10 that make values, each of 16 columns.
    let of = |head: usize, row: usize, col: usize| kv.data[(head * 22 + row) * 16 + col];
    assert_eq!(keys[(3 * 16 + 5) * 12 + 7], of(3, 7, 5));
    assert_eq!(values[(2 * 10 + 9) * 16 + 4], of(2, 12 + 9, 4));
    assert_eq!((keys.len(), values.len()), (4 * 12 * 16, 4 * 10 * 16));
    assert_eq!(gguf.metadata["deepseek2.attention.key_length"], Value::U32(32));
    assert_eq!(gguf.metadata["deepseek2.attention.key_length_mla"], Value::U32(28));
    assert_eq!(gguf.metadata["deepseek2.expert_gating_func"], Value::U32(2));
    assert_eq!(gguf.metadata["deepseek2.rope.scaling.yarn_log_multiplier"], Value::F32(0.1));
}

/// DeepSeek V3 with the two numbers that llama.cpp has one for alike.
fn yarn_of_one_number(dir: &Path) -> Model {
    let rope = json!({"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 1024});
    checkpoint(dir, "deepseek_v3", json!({"rope_parameters": rope}), None)
}

fn f32s(gguf: &Gguf, name: &str) -> Vec<f32> {
    let (info, at) = gguf.tensors.iter().find(|(t, _)| t.name == name).unwrap();
    assert_eq!(info.kind.name, "f32");
    let (at, bytes) = (*at as usize, info.bytes().unwrap() as usize);
    fs::read(&gguf.path).unwrap()[at..at + bytes]
        .as_chunks()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

#[test]
fn biases_and_sinks_of_gpt_oss_have_their_places() {
    let dir = tempfile::tempdir().unwrap();
    let gguf =
        exported(&checkpoint(dir.path(), "gpt_oss_mxfp4", json!({"swiglu_limit": 7.0}), None), dir.path());
    let found = |name: &str| {
        let (t, _) = gguf.tensors.iter().find(|(t, _)| t.name == name).unwrap();
        (t.kind.name, t.dims.clone())
    };
    assert_eq!(found("blk.1.ffn_gate_exps.weight"), ("mxfp4", vec![64, 32, 4]));
    assert_eq!(found("blk.1.ffn_down_exps.bias"), ("f32", vec![64, 4]));
    assert_eq!(found("blk.0.attn_sinks.weight"), ("f32", vec![4]));
    assert_eq!(found("blk.0.post_attention_norm.weight"), ("f32", vec![64]));
    assert_eq!(gguf.metadata["gpt-oss.attention.sliding_window"], Value::U32(8));
}
