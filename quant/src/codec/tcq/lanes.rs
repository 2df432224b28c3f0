//! Coding columns of the 8-state trellis side by side, where columns do not depend on each other.
//!
//! What `column.rs` and `trellis.rs` do for one column; the paths found are the same.

use super::column::{BLOCK, Prices, Samples, nearest_block, prepare_block};
use super::trellis::{RENORMALIZE, Trellis, UNREACHED};
use crate::isa::Isa;
use crate::per_isa;

#[cfg(target_arch = "x86_64")]
mod avx2;

/// Columns side by side.
pub const LANES: usize = BLOCK;

/// Costs of a sample of each lane, subset by subset.
type Metrics = [[u16; LANES]; 4];
/// For each lane a bit for each state: `z1` of the better way into it.
type Decisions = [u8; LANES];

/// Buffers kept from group to group.
#[derive(Debug, Default)]
pub struct Buffers {
    samples: Vec<Samples>,
    metrics: Vec<Metrics>,
    decisions: Vec<Decisions>,
    subsets: Vec<[u8; LANES]>,
}

/// Codes [`LANES`] columns at once. `x` is `[rows]` of which `LANES` values are the columns', `stride` from row to row;
/// `prices` is `[row classes]`; `levels` is `[LANES]` columns at so many values from each other.
pub fn code(
    isa: Isa,
    (x, stride): (&[f32], usize),
    prices: &[Prices],
    row_price: &[u8],
    (levels, distance): (&mut [i16], usize),
    buffers: &mut Buffers,
) {
    let n = row_price.len();
    buffers.samples.resize(n, Samples::default());
    buffers.metrics.resize(n, [[0; LANES]; 4]);
    buffers.decisions.resize(n, [0; LANES]);
    buffers.subsets.resize(n, [0; LANES]);
    prepare(isa, x, stride, prices, row_price, &mut buffers.samples, &mut buffers.metrics);
    search(isa, &buffers.metrics, &mut buffers.decisions, &mut buffers.subsets);
    nearest(isa, &buffers.samples, &buffers.subsets, levels, distance);
}

per_isa! {
    fn prepare(
        x: &[f32], stride: usize, prices: &[Prices], row_price: &[u8], samples: &mut [Samples], metrics: &mut [Metrics],
    ) = prepare_body;
}
per_isa! { fn nearest(samples: &[Samples], subsets: &[[u8; LANES]], levels: &mut [i16], distance: usize) = nearest_body; }

#[inline(always)]
fn prepare_body(
    x: &[f32],
    stride: usize,
    prices: &[Prices],
    row_price: &[u8],
    samples: &mut [Samples],
    metrics: &mut [Metrics],
) {
    let rows = row_price.iter().zip(samples.iter_mut().zip(metrics.iter_mut()));
    for (row, (&p, (samples, metrics))) in rows.enumerate() {
        let prices = &prices[usize::from(p)];
        let x: &[f32; LANES] = x[row * stride..].first_chunk().unwrap_or(&[0.0; LANES]);
        prepare_block(x, prices, samples, metrics);
    }
}

#[inline(always)]
fn nearest_body(samples: &[Samples], subsets: &[[u8; LANES]], levels: &mut [i16], distance: usize) {
    /// Rows turned at a time.
    const ROWS: usize = 32;
    let mut turned = [[0i16; LANES]; ROWS];
    for (block, (samples, subsets)) in samples.chunks(ROWS).zip(subsets.chunks(ROWS)).enumerate() {
        for (turned, (samples, subsets)) in turned.iter_mut().zip(samples.iter().zip(subsets)) {
            nearest_block(samples, subsets, turned);
        }
        for l in 0..LANES {
            let column = &mut levels[l * distance + block * ROWS..][..samples.len()];
            column.iter_mut().zip(&turned).for_each(|(level, row)| *level = row[l]);
        }
    }
}

