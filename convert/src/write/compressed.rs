//! compressed-tensors 0.20: `pack-quantized`, `nvfp4-pack-quantized`, `mxfp4-pack-quantized`, `float-quantized` in blocks.
//!
//! The bits are those of our codecs; rows of integers are filled up to whole words of 32 bits. Sources:
//! compressed-tensors 0.20.0 `compressors/pack_quantized`, `nvfp4`, `mxfp4`, `naive_quantized`;
//! vLLM wants the three matrices of an expert in one scheme, and transformers 5.23 all experts of a model.

use moepack_format::{Dtype, Error, PlaneSpec, Result};
use serde_json::{Value, json};

use super::scheme::{Int, Scheme};
use crate::coded::CodedPart;
use crate::packing::padded;

/// Columns that share a scale.
const NV_COLS: u64 = 16;
const MX_COLS: u64 = 32;

/// Why this target cannot hold such a matrix, if it cannot.
pub fn refuses(scheme: Option<&Scheme>, [_, cols]: [u64; 2]) -> Option<String> {
    match scheme? {
        Scheme::Int(Int { asym: true, .. }) => Some("has zero points, expected symmetric groups".to_owned()),
        Scheme::Int(Int { indexed: true, .. }) => Some("has an order of columns of its own".to_owned()),
        Scheme::Int(Int { group, .. }) if !cols.is_multiple_of(*group) => {
            Some(format!("{cols} columns are no whole groups of {group}"))
        }
        Scheme::Fp8 { scales: Dtype::F8E8m0, .. } => Some("has powers of two as scales of FP8".to_owned()),
        Scheme::Plain(_) => Some("is not quantized; --to safetensors writes it".to_owned()),
        _ => None,
    }
}

/// The tensors of a matrix.
pub fn tensors(scheme: &Scheme, stem: &str, [rows, cols]: [u64; 2]) -> Vec<PlaneSpec> {
    let spec = |ending: &str, dtype, shape: &[u64]| PlaneSpec::new(&format!("{stem}.{ending}"), dtype, shape);
    let packed = |dtype, shape: &[u64]| spec("weight_packed", dtype, shape);
    match scheme {
        Scheme::Int(int) => vec![
            packed(Dtype::I32, &[rows, (cols * u64::from(int.bits)).div_ceil(32)]),
            spec("weight_scale", int.scales, &[rows, cols.div_ceil(int.group)]),
            spec("weight_shape", Dtype::I64, &[2]),
        ],
        Scheme::Mxfp4 => vec![
            packed(Dtype::U8, &[rows, cols / 2]),
            spec("weight_scale", Dtype::U8, &[rows, cols / MX_COLS]),
        ],
        Scheme::NvfpDivided => vec![
            packed(Dtype::U8, &[rows, cols / 2]),
            spec("weight_scale", Dtype::F8E4m3, &[rows, cols / NV_COLS]),
            spec("weight_global_scale", Dtype::F32, &[1]),
        ],
        Scheme::Fp8 { block: [r, c], scales } => vec![
            spec("weight", Dtype::F8E4m3, &[rows, cols]),
            spec("weight_scale", *scales, &[rows.div_ceil(*r), cols.div_ceil(*c)]),
        ],
        Scheme::Plain(dtype) => vec![spec("weight", *dtype, &[rows, cols])],
    }
}

/// The bytes of these tensors.
///
/// # Errors
/// A codec that this target has no place for.
pub fn bytes(part: &CodedPart) -> Result<Vec<Vec<u8>>> {
    let name = part.codec.name();
    let Some(Scheme::Int(int)) = Scheme::of(&name) else { return Ok(part.planes.clone()) };
    let [codes, scales] = &*part.planes else {
        return Err(Error::bad_data(format!("{} planes of {name}, expected 2", part.planes.len())));
    };
    let shape = [part.rows as u64, part.cols as u64];
    let shape = shape.iter().flat_map(|n| n.to_le_bytes()).collect();
    Ok(vec![padded(int.bits, codes, part.cols)?, scales.clone(), shape])
}

/// The `format` of config.json, and the arguments of the weights.
pub fn arguments(scheme: &Scheme, [rows, cols]: [u64; 2]) -> (&'static str, Value) {
    match scheme {
        Scheme::Int(int) => (
            "pack-quantized",
            json!({"num_bits": int.bits, "type": "int", "symmetric": true, "strategy": "group",
                "group_size": int.group, "dynamic": false}),
        ),
        Scheme::Mxfp4 => (
            "mxfp4-pack-quantized",
            json!({"num_bits": 4, "type": "float", "symmetric": true, "strategy": "group",
                "group_size": MX_COLS, "scale_dtype": "torch.uint8", "dynamic": false}),
        ),
        Scheme::NvfpDivided => (
            "nvfp4-pack-quantized",
            json!({"num_bits": 4, "type": "float", "symmetric": true, "strategy": "tensor_group",
                "group_size": NV_COLS, "scale_dtype": "torch.float8_e4m3fn", "dynamic": false}),
        ),
        Scheme::Fp8 { block: [r, c], .. } if *r >= rows && *c >= cols => ("float-quantized", fp8("tensor")),
        Scheme::Fp8 { block: [1, c], .. } if *c >= cols => ("float-quantized", fp8("channel")),
        Scheme::Fp8 { block, .. } => {
            let mut arguments = fp8("block");
            arguments["block_structure"] = json!(block);
            ("float-quantized", arguments)
        }
        Scheme::Plain(_) => ("dense", Value::Null),
    }
}

fn fp8(strategy: &str) -> Value {
    json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": strategy, "dynamic": false})
}
