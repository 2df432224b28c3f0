//! What must hold of the numbers that give other numbers their meaning: scales, zero points, group indices, shapes.

use moepack_format::{Dtype, Error, Result};

use crate::checkpoint::SourceTensor;
use crate::names::Companion;

/// Refuses what gives numbers no meaning: scales that are no positive, finite, normal numbers, groups that do not exist
/// (`n_groups`, of integers only), a shape that is another (`shape`). `bytes` are those of the tensor from element `first` on.
///
/// # Errors
/// `BadData` with tensor, index and value.
pub fn check_contents(
    companion: Companion,
    tensor: &SourceTensor,
    (first, bytes): (u64, &[u8]),
    n_groups: Option<u64>,
    shape: Option<[u64; 2]>,
) -> Result<()> {
    // Integers around zero may be turned over: the sign says on which side the extra level is.
    let signed = n_groups.is_some();
    match companion {
        Companion::Scale | Companion::Global | Companion::Divisor => {
            check_scales(tensor, first, bytes, signed)
        }
        Companion::GroupIndex => n_groups.map_or(Ok(()), |n| check_index(tensor, first, bytes, n)),
        Companion::Shape => shape.map_or(Ok(()), |shape| check_shape(tensor, bytes, shape)),
        Companion::Zero => Ok(()),
    }
}

fn check_scales(scales: &SourceTensor, first: u64, bytes: &[u8], signed: bool) -> Result<()> {
    let Some((at, value)) = odd_scale(scales.dtype, bytes, signed) else { return Ok(()) };
    let index = first.saturating_add(at as u64);
    let what = format!("scale {index} is {value}, expected a positive, finite, normal number");
    Err(located(scales, index, Error::bad_data(what))
        .hint("the file is damaged; compare its sha256 with the release"))
}

/// The first scale that is no good, as text.
fn odd_scale(dtype: Dtype, bytes: &[u8], signed: bool) -> Option<(usize, String)> {
    let odd = |values: &mut dyn Iterator<Item = f32>| {
        values
            .enumerate()
            .find(|(_, s)| !sound(if signed { s.abs() } else { *s }))
            .map(|(at, s)| (at, s.to_string()))
    };
    match dtype {
        Dtype::F32 => odd(&mut bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
        Dtype::Bf16 => odd(&mut bytes.as_chunks().0.iter().map(|b| bf16(*b))),
        Dtype::F16 => odd(&mut bytes.as_chunks().0.iter().map(|b| f16(*b))),
        // E4M3: groups of zeros have 0; only NaN and negative ones mean nothing.
        Dtype::F8E4m3 => {
            let at = bytes.iter().position(|&b| b & 0x7f == 0x7f || b > 0x80)?;
            let nan = bytes.get(at).is_some_and(|b| b & 0x7f == 0x7f);
            Some((at, if nan { "NaN" } else { "negative" }.to_owned()))
        }
        // E8M0: 0 is 2^-127, which empty blocks have; 255 is NaN.
        _ => bytes.iter().position(|&b| b == 255).map(|at| (at, "255, which is NaN".to_owned())),
    }
}

fn check_index(tensor: &SourceTensor, first: u64, bytes: &[u8], n: u64) -> Result<()> {
    let indices = bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b));
    let beyond = |g: &i32| u64::try_from(*g).map_or(true, |g| g >= n);
    let Some((at, g)) = indices.enumerate().find(|(_, g)| beyond(g)) else { return Ok(()) };
    let index = first.saturating_add(at as u64);
    let what = format!("column {index} is in group {g}, expected 0 to {}", n.saturating_sub(1));
    Err(located(tensor, index, Error::bad_data(what))
        .hint("the file is damaged; compare its sha256 with the release"))
}

fn check_shape(tensor: &SourceTensor, bytes: &[u8], expected: [u64; 2]) -> Result<()> {
    let found: Vec<i64> = match tensor.dtype {
        Dtype::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
        _ => bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect(),
    };
    if found.iter().map(|&n| u64::try_from(n).ok()).eq(expected.map(Some)) {
        return Ok(());
    }
    let what = format!("says that the matrix is {found:?}, config.json says {expected:?}");
    Err(located(tensor, 0, Error::bad_data(what)).hint("config.json may belong to another model"))
}

fn located(tensor: &SourceTensor, index: u64, error: Error) -> Error {
    let width = tensor.dtype.bits() / 8;
    error.in_tensor(&*tensor.name).at_byte(tensor.start.saturating_add(index.saturating_mul(width)))
}

fn sound(scale: f32) -> bool {
    scale > 0.0 && scale.is_normal()
}

fn bf16(bytes: [u8; 2]) -> f32 {
    moepack_quant::minifloat::bf16_to_f32(u16::from_le_bytes(bytes))
}

fn f16(bytes: [u8; 2]) -> f32 {
    moepack_quant::minifloat::f16_to_f32(u16::from_le_bytes(bytes))
}
