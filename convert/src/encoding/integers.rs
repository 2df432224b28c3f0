//! Integer codes with a scale a group: compressed-tensors (`pack-quantized`, `int-quantized`), GPTQ and AWQ.

use moepack_format::{Dtype, Error, Result};
use moepack_quant::codec::affine::{Affine, BITS};

use super::{
    Encoded, Encoding, Hints, Holding, affine, refuse_turned, scale_type, side, words_of, wrong_scales,
};
use crate::checkpoint::SourceTensor;
use crate::names::Companion;
use crate::packing::{Packing, Words};

/// Bits of GPTQ's codes.
pub(super) const GPTQ_BITS: [u32; 4] = [2, 3, 4, 8];
/// Bits of AWQ's codes.
const AWQ_BITS: u32 = 4;

/// compressed-tensors' `pack-quantized`: rows of words, zero points packed along the rows.
pub(super) fn words<'a>(encoded: &Encoded<'a>, holding: Holding, hints: Hints) -> Result<Encoding<'a>> {
    let Holding { rows, cols, .. } = holding;
    refuse_packed(holding)?;
    let scales = encoded.scale()?;
    let n_words = encoded.tensor.shape.last().copied().unwrap_or(0);
    let bits = bits_of_words(cols, n_words, hints.bits)?;
    let groups = groups_of(scales, rows, cols, hints, false)?;
    let zeros = encoded.get(Companion::Zero);
    // Early versions stored a byte a zero point.
    let in_bytes = zeros.is_some_and(|zeros| zeros.dtype == Dtype::I8);
    match zeros {
        Some(zeros) if in_bytes => shaped(zeros, Dtype::I8, &scales.shape)?,
        Some(zeros) => shaped(zeros, Dtype::I32, &[words_of(rows, bits), groups.n])?,
        None => {}
    }
    if let Some(shape) = encoded.get(Companion::Shape) {
        shaped(shape, Dtype::I64, &[2]).or_else(|_| shaped(shape, Dtype::I32, &[2]))?;
    }
    finish(encoded, scales, zeros, bits, groups.len, Packing::Rows { bits, in_bytes }, cols)
}

/// Whether these bytes are integers: with a scale of a float type, which FP4 pairs do not have.
pub(super) fn are_bytes(encoded: &Encoded<'_>, holding: Holding) -> bool {
    let whole = encoded.tensor.shape.last() == Some(&holding.cols);
    let scale = encoded.get(Companion::Scale).map(|s| s.dtype);
    whole && scale.is_none_or(|d| matches!(d, Dtype::F16 | Dtype::Bf16 | Dtype::F32))
}

/// compressed-tensors' `int-quantized`: a byte a code.
pub(super) fn bytes<'a>(encoded: &Encoded<'a>, holding: Holding, hints: Hints) -> Result<Encoding<'a>> {
    let Holding { rows, cols, .. } = holding;
    refuse_packed(holding)?;
    let scales = encoded.scale()?;
    let groups = groups_of(scales, rows, cols, hints, true)?;
    let zeros = encoded.get(Companion::Zero);
    if let Some(zeros) = zeros {
        shaped(zeros, Dtype::I8, &scales.shape)?;
    }
    let packing = Packing::Bytes { said: hints.bits.filter(|b| BITS.contains(b)).unwrap_or(8) };
    finish(encoded, scales, zeros, 8, groups.len, packing, cols)
}

/// Both store inputs first; AWQ packs outputs into words, GPTQ inputs.
pub(super) fn gptq_or_awq<'a>(encoded: &Encoded<'a>, holding: Holding, hints: Hints) -> Result<Encoding<'a>> {
    let Holding { rows, cols, .. } = holding;
    refuse_packed(holding)?;
    let scales = encoded.scale()?;
    let [n, found_rows] = *scales.shape else {
        return Err(wrong_scales(scales, "two dimensions, [groups, outputs]"));
    };
    let len = side(cols, n, hints.group, None).filter(|_| found_rows == rows);
    let len = len.ok_or_else(|| wrong_scales(scales, &format!("[groups of {cols} inputs, {rows}]")))?;
    let zeros = encoded.needs(Companion::Zero)?;
    let (bits, words) = match *encoded.tensor.shape {
        [inputs, _] if inputs == cols => (AWQ_BITS, Words::Awq),
        [words, _] => {
            let bits = gptq_bits(cols, words)?;
            (bits, if hints.gptq_v2 { Words::GptqV2 } else { Words::Gptq })
        }
        _ => return Err(Error::bad_data("packed numbers that are no matrix")),
    };
    shaped(zeros, Dtype::I32, &[n, words_of(rows, bits)])?;
    finish(encoded, scales, Some(zeros), bits, len, Packing::Columns(bits, words), cols)
}

