//! How a stored tensor's numbers are encoded, told from its name's ending, its dtype and the shape of its
//! scales.
//!
//! Never from the model's name: one release is FP8, the next of the same family is not, and one file may hold
//! both.

use std::sync::Arc;

use moepack_format::{Dtype, Error, Result};
use moepack_quant::codec::fp8_block::{Fp8Block, ScaleType};
use moepack_quant::{CodecRef, codec};

use crate::checkpoint::SourceTensor;

/// Ending of packed MXFP4 levels, `[…, out, in/32, 16]`.
const BLOCKS: &str = "_blocks";
/// Columns of an MXFP4 block, and bytes of its levels.
const BLOCK_COLS: u64 = 32;
const BLOCK_BYTES: u64 = 16;
/// The block side of published FP8 checkpoints, tried before any other that fits.
const USUAL_SIDE: u64 = 128;

/// Rows and columns of FP8 blocks, where config.json says them (`quantization_config.weight_block_size`).
pub type BlockSize = Option<[u64; 2]>;

/// How a matrix is stored, decided by headers alone.
#[derive(Clone, Debug)]
pub struct Encoding {
    /// The codec its bytes are in already.
    pub codec: CodecRef,
    /// Its name.
    pub name: String,
}

/// Shape of the tensor that holds a matrix `[rows, cols]`, `n` of them along the first axis if `n` is given.
pub fn stored_shape(name: &str, dtype: Dtype, n: Option<u64>, rows: u64, cols: u64) -> Vec<u64> {
    let matrix = match dtype {
        _ if is_blocks(name) => vec![rows, cols / BLOCK_COLS, BLOCK_BYTES],
        // Two FP4 numbers a byte.
        Dtype::I8 => vec![rows, cols / 2],
        _ => vec![rows, cols],
    };
    n.into_iter().chain(matrix).collect()
}

/// Whether numbers of this type, in a tensor of this name, are FP4 with a scale for every 32 columns.
pub fn is_mxfp4(name: &str, dtype: Dtype) -> bool {
    is_blocks(name) || matches!(dtype, Dtype::I8 | Dtype::F4)
}

/// Whether this name holds MXFP4 levels.
pub fn is_blocks(name: &str) -> bool {
    name.ends_with(BLOCKS)
}

/// The encoding of a matrix of `rows` × `cols`, of which the tensor holds `n` along its first axis if `n` is
/// given.
///
/// # Errors
/// Scales missing, not belonging to such a tensor, or of the wrong shape; a dtype that needs more than is
/// there.
pub fn encoding(
    tensor: &SourceTensor,
    scales: Option<&SourceTensor>,
    n: Option<u64>,
    (rows, cols): (u64, u64),
    block: BlockSize,
) -> Result<Encoding> {
    let inner = || match (tensor.dtype, scales) {
        (Dtype::U8, Some(scales)) if is_blocks(&tensor.name) => mxfp4(scales, n, rows, cols),
        (Dtype::U8, None) if is_blocks(&tensor.name) => Err(without_scales("_scales")),
        (Dtype::I8 | Dtype::F4, Some(scales)) if scales.dtype == Dtype::F8E8m0 => {
            mxfp4(scales, n, rows, cols)
        }
        (Dtype::F8E4m3, Some(scales)) => fp8(scales, [rows, cols], block),
        (Dtype::F8E4m3, None) => Err(without_scales("weight_scale_inv or scale")),
        (Dtype::I8 | Dtype::F4, None) => Err(without_scales("scale")),
        (Dtype::I8 | Dtype::F4, Some(scales)) => {
            Err(wrong_scales(scales, "F8_E8M0, one for every 32 columns"))
        }
        (Dtype::Bf16 | Dtype::F16 | Dtype::F32, None) => plain(tensor.dtype),
        (dtype, Some(scales)) => {
            let what = format!("{} beside numbers of {}, which need no scales", scales.name, dtype.name());
            Err(Error::bad_data(what))
        }
        (dtype, None) => {
            let what = format!("numbers of {}, expected BF16, F16, F32 or F8_E4M3 with scales", dtype.name());
            Err(Error::bad_data(what).hint("this storage is not supported; start from the original release"))
        }
    };
    inner().map_err(|e| e.in_tensor(&*tensor.name).at_byte(tensor.start))
}

/// Refuses a table whose numbers are no integers.
pub fn not_integers(dtype: Dtype) -> Error {
    Error::bad_data(format!("numbers of {}, expected integers: I64 or I32", dtype.name()))
        .hint("the table was converted with the weights; take it from the original release")
}

fn without_scales(ending: &str) -> Error {
    Error::bad_data(format!("packed numbers without their scales, expected a tensor that ends in {ending}"))
        .hint("the scales may be in a shard that was not fetched; without them the numbers mean nothing")
}

fn plain(dtype: Dtype) -> Result<Encoding> {
    let name = dtype.name().to_lowercase();
    Ok(Encoding { codec: codec(&name)?, name })
}

