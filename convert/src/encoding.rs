//! How a stored matrix's numbers are encoded, told from the endings of its tensors' names, their dtypes and shapes.
//!
//! Never from the model's name: one release is FP8, the next of the same family is not, and one file may hold
//! both. config.json is asked only where tensors leave a choice ([`Hints`]).
#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

use std::sync::Arc;

use moepack_format::{Dtype, Error, Result};
use moepack_quant::codec::affine::{Affine, Scales};
use moepack_quant::codec::nvfp4::Nvfp4;
use moepack_quant::{CodecRef, codec};

use crate::checkpoint::{Checkpoint, SourceTensor};
use crate::names::{Companion, companions_of, is_blocks, is_packed};
use crate::packing::Packing;

mod contents;
mod fp8;
mod integers;
mod shape;
#[cfg(test)]
mod tests;

pub use contents::check_contents;
pub use shape::stored_shape;
pub(crate) use shape::{BITS_DEFAULT, words_of};

/// Columns of an MXFP4 or NVFP4 block.
pub(crate) const MX_COLS: u64 = 32;
pub(crate) const NV_COLS: u64 = 16;

/// What config.json says of stored numbers, where tensors alone leave a choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Rows and columns of FP8 blocks (`weight_block_size`).
    pub block: Option<[u64; 2]>,
    /// Bits of integers, the same everywhere.
    pub bits: Option<u32>,
    /// Columns that share a scale.
    pub group: Option<u64>,
    /// GPTQ files hold zero points, not what is one below (`checkpoint_format: gptq_v2`).
    pub gptq_v2: bool,
}

/// A tensor of numbers and those beside it that give them their meaning.
#[derive(Clone, Debug)]
pub struct Encoded<'a> {
    /// The numbers.
    pub tensor: &'a SourceTensor,
    companions: Vec<(Companion, &'a SourceTensor)>,
}

impl<'a> Encoded<'a> {
    /// Finds what belongs to `tensor`.
    pub fn of(checkpoint: &'a Checkpoint, tensor: &'a SourceTensor) -> Encoded<'a> {
        let found = |(name, companion): (String, Companion)| {
            Some((companion, checkpoint.tensors().get(checkpoint.find(&name)?)?))
        };
        Encoded { tensor, companions: companions_of(&tensor.name).filter_map(found).collect() }
    }

    /// The tensor that gives this.
    pub fn get(&self, companion: Companion) -> Option<&'a SourceTensor> {
        self.companions.iter().find(|(c, _)| *c == companion).map(|(_, t)| *t)
    }

    /// All of them.
    pub fn companions(&self) -> &[(Companion, &'a SourceTensor)] {
        &self.companions
    }

    fn scale(&self) -> Result<&'a SourceTensor> {
        self.needs(Companion::Scale)
    }

    fn needs(&self, companion: Companion) -> Result<&'a SourceTensor> {
        self.get(companion).ok_or_else(|| {
            let endings = crate::names::endings_of(&self.tensor.name, companion);
            let (what, endings) = (companion.name(), any_of(&endings));
            Error::bad_data(format!(
                "packed numbers without their {what}, expected a tensor that ends in {endings}"
            ))
            .hint(format!(
                "the {what} may be in a shard that was not fetched; without them the numbers mean nothing"
            ))
        })
    }
}

/// How a matrix is stored, decided by headers alone.
#[derive(Clone, Debug)]
pub struct Encoding<'a> {
    /// The codec its bytes are in, or become without rounding.
    pub codec: CodecRef,
    /// Numbers, scales and what else there is: the raw bytes of the codec's planes.
    pub sources: Vec<&'a SourceTensor>,
    /// How they become the planes.
    pub packing: Packing,
    /// Rows that share a scale; rows can only be parted between such blocks.
    pub block_rows: u64,
}

impl Encoding<'_> {
    /// Its codec's name.
    pub fn name(&self) -> String {
        self.codec.name()
    }
}

/// The shape of a matrix and how the tensor holds it.
#[derive(Clone, Copy, Debug)]
pub struct Holding {
    /// How many experts it holds along its first axis, if such an axis is there.
    pub n: Option<u64>,
    /// Outputs.
    pub rows: u64,
    /// Inputs.
    pub cols: u64,
    /// Stored `[in, out]`.
    pub transposed: bool,
}

impl Holding {
    /// One matrix, rows first.
    pub fn plain((rows, cols): (u64, u64)) -> Holding {
        Holding { n: None, rows, cols, transposed: false }
    }

