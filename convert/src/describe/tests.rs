//! Configurations: what they mean, and those that mean nothing.

use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::spec::{Attention, Pairing};
use crate::testing::TestCheckpoint;

fn spec(config: &Value) -> Result<ModelSpec> {
    let config = Config::parse(Path::new("config.json"), config.to_string().as_bytes())?;
    describe(Family::of(&config)?, &config)
}

fn refusal(base: &Value, change: Value) -> String {
    let mut config = base.clone();
    for (key, value) in change.as_object().unwrap() {
        config[key] = value.clone();
    }
    spec(&config).map(|_| ()).unwrap_err().what().to_owned()
}

#[test]
fn numbers_that_contradict_each_other_are_refused() {
    let cases = [
        (json!({ "num_attention_heads": 0 }), "num_attention_heads is 0, expected an integer from 1 to 4096"),
        (
            json!({ "num_attention_heads": 3, "num_key_value_heads": 2 }),
            "3 attention heads do not divide among 2 key-value heads",
        ),
        (json!({ "head_dim": 5 }), "head_dim is 5, expected an even number: dimensions rotate in pairs"),
        (
            json!({ "head_dim": null, "num_attention_heads": 3 }),
            "head_dim is missing and hidden_size 8 does not divide by 3 heads",
        ),
        (json!({ "head_dim": 1_000_000 }), "head_dim is 1000000, expected an integer from 1 to 4096"),
        (json!({ "num_experts_per_tok": 4 }), "a token uses 4 experts, but there are 3"),
        (json!({ "num_experts": 70_000 }), "num_experts is 70000, expected an integer from 1 to 65536"),
        (json!({ "decoder_sparse_step": 0 }), "decoder_sparse_step is 0, expected an integer from 1 to 1024"),
        (json!({ "mlp_only_layers": [0, 1] }), "none of 2 layers has experts"),
        (json!({ "mlp_only_layers": [-1] }), "mlp_only_layers is -1, expected a list of integers below 1024"),
        (json!({ "rms_norm_eps": -1e-6 }), "rms_norm_eps is -0.000001, expected 0 or more and less than 1"),
        (
            json!({ "hidden_act": "gelu" }),
            "hidden_act is \"gelu\", expected \"silu\", as every qwen3_moe has it",
        ),
        (json!({ "norm_topk_prob": 1 }), "norm_topk_prob is 1, expected true or false"),
        (json!({ "max_position_embeddings": null }), "max_position_embeddings is missing"),
        (
            json!({ "vocab_size": 1e12 }),
            "vocab_size is 1000000000000.0, expected an integer from 1 to 67108864",
        ),
    ];
    let base = TestCheckpoint::qwen3().config;
    for (change, expected) in cases {
        assert_eq!(refusal(&base, change.clone()), expected, "{change}");
    }
}

#[test]
fn groups_and_latents_that_make_no_sense_are_refused() {
    let cases = [
        (json!({ "n_group": 3 }), "4 experts do not divide into 3 groups"),
        (json!({ "topk_group": 3 }), "topk_group is 3, but n_group is 2"),
        (json!({ "num_experts_per_tok": 3 }), "a token uses 3 experts, but 1 of 2 groups hold 2"),
        (json!({ "n_group": 4, "topk_group": 2 }), "4 groups of 4 experts leave fewer than 2 in a group"),
        (
            json!({ "scoring_func": "softmax" }),
            "scoring_func is \"softmax\", expected \"sigmoid\", as every deepseek_v3 has it",
        ),
        (json!({ "moe_layer_freq": 2 }), "moe_layer_freq is 2, expected 1, as every deepseek_v3 has it"),
        (
            json!({ "first_k_dense_replace": 3 }),
            "first_k_dense_replace is 3, expected an integer from 0 to 2",
        ),
        (
            json!({ "qk_rope_head_dim": 3 }),
            "qk_rope_head_dim is 3, expected an even number: dimensions rotate in pairs",
        ),
        (json!({ "n_shared_experts": -1 }), "n_shared_experts is -1, expected an integer from 0 to 1024"),
        (json!({ "routed_scaling_factor": 0 }), "routed_scaling_factor is 0, expected a number above 0"),
    ];
    let base = TestCheckpoint::deepseek().config;
    for (change, expected) in cases {
        assert_eq!(refusal(&base, change.clone()), expected, "{change}");
    }
    let mut config = base;
    config.as_object_mut().unwrap().shift_remove("q_lora_rank");
    assert!(spec(&config).unwrap_err().what().starts_with("q_lora_rank is missing"));
}