fn mxfp4(scales: &SourceTensor, n: Option<u64>, rows: u64, cols: u64) -> Result<Encoding> {
    let expected: Vec<u64> = n.into_iter().chain([rows, cols / BLOCK_COLS]).collect();
    if scales.dtype != Dtype::U8 && scales.dtype != Dtype::F8E8m0 {
        return Err(wrong_scales(scales, &format!("U8 {expected:?}")));
    }
    if *scales.shape != *expected {
        return Err(wrong_scales(scales, &format!("{expected:?}, one for every 32 columns")));
    }
    Ok(Encoding { codec: codec("mxfp4")?, name: "mxfp4".to_owned() })
}

fn fp8(scales: &SourceTensor, shape: [u64; 2], block: BlockSize) -> Result<Encoding> {
    let scale = match scales.dtype {
        Dtype::F32 => ScaleType::F32,
        Dtype::Bf16 => ScaleType::Bf16,
        Dtype::F8E8m0 => ScaleType::E8m0,
        _ => return Err(wrong_scales(scales, "F32, BF16 or F8_E8M0")),
    };
    let [scale_rows, scale_cols] = *scales.shape else {
        return Err(wrong_scales(scales, "two dimensions, one scale for every block"));
    };
    let grid = [scale_rows, scale_cols];
    let [Some(rows), Some(cols)] = sides(shape, grid, block) else {
        let expected = match block {
            Some([r, c]) => {
                let needed = [shape[0].div_ceil(r), shape[1].div_ceil(c)];
                format!("{needed:?}, one for every {r}x{c} of {shape:?} as config.json says")
            }
            None => format!("as many as blocks of a power of two need to cover {shape:?}"),
        };
        return Err(wrong_scales(scales, &expected));
    };
    let codec = Fp8Block::new(rows, cols, scale);
    let codec: CodecRef = Arc::new(codec.ok_or_else(|| wrong_scales(scales, "blocks of 1 to 2^20"))?);
    Ok(Encoding { name: codec.name(), codec })
}

/// Sides of the blocks of which `grid` cover `shape`.
fn sides(shape: [u64; 2], grid: [u64; 2], block: BlockSize) -> [Option<usize>; 2] {
    let [rows, cols] = shape;
    let said = block.map_or([None; 2], |b| b.map(Some));
    [side(rows, grid[0], said[0]), side(cols, grid[1], said[1])]
}

fn wrong_scales(scales: &SourceTensor, expected: &str) -> Error {
    let (name, shape, dtype) = (&scales.name, &scales.shape, scales.dtype.name());
    Error::bad_data(format!("scales {name} are {dtype} {shape:?}, expected {expected}"))
}

/// Side of the blocks of which `n` cover `len`; the block at the edge may be smaller.
///
/// Where config.json does not say it, several may fit (576 rows in 5 blocks: 116 … 143): 128 first, else a
/// power of two.
fn side(len: u64, n: u64, said: Option<u64>) -> Option<usize> {
    let fits = |side: u64| side > 0 && len.div_ceil(side) == n;
    let found = match said {
        Some(side) => Some(side).filter(|&s| fits(s)),
        None => {
            let power = len.div_ceil(n.max(1)).checked_next_power_of_two();
            [Some(USUAL_SIDE), power].into_iter().flatten().find(|&s| fits(s))
        }
    };
    usize::try_from(found?).ok()
}

/// Refuses scales that are no positive, finite, normal numbers: a block of numbers under such a scale means
/// nothing. `bytes` are the scales from index `first` on.
///
/// # Errors
/// `BadData` with tensor, index and value.
pub fn check_scales(scales: &SourceTensor, first: u64, bytes: &[u8]) -> Result<()> {
    let odd = match scales.dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).position(|s| !sound(s)),
        Dtype::Bf16 => bytes.as_chunks().0.iter().map(|b| bf16(*b)).position(|s| !sound(s)),
        // E8M0: 0 is 2^-127, which empty blocks have; 255 is NaN.
        _ => bytes.iter().position(|&b| b == 255),
    };
    let Some(at) = odd else { return Ok(()) };
    let value = match scales.dtype {
        Dtype::F32 => bytes.as_chunks().0.get(at).map(|b| f32::from_le_bytes(*b).to_string()),
        Dtype::Bf16 => bytes.as_chunks().0.get(at).map(|b| bf16(*b).to_string()),
        _ => Some("255, which is NaN".to_owned()),
    };
    let width = scales.dtype.bits() / 8;
    let what = format!(
        "scale {} is {}, expected a positive, finite, normal number",
        first + at as u64,
        value.unwrap_or_default()
    );
    Err(Error::bad_data(what)
        .in_tensor(&*scales.name)
        .at_byte(scales.start.saturating_add((first + at as u64).saturating_mul(width)))
        .hint("the file is damaged; compare its sha256 with the release"))
}

fn sound(scale: f32) -> bool {
    scale > 0.0 && scale.is_normal()
}

