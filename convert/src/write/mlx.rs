//! MLX: `mx.quantize`'s affine groups of 2, 3, 4, 5, 6 and 8 bits, and MXFP4. Experts of a layer lie in one tensor.
//!
//! MLX keeps codes in words of 32 bits, least significant first and across words where bits do not divide 32: our
//! streams, where a row fills whole words. Its value is `code × scale + bias`; a symmetric group's bias is
//! `−2^(b−1) × scale`, which is exact in the type of the scale unless it overflows. Source: mlx 0.32
//! `mlx/backend/cpu/quantized.cpp`; mlx-lm `models/switch_layers.py`.

use moepack_format::{Dtype, Error, PlaneSpec, Result};
use moepack_quant::minifloat::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use serde_json::{Value, json};

use super::scheme::{Int, Scheme};
use crate::coded::CodedPart;

const BITS: &[u32] = &[2, 3, 4, 5, 6, 8];
const GROUPS: &[u64] = &[32, 64, 128];
const MX_COLS: u64 = 32;

/// Why this target cannot hold such a matrix, if it cannot.
pub fn refuses(scheme: Option<&Scheme>, [_, cols]: [u64; 2]) -> Option<String> {
    match scheme? {
        Scheme::Int(Int { asym: true, .. }) => {
            Some("has zero points, whose products with scales would be rounded".to_owned())
        }
        Scheme::Int(Int { indexed: true, .. }) => Some("has an order of columns of its own".to_owned()),
        Scheme::Int(Int { bits, group, .. }) if !BITS.contains(bits) || !GROUPS.contains(group) => {
            Some(format!("{bits} bits in groups of {group}, expected groups of 32, 64 or 128 columns"))
        }
        Scheme::Int(Int { group, .. }) if !cols.is_multiple_of(*group) => {
            Some(format!("{cols} columns are no whole groups of {group}"))
        }
        Scheme::NvfpDivided | Scheme::Fp8 { .. } => Some("is no affine group and no MXFP4".to_owned()),
        _ => None,
    }
}

/// What mlx-lm calls the module of all experts.
pub fn experts_name(family: &str) -> &'static str {
    if family == "gpt_oss" { "experts" } else { "switch_mlp" }
}

/// The tensors of a matrix, or of `n` of them along the first axis.
pub fn tensors(scheme: &Scheme, stem: &str, n: Option<u64>, [rows, cols]: [u64; 2]) -> Vec<PlaneSpec> {
    let spec = |ending: &str, dtype, cols: u64| {
        let shape: Vec<u64> = n.into_iter().chain([rows, cols]).collect();
        PlaneSpec::new(&format!("{stem}.{ending}"), dtype, &shape)
    };
    match scheme {
        Scheme::Int(int) => {
            let groups = cols / int.group.max(1);
            let words = cols * u64::from(int.bits) / 32;
            vec![
                spec("weight", Dtype::U32, words),
                spec("scales", int.scales, groups),
                spec("biases", int.scales, groups),
            ]
        }
        Scheme::Mxfp4 => {
            vec![spec("weight", Dtype::U32, cols / 8), spec("scales", Dtype::U8, cols / MX_COLS)]
        }
        Scheme::Plain(dtype) => vec![spec("weight", *dtype, cols)],
        Scheme::NvfpDivided | Scheme::Fp8 { .. } => Vec::new(),
    }
}

/// The bytes of these tensors.
///
/// # Errors
/// A scale whose bias overflows its type.
pub fn bytes(part: &CodedPart) -> Result<Vec<Vec<u8>>> {
    let name = part.codec.name();
    let Some(Scheme::Int(int)) = Scheme::of(&name) else { return Ok(part.planes.clone()) };
    let [codes, scales] = &*part.planes else {
        return Err(Error::bad_data(format!("{} planes of {name}, expected 2", part.planes.len())));
    };
    Ok(vec![codes.clone(), scales.clone(), biases(&int, scales)?])
}

/// `−2^(b−1) × scale` in the type of the scales.
fn biases(int: &Int, scales: &[u8]) -> Result<Vec<u8>> {
    let middle = f32::from(1u16 << (int.bits - 1));
    let mut out = Vec::with_capacity(scales.len());
    let mut lost = false;
    match int.scales {
        Dtype::F32 => {
            for scale in scales.as_chunks().0 {
                let bias = -middle * f32::from_le_bytes(*scale);
                lost |= !bias.is_finite();
                out.extend(bias.to_le_bytes());
            }
        }
        dtype => {
            type Pair = (fn(u16) -> f32, fn(f32) -> u16);
            let (read, write): Pair = match dtype {
                Dtype::F16 => (f16_to_f32, f32_to_f16),
                _ => (bf16_to_f32, f32_to_bf16),
            };
            for scale in scales.as_chunks().0 {
                let bias = -middle * read(u16::from_le_bytes(*scale));
                let code = write(bias);
                lost |= read(code) != bias;
                out.extend(code.to_le_bytes());
            }
        }
    }
    if lost {
        return Err(Error::plan("a scale so large that MLX's bias of its group is beyond the scale's type")
            .hint("quantize with mxfp4, or convert with --requantize"));
    }
    Ok(out)
}

/// What config.json says of a module; `None` where its numbers are plain.
pub fn arguments(scheme: &Scheme) -> Option<Value> {
    match scheme {
        Scheme::Int(int) => Some(json!({"group_size": int.group, "bits": int.bits, "mode": "affine"})),
        Scheme::Mxfp4 => Some(json!({"group_size": MX_COLS, "bits": 4, "mode": "mxfp4"})),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_is_exact_or_refused() {
        let int = Int { bits: 8, group: 32, scales: Dtype::F16, asym: false, indexed: false };
        let scale = |v: f32| f32_to_f16(v).to_le_bytes().to_vec();
        assert_eq!(biases(&int, &scale(-0.37)).unwrap(), scale(128.0 * f16_to_f32(f32_to_f16(0.37))));
        assert_eq!(biases(&int, &scale(600.0)).unwrap_err().kind().exit_code(), 78);
    }
}
