//! Coding the numbers of a column: fixed-point costs, the search, the levels.
//!
//! A sample `x`, in units of the column's step, is coded as the integer `j` on the path that minimises
//! `Σ (x − j)² + λ · bits(j)`. With a table's `bits(j) = log2 Z + κ j²` (`Z` that of the parity) the square can be completed:
//!
//! ```text
//!  (x − j)² + λκ j² = (1 + λκ) · (x / (1 + λκ) − j)² + terms without j
//! ```
//!
//! so the rate only shrinks the sample and raises its weight; within a subset the best `j` is the nearest. What remains of the
//! rate is a constant for odd numbers, `λ (log2 Z_odd − log2 Z_even)`. Samples are integers of 1/32 step and costs of 1/1024
//! squared step, so every instruction set decides alike.

use super::tables::Table;
use super::trellis::{LANES, LaneMetrics, LaneScratch, Metrics, Scratch, Trellis, search_lanes};
use crate::isa::Isa;
use crate::per_isa;

/// Fractions of a step.
const ONE: i32 = 32;
/// The largest sample, in steps: levels fit 16 bits.
pub const SAMPLE_MAX: f32 = 32_000.0;
/// Fractions of a weight.
const WEIGHT_ONE: f64 = 1024.0;
/// Adding it rounds a float to an integer, to even, whose low bits then stand in the float's.
const MAGIC: f32 = 12_582_912.0;

/// How samples of one table are prepared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Price {
    /// Samples are multiplied by it: one over the step and over `1 + λκ`, times [`ONE`].
    factor: f32,
    /// Of a squared distance, in 1/1024.
    weight: i32,
    /// What even and odd numbers cost beside it.
    parity: [i32; 2],
}

impl Price {
    /// For a table, a step, and `shrink` = λκ.
    pub fn new(table: &Table, step: f32, shrink: f64) -> Price {
        let lambda = shrink / table.kappa;
        let odd = lambda * (table.log2_z[1] - table.log2_z[0]) * f64::from(ONE * ONE);
        let odd = odd.clamp(-4000.0, 4000.0) as i32;
        Price {
            factor: (f64::from(ONE) / (f64::from(step) * (1.0 + shrink))) as f32,
            weight: ((1.0 + shrink) * WEIGHT_ONE) as i32,
            parity: [(-odd).max(0), odd.max(0)],
        }
    }
}

/// Codes one column. `prices` has one entry for each row class, `row_price` says which each row has. `levels` becomes
/// what is coded.
#[allow(clippy::too_many_arguments, reason = "a kernel's operands are its signature")]
pub fn code(
    isa: Isa,
    trellis: Trellis,
    x: &[f32],
    prices: &[Price],
    row_price: &[u8],
    levels: &mut [i16],
    buffers: &mut Buffers,
) {
    let n = x.len();
    buffers.samples.resize(n, 0);
    buffers.metrics.resize(n, [0; 4]);
    buffers.subsets.resize(n, 0);
    prepare(isa, x, prices, row_price, &mut buffers.samples, &mut buffers.metrics);
    trellis.search(isa, &buffers.metrics, &mut buffers.subsets, &mut buffers.scratch);
    nearest(isa, &buffers.samples, &buffers.subsets, levels);
}

/// Buffers kept from column to column.
#[derive(Debug, Default)]
pub struct Buffers {
    samples: Vec<i32>,
    metrics: Vec<Metrics>,
    subsets: Vec<u8>,
    scratch: Scratch,
}

per_isa! { fn prepare(x: &[f32], prices: &[Price], row_price: &[u8], samples: &mut [i32], metrics: &mut [Metrics]) = prepare_body; }
per_isa! { fn nearest(samples: &[i32], subsets: &[u8], levels: &mut [i16]) = nearest_body; }

#[inline(always)]
fn prepare_body(x: &[f32], prices: &[Price], row_price: &[u8], samples: &mut [i32], metrics: &mut [Metrics]) {
    let rows = x.iter().zip(row_price).zip(samples.iter_mut().zip(metrics.iter_mut()));
    for ((&x, &p), (sample, metrics)) in rows {
        let price = &prices[usize::from(p)];
        *sample = fixed(x, price.factor);
        *metrics = costs(*sample, price);
    }
}

/// A sample in 1/32 step.
#[inline(always)]
fn fixed(x: f32, factor: f32) -> i32 {
    const MAX: f32 = SAMPLE_MAX * ONE as f32;
    let v = x * factor;
    // Not `clamp`: a NaN must become a number.
    let v = if v < MAX { v } else { MAX };
    let v = if v > -MAX { v } else { -MAX };
    (v + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()) as i32
}