    /// With the axis of experts before `shape`.
    fn shape(&self, shape: &[u64]) -> Vec<u64> {
        self.n.into_iter().chain(shape.iter().copied()).collect()
    }
}

/// The encoding of a matrix.
///
/// # Errors
/// Scales and the like missing, not belonging to such numbers, or of the wrong shape; a dtype that is not read.
pub fn encoding<'a>(encoded: &Encoded<'a>, holding: Holding, hints: Hints) -> Result<Encoding<'a>> {
    let tensor = encoded.tensor;
    let scale = encoded.get(Companion::Scale).map(|s| s.dtype);
    let inner = || match tensor.dtype {
        Dtype::U8 if is_blocks(&tensor.name) => mxfp4(encoded, holding),
        Dtype::U8 | Dtype::F4 if encoded.get(Companion::Global).is_some() => {
            nvfp4(encoded, holding, Companion::Global)
        }
        Dtype::U8 | Dtype::F4 if encoded.get(Companion::Divisor).is_some() => {
            nvfp4(encoded, holding, Companion::Divisor)
        }
        Dtype::U8 | Dtype::F4 if scale == Some(Dtype::F8E4m3) => Err(without_global(encoded)),
        Dtype::U8 | Dtype::F4 => mxfp4(encoded, holding),
        Dtype::I8 if integers::are_bytes(encoded, holding) => integers::bytes(encoded, holding, hints),
        Dtype::I8 => mxfp4(encoded, holding),
        Dtype::I32 if is_qweight(&tensor.name) => integers::gptq_or_awq(encoded, holding, hints),
        Dtype::I32 if is_packed(&tensor.name) => integers::words(encoded, holding, hints),
        Dtype::F8E4m3 => fp8::fp8(encoded, holding, hints),
        Dtype::Bf16 | Dtype::F16 | Dtype::F32 => plain(encoded),
        dtype => {
            let what = format!("numbers of {}, expected BF16, F16, F32 or F8_E4M3 with scales", dtype.name());
            Err(Error::bad_data(what).hint("this storage is not supported; start from the original release"))
        }
    };
    let found = inner().and_then(|found| refuse_unused(encoded, found));
    found.map_err(|e| e.in_tensor(&*tensor.name).at_byte(tensor.start))
}

/// Nothing that lies beside numbers is passed over: what such numbers do not need may mean that they are others.
fn refuse_unused<'a>(encoded: &Encoded<'a>, found: Encoding<'a>) -> Result<Encoding<'a>> {
    let is_used = |(companion, tensor): &&(Companion, &'a SourceTensor)| {
        *companion == Companion::Shape || found.sources.iter().any(|s| s.name == tensor.name)
    };
    let Some((companion, tensor)) = encoded.companions.iter().find(|c| !is_used(c)) else { return Ok(found) };
    let what = format!("{} ({}) beside numbers that are {}", tensor.name, companion.name(), found.name());
    Err(Error::bad_data(what).hint("two releases may be mixed in one directory"))
}

/// Refuses a table whose numbers are no integers.
pub fn not_integers(dtype: Dtype) -> Error {
    Error::bad_data(format!("numbers of {}, expected integers: I64 or I32", dtype.name()))
        .hint("the table was converted with the weights; take it from the original release")
}

fn is_qweight(name: &str) -> bool {
    name.ends_with(".qweight")
}

fn without_global(encoded: &Encoded<'_>) -> Error {
    let packed = encoded.tensor.name.ends_with("_packed");
    let companion = if packed { Companion::Divisor } else { Companion::Global };
    encoded.needs(companion).map(|_| ()).err().unwrap_or_else(|| Error::bad_data("no global scale"))
}

fn plain<'a>(encoded: &Encoded<'a>) -> Result<Encoding<'a>> {
    let tensor = encoded.tensor;
    if let Some((_, companion)) = encoded.companions.first() {
        let what =
            format!("{} beside numbers of {}, which need no scales", companion.name, tensor.dtype.name());
        return Err(Error::bad_data(what));
    }
    if is_packed(&tensor.name) {
        return Err(Error::bad_data(format!(
            "numbers of {} in a tensor of packed ones",
            tensor.dtype.name()
        )));
    }
    let codec = codec(&tensor.dtype.name().to_lowercase())?;
    Ok(Encoding { codec, sources: vec![tensor], packing: Packing::AsPlanes, block_rows: 1 })
}

