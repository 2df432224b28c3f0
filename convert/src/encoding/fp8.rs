//! E4M3 numbers with scales: a block of rows and columns each, a row each, or one for all.

use std::sync::Arc;

use moepack_format::{Dtype, Result};
use moepack_quant::codec::fp8_block::{Fp8Block, ScaleType};

use super::{Encoded, Encoding, Hints, Holding, MX_COLS, side, wrong_scales};
use crate::checkpoint::SourceTensor;
use crate::packing::Packing;

/// The block side of published FP8 checkpoints, tried before any other that fits.
const USUAL_SIDE: u64 = 128;

/// The encoding of FP8 numbers.
pub(super) fn fp8<'a>(encoded: &Encoded<'a>, holding: Holding, hints: Hints) -> Result<Encoding<'a>> {
    let scales = encoded.scale()?;
    let scale = match scales.dtype {
        Dtype::F32 => ScaleType::F32,
        Dtype::Bf16 => ScaleType::Bf16,
        Dtype::F16 => ScaleType::F16,
        Dtype::F8E8m0 | Dtype::U8 => ScaleType::E8m0,
        _ => return Err(wrong_scales(scales, "F32, BF16, F16, F8_E8M0 or U8")),
    };
    let stored = if holding.transposed { [holding.cols, holding.rows] } else { [holding.rows, holding.cols] };
    let block = block(scales, scale, holding.n, stored, hints.block)?;
    let [rows, cols] = if holding.transposed { [block[1], block[0]] } else { block };
    let sides = usize::try_from(rows).ok().zip(usize::try_from(cols).ok());
    let codec = sides.and_then(|(rows, cols)| Fp8Block::new(rows, cols, scale));
    let codec = Arc::new(codec.ok_or_else(|| wrong_scales(scales, "blocks of 1 to 2^20"))?);
    let sources = vec![encoded.tensor, scales];
    Ok(Encoding { codec, sources, packing: Packing::AsPlanes, block_rows: rows })
}

/// Sides of the blocks of a matrix that is stored as `shape`, by the shape of its scales.
fn block(
    scales: &SourceTensor,
    scale: ScaleType,
    n: Option<u64>,
    shape: [u64; 2],
    said: Option<[u64; 2]>,
) -> Result<[u64; 2]> {
    let [rows, cols] = shape;
    let own = match n {
        None => Some(&*scales.shape),
        Some(n) => scales.shape.split_first().filter(|(first, _)| **first == n).map(|(_, rest)| rest),
    };
    match own {
        // One for all, or one a row.
        Some([] | [1]) => return Ok(shape),
        Some([n]) if *n == rows => return Ok([1, cols]),
        Some([r, c]) => {
            if let Some(block) = grid([rows, cols], [*r, *c], scale, said) {
                return Ok(block);
            }
        }
        _ => return Err(wrong_scales(scales, "two dimensions, one scale for every block")),
    }
    let expected = match said {
        Some([r, c]) => {
            let needed = [rows.div_ceil(r), cols.div_ceil(c)];
            format!("{needed:?}, one for every {r}x{c} of {shape:?} as config.json says")
        }
        None => format!("as many as blocks of a power of two need to cover {shape:?}"),
    };
    Err(wrong_scales(scales, &expected))
}

/// Sides of the blocks of which `grid` cover `shape`: those of config.json, else rows or MXFP8 blocks, else what fits.
fn grid(
    [rows, cols]: [u64; 2],
    grid: [u64; 2],
    scale: ScaleType,
    said: Option<[u64; 2]>,
) -> Option<[u64; 2]> {
    let covers = |[r, c]: &[u64; 2]| [rows.div_ceil(*r), cols.div_ceil(*c)] == grid;
    let row = cols.max(1).checked_next_power_of_two().map(|cols| [1, cols]);
    let mx = (scale == ScaleType::E8m0).then_some([1, MX_COLS]);
    let free =
        || Some([side(rows, grid[0], None, Some(USUAL_SIDE))?, side(cols, grid[1], None, Some(USUAL_SIDE))?]);
    match said {
        Some(block) => [Some(block), row, mx].into_iter().flatten().find(covers),
        None => mx.filter(covers).or_else(free),
    }
}
