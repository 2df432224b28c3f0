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
use super::trellis::{Metrics, Scratch, Trellis};
use crate::isa::Isa;
use crate::per_isa;

/// Fractions of a step.
const ONE: i32 = 32;
/// The largest sample, in steps: levels fit 16 bits.
pub const SAMPLE_MAX: f32 = 32_000.0;
/// Fractions of a weight.
const WEIGHT_ONE: f64 = 8192.0;
/// Adding it rounds a float to an integer, to even, whose low bits then stand in the float's.
const MAGIC: f32 = 12_582_912.0;

/// Samples that are prepared at a time.
pub const BLOCK: usize = 32;

/// How samples of one table are prepared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Price {
    /// Samples are multiplied by it: one over the step and over `1 + λκ`, times [`ONE`].
    factor: f32,
    /// Of a squared distance, in 1/8192.
    weight: u16,
    /// What even and odd numbers cost beside it.
    parity: [u16; 2],
}

impl Price {
    /// For a table, a step, and `shrink` = λκ.
    pub fn new(table: &Table, step: f32, shrink: f64) -> Price {
        let lambda = shrink / table.kappa;
        let odd = lambda * (table.log2_z[1] - table.log2_z[0]) * f64::from(ONE * ONE);
        let odd = odd.clamp(-4000.0, 4000.0) as i32;
        Price {
            factor: (f64::from(ONE) / (f64::from(step) * (1.0 + shrink))) as f32,
            weight: ((1.0 + shrink) * WEIGHT_ONE) as u16,
            parity: [(-odd).max(0) as u16, odd.max(0) as u16],
        }
    }
}

/// A price for each sample of a block.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prices {
    factor: [f32; BLOCK],
    weight: [u16; BLOCK],
    even: [u16; BLOCK],
    odd: [u16; BLOCK],
}

impl Prices {
    /// Sets that of a sample.
    #[inline(always)]
    pub fn set(&mut self, i: usize, price: Price) {
        (self.factor[i], self.weight[i]) = (price.factor, price.weight);
        [self.even[i], self.odd[i]] = price.parity;
    }
}

/// Samples of a block: each a number and what lies above it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Samples {
    /// Multiples of four.
    base: [i16; BLOCK],
    /// What lies above, 0 … 127 thirty-seconds of a step.
    above: [u16; BLOCK],
}

/// Codes one column. `prices` has one entry for each row class, `row_price` says which each row has. `levels` becomes
/// what is coded.
pub fn code(
    isa: Isa,
    trellis: Trellis,
    x: &[f32],
    (prices, row_price): (&[Price], &[u8]),
    levels: &mut [i16],
    buffers: &mut Buffers,
) {
    let blocks = x.len().div_ceil(BLOCK);
    buffers.samples.resize(blocks, Samples::default());
    buffers.metrics.resize(blocks * BLOCK, [0; 4]);
    buffers.subsets.resize(blocks * BLOCK, 0);
    prepare(isa, x, prices, row_price, &mut buffers.samples, &mut buffers.metrics);
    let (metrics, subsets) = (&buffers.metrics[..x.len()], &mut buffers.subsets[..x.len()]);
    trellis.search(isa, metrics, subsets, &mut buffers.scratch);
    nearest(isa, &buffers.samples, &buffers.subsets, levels);
}

/// Buffers kept from column to column.
#[derive(Debug, Default)]
pub struct Buffers {
    samples: Vec<Samples>,
    metrics: Vec<Metrics>,
    subsets: Vec<u8>,
    scratch: Scratch,
}

per_isa! { fn prepare(x: &[f32], prices: &[Price], row_price: &[u8], samples: &mut [Samples], metrics: &mut [Metrics]) = prepare_body; }
per_isa! { fn nearest(samples: &[Samples], subsets: &[u8], levels: &mut [i16]) = nearest_body; }

#[inline(always)]
fn prepare_body(
    x: &[f32],
    prices: &[Price],
    row_price: &[u8],
    samples: &mut [Samples],
    metrics: &mut [Metrics],
) {
    let mut own = Prices::default();
    if let [price] = prices {
        (0..BLOCK).for_each(|i| own.set(i, *price));
    }
    let blocks = x.chunks(BLOCK).zip(row_price.chunks(BLOCK));
    for ((x, classes), (samples, metrics)) in
        blocks.zip(samples.iter_mut().zip(metrics.chunks_exact_mut(BLOCK)))
    {
        let mut block = [0.0; BLOCK];
        block.iter_mut().zip(x).for_each(|(to, x)| *to = *x);
        if prices.len() > 1 {
            classes.iter().enumerate().for_each(|(i, &p)| own.set(i, prices[usize::from(p)]));
        }
        let mut costs = [[0; BLOCK]; 4];
        prepare_block(&block, &own, samples, &mut costs);
        for (i, metrics) in metrics.iter_mut().enumerate() {
            *metrics = [costs[0][i], costs[1][i], costs[2][i], costs[3][i]];
        }
    }
}

/// What the nearest number of each subset costs each sample, the cheapest being 0.
#[inline(always)]
pub fn prepare_block(
    x: &[f32; BLOCK],
    prices: &Prices,
    samples: &mut Samples,
    metrics: &mut [[u16; BLOCK]; 4],
) {
    for (i, &x) in x.iter().enumerate() {
        let sample = fixed(x, prices.factor[i]);
        samples.above[i] = (sample & (4 * ONE - 1)) as u16;
        samples.base[i] = (sample >> 7 << 2) as i16;
    }
    for i in 0..BLOCK {
        let cost = |k: u16| {
            let off = off(samples.above[i], k);
            let square = (off * off) as u16;
            ((u32::from(square << 3) * u32::from(prices.weight[i])) >> 16) as u16
        };
        let (even, odd) = (prices.even[i], prices.odd[i]);
        let all = [cost(0) + even, cost(1) + odd, cost(2) + even, cost(3) + odd];
        let least = all[0].min(all[1]).min(all[2].min(all[3]));
        for (metrics, cost) in metrics.iter_mut().zip(all) {
            metrics[i] = cost - least;
        }
    }
}

const _: () = assert!(ONE == 32 && WEIGHT_ONE == 8192.0);

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

/// How far a sample is from the nearest number of subset `k`, in 1/32 step: -64 … 63.
#[inline(always)]
fn off(above: u16, k: u16) -> i16 {
    (above.wrapping_sub(32 * k).wrapping_add(64) & 127) as i16 - 64
}

/// The nearest number of each sample's subset.
#[inline(always)]
pub fn nearest_block(samples: &Samples, subsets: &[u8; BLOCK], levels: &mut [i16; BLOCK]) {
    for i in 0..BLOCK {
        let above = samples.above[i] as i16;
        levels[i] = samples.base[i] + ((above - off(samples.above[i], subsets[i].into())) >> 5);
    }
}

#[inline(always)]
fn nearest_body(samples: &[Samples], subsets: &[u8], levels: &mut [i16]) {
    for ((samples, subsets), levels) in
        samples.iter().zip(subsets.as_chunks().0).zip(levels.chunks_mut(BLOCK))
    {
        let mut block = [0; BLOCK];
        nearest_block(samples, subsets, &mut block);
        levels.iter_mut().zip(block).for_each(|(to, level)| *to = level);
    }
}
