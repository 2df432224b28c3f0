//! Tensors that are missing, foreign, of the wrong shape, or hold values that no codec can.

use super::*;

/// What may be wrong with the set of tensors.
pub const TENSORS: &[Fault] = &[
    Fault {
        what: "an expert is missing",
        of: QWEN3,
        exit: 65,
        says: &["4 experts a layer", "layer 1: 3 experts, missing 2"],
        make: |m| m.without(|name| name.contains("layers.1.mlp.experts.2.")),
    },
    Fault {
        what: "one matrix of an expert is missing",
        of: QWEN3,
        exit: 65,
        says: &[GATE],
        make: |m| m.without(|name| name == GATE),
    },
    Fault {
        what: "one expert too many",
        of: QWEN3,
        exit: 65,
        says: &["4 experts a layer", "layer 0: 5 experts, too many 9"],
        make: |m| m.with("model.layers.0.mlp.experts.9.gate_proj.weight", &[64, 64]),
    },
    Fault {
        what: "a tensor of the trunk is missing",
        of: QWEN3,
        exit: 65,
        says: &[Q],
        make: |m| m.without(|name| name == Q),
    },
    Fault {
        what: "a tensor that no rule knows",
        of: QWEN3,
        exit: 65,
        says: &["model.layers.0.self_attn.q_proj.lora_A"],
        make: |m| m.with("model.layers.0.self_attn.q_proj.lora_A", &[4, 64]),
    },
    Fault {
        what: "a matrix that is flat",
        of: QWEN3,
        exit: 65,
        says: &[Q, "[6144]", "[96, 64]"],
        make: |m| m.tensor(Q, |t| t.shape = vec![96 * 64]),
    },
    Fault {
        what: "a matrix that is transposed",
        of: QWEN3,
        exit: 65,
        says: &[Q, "[64, 96]", "[96, 64]"],
        make: |m| m.tensor(Q, |t| t.shape.reverse()),
    },
    Fault {
        what: "an expert without rows",
        of: QWEN3,
        exit: 65,
        says: &[GATE, "[0, 64]"],
        make: |m| {
            m.tensor(GATE, |t| {
                t.shape = vec![0, 64];
                t.bytes.clear();
            })
        },
    },
    Fault {
        what: "weights that are integers",
        of: QWEN3,
        exit: 65,
        says: &[GATE, "I32"],
        make: |m| m.tensor(GATE, |t| t.dtype = "I32".to_owned()),
    },
    Fault {
        what: "an FP8 matrix without its factors",
        of: FP8,
        exit: 65,
        says: &["experts.3.up_proj.weight"],
        make: |m| {
            reindex(m, |tensors| {
                tensors.retain(|t| t.name != "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv")
            });
        },
    },
    Fault {
        what: "factors of the wrong number of tiles",
        of: FP8,
        exit: 65,
        says: &["experts.3.up_proj.weight_scale_inv", "[2, 2]", "[1, 2]"],
        make: |m| {
            reindex(m, |tensors| {
                if let Some(t) =
                    tensors.iter_mut().find(|t| t.name.ends_with("1.mlp.experts.3.up_proj.weight_scale_inv"))
                {
                    t.shape = vec![2, 2];
                    t.bytes = t.bytes.repeat(2);
                }
            })
        },
    },
    Fault {
        what: "factors without a matrix",
        of: FP8,
        exit: 65,
        says: &["model.norm.weight_scale_inv"],
        make: |m| {
            reindex(m, |tensors| {
                if tensors.iter().any(|t| t.name == NORM) {
                    tensors.push(zeros("model.norm.weight_scale_inv", &[1, 1]));
                }
            })
        },
    },
    Fault {
        what: "MXFP4 blocks without scales",
        of: MXFP4,
        exit: 65,
        says: &[
            "expected a tensor that ends in _scales",
            "model.layers.1.mlp.experts.down_proj_blocks",
            WEIGHTS,
        ],
        make: |m| m.without(|name| name == "model.layers.1.mlp.experts.down_proj_scales"),
    },
];

