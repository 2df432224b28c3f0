//! Indexes and configurations that do not fit the files.

use super::*;

/// What an index may claim.
pub const INDEXES: &[Fault] = &[
    Fault {
        what: "two shards are missing",
        of: SHARDED,
        exit: 66,
        says: &["model-00001-of-00003.safetensors", SECOND],
        make: |m| {
            fs::remove_file(m.path("model-00001-of-00003.safetensors")).unwrap();
            fs::remove_file(m.path(SECOND)).unwrap();
        },
    },
    Fault {
        what: "the index names the wrong file",
        of: SHARDED,
        exit: 65,
        says: &["model-00003-of-00003.safetensors", SECOND],
        make: |m| {
            m.json(INDEX, |index| {
                let in_second =
                    index["weight_map"].as_object_mut().unwrap().values_mut().find(|v| *v == SECOND);
                *in_second.unwrap() = json!("model-00003-of-00003.safetensors");
            })
        },
    },
    Fault {
        what: "the index names a tensor that is nowhere",
        of: SHARDED,
        exit: 65,
        says: &["model.layers.0.ghost.weight", SECOND],
        make: |m| m.json(INDEX, |index| index["weight_map"]["model.layers.0.ghost.weight"] = json!(SECOND)),
    },
    Fault {
        what: "a tensor in two shards",
        of: SHARDED,
        exit: 65,
        says: &[NORM, SECOND, "model-00003-of-00003.safetensors"],
        make: |m| {
            let holds_norm = |n: usize| {
                let file = format!("model-0000{n}-of-00003.safetensors");
                damage::parse(&fs::read(m.path(&file)).unwrap()).iter().any(|t| t.name == NORM)
            };
            assert!(holds_norm(3), "the fixture changed");
            let mut copy = zeros(NORM, &[64]);
            copy.dtype = "BF16".to_owned();
            copy.bytes.truncate(128);
            m.tensors(SECOND, |tensors| tensors.push(copy));
        },
    },
    Fault {
        what: "an index that climbs out",
        of: SHARDED,
        exit: 65,
        says: &["../model-00002-of-00003.safetensors", INDEX],
        make: |m| {
            fs::rename(m.path(SECOND), m.path("../model-00002-of-00003.safetensors")).unwrap();
            place(m, "../model-00002-of-00003.safetensors");
        },
    },
    Fault {
        what: "an index that climbs out by a detour",
        of: SHARDED,
        exit: 65,
        says: &["a/../../b", INDEX],
        make: |m| place(m, "a/../../b"),
    },
    Fault {
        what: "an absolute path in the index",
        of: SHARDED,
        exit: 65,
        says: &["/etc/passwd", INDEX],
        make: |m| place(m, "/etc/passwd"),
    },
    Fault {
        what: "a drive letter in the index",
        of: SHARDED,
        exit: 65,
        says: &["C:", INDEX],
        make: |m| place(m, "C:\\model.safetensors"),
    },
    Fault {
        what: "a NUL in the index",
        of: SHARDED,
        exit: 65,
        says: &[INDEX],
        make: |m| place(m, "model\0.safetensors"),
    },
    Fault {
        what: "an index that is no JSON",
        of: SHARDED,
        exit: 65,
        says: &["not valid JSON", INDEX],
        make: |m| m.bytes(INDEX, |b| b.truncate(b.len() / 2)),
    },
    Fault {
        what: "an index without a map",
        of: SHARDED,
        exit: 65,
        says: &["weight_map", INDEX],
        make: |m| m.json(INDEX, |index| drop(index.remove("weight_map"))),
    },
    Fault {
        what: "an index that maps to a number",
        of: SHARDED,
        exit: 65,
        says: &[INDEX, NORM],
        make: |m| m.json(INDEX, |index| index["weight_map"][NORM] = json!(3)),
    },
    Fault {
        what: "an index that names a tensor twice",
        of: SHARDED,
        exit: 65,
        says: &["twice", INDEX, NORM],
        make: |m| {
            m.bytes(INDEX, |b| {
                let text = String::from_utf8(b.clone()).unwrap();
                let map = "\"weight_map\": {";
                assert!(text.contains(map));
                *b = text.replace(map, &format!("{map}\"{NORM}\": \"{SECOND}\",")).into_bytes();
            })
        },
    },
];

/// Points everything that the index has in the second shard elsewhere.
fn place(m: &Model, at: &str) {
    m.json(INDEX, |index| {
        for file in index["weight_map"].as_object_mut().unwrap().values_mut().filter(|v| *v == SECOND) {
            *file = json!(at);
        }
    });
}

