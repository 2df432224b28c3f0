//! What config.json says of stored numbers, where tensors alone leave a choice.

use moepack_format::{Dtype, Error, Result};
use serde_json::Value;

use crate::catalog::{Scales, Storage};
use crate::encoding::Hints;
use crate::hparams::{Config, Section};
use crate::limits::BLOCK_SIDE_MAX;

const BLOCK: &str = "weight_block_size";
/// Storage that has the tensors of another one, but not their meaning: key, values that are read.
const READ: &[(&str, &[&str])] = &[
    ("checkpoint_format", &["gptq", "gptq_v2"]),
    ("version", &["gemm", "GEMM"]),
    ("packing_format", &["auto_awq:gemm"]),
];
/// Of FP8 blocks, where compressed-tensors does not say.
const BLOCK_SIDE: u64 = 128;
const CODE_BITS_MAX: u64 = 8;

/// What `quantization_config` says.
///
/// # Errors
/// `BadData` for block sizes that are not two sizes, and for storage that is not read.
pub fn hints(config: &Config) -> Result<Hints> {
    let Some(section) = config.object_opt(&["quantization_config", "compression_config"])? else {
        return Ok(Hints::default());
    };
    let text = |key: &str| section.find(&[key]).and_then(Value::as_str);
    if matches!(text("quant_method"), Some("gptq" | "awq" | "gptqmodel")) {
        check_read(&section)?;
    }
    let bits = number(&section, &["bits", "w_bit"]).or_else(|| of_groups(&section, "num_bits"));
    Ok(Hints {
        block: block(&section)?,
        bits: bits.filter(|b| *b <= CODE_BITS_MAX).and_then(|b| u32::try_from(b).ok()),
        group: number(&section, &["group_size", "q_group_size"])
            .or_else(|| of_groups(&section, "group_size")),
        gptq_v2: text("checkpoint_format") == Some("gptq_v2"),
    })
}

/// What names alone leave open: dtypes, whether routed experts are FP4, and how scales lie.
///
/// # Errors
/// A key of another type.
pub fn storage(config: &Config, total_bytes: Option<u64>) -> Result<Storage> {
    let section = config.object_opt(&["quantization_config", "compression_config"])?;
    let inside = |key: &str| section.as_ref().and_then(|s| s.find(&[key])).and_then(Value::as_str);
    let fp4 = |v: &str| v == "fp4";
    let own = config.find(&["expert_dtype"]).and_then(|(_, v)| v.as_str());
    let plain = config.find(&["dtype", "torch_dtype"]).and_then(|(_, v)| v.as_str());
    Ok(Storage {
        plain: match plain {
            Some("float32") => Dtype::F32,
            Some("float16") => Dtype::F16,
            _ => Dtype::Bf16,
        },
        fp4_experts: own.is_some_and(fp4) || inside("expert_dtype").is_some_and(fp4),
        e8m0: inside("scale_fmt") == Some("ue8m0"),
        scales: section.as_ref().map_or(Scales::Rows, scales),
        int_bytes: inside("format") == Some("int-quantized"),
        total_bytes,
    })
}

/// How scales of FP8 lie where `weight_block_size` is missing.
fn scales(section: &Section<'_>) -> Scales {
    let inside = |key: &str| section.find(&[key]).and_then(Value::as_str);
    let side = |at: usize| {
        let sides = in_groups(section, "block_structure").and_then(Value::as_array);
        sides.and_then(|s| s.get(at)?.as_u64()).unwrap_or(BLOCK_SIDE)
    };
    match in_groups(section, "strategy").and_then(Value::as_str) {
        _ if inside("quant_method") == Some("mxfp8") || inside("format") == Some("mxfp8-quantized") => {
            Scales::Mx
        }
        _ if inside("quant_method") == Some("modelopt") => Scales::Scalar,
        Some("tensor") => Scales::One,
        Some("channel") => Scales::OfRows,
        Some("block") => Scales::Blocks([side(0), side(1)]),
        _ => Scales::Rows,
    }
}

fn check_read(section: &Section<'_>) -> Result<()> {
    for (key, read) in READ {
        let found = section.find(&[key]).and_then(Value::as_str);
        if let Some(found) = found.filter(|f| !read.contains(f)) {
            let what = format!("is {found:?}, expected {}", read.join(" or "));
            return Err(section
                .error(key, &what)
                .hint("this storage is not supported; start from the original release"));
        }
    }
    Ok(())
}

fn number(section: &Section<'_>, keys: &[&str]) -> Option<u64> {
    section.find(keys).and_then(Value::as_u64).filter(|&n| n > 0)
}

/// A number of compressed-tensors' `config_groups`, where all of them that are for weights agree.
fn of_groups(section: &Section<'_>, key: &str) -> Option<u64> {
    in_groups(section, key)?.as_u64()
}

fn in_groups<'a>(section: &Section<'a>, key: &str) -> Option<&'a Value> {
    let groups = section.find(&["config_groups"])?.as_object()?;
    let mut found = groups.values().filter_map(|g| g.get("weights")?.get(key));
    let first = found.next()?;
    found.all(|v| v == first).then_some(first)
}

/// Rows and columns of FP8 blocks.
fn block(section: &Section<'_>) -> Result<Option<[u64; 2]>> {
    let Some(value) = section.find(&[BLOCK]) else { return Ok(None) };
    let sides = value.as_array().map(|a| a.iter().filter_map(Value::as_u64).collect::<Vec<_>>());
    match sides.as_deref() {
        Some(&[r, c]) if (1..=BLOCK_SIDE_MAX).contains(&r) && (1..=BLOCK_SIDE_MAX).contains(&c) => {
            Ok(Some([r, c]))
        }
        _ => Err(not_sides(section, value)),
    }
}

fn not_sides(section: &Section<'_>, value: &Value) -> Error {
    section.error(BLOCK, &format!("is {value}, expected two integers from 1 to {BLOCK_SIDE_MAX}"))
}