fn bf16(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, dtype: Dtype, shape: &[u64]) -> SourceTensor {
        let end = dtype.bytes(shape).unwrap();
        SourceTensor { name: name.into(), dtype, file: 0, shape: shape.into(), start: 0, end }
    }

    fn fp8_name(shape: [u64; 2], scale: Dtype, grid: &[u64], block: BlockSize) -> Result<String> {
        let weight = tensor("x.weight", Dtype::F8E4m3, &shape);
        let scales = tensor("x.weight_scale_inv", scale, grid);
        encoding(&weight, Some(&scales), None, (shape[0], shape[1]), block).map(|e| e.name)
    }

    #[test]
    fn the_block_comes_from_the_shapes() {
        let cases: &[([u64; 2], Dtype, &[u64], &str)] = &[
            ([256, 512], Dtype::F32, &[2, 4], "fp8-block"),
            ([576, 7168], Dtype::F32, &[5, 56], "fp8-block"),
            ([64, 64], Dtype::F32, &[1, 1], "fp8-block"),
            ([256, 512], Dtype::Bf16, &[2, 4], "fp8-block-bf16"),
            ([256, 512], Dtype::F8E8m0, &[8, 16], "fp8-block-32x32-e8m0"),
            ([300, 512], Dtype::F32, &[300, 1], "fp8-block-1x512"),
            ([300, 100], Dtype::F32, &[5, 2], "fp8-block-64x64"),
        ];
        for (shape, dtype, grid, name) in cases {
            assert_eq!(fp8_name(*shape, *dtype, grid, None).unwrap(), *name, "{shape:?} {grid:?}");
        }
    }

    #[test]
    fn fp4_pairs_in_bytes_have_a_scale_for_every_32_columns() {
        let weight = tensor("e.w1.weight", Dtype::I8, &[8, 32]);
        let name = |dtype, grid: &[u64]| {
            let scales = tensor("e.w1.scale", dtype, grid);
            encoding(&weight, Some(&scales), None, (8, 64), None)
                .map(|e| e.name)
                .map_err(|e| e.what().to_owned())
        };
        assert_eq!(stored_shape("e.w1.weight", Dtype::I8, None, 8, 64), [8, 32]);
        assert_eq!(name(Dtype::F8E8m0, &[8, 2]).unwrap(), "mxfp4");
        assert_eq!(
            name(Dtype::F8E8m0, &[8, 1]).unwrap_err(),
            "scales e.w1.scale are F8_E8M0 [8, 1], expected [8, 2], one for every 32 columns"
        );
        let e = name(Dtype::F32, &[8, 2]).unwrap_err();
        assert_eq!(e, "scales e.w1.scale are F32 [8, 2], expected F8_E8M0, one for every 32 columns");
    }

    #[test]
    fn scales_that_do_not_fit_are_refused() {
        let cases: &[(Dtype, &[u64], &str)] = &[
            (
                Dtype::F32,
                &[3, 4],
                "F32 [3, 4], expected as many as blocks of a power of two need to cover [256, 512]",
            ),
            (
                Dtype::F32,
                &[0, 4],
                "F32 [0, 4], expected as many as blocks of a power of two need to cover [256, 512]",
            ),
            (Dtype::F32, &[8], "F32 [8], expected two dimensions, one scale for every block"),
            (Dtype::I32, &[2, 4], "I32 [2, 4], expected F32, BF16 or F8_E8M0"),
        ];
        for (dtype, grid, expected) in cases {
            let e = fp8_name([256, 512], *dtype, grid, None).unwrap_err();
            assert_eq!(e.what(), format!("scales x.weight_scale_inv are {expected}"));
            assert_eq!((e.kind().exit_code(), e.tensor()), (65, Some("x.weight")));
        }
    }

    #[test]
    fn the_block_size_of_config_json_binds() {
        let block = Some([128, 128]);
        assert_eq!(fp8_name([64, 160], Dtype::F32, &[1, 2], block).unwrap(), "fp8-block");
        let e = fp8_name([64, 160], Dtype::F32, &[2, 1], block).unwrap_err();
        let expected = "[1, 2], one for every 128x128 of [64, 160] as config.json says";
        assert_eq!(e.what(), format!("scales x.weight_scale_inv are F32 [2, 1], expected {expected}"));
    }

    #[test]
    fn numbers_and_scales_need_each_other() {
        let weight = tensor("x.weight", Dtype::F8E4m3, &[4, 4]);
        let e = encoding(&weight, None, None, (4, 4), None).unwrap_err();
        assert_eq!(
            e.what(),
            "packed numbers without their scales, expected a tensor that ends in weight_scale_inv or scale"
        );
        let (weight, scales) =
            (tensor("x.weight", Dtype::Bf16, &[4, 4]), tensor("x.weight_scale_inv", Dtype::F32, &[1, 1]));
        let e = encoding(&weight, Some(&scales), None, (4, 4), None).unwrap_err();
        assert_eq!(e.what(), "x.weight_scale_inv beside numbers of BF16, which need no scales");
        let e = encoding(&tensor("x", Dtype::I64, &[4]), None, None, (1, 4), None).unwrap_err();
        assert_eq!(e.what(), "numbers of I64, expected BF16, F16, F32 or F8_E4M3 with scales");
    }
}
