//! Small checkpoints for tests, put together byte by byte: any fault can be built in.

use std::fs;
use std::path::{Path, PathBuf};

use moepack_format::{Dtype, Error};
use serde_json::{Value, json};

use crate::model::{Model, OpenOptions};

/// One tensor to write.
#[derive(Clone, Debug)]
pub struct TestTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub bytes: Vec<u8>,
}

/// A tensor whose bytes differ from those of any other.
pub fn tensor(name: &str, dtype: Dtype, shape: &[u64]) -> TestTensor {
    let len = dtype.bytes(shape).unwrap() as usize;
    let seed = name.bytes().fold(7u32, |h, b| h.wrapping_mul(31).wrapping_add(u32::from(b)));
    // The low byte of each number varies, the high one is 0x3c: ordinary magnitudes in every float type.
    let width = (dtype.bits() / 8) as usize;
    let byte =
        |i: usize| if i % width == width - 1 && width > 1 { 0x3c } else { (i as u32 ^ seed) as u8 & 0x3f };
    TestTensor { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes: (0..len).map(byte).collect() }
}

/// F32 values.
pub fn f32s(name: &str, shape: &[u64], values: &[f32]) -> TestTensor {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    TestTensor { name: name.to_owned(), dtype: Dtype::F32, shape: shape.to_vec(), bytes }
}

/// A safetensors file.
pub fn safetensors(tensors: &[TestTensor]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut at = 0;
    for t in tensors {
        let (start, end) = (at, at + t.bytes.len());
        let entry = json!({ "dtype": t.dtype.name(), "shape": t.shape, "data_offsets": [start, end] });
        entries.push(format!("{}:{entry}", json!(t.name)));
        at = end;
    }
    let mut header = format!("{{{}}}", entries.join(",")).into_bytes();
    header.resize(header.len().next_multiple_of(8).max(8), b' ');
    let data = tensors.iter().flat_map(|t| t.bytes.iter().copied());
    (header.len() as u64).to_le_bytes().into_iter().chain(header.iter().copied()).chain(data).collect()
}

/// A checkpoint that a test changes before it writes it.
#[derive(Clone, Debug)]
pub struct TestCheckpoint {
    pub config: Value,
    pub tensors: Vec<TestTensor>,
}

impl TestCheckpoint {
    /// Two layers of Qwen3-MoE, three experts each, in BF16.
    pub fn qwen3() -> TestCheckpoint {
        let config = json!({
            "model_type": "qwen3_moe", "hidden_size": 8, "vocab_size": 10, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64,
            "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "intermediate_size": 16,
            "norm_topk_prob": true, "rope_theta": 10000.0, "tie_word_embeddings": false,
        });
        let mut tensors = vec![bf16("model.embed_tokens.weight", &[10, 8])];
        for l in 0..2 {
            let mut add =
                |name: &str, shape: &[u64]| tensors.push(bf16(&format!("model.layers.{l}.{name}"), shape));
            for (name, shape) in [("q", [8, 8]), ("k", [4, 8]), ("v", [4, 8]), ("o", [8, 8])] {
                add(&format!("self_attn.{name}_proj.weight"), &shape);
            }
            add("self_attn.q_norm.weight", &[4]);
            add("self_attn.k_norm.weight", &[4]);
            add("input_layernorm.weight", &[8]);
            add("post_attention_layernorm.weight", &[8]);
            add("mlp.gate.weight", &[3, 8]);
            for e in 0..3 {
                add(&format!("mlp.experts.{e}.gate_proj.weight"), &[6, 8]);
                add(&format!("mlp.experts.{e}.up_proj.weight"), &[6, 8]);
                add(&format!("mlp.experts.{e}.down_proj.weight"), &[8, 6]);
            }
        }
        tensors.extend([bf16("model.norm.weight", &[8]), bf16("lm_head.weight", &[10, 8])]);
        TestCheckpoint { config, tensors }
    }

    /// One dense and one MoE layer of DeepSeek-V3, direct queries, and an MTP layer in part.
    pub fn deepseek() -> TestCheckpoint {
        let config = json!({
            "model_type": "deepseek_v3", "hidden_size": 8, "vocab_size": 10, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 64, "q_lora_rank": null, "kv_lora_rank": 4,
            "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "first_k_dense_replace": 1,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "intermediate_size": 16,
            "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 1,
        });
        let mut tensors = vec![bf16("model.embed_tokens.weight", &[10, 8])];
        for l in 0..3 {
            let mut add =
                |name: &str, shape: &[u64]| tensors.push(bf16(&format!("model.layers.{l}.{name}"), shape));
            add("self_attn.q_proj.weight", &[12, 8]);
            add("self_attn.kv_a_proj_with_mqa.weight", &[6, 8]);
            add("self_attn.kv_a_layernorm.weight", &[4]);
            add("self_attn.kv_b_proj.weight", &[16, 4]);
            add("self_attn.o_proj.weight", &[8, 8]);
            add("input_layernorm.weight", &[8]);
            add("post_attention_layernorm.weight", &[8]);
            let mlps = match l {
                0 => vec![("mlp.".to_owned(), 16)],
                _ => (0..4)
                    .map(|e| (format!("mlp.experts.{e}."), 6))
                    .chain([("mlp.shared_experts.".to_owned(), 6)])
                    .collect(),
            };
            for (mlp, inter) in mlps {
                add(&format!("{mlp}gate_proj.weight"), &[inter, 8]);
                add(&format!("{mlp}up_proj.weight"), &[inter, 8]);
                add(&format!("{mlp}down_proj.weight"), &[8, inter]);
            }
            if l > 0 {
                add("mlp.gate.weight", &[4, 8]);
                let name = format!("model.layers.{l}.mlp.gate.e_score_correction_bias");
                tensors.push(f32s(&name, &[4], &[0.5, -0.25, 0.0, 1.0]));
            }
        }
        for (name, shape) in
            [("eh_proj", &[8, 16][..]), ("enorm", &[8]), ("hnorm", &[8]), ("shared_head.head", &[10, 8])]
        {
            tensors.push(bf16(&format!("model.layers.2.{name}.weight"), shape));
        }
        tensors.extend([bf16("model.norm.weight", &[8]), bf16("lm_head.weight", &[10, 8])]);
        TestCheckpoint { config, tensors }
    }

