//! No caps: 512 and 896 experts, of which a token uses more than eight. Weights are the formula of
//! `fixtures/goldens/many_experts.py`, logits are transformers'.

use std::fs;

use crate::goldens::{distance, golden_nlls, nlls};
use crate::hostile::damage::{Tensor, unparse};
use crate::support::{fixture, succeeds};

/// NLLs in f32 against f32, nats.
const NLL_MAX: f64 = 1e-4;

#[test]
fn a_model_of_512_experts_scores_as_in_transformers_and_packs() {
    scores_and_packs(512);
}

#[test]
fn a_model_of_896_experts_scores_as_in_transformers_and_packs() {
    scores_and_packs(896);
}

fn scores_and_packs(n_experts: usize) {
    let work = tempfile::tempdir().unwrap();
    let golden = fixture("many-experts").join(n_experts.to_string());
    let model = work.path().join("model");
    fs::create_dir(&model).unwrap();
    fs::copy(golden.join("config.json"), model.join("config.json")).unwrap();
    fs::write(model.join("model.safetensors"), unparse(&tensors(n_experts))).unwrap();
    let (windows, expected) = golden_nlls(&golden.join("golden.safetensors"));
    let distance = distance(&nlls(&model, &windows), &expected);
    assert!(distance <= NLL_MAX, "{n_experts} experts: {distance:.2e} nats apart");
    succeeds(work.path(), &["quantize", "model", "-o", "out.moepack", "--codec", "int4-g32"]);
    succeeds(work.path(), &["check", "out.moepack", "--against", "model"]);
    assert!(nlls(&work.path().join("out.moepack"), &windows).iter().flatten().all(|n| n.is_finite()));
}

/// Every tensor in the order of names.
fn tensors(n_experts: usize) -> Vec<Tensor> {
    let mut shapes: Vec<(String, Vec<u64>)> = vec![
        ("model.embed_tokens.weight".into(), vec![64, 32]),
        ("model.norm.weight".into(), vec![32]),
        ("lm_head.weight".into(), vec![64, 32]),
    ];
    for l in 0..2 {
        let mut add = |name: String, shape: &[u64]| {
            shapes.push((format!("model.layers.{l}.{name}.weight"), shape.to_vec()));
        };
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(norm.into(), &[32]);
        }
        for (w, shape) in [("q", [32, 32]), ("k", [16, 32]), ("v", [16, 32]), ("o", [32, 32])] {
            add(format!("self_attn.{w}_proj"), &shape);
        }
        add("self_attn.q_norm".into(), &[16]);
        add("self_attn.k_norm".into(), &[16]);
        add("mlp.gate".into(), &[n_experts as u64, 32]);
        for e in 0..n_experts {
            for (w, shape) in [("gate", [16, 32]), ("up", [16, 32]), ("down", [32, 16])] {
                add(format!("mlp.experts.{e}.{w}_proj"), &shape);
            }
        }
    }
    shapes.sort();
    let tensor = |(t, (name, shape)): (usize, (String, Vec<u64>))| {
        let n = shape.iter().product::<u64>();
        let bytes = (0..n).flat_map(|i| value(t as u64, &name, i).to_le_bytes()).collect();
        Tensor { name, dtype: "F32".to_owned(), shape, bytes }
    };
    shapes.into_iter().enumerate().map(tensor).collect()
}

/// Number `i` of tensor `t`.
fn value(t: u64, name: &str, i: u64) -> f32 {
    let code = ((i * 2_654_435_761 + t * 40_503 * 65_537) & 0xffff_ffff) >> 16;
    let x = code as f32 / 65_536.0 - 0.5;
    match name {
        _ if name.contains("norm") => 1.0 + x / 4.0,
        _ if name.contains("mlp.gate.") => 4.0 * x,
        _ => x,
    }
}