/// The cheapest path of each lane: for each sample the subset, 0 … 3.
fn search(isa: Isa, metrics: &[Metrics], decisions: &mut [Decisions], subsets: &mut [[u8; LANES]]) {
    let mut cost = [[UNREACHED; LANES]; 8];
    cost[0] = [0; LANES];
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx2() {
        avx2::forward(isa, metrics, decisions, &mut cost);
        return avx2::backward(isa, cheapest(&cost), decisions, subsets);
    }
    let _ = isa;
    forward(metrics, decisions, &mut cost);
    backward(cheapest(&cost), decisions, subsets);
}

const EIGHT: Trellis = Trellis::known(8);

/// The first of the cheapest states of each lane.
fn cheapest(cost: &[[u16; LANES]; 8]) -> [u8; LANES] {
    std::array::from_fn(|l| {
        let least = cost.iter().map(|c| c[l]).min();
        cost.iter().position(|c| Some(c[l]) == least).unwrap_or(0) as u8
    })
}

/// The two states before state `d`, for `z1` = 0 and 1.
const fn before(d: usize) -> [usize; 2] {
    let z0 = d / 4;
    let u = d ^ (EIGHT.h0 as usize * z0);
    [(2 * u + z0) % 8, (2 * (u ^ EIGHT.h1 as usize) + z0) % 8]
}

fn forward(metrics: &[Metrics], decisions: &mut [Decisions], cost: &mut [[u16; LANES]; 8]) {
    for (i, (m, decisions)) in metrics.iter().zip(decisions.iter_mut()).enumerate() {
        let old = *cost;
        *decisions = [0; LANES];
        for (d, cost) in cost.iter_mut().enumerate() {
            let ([a, b], z0) = (before(d), d / 4);
            for l in 0..LANES {
                let stay = old[a][l].saturating_add(m[z0][l]);
                let turn = old[b][l].saturating_add(m[z0 + 2][l]);
                cost[l] = stay.min(turn);
                decisions[l] |= u8::from(turn < stay) << d;
            }
        }
        if i % RENORMALIZE == RENORMALIZE - 1 {
            for l in 0..LANES {
                let least = cost.iter().fold(u16::MAX, |a, c| a.min(c[l]));
                cost.iter_mut().for_each(|c| c[l] -= least);
            }
        }
    }
}

/// Follows the bits back from the states at the end.
fn backward(mut state: [u8; LANES], decisions: &[Decisions], subsets: &mut [[u8; LANES]]) {
    for (decisions, subsets) in decisions.iter().zip(subsets.iter_mut()).rev() {
        for l in 0..LANES {
            let (z0, z1) = (state[l] >> 2, decisions[l] >> state[l] & 1);
            subsets[l] = 2 * z1 + z0;
            state[l] = before(usize::from(state[l]))[usize::from(z1)] as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::trellis::Scratch;
    use super::*;

    fn noise(n: usize, seed: u32) -> Vec<[u16; 4]> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 20) as u16
        };
        (0..n).map(|_| [next(), next(), next(), next()]).collect()
    }

    #[test]
    fn lanes_find_what_single_paths_find() {
        let n = 300;
        let mut paths: Vec<_> = (0..LANES as u32).map(|l| noise(n, l)).collect();
        // Ties, and costs that saturate.
        for path in &mut paths {
            path.iter_mut().skip(50).take(20).for_each(|m| *m = [9; 4]);
            path.iter_mut().skip(80).take(9).for_each(|m| *m = [40_000, 60_000, u16::MAX, 50_000]);
        }
        let metrics: Vec<Metrics> =
            (0..n).map(|i| [0, 1, 2, 3].map(|k| std::array::from_fn(|l| paths[l][i][k]))).collect();
        for isa in Isa::available() {
            let (mut decisions, mut together) = (vec![[0; LANES]; n], vec![[9; LANES]; n]);
            search(isa, &metrics, &mut decisions, &mut together);
            for (l, path) in paths.iter().enumerate() {
                let mut alone = vec![0; n];
                EIGHT.search(isa, path, &mut alone, &mut Scratch::default());
                assert!(alone.iter().zip(&together).all(|(a, t)| *a == t[l]), "lane {l}, {}", isa.name());
            }
        }
    }
}