fn gptq_bits(cols: u64, words: u64) -> Result<u32> {
    let fits = |b: &u32| cols.checked_mul(u64::from(*b)) == words.checked_mul(32);
    GPTQ_BITS.into_iter().find(fits).ok_or_else(|| {
        Error::bad_data(format!("{words} words for {cols} inputs, expected 2, 3, 4 or 8 bits each"))
    })
}

/// The codec and its sources, in the order that [`Packing`] takes them.
fn finish<'a>(
    encoded: &Encoded<'a>,
    scales: &'a SourceTensor,
    zeros: Option<&'a SourceTensor>,
    bits: u32,
    group: u64,
    packing: Packing,
    cols: u64,
) -> Result<Encoding<'a>> {
    let index = encoded.get(Companion::GroupIndex);
    if let Some(index) = index {
        shaped(index, Dtype::I32, &[cols])?;
    }
    let codec = affine(Affine {
        bits,
        group: usize::try_from(group).unwrap_or(0),
        scales: scale_type(scales)?,
        asym: zeros.is_some(),
        indexed: index.is_some(),
    })?;
    let sources = [Some(encoded.tensor), Some(scales), zeros, index].into_iter().flatten().collect();
    Ok(Encoding { codec, sources, packing, block_rows: 1 })
}

/// Groups of a row.
struct GroupsOf {
    n: u64,
    len: u64,
}

/// The groups that scales `[rows, groups]` make; one for all stands for one a row where `one_for_all` allows it.
fn groups_of(
    scales: &SourceTensor,
    rows: u64,
    cols: u64,
    hints: Hints,
    one_for_all: bool,
) -> Result<GroupsOf> {
    let n = match *scales.shape {
        [r, n] if r == rows => n,
        [r] if r == rows => 1,
        [] | [1] if one_for_all => 1,
        _ => return Err(wrong_scales(scales, &format!("[{rows}, groups of {cols} columns]"))),
    };
    let len = side(cols, n, hints.group, None);
    let len = len.ok_or_else(|| wrong_scales(scales, &format!("groups that cover {cols} columns")))?;
    Ok(GroupsOf { n, len })
}

/// Bits of `cols` codes in `n` words. A few columns fill the last word in several ways; then config.json decides.
pub(super) fn bits_of_words(cols: u64, n: u64, said: Option<u32>) -> Result<u32> {
    let fits = |b: &u32| cols.checked_mul(u64::from(*b)).map(|bits| bits.div_ceil(32)) == Some(n);
    let mut found = BITS.filter(fits);
    match (said.filter(|b| BITS.contains(b) && fits(b)), found.next(), found.next()) {
        (Some(said), _, _) => Ok(said),
        (None, Some(bits), None) => Ok(bits),
        (None, Some(a), Some(b)) => {
            Err(Error::bad_data(format!("{n} words a row of {cols} numbers, which may have {a} or {b} bits"))
                .hint("config.json has no quantization_config that says it; restore the one of the release"))
        }
        (None, None, _) => {
            Err(Error::bad_data(format!("{n} words a row of {cols} numbers, expected 2 to 8 bits each")))
        }
    }
}

fn refuse_packed(holding: Holding) -> Result<()> {
    refuse_turned(holding)?;
    match holding.n {
        Some(_) => {
            Err(Error::bad_data("packed integers of several experts in one tensor, which is not read"))
        }
        None => Ok(()),
    }
}

/// Compares a tensor beside the numbers with what they need.
fn shaped(tensor: &SourceTensor, dtype: Dtype, shape: &[u64]) -> Result<()> {
    if tensor.dtype == dtype && *tensor.shape == *shape {
        return Ok(());
    }
    let (name, found) = (&tensor.name, tensor.dtype.name());
    let what = format!("{name} is {found} {:?}, expected {} {shape:?}", tensor.shape, dtype.name());
    Err(Error::bad_data(what))
}
