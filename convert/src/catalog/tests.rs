//! Tensors that are missing, left over, in the wrong place or of the wrong shape, each with its exact
//! complaint.

use moepack_format::Dtype;
use serde_json::json;

use crate::spec::Role;
use crate::testing::{TestCheckpoint, f32s, tensor};

/// What is wrong, the complaint, and what makes it of a sound checkpoint.
struct Fault {
    what: &'static str,
    says: &'static str,
    of: fn() -> TestCheckpoint,
    make: fn(&mut TestCheckpoint),
}

const TABLE: &str = "config.json and the tensors contradict each other:";

const FAULTS: &[Fault] = &[
    Fault {
        what: "an expert gone in both layers, one too many",
        says: "config.json says 3 experts a layer, but 2 layers differ:\n    layer 0: 2 experts, missing 1\n    \
               layer 1: 3 experts, missing 1, too many 7",
        of: TestCheckpoint::qwen3,
        make: |m| {
            m.tensors.retain(|t| !t.name.contains("experts.1."));
            m.tensors.push(tensor("model.layers.1.mlp.experts.7.up_proj.weight", Dtype::Bf16, &[6, 8]));
        },
    },
    Fault {
        what: "two matrices of an expert gone",
        says: "2 tensors are missing:\n    model.layers.1.mlp.experts.2.gate_proj.weight\n    \
               model.layers.1.mlp.experts.2.down_proj.weight",
        of: TestCheckpoint::qwen3,
        make: |m| {
            m.remove("model.layers.1.mlp.experts.2.gate_proj.weight");
            m.remove("model.layers.1.mlp.experts.2.down_proj.weight");
        },
    },
    Fault {
        what: "trunk tensors gone",
        says: "2 tensors are missing:\n    lm_head.weight\n    model.layers.0.mlp.gate.weight",
        of: TestCheckpoint::qwen3,
        make: |m| {
            m.remove("lm_head.weight");
            m.remove("model.layers.0.mlp.gate.weight");
        },
    },
    Fault {
        what: "unknown tensors",
        says: "2 tensors are unknown to the family qwen3_moe:\n    model.layers.0.self_attn.q_proj.bias (config.json says \
               that this layer has no such tensor)\n    model.layers.0.self_attn.q_proj.lora_A.weight",
        of: TestCheckpoint::qwen3,
        make: |m| {
            m.tensors.push(tensor("model.layers.0.self_attn.q_proj.bias", Dtype::Bf16, &[8]));
            m.tensors.push(tensor("model.layers.0.self_attn.q_proj.lora_A.weight", Dtype::Bf16, &[2, 8]));
        },
    },
    Fault {
        what: "experts in a dense layer",
        says: "1 tensors are unknown to the family deepseek_v3:\n    model.layers.0.mlp.experts.0.up_proj.weight \
               (config.json says that this layer is dense)",
        of: TestCheckpoint::deepseek,
        make: |m| m.tensors.push(tensor("model.layers.0.mlp.experts.0.up_proj.weight", Dtype::Bf16, &[6, 8])),
    },
    Fault {
        what: "sizes that contradict config.json",
        says: "config.json and the tensors contradict each other:\n\
               \x20                                                  config.json  tensors\n    \
               model.layers.0.self_attn.q_proj.weight         [8, 8]       [12, 8]\n    \
               model.layers.1.mlp.experts.0.down_proj.weight  [8, 6]       [6, 8]",
        of: TestCheckpoint::qwen3,
        make: |m| {
            *m.find("model.layers.0.self_attn.q_proj.weight") =
                tensor("model.layers.0.self_attn.q_proj.weight", Dtype::Bf16, &[12, 8]);
            m.find("model.layers.1.mlp.experts.0.down_proj.weight").shape = vec![6, 8];
        },
    },
    Fault {
        what: "more layers than config.json says",
        says: "config.json and the tensors contradict each other:\n\
               \x20           config.json  tensors\n    layers  1            2",
        of: TestCheckpoint::qwen3,
        make: |m| m.config["num_hidden_layers"] = json!(1),
    },
    Fault {
        what: "an extra layer that is no MTP layer",
        says: "config.json and the tensors contradict each other:\n\
               \x20           config.json  tensors\n    layers  2            3",
        of: TestCheckpoint::deepseek,
        make: |m| drop(m.remove("model.layers.2.eh_proj.weight")),
    },
    Fault {
        what: "fewer layers than config.json says",
        says: "config.json and the tensors contradict each other:\n\
               \x20           config.json  tensors\n    layers  3            2",
        of: TestCheckpoint::qwen3,
        make: |m| m.config["num_hidden_layers"] = json!(3),
    },
    Fault {
        what: "scales without numbers",
        says: "1 scales without the numbers they scale:\n    model.layers.0.mlp.experts.0.up_proj.weight_scale_inv of \
               model.layers.0.mlp.experts.0.up_proj.weight",
        of: TestCheckpoint::qwen3,
        make: |m| {
            m.store_as_fp8("model.layers.0.mlp.experts.0.up_proj.weight");
            m.remove("model.layers.0.mlp.experts.0.up_proj.weight");
        },
    },
    Fault {
        what: "numbers without scales",
        says: "packed numbers without their scales, expected a tensor that ends in weight_scale_inv, weight_scale or scale",
        of: TestCheckpoint::qwen3,
        make: |m| {
            m.store_as_fp8("model.layers.0.mlp.experts.0.up_proj.weight");
            m.remove("model.layers.0.mlp.experts.0.up_proj.weight_scale_inv");
        },
    },
    Fault {
        what: "trunk scales of the wrong shape",
        says: "scales model.layers.0.self_attn.o_proj.weight_scale_inv are F32 [4, 1], expected [2, 2], one for every \
               4x4 of [8, 8] as config.json says",
        of: TestCheckpoint::qwen3,
        make: |m| {
            m.store_as_fp8("model.layers.0.self_attn.o_proj.weight");
            m.find("model.layers.0.self_attn.o_proj.weight_scale_inv").shape = vec![4, 1];
        },
    },
    Fault {
        what: "integers",
        says: "numbers of I16, expected BF16, F16, F32 or F8_E4M3 with scales",
        of: TestCheckpoint::qwen3,
        make: |m| m.find("model.norm.weight").dtype = Dtype::I16,
    },
];

