//! Every storage scheme decodes to the bit as the library that defines it does. `fixtures/goldens/encodings.py` made the
//! checkpoints and the decoded matrices.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::path::{Path, PathBuf};

use moepack_convert::{Model, OpenOptions, Part, Role};
use moepack_quant::Isa;
use safetensors::SafeTensors;

/// Scheme, and the codecs of gate, up and down.
const SCHEMES: &[(&str, [&str; 3])] = &[
    ("awq", ["affine4-g32-asym"; 3]),
    ("ct_fp8_block", ["fp8-block-16x32-bf16", "fp8-block-16x32-bf16", "fp8-block-16x128-bf16"]),
    ("ct_fp8_channel", ["fp8-block-1x128-bf16"; 3]),
    ("ct_fp8_tensor", ["fp8-block-32x64", "fp8-block-32x64", "fp8-block-64x32"]),
    ("ct_int4", ["affine4-g32-bf16"; 3]),
    ("ct_int4_act_order", ["affine4-g16-bf16-idx"; 3]),
    ("ct_int4_asym", ["affine4-g16-asym"; 3]),
    ("ct_int8", ["affine8-g64-bf16", "affine8-g64-f32-asym", "affine8-g32-f32"]),
    ("ct_int_2_3_5", ["affine2-g16-bf16-asym", "affine3-g32-bf16", "affine5-g32-f32-asym"]),
    ("ct_int_6_7_8", ["affine6-g64-bf16-asym", "affine7-g16-bf16", "affine8-g32-bf16-asym"]),
    ("ct_mxfp4", ["mxfp4"; 3]),
    ("ct_mxfp8", ["fp8-block-1x32-e8m0"; 3]),
    ("ct_nvfp4", ["nvfp4-div"; 3]),
    ("fp8_32x32_e8m0", ["fp8-block-32x32-e8m0"; 3]),
    ("gptq_2_3_8", ["affine2-g16-asym-idx", "affine3-g16-asym-idx", "affine8-g16-asym-idx"]),
    ("gptq_v1", ["affine4-g16-asym-idx"; 3]),
    ("gptq_v2", ["affine4-g16-asym-idx"; 3]),
    ("modelopt_fp8", ["fp8-block-32x64", "fp8-block-32x64", "fp8-block-64x32"]),
    ("modelopt_nvfp4", ["nvfp4"; 3]),
    ("mxfp8_scale_inv", ["fp8-block-1x32-e8m0"; 3]),
];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/encodings")
}

fn open(name: &str) -> Model {
    Model::open(&fixtures().join(name), &OpenOptions::default()).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// A decoded matrix of a golden.
fn decoded(name: &str, matrix: &str) -> Vec<u32> {
    let bytes = std::fs::read(fixtures().join(name).join("golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = golden.tensor(&format!("decoded.model.layers.0.{matrix}.weight")).unwrap();
    tensor.data().as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

fn assert_same(name: &str, found: &[f32], expected: &[u32]) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let e = f32::from_bits(*e);
        // The sign of a zero is lost where integers are subtracted first.
        let zeros = *f == 0.0 && e == 0.0;
        assert!(f.to_bits() == e.to_bits() || zeros, "{name}: value {i} is {f:e} instead of {e:e}");
    }
}

#[test]
fn every_scheme_decodes_to_the_bit_as_where_it_comes_from() {
    for (name, codecs) in SCHEMES {
        let model = open(name);
        let expert = model.expert(0, 0).unwrap();
        for (part, codec) in [Part::Gate, Part::Up, Part::Down].into_iter().zip(codecs) {
            let coded = expert.part(part).unwrap();
            assert_eq!(coded.codec.name(), *codec, "{name} {}", part.name());
            let expected = decoded(name, &format!("mlp.experts.0.{}", part.name()));
            assert_same(&format!("{name} {}", part.name()), &coded.decode(Isa::get()).unwrap(), &expected);
        }
        let q = model.trunk(Some(0), Role::Q).unwrap();
        assert_eq!(q.shape, [64, 64], "{name}");
        assert_same(&format!("{name} q_proj"), &q.data, &decoded(name, "self_attn.q_proj"));
    }
}

#[test]
fn every_fixture_is_among_the_schemes() {
    let mut found: Vec<_> = std::fs::read_dir(fixtures()).unwrap().map(|e| e.unwrap().file_name()).collect();
    found.sort();
    let expected: Vec<_> = SCHEMES.iter().map(|(name, _)| std::ffi::OsString::from(name)).collect();
    assert_eq!(found, expected);
}

/// Static factors of activations and caches are no part of the weights, and nothing is lost.
#[test]
fn factors_of_activations_are_carried() {
    let model = open("modelopt_fp8");
    let carried: Vec<_> = model.trunk_tensors().iter().filter(|t| t.role == Role::Carried).collect();
    assert_eq!(carried.iter().filter(|t| t.name.ends_with(".input_scale")).count(), 26);
    assert_eq!(
        carried.iter().filter(|t| t.name.ends_with(".k_scale") || t.name.ends_with(".v_scale")).count(),
        4
    );
    assert!(model.catalog().left_out.is_empty());
}
