//! What config.json and names alone say of a checkpoint's tensors, against what its files say.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use moepack_format::Dtype;
use serde_json::json;

use crate::model::{Model, OpenOptions};
use crate::spec::Role;
use crate::testing::fixture;

/// Dtype, shape and bytes of each tensor.
type Tensors = BTreeMap<String, (Dtype, Vec<u64>, u64)>;

/// What neither config.json nor names tell: the fixture, what its tensors' names have in them, and why.
const UNTOLD: &[(&str, &str, &str)] = &[
    (
        "encodings/ct_fp8_block",
        "weight_scale",
        "blocks smaller than any release's, and config.json does not say",
    ),
    ("encodings/ct_int4_asym", "weight_scale", "F16, though the model is BF16"),
    ("encodings/ct_int8", "weight_scale", "one a row here, one a matrix there"),
    ("encodings/ct_int_2_3_5", "weight_", "each matrix has other bits and groups"),
    ("encodings/ct_int_6_7_8", "weight_", "each matrix has other bits and groups"),
    ("random/nemotron_h_latent", "e_score_correction_bias", "BF16, F32 in releases"),
    ("random/qwen3_vl_moe", "experts.", "stored [out, in], [in, out] in releases"),
];

#[test]
fn names_alone_say_what_the_files_say() {
    let mut wrong = Vec::new();
    for dir in fixtures() {
        let name = dir.strip_prefix(fixture("")).unwrap().display().to_string();
        let real = Model::open(&dir, &OpenOptions::default()).unwrap();
        let copy = tempfile::tempdir().unwrap();
        write_names(&real, &dir, copy.path());
        match Model::open(copy.path(), &OpenOptions { names_alone: true, ..OpenOptions::default() }) {
            Err(e) => wrong.push(format!("{name}: {}", e.what())),
            Ok(outlined) => {
                assert!(outlined.is_names_alone());
                wrong.extend(differences(&name, &tensors(&real), &tensors(&outlined)));
            }
        }
    }
    let is_untold = |line: &String, (model, part, _): &(&str, &str, &str)| {
        line.strip_prefix(model).and_then(|rest| rest.split(" is ").next()).is_some_and(|n| n.contains(part))
    };
    for untold in UNTOLD {
        let n_before = wrong.len();
        wrong.retain(|line| !is_untold(line, untold));
        assert!(wrong.len() < n_before, "{untold:?} differs no longer");
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// Every checkpoint whose names tell its encoding.
fn fixtures() -> Vec<PathBuf> {
    let mut all = vec![fixture("tiny-deepseek-v4")];
    for parent in ["random", "released", "encodings"] {
        let entries = fs::read_dir(fixture(parent)).unwrap().map(|e| e.unwrap());
        let named = entries
            .filter(|e| !["awq", "gptq"].iter().any(|n| e.file_name().to_string_lossy().starts_with(n)));
        all.extend(named.map(|e| e.path()).filter(|p| p.join("config.json").is_file()));
    }
    all.sort();
    all
}

/// config.json and an index of a file that is not there.
fn write_names(real: &Model, from: &Path, to: &Path) {
    let all = real.checkpoint.tensors();
    let map: BTreeMap<&str, &str> =
        all.iter().map(|t| (&*t.name, "model-00001-of-00001.safetensors")).collect();
    let total: u64 = all.iter().map(|t| t.bytes()).sum();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
    fs::write(to.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
}

/// All but those that are carried or left out, whose shapes only files know.
fn tensors(model: &Model) -> Tensors {
    let carried = |name: &str| model.catalog.trunk.iter().any(|t| t.role == Role::Carried && t.name == name);
    let left_out = |name: &str| model.catalog.left_out.iter().any(|(n, _)| n == name);
    let all = model.checkpoint.tensors().iter().filter(|t| !carried(&t.name) && !left_out(&t.name));
    all.map(|t| (t.name.to_string(), (t.dtype, t.shape.to_vec(), t.bytes()))).collect()
}

fn differences(model: &str, real: &Tensors, outlined: &Tensors) -> Vec<String> {
    let all: Vec<&String> = real.keys().chain(outlined.keys().filter(|n| !real.contains_key(*n))).collect();
    let differ = all.into_iter().filter(|n| real.get(*n) != outlined.get(*n));
    differ.map(|n| format!("{model}: {n} is {:?}, names say {:?}", real.get(n), outlined.get(n))).collect()
}