#[test]
fn each_fault_has_its_own_complaint() {
    assert!(FAULTS[5].says.starts_with(TABLE));
    for fault in FAULTS {
        let mut model = (fault.of)();
        (fault.make)(&mut model);
        let e = model.refusal();
        assert_eq!(e.what(), fault.says, "{}", fault.what);
        assert_eq!(e.kind().exit_code(), 65, "{}", fault.what);
        assert!(e.file().is_some(), "{}", fault.what);
        assert!(e.to_string().contains("hint: ") || e.tensor().is_some(), "{e}");
    }
}

#[test]
fn foreign_storage_is_named() {
    let mut model = TestCheckpoint::qwen3();
    let name = "model.layers.0.mlp.experts.0.up_proj.weight";
    model.tensors.push(f32s(&format!("{name}.absmax"), &[1], &[1.0]));
    let e = model.refusal().to_string();
    assert!(e.contains("these look like bitsandbytes weights"), "{e}");
}

#[test]
fn long_lists_are_cut_and_counted() {
    let mut model = TestCheckpoint::qwen3();
    for i in 0..37 {
        model.tensors.push(tensor(&format!("extra.{i:02}"), Dtype::Bf16, &[2]));
    }
    let what = model.refusal().what().to_owned();
    assert!(what.starts_with("37 tensors are unknown to the family qwen3_moe:\n    extra.00\n"), "{what}");
    assert!(what.ends_with("extra.19\n    and 17 more"), "{what}");
}

#[test]
fn mtp_layers_are_carried_with_their_scales() {
    let mut model = TestCheckpoint::deepseek();
    model.store_as_fp8("model.layers.2.mlp.experts.3.up_proj.weight");
    let opened = model.open().unwrap();
    let carried: Vec<_> = opened.trunk_tensors().iter().filter(|t| t.role == Role::Carried).collect();
    assert_eq!(carried.len(), model.tensors.iter().filter(|t| t.name.starts_with("model.layers.2.")).count());
    assert!(carried.iter().all(|t| t.layer == Some(2)));
    assert_eq!(carried.iter().filter(|t| t.is_scale).count(), 1);
    assert_eq!(opened.spec().layers.len(), 2);
    assert_eq!(opened.warnings(), [] as [&str; 0]);
}

#[test]
fn announced_mtp_layers_that_are_not_there_are_mentioned() {
    let mut model = TestCheckpoint::deepseek();
    model.tensors.retain(|t| !t.name.starts_with("model.layers.2."));
    let says = ["config.json announces 1 multi-token-prediction layers, the files have none"];
    assert_eq!(model.open().unwrap().warnings(), says);
}

#[test]
fn every_tensor_is_in_the_catalog_once() {
    let mut model = TestCheckpoint::deepseek();
    model.store_as_fp8("model.layers.1.mlp.experts.0.down_proj.weight");
    model.store_as_fp8("model.layers.0.self_attn.o_proj.weight");
    model.tensors.push(f32s("model.layers.0.self_attn.rotary_emb.inv_freq", &[1], &[1.0]));
    let opened = model.open().unwrap();
    let catalog = opened.catalog();
    let reason = "a table that config.json determines; transformers no longer saves it";
    assert_eq!(
        catalog.left_out,
        [("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), reason.to_owned())]
    );
    let experts = catalog.experts.iter().flatten().flat_map(|l| &l.pieces);
    let n_scales = 1;
    let n_experts = experts.flat_map(|p| &p.tensors).filter(|&&t| t != super::NONE).count() + n_scales;
    assert_eq!(catalog.trunk.len() + catalog.left_out.len() + n_experts, model.tensors.len());
    let scales: Vec<_> = catalog.trunk.iter().filter(|t| t.is_scale).map(|t| (t.layer, t.role)).collect();
    assert_eq!(scales, [(Some(0), Role::O)]);
    // In the order of the file.
    let order: Vec<_> = catalog.trunk.iter().map(|t| t.name.as_str()).collect();
    let in_file = model.tensors.iter().map(|t| t.name.as_str()).filter(|n| order.contains(n));
    assert_eq!(order, in_file.collect::<Vec<_>>());
}

#[test]
fn experts_in_two_layouts_are_refused() {
    let mut model = TestCheckpoint::gpt_oss();
    model.tensors.push(tensor("model.layers.0.mlp.experts.gate_up_proj", Dtype::Bf16, &[2, 32, 128]));
    let says = "layer 0 has experts in more than one layout: stacked MXFP4 blocks and stacked, [in, out]";
    assert_eq!(model.refusal().what(), says);
}

#[test]
fn carried_numbers_need_their_scales_too() {
    let mut model = TestCheckpoint::deepseek();
    let name = "model.layers.2.mlp.experts.3.up_proj.weight";
    model.store_as_fp8(name);
    model.remove(&format!("{name}_scale_inv"));
    let e = model.refusal();
    assert!(e.what().starts_with("packed numbers without their scales"), "{e}");
    assert_eq!(e.tensor(), Some(name));
}