/// What a config.json may claim.
pub const CONFIGS: &[Fault] = &[
    Fault {
        what: "no config.json",
        of: QWEN3,
        exit: 66,
        says: &["config.json"],
        make: |m| fs::remove_file(m.path("config.json")).unwrap(),
    },
    Fault {
        what: "a config.json that is no JSON",
        of: QWEN3,
        exit: 65,
        says: &["not valid JSON", "config.json"],
        make: |m| fs::write(m.path("config.json"), "{\"model_type\": ").unwrap(),
    },
    Fault {
        what: "a config.json of brackets",
        of: QWEN3,
        exit: 65,
        says: &["nested", "config.json"],
        make: |m| fs::write(m.path("config.json"), "[".repeat(100_000)).unwrap(),
    },
    Fault {
        what: "a config.json that says a thing twice",
        of: QWEN3,
        exit: 65,
        says: &["hidden_size", "twice", "config.json"],
        make: |m| m.bytes("config.json", |b| drop(b.splice(0..1, *b"{\"hidden_size\": 1, "))),
    },
    Fault {
        what: "an unknown model_type",
        of: QWEN3,
        exit: 65,
        says: &["model_type \"gpt9_moe\"", "qwen3_moe", "deepseek_v3", "config.json"],
        make: |m| m.config("model_type", json!("gpt9_moe")),
    },
    Fault {
        what: "no model_type",
        of: QWEN3,
        exit: 65,
        says: &["model_type is missing", "config.json"],
        make: |m| m.json("config.json", |c| drop(c.remove("model_type"))),
    },
    Fault {
        what: "another family's model_type",
        of: QWEN3,
        exit: 65,
        says: &["model"],
        make: |m| m.config("model_type", json!("mixtral")),
    },
    Fault {
        what: "more experts than there are",
        of: QWEN3,
        exit: 65,
        says: &["model.layers.1.mlp.gate.weight", "[5, 64]", "[4, 64]"],
        make: |m| m.config("num_experts", json!(5)),
    },
    Fault {
        what: "fewer experts than there are",
        of: QWEN3,
        exit: 65,
        says: &["model.layers.1.mlp.gate.weight", "[3, 64]", "[4, 64]"],
        make: |m| m.config("num_experts", json!(3)),
    },
    Fault {
        what: "more layers than there are",
        of: QWEN3,
        exit: 65,
        says: &["config.json and the tensors contradict each other", "layers  3            2"],
        make: |m| m.config("num_hidden_layers", json!(3)),
    },
    Fault {
        what: "fewer layers than there are",
        of: QWEN3,
        exit: 65,
        says: &["config.json and the tensors contradict each other", "layers  1            2"],
        make: |m| m.config("num_hidden_layers", json!(1)),
    },
    Fault {
        what: "another hidden size",
        of: QWEN3,
        exit: 65,
        says: &["64", "128"],
        make: |m| m.config("hidden_size", json!(128)),
    },
    Fault {
        what: "another size of experts",
        of: QWEN3,
        exit: 65,
        says: &["experts", "64", "32"],
        make: |m| m.config("moe_intermediate_size", json!(32)),
    },
    Fault {
        what: "another vocabulary",
        of: QWEN3,
        exit: 65,
        says: &["96", "97"],
        make: |m| m.config("vocab_size", json!(97)),
    },
    Fault {
        what: "10^12 layers",
        of: QWEN3,
        exit: 65,
        says: &["num_hidden_layers is 1000000000000", "config.json"],
        make: |m| m.config("num_hidden_layers", json!(1_000_000_000_000u64)),
    },
    Fault {
        what: "-1 experts",
        of: QWEN3,
        exit: 65,
        says: &["num_experts is -1", "config.json"],
        make: |m| m.config("num_experts", json!(-1)),
    },
    Fault {
        what: "no heads",
        of: QWEN3,
        exit: 65,
        says: &["num_attention_heads is 0", "config.json"],
        make: |m| m.config("num_attention_heads", json!(0)),
    },
    Fault {
        what: "more experts used than there are",
        of: QWEN3,
        exit: 65,
        says: &["a token uses 5 experts, but there are 4", "config.json"],
        make: |m| m.config("num_experts_per_tok", json!(5)),
    },
    Fault {
        what: "a hidden size that is text",
        of: QWEN3,
        exit: 65,
        says: &["hidden_size is \"64\"", "config.json"],
        make: |m| m.config("hidden_size", json!("64")),
    },
    Fault {
        what: "an unknown kind of rope scaling",
        of: QWEN3,
        exit: 65,
        says: &["rope", "config.json"],
        make: |m| m.config("rope_parameters", json!({ "rope_type": "spiral", "rope_theta": 1e4 })),
    },
    Fault {
        what: "an unknown activation",
        of: QWEN3,
        exit: 65,
        says: &["hidden_act", "config.json"],
        make: |m| m.config("hidden_act", json!("relu")),
    },
];