#[test]
fn block_sizes_are_two_integers() {
    let block = |value: Value| {
        let text = json!({ "quantization_config": { "weight_block_size": value } }).to_string();
        hints(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap()).map(|h| h.block)
    };
    assert_eq!(block(json!([128, 64])), Ok(Some([128, 64])));
    assert_eq!(block(Value::Null), Ok(None));
    for bad in [json!([128]), json!([0, 128]), json!("128x128"), json!([128, 128, 128])] {
        let says = format!(
            "quantization_config.weight_block_size is {bad}, expected two integers from 1 to 1048576"
        );
        assert_eq!(block(bad).unwrap_err().what(), says);
    }
}

#[test]
fn what_tensors_do_not_tell_of_storage_is_asked_of_config_json() {
    let of = |quantization: Value| {
        let text = json!({ "quantization_config": quantization }).to_string();
        hints(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap())
    };
    let group = |bits: u32| json!({ "weights": { "num_bits": bits, "group_size": 32 } });
    let said =
        of(json!({ "config_groups": { "a": group(4), "b": group(4), "c": { "targets": [] } } })).unwrap();
    assert_eq!((said.bits, said.group), (Some(4), Some(32)));
    assert_eq!(of(json!({ "config_groups": { "a": group(4), "b": group(8) } })).unwrap().bits, None);
    let v2 = json!({ "quant_method": "gptq", "bits": 3, "group_size": -1, "checkpoint_format": "gptq_v2" });
    let v2 = of(v2).unwrap();
    assert_eq!((v2.bits, v2.group, v2.gptq_v2), (Some(3), None, true));
    let e = of(json!({ "quant_method": "gptq", "checkpoint_format": "marlin" })).unwrap_err();
    assert_eq!(e.what(), "quantization_config.checkpoint_format is \"marlin\", expected gptq or gptq_v2");
    assert_eq!(e.kind().exit_code(), 65);
}

#[test]
fn defaults_are_those_of_transformers() {
    let model = spec(&TestCheckpoint::deepseek().config).unwrap();
    let Mlp::Moe(moe) = &model.layers[1].mlp else { panic!("experts") };
    assert_eq!((moe.router.renorm, moe.router.scale), (Some(1e-20), 2.5));
    let Attention::Mla(mla) = &model.layers[0].attention else { panic!("latent attention") };
    assert_eq!((mla.rope.pairing, mla.latent_eps, mla.bias), (Pairing::Adjacent, 1e-6, false));
    assert!(!model.tied_head);

    let mut config = TestCheckpoint::qwen3().config;
    for key in ["norm_topk_prob", "rope_theta", "head_dim"] {
        config.as_object_mut().unwrap().shift_remove(key);
    }
    let model = spec(&config).unwrap();
    let Mlp::Moe(moe) = &model.layers[1].mlp else { panic!("experts") };
    assert_eq!(moe.router.renorm, None);
    let Attention::Gqa(gqa) = &model.layers[0].attention else { panic!("grouped queries") };
    assert_eq!((gqa.head_dim, gqa.scale, gqa.window), (4, 0.5, None));
}

#[test]
fn a_kimi_is_a_deepseek() {
    let mut config = TestCheckpoint::deepseek().config;
    config["model_type"] = json!("kimi_k2");
    config["n_group"] = json!(1);
    let model = spec(&config).unwrap();
    assert_eq!(model.family, "deepseek_v3");
    assert!(matches!(&model.layers[1].mlp, Mlp::Moe(moe) if moe.router.groups.is_none()));
}