    /// One layer of gpt-oss with two experts in MXFP4.
    pub fn gpt_oss() -> TestCheckpoint {
        let config = json!({
            "model_type": "gpt_oss", "hidden_size": 32, "vocab_size": 10, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64,
            "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 64, "tie_word_embeddings": false,
        });
        let mut tensors = vec![bf16("model.embed_tokens.weight", &[10, 32])];
        let mut add = |name: &str, dtype, shape: &[u64]| {
            tensors.push(tensor(&format!("model.layers.0.{name}"), dtype, shape));
        };
        for (name, rows, cols) in [("q", 8, 32), ("k", 4, 32), ("v", 4, 32), ("o", 32, 8)] {
            add(&format!("self_attn.{name}_proj.weight"), Dtype::Bf16, &[rows, cols]);
            add(&format!("self_attn.{name}_proj.bias"), Dtype::Bf16, &[rows]);
        }
        add("self_attn.sinks", Dtype::Bf16, &[2]);
        add("input_layernorm.weight", Dtype::Bf16, &[32]);
        add("post_attention_layernorm.weight", Dtype::Bf16, &[32]);
        add("mlp.router.weight", Dtype::Bf16, &[2, 32]);
        add("mlp.router.bias", Dtype::Bf16, &[2]);
        add("mlp.experts.gate_up_proj_blocks", Dtype::U8, &[2, 128, 1, 16]);
        add("mlp.experts.gate_up_proj_scales", Dtype::U8, &[2, 128, 1]);
        add("mlp.experts.gate_up_proj_bias", Dtype::Bf16, &[2, 128]);
        add("mlp.experts.down_proj_blocks", Dtype::U8, &[2, 32, 2, 16]);
        add("mlp.experts.down_proj_scales", Dtype::U8, &[2, 32, 2]);
        add("mlp.experts.down_proj_bias", Dtype::Bf16, &[2, 32]);
        tensors.extend([bf16("model.norm.weight", &[32]), bf16("lm_head.weight", &[10, 32])]);
        TestCheckpoint { config, tensors }
    }

    pub fn find(&mut self, name: &str) -> &mut TestTensor {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    pub fn remove(&mut self, name: &str) -> TestTensor {
        let at =
            self.tensors.iter().position(|t| t.name == name).unwrap_or_else(|| panic!("no tensor {name}"));
        self.tensors.remove(at)
    }

    /// Stores a BF16 matrix as FP8 with one scale for every 4 × 4 block of numbers.
    pub fn store_as_fp8(&mut self, name: &str) {
        let t = self.find(name);
        let [rows, cols] = t.shape[..] else { panic!("{name} is no matrix") };
        let scales = format!("{name}_scale_inv");
        *t = tensor(name, Dtype::F8E4m3, &[rows, cols]);
        let grid = [rows.div_ceil(4), cols.div_ceil(4)];
        let values: Vec<f32> = (0..grid[0] * grid[1]).map(|i| 0.5 + i as f32).collect();
        self.tensors.push(f32s(&scales, &grid, &values));
        self.config["quantization_config"] = json!({ "quant_method": "fp8", "weight_block_size": [4, 4] });
    }

    /// Writes it as one file.
    pub fn write(&self, dir: &Path) -> PathBuf {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        fs::write(dir.join("model.safetensors"), safetensors(&self.tensors)).unwrap();
        dir.to_owned()
    }

    /// Writes it in `n` shards with an index.
    pub fn write_shards(&self, dir: &Path, n: usize) -> PathBuf {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        let mut map = serde_json::Map::new();
        for (i, part) in self.tensors.chunks(self.tensors.len().div_ceil(n)).enumerate() {
            let name = format!("model-{:05}-of-{n:05}.safetensors", i + 1);
            fs::write(dir.join(&name), safetensors(part)).unwrap();
            map.extend(part.iter().map(|t| (t.name.clone(), json!(name))));
        }
        write_index(dir, &json!({ "metadata": { "total_size": 1 }, "weight_map": map }));
        dir.to_owned()
    }

    /// Writes and opens it.
    pub fn open(&self) -> moepack_format::Result<Model> {
        let dir = tempfile::tempdir().unwrap();
        Model::open(&self.write(&dir.path().join("model")), &OpenOptions::default())
    }

    /// The refusal that opening it gives.
    pub fn refusal(&self) -> Error {
        self.open().map(|m| m.spec().clone()).unwrap_err()
    }
}

/// Writes an index.
pub fn write_index(dir: &Path, index: &Value) {
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// A fixture made by somebody else's tool.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
}

fn bf16(name: &str, shape: &[u64]) -> TestTensor {
    tensor(name, Dtype::Bf16, shape)
}