/// What the nearest number of each subset costs, the cheapest being 0.
#[inline(always)]
fn costs(sample: i32, price: &Price) -> Metrics {
    let cost = |k: i32| {
        let r = off(sample, k);
        ((r * r * price.weight) >> 10) + price.parity[(k & 1) as usize]
    };
    let all = [cost(0), cost(1), cost(2), cost(3)];
    let least = all[0].min(all[1]).min(all[2].min(all[3]));
    all.map(|c| (c - least).min(i32::from(u16::MAX)) as u16)
}

/// How far a sample is from the nearest number of subset `k`, in 1/32 step.
#[inline(always)]
fn off(sample: i32, k: i32) -> i32 {
    ((sample - ONE * k + 2 * ONE) & (4 * ONE - 1)) - 2 * ONE
}

#[inline(always)]
fn nearest_body(samples: &[i32], subsets: &[u8], levels: &mut [i16]) {
    for ((&sample, &k), level) in samples.iter().zip(subsets).zip(levels) {
        *level = ((sample - off(sample, i32::from(k))) / ONE) as i16;
    }
}

/// Codes [`LANES`] columns of the 8-state trellis at once. `x` is `[rows]` of which `LANES` values from `first` on are the
/// columns'; `prices` is `[row classes][LANES]`; `levels` is `[LANES]` columns at so many values from each other.
#[allow(clippy::too_many_arguments, reason = "a kernel's operands are its signature")]
pub fn code_lanes(
    isa: Isa,
    x: &[f32],
    stride: usize,
    prices: &[[Price; LANES]],
    row_price: &[u8],
    (levels, distance): (&mut [i16], usize),
    buffers: &mut LaneBuffers,
) {
    let n = row_price.len();
    buffers.samples.resize(n, [0; LANES]);
    buffers.metrics.resize(n, [[0; LANES]; 4]);
    buffers.subsets.resize(n, [0; LANES]);
    prepare_lanes(isa, x, stride, prices, row_price, &mut buffers.samples, &mut buffers.metrics);
    search_lanes(isa, &buffers.metrics, &mut buffers.subsets, &mut buffers.scratch);
    nearest_lanes(isa, &buffers.samples, &buffers.subsets, levels, distance);
}

/// Buffers kept from group to group.
#[derive(Debug, Default)]
pub struct LaneBuffers {
    samples: Vec<[i32; LANES]>,
    metrics: Vec<LaneMetrics>,
    subsets: Vec<[u8; LANES]>,
    scratch: LaneScratch,
}

per_isa! {
    fn prepare_lanes(
        x: &[f32], stride: usize, prices: &[[Price; LANES]], row_price: &[u8], samples: &mut [[i32; LANES]], metrics: &mut [LaneMetrics],
    ) = prepare_lanes_body;
}
per_isa! { fn nearest_lanes(samples: &[[i32; LANES]], subsets: &[[u8; LANES]], levels: &mut [i16], distance: usize) = nearest_lanes_body; }

#[inline(always)]
fn prepare_lanes_body(
    x: &[f32],
    stride: usize,
    prices: &[[Price; LANES]],
    row_price: &[u8],
    samples: &mut [[i32; LANES]],
    metrics: &mut [LaneMetrics],
) {
    let rows = row_price.iter().zip(samples.iter_mut().zip(metrics.iter_mut()));
    for (row, (&p, (samples, metrics))) in rows.enumerate() {
        let prices = &prices[usize::from(p)];
        let x: &[f32; LANES] = x[row * stride..].first_chunk().unwrap_or(&[0.0; LANES]);
        for l in 0..LANES {
            samples[l] = fixed(x[l], prices[l].factor);
            let costs = costs(samples[l], &prices[l]);
            for k in 0..4 {
                metrics[k][l] = costs[k];
            }
        }
    }
}

#[inline(always)]
fn nearest_lanes_body(
    samples: &[[i32; LANES]],
    subsets: &[[u8; LANES]],
    levels: &mut [i16],
    distance: usize,
) {
    /// Rows turned at a time.
    const ROWS: usize = 32;
    for (block, (samples, subsets)) in samples.chunks(ROWS).zip(subsets.chunks(ROWS)).enumerate() {
        let mut turned = [[0i16; LANES]; ROWS];
        for (turned, (samples, subsets)) in turned.iter_mut().zip(samples.iter().zip(subsets)) {
            for l in 0..LANES {
                turned[l] = ((samples[l] - off(samples[l], i32::from(subsets[l]))) / ONE) as i16;
            }
        }
        for l in 0..LANES {
            let column = &mut levels[l * distance + block * ROWS..][..samples.len()];
            column.iter_mut().zip(&turned).for_each(|(level, row)| *level = row[l]);
        }
    }
}