#[test]
fn windows_follow_the_family() {
    let windows = |config: &Value| -> Vec<Option<usize>> {
        let window = |l: &LayerSpec| match &l.attention {
            Attention::Gqa(gqa) => gqa.window,
            _ => None,
        };
        spec(config).unwrap().layers.iter().map(window).collect()
    };
    let mut config = TestCheckpoint::qwen3().config;
    config["num_hidden_layers"] = json!(4);
    config["sliding_window"] = json!(9);
    assert_eq!(windows(&config), [None; 4]);
    config["use_sliding_window"] = json!(true);
    assert_eq!(windows(&config), [Some(9); 4]);

    // transformers 5.23.0: Qwen2MoeConfig(num_hidden_layers=4, use_sliding_window=True, sliding_window=9,
    // max_window_layers=3).layer_types == [sliding, full, sliding, full]
    config["model_type"] = json!("qwen2_moe");
    config["shared_expert_intermediate_size"] = json!(6);
    config["max_window_layers"] = json!(3);
    assert_eq!(windows(&config), [Some(9), None, Some(9), None]);
    config["layer_types"] =
        json!(["full_attention", "full_attention", "sliding_attention", "full_attention"]);
    assert_eq!(windows(&config), [None, None, Some(9), None]);
    config["layer_types"] = json!(["full_attention"]);
    assert_eq!(refusal(&config, json!({})), "layer_types is a list, expected a list of 4 strings");
    config["use_sliding_window"] = json!(false);
    config["layer_types"] = Value::Null;
    assert_eq!(windows(&config), [None; 4]);
    config["sliding_window"] = json!(0);
    assert_eq!(windows(&config), [None; 4]);

    config["model_type"] = json!("mixtral");
    config["num_local_experts"] = json!(3);
    assert_eq!(windows(&config), [None; 4]);
    config["sliding_window"] = json!(5);
    assert_eq!(windows(&config), [Some(5); 4]);

    let mut config = TestCheckpoint::gpt_oss().config;
    config["num_hidden_layers"] = json!(3);
    assert_eq!(windows(&config), [Some(128), None, Some(128)]);
}

#[test]
fn sparse_layers_follow_step_and_list() {
    let mut config = TestCheckpoint::qwen3().config;
    config["num_hidden_layers"] = json!(6);
    config["decoder_sparse_step"] = json!(2);
    config["mlp_only_layers"] = json!([3]);
    let is_moe = |l: &LayerSpec| matches!(l.mlp, Mlp::Moe(_));
    let layers: Vec<bool> = spec(&config).unwrap().layers.iter().map(is_moe).collect();
    assert_eq!(layers, [false, true, false, false, false, true]);
}

/// The config.json of a random model.
fn random(name: &str) -> Value {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/random").join(name).join("config.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn layers_of_one_block_are_listed_or_spelled() {
    let listed = random("nemotron_h");
    let mut spelled = listed.clone();
    spelled["layers_block_type"] = Value::Null;
    spelled["hybrid_override_pattern"] = "ME*-E".into();
    assert_eq!(spec(&listed), spec(&spelled));
    let layers = spec(&listed).unwrap().layers;
    assert!(matches!((&layers[0].attention, &layers[0].mlp), (Attention::StateSpace(_), Mlp::None)));
    assert!(matches!((&layers[3].attention, &layers[3].mlp), (Attention::None, Mlp::Dense { .. })));
    assert_eq!(layers[4].mlp.moe().unwrap().matrices().len(), 2);
}

#[test]
fn layers_with_a_state_that_make_no_sense_are_refused() {
    let cases = [
        ("nemotron_h", json!({ "layers_block_type": ["moe", "rnn"] }), "layers_block_type is \"rnn\""),
        (
            "nemotron_h",
            json!({ "layers_block_type": [] }),
            "layers_block_type is a list, expected a list of 1 to",
        ),
        ("nemotron_h", json!({ "n_groups": 3 }), "4 heads of 10 channels do not divide among 3 groups"),
        ("nemotron_h", json!({ "mlp_bias": true }), "mlp_bias is true, expected false"),
        ("jamba", json!({ "attn_layer_offset": 3 }), "attn_layer_offset is 3, expected less than attn_layer"),
        ("granitemoehybrid", json!({ "time_step_limit": [1, 0] }), "time_step_limit is a list, expected two"),
        ("granitemoehybrid", json!({ "layer_types": ["mamba", "moe", "mamba"] }), "layer_types is \"moe\""),
        ("longcat_flash", json!({ "moe_topk": 7 }), "a token uses 7 experts, but there are 6"),
        ("longcat_flash", json!({ "zero_expert_type": "drop" }), "zero_expert_type is \"drop\""),
    ];
    for (name, change, expected) in cases {
        let found = refusal(&random(name), change.clone());
        assert!(found.starts_with(expected), "{name} {change}: {found}");
    }
}