fn mxfp4<'a>(encoded: &Encoded<'a>, holding: Holding) -> Result<Encoding<'a>> {
    let Holding { rows, cols, .. } = holding;
    let scales = encoded.scale()?;
    refuse_turned(holding)?;
    if !cols.is_multiple_of(MX_COLS) {
        return Err(Error::bad_data(format!(
            "MXFP4 blocks of rows of {cols} numbers, expected a multiple of {MX_COLS}"
        )));
    }
    let bytes = is_blocks(&encoded.tensor.name) || encoded.tensor.dtype == Dtype::U8;
    let expected = holding.shape(&[rows, cols / MX_COLS]);
    match scales.dtype {
        Dtype::F8E8m0 => {}
        Dtype::U8 if bytes => {}
        _ if bytes => return Err(wrong_scales(scales, &format!("U8 {expected:?}"))),
        _ => return Err(wrong_scales(scales, "F8_E8M0, one for every 32 columns")),
    }
    if *scales.shape != *expected {
        return Err(wrong_scales(scales, &format!("{expected:?}, one for every {MX_COLS} columns")));
    }
    let sources = vec![encoded.tensor, scales];
    Ok(Encoding { codec: codec("mxfp4")?, sources, packing: Packing::AsPlanes, block_rows: 1 })
}

fn nvfp4<'a>(encoded: &Encoded<'a>, holding: Holding, which: Companion) -> Result<Encoding<'a>> {
    let Holding { rows, cols, .. } = holding;
    let (scales, global) = (encoded.scale()?, encoded.needs(which)?);
    refuse_turned(holding)?;
    if !cols.is_multiple_of(NV_COLS) {
        return Err(Error::bad_data(format!(
            "NVFP4 blocks of rows of {cols} numbers, expected a multiple of {NV_COLS}"
        )));
    }
    let expected = holding.shape(&[rows, cols / NV_COLS]);
    if scales.dtype != Dtype::F8E4m3 || *scales.shape != *expected {
        let expected = format!("F8_E4M3 {expected:?}, one for every {NV_COLS} columns");
        return Err(wrong_scales(scales, &expected));
    }
    if global.dtype != Dtype::F32 || global.shape.iter().product::<u64>() != holding.n.unwrap_or(1) {
        return Err(wrong_scales(global, "one F32 number a matrix"));
    }
    let codec = Arc::new(Nvfp4 { divides: which == Companion::Divisor });
    let sources = vec![encoded.tensor, scales, global];
    Ok(Encoding { codec, sources, packing: Packing::AsPlanes, block_rows: 1 })
}

/// Packed numbers lie along their rows, so a matrix stored `[in, out]` cannot be turned without taking them apart.
fn refuse_turned(holding: Holding) -> Result<()> {
    match holding.transposed {
        true => {
            Err(Error::bad_data("packed numbers in a tensor that is stored [in, out], which is not read"))
        }
        false => Ok(()),
    }
}

fn wrong_scales(scales: &SourceTensor, expected: &str) -> Error {
    let (name, shape, dtype) = (&scales.name, &scales.shape, scales.dtype.name());
    Error::bad_data(format!("scales {name} are {dtype} {shape:?}, expected {expected}"))
}

/// Length of the groups of which `n` cover `len`; the last may be shorter.
///
/// Where config.json does not say it, several may fit (576 rows in 5 blocks: 116 … 143): `usual` first, then an exact
/// part, else a power of two.
fn side(len: u64, n: u64, said: Option<u64>, usual: Option<u64>) -> Option<u64> {
    let fits = |side: &u64| *side > 0 && len.div_ceil(*side) == n;
    let exact = len.checked_div(n).filter(|_| len.is_multiple_of(n.max(1)));
    let power = len.div_ceil(n.max(1)).checked_next_power_of_two();
    [said, usual, exact.filter(|_| usual.is_none()), power].into_iter().flatten().find(fits)
}

/// How scales of integers are stored.
fn scale_type(scales: &SourceTensor) -> Result<Scales> {
    match scales.dtype {
        Dtype::F16 => Ok(Scales::F16),
        Dtype::Bf16 => Ok(Scales::Bf16),
        Dtype::F32 => Ok(Scales::F32),
        _ => Err(wrong_scales(scales, "F16, BF16 or F32")),
    }
}

/// `a, b or c`.
fn any_of(words: &[&str]) -> String {
    match words {
        [first @ .., a, b] => {
            first.iter().map(|w| format!("{w}, ")).collect::<String>() + &format!("{a} or {b}")
        }
        _ => words.concat(),
    }
}

/// The codec of integers, if there is one.
fn affine(codec: Affine) -> Result<CodecRef> {
    if codec.is_valid() {
        return Ok(Arc::new(codec));
    }
    Err(Error::bad_data(format!(
        "integers of {} bits in groups of {}, which is not read",
        codec.bits, codec.group
    )))
}