/// Changes the tensors of both shards and makes the index fit again.
fn reindex(m: &Model, change: impl Fn(&mut Vec<Tensor>)) {
    let mut map = serde_json::Map::new();
    for n in 1..=2 {
        let file = format!("model-{n:05}-of-00002.safetensors");
        m.tensors(&file, |tensors| {
            change(tensors);
            map.extend(tensors.iter().map(|t| (t.name.clone(), json!(file))));
        });
    }
    m.json(INDEX, |index| drop(index.insert("weight_map".to_owned(), Value::Object(map))));
}

/// What only shows when the values are read.
pub const VALUES: &[Fault] = &[
    Fault {
        what: "NaN in an expert",
        of: QWEN3,
        exit: 65,
        says: &["NaN", GATE, WEIGHTS],
        make: |m| m.tensor(GATE, |t| t.set_f32(77, f32::NAN)),
    },
    Fault {
        what: "infinity in an expert",
        of: QWEN3,
        exit: 65,
        says: &["inf", GATE, WEIGHTS],
        make: |m| m.tensor(GATE, |t| t.set_f32(4095, f32::NEG_INFINITY)),
    },
    Fault {
        what: "an outlier that overflows the scale",
        of: QWEN3,
        exit: 78,
        says: &["1e38", "beyond", "int8-g64", "layers.1.experts.2.gate_proj", "hint:"],
        make: |m| m.tensor(GATE, |t| t.set_f32(0, 1e38)),
    },
    Fault {
        what: "an FP8 factor of zero",
        of: FP8,
        exit: 65,
        says: &["experts.3.up_proj.weight_scale_inv"],
        make: |m| fp8_factor(m, 0.0),
    },
    Fault {
        what: "an FP8 factor that is NaN",
        of: FP8,
        exit: 65,
        says: &["experts.3.up_proj.weight_scale_inv"],
        make: |m| fp8_factor(m, f32::NAN),
    },
    Fault {
        what: "an infinite FP8 factor",
        of: FP8,
        exit: 65,
        says: &["experts.3.up_proj.weight_scale_inv"],
        make: |m| fp8_factor(m, f32::INFINITY),
    },
    Fault {
        what: "an FP8 weight that is NaN",
        of: FP8,
        exit: 65,
        says: &["NaN", "experts.3.up_proj.weight"],
        make: |m| {
            reindex(m, |tensors| {
                if let Some(t) =
                    tensors.iter_mut().find(|t| t.name == "model.layers.1.mlp.experts.3.up_proj.weight")
                {
                    t.bytes[5] = 0x7f;
                }
            })
        },
    },
    Fault {
        what: "NaN in the trunk, which is only copied",
        of: QWEN3,
        exit: 65,
        says: &[NORM, WEIGHTS, "2 of 64 numbers are NaN or infinite, the first is number 5"],
        make: |m| {
            m.tensor(NORM, |t| {
                t.set_f32(5, f32::NAN);
                t.set_f32(9, f32::NEG_INFINITY);
            })
        },
    },
    Fault {
        what: "a tokenizer that is a symlink out of the checkpoint",
        of: QWEN3,
        exit: 65,
        says: &["tokenizer.json", "symlink"],
        make: |m| {
            fs::write(m.path("../secret"), "{}").unwrap();
            std::os::unix::fs::symlink("../secret", m.path("tokenizer.json")).unwrap();
        },
    },
    Fault {
        what: "a Git LFS pointer in place of the tokenizer, which travels along",
        of: QWEN3,
        exit: 66,
        says: &["Git LFS pointer", "tokenizer.json", "git lfs pull"],
        make: |m| {
            let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n";
            fs::write(m.path("tokenizer.json"), pointer).unwrap();
        },
    },
    Fault {
        what: "an MXFP4 scale that is NaN",
        of: MXFP4,
        exit: 65,
        says: &["model.layers.0.mlp.experts.gate_up_proj_scales"],
        make: |m| m.tensor("model.layers.0.mlp.experts.gate_up_proj_scales", |t| t.bytes[9] = 255),
    },
];

fn fp8_factor(m: &Model, value: f32) {
    reindex(m, |tensors| {
        let name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv";
        if tensors.iter().any(|t| t.name == name) {
            find(tensors, name).set_f32(1, value);
        }
    });
}
