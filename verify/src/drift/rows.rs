//! Kernels over rows of logits and activations, in f64 with sums in a fixed order.
//!
//! Drift is a small difference of large numbers: KL divergences of 1e-6 nats are of interest, and an `exp` in f32
//! would blur them by 1e-7. So everything here is f64. Sums have eight partial sums and a fixed tree, whatever the
//! instruction set.

use moepack_quant::{Isa, per_isa};

/// Partial sums of every sum over a row.
const LANES: usize = 8;

/// Largest value of a row and where it stands first. NaN is passed over, so a row without numbers has no largest.
pub fn argmax(isa: Isa, row: &[f32]) -> Option<(usize, f32)> {
    let max = row_max(isa, row);
    row.iter().position(|&v| v == max).map(|i| (i, max))
}

/// ln Σ e^x of a row of logits, in f64. NaN in the row gives NaN.
pub fn log_sum_exp(isa: Isa, row: &[f32]) -> f64 {
    let max = f64::from(row_max(isa, row));
    max + libm::log(exp_sum(isa, row, max))
}

/// What [`pair_sums`] gives of two rows a and b with maxima A and B.
#[derive(Clone, Copy, Debug)]
pub struct PairSums {
    /// Σ e^(a−A)
    pub exp_a: f64,
    /// Σ e^(b−B)
    pub exp_b: f64,
    /// Σ e^(a−A)·(a−b)
    pub weighted: f64,
}

per_isa! {
    /// Σ (b−a)² and Σ a², for a relative error.
    pub fn square_sums(a: &[f32], b: &[f32]) -> (f64, f64) = square_sums_body;
}
per_isa! {
    /// The sums of one pass over two rows of equal length, with their maxima given.
    pub fn pair_sums(a: &[f32], b: &[f32], max_a: f64, max_b: f64) -> PairSums = pair_sums_body;
}
per_isa! {
    /// e^(x−max) of each logit; `max` is the row's largest.
    pub fn exp_each(row: &[f32], max: f64, out: &mut [f64]) = exp_each_body;
}
per_isa! {
    fn row_max(row: &[f32]) -> f32 = row_max_body;
}
per_isa! {
    fn exp_sum(row: &[f32], max: f64) -> f64 = exp_sum_body;
}

/// e^x for x ≤ 0, relative error below 2^-51; 0 below -708, NaN for NaN.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, e^r by its Taylor polynomial of degree 13 (the first term left out is 4e-18),
/// 2^n by the exponent bits. ln 2 comes in two parts, of which the first times n is exact.
#[inline(always)]
fn exp(x: f64) -> f64 {
    const LN2: (f64, f64) = (6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10);
    /// 1.5 · 2^52: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    // The comparison is false for NaN, which so goes through.
    let small = x < -708.0;
    let x = if small { -708.0 } else { x };
    let rounded = x.mul_add(std::f64::consts::LOG2_E, ROUND);
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits());
    let whole = rounded - ROUND;
    let r = whole.mul_add(-LN2.1, whole.mul_add(-LN2.0, x));
    // 1/13! … 1/2!, 1, 1
    let mut p = 1.605_904_383_682_161_5e-10_f64;
    for c in [
        2.087_675_698_786_81e-9,
        2.505_210_838_544_172e-8,
        2.755_731_922_398_589_3e-7,
        2.755_731_922_398_589e-6,
        2.480_158_730_158_73e-5,
        1.984_126_984_126_984e-4,
        1.388_888_888_888_889e-3,
        8.333_333_333_333_333e-3,
        4.166_666_666_666_666_4e-2,
        1.666_666_666_666_666_6e-1,
        0.5,
        1.0,
        1.0,
    ] {
        p = p.mul_add(r, c);
    }
    let power = f64::from_bits(n.wrapping_add(1023) << 52);
    if small { 0.0 } else { p * power }
}

/// Adds lanes in a fixed tree: halves onto halves.
#[inline(always)]
fn tree(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn row_max_body(row: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = row.as_chunks::<16>();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, v);
        }
    }
    rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |a, &b| larger(a, b))
}

#[inline(always)]
fn exp_sum_body(row: &[f32], max: f64) -> f64 {
    let mut sums = [0.0; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (sum, &v) in sums.iter_mut().zip(chunk) {
            *sum += exp(f64::from(v) - max);
        }
    }
    for (sum, &v) in sums.iter_mut().zip(rest) {
        *sum += exp(f64::from(v) - max);
    }
    tree(sums)
}

#[inline(always)]
fn exp_each_body(row: &[f32], max: f64, out: &mut [f64]) {
    for (out, &v) in out.iter_mut().zip(row) {
        *out = exp(f64::from(v) - max);
    }
}

#[inline(always)]
fn pair_sums_body(a: &[f32], b: &[f32], max_a: f64, max_b: f64) -> PairSums {
    let (mut exp_a, mut exp_b, mut weighted) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    let (chunks_a, rest_a) = a.as_chunks::<LANES>();
    let (chunks_b, rest_b) = b.as_chunks::<LANES>();
    for (a, b) in chunks_a.iter().zip(chunks_b) {
        let (a, b) = (a.map(f64::from), b.map(f64::from));
        // One loop an array, and nothing else in it: so the compiler makes vectors of them.
        let mut e = [0.0; LANES];
        for lane in 0..LANES {
            e[lane] = exp(a[lane] - max_a);
        }
        for lane in 0..LANES {
            exp_b[lane] += exp(b[lane] - max_b);
        }
        for lane in 0..LANES {
            exp_a[lane] += e[lane];
            weighted[lane] = e[lane].mul_add(a[lane] - b[lane], weighted[lane]);
        }
    }
    for (lane, (&a, &b)) in rest_a.iter().zip(rest_b).enumerate() {
        let (a, b) = (f64::from(a), f64::from(b));
        let e = exp(a - max_a);
        exp_a[lane] += e;
        exp_b[lane] += exp(b - max_b);
        weighted[lane] = e.mul_add(a - b, weighted[lane]);
    }
    PairSums { exp_a: tree(exp_a), exp_b: tree(exp_b), weighted: tree(weighted) }
}

#[inline(always)]
fn square_sums_body(a: &[f32], b: &[f32]) -> (f64, f64) {
    let (mut diffs, mut norms) = ([0.0_f64; LANES], [0.0_f64; LANES]);
    let (chunks_a, rest_a) = a.as_chunks::<LANES>();
    let (chunks_b, rest_b) = b.as_chunks::<LANES>();
    for (a, b) in chunks_a.iter().zip(chunks_b) {
        for lane in 0..LANES {
            let (x, y) = (f64::from(a[lane]), f64::from(b[lane]));
            diffs[lane] = (y - x).mul_add(y - x, diffs[lane]);
            norms[lane] = x.mul_add(x, norms[lane]);
        }
    }
    for (lane, (&x, &y)) in rest_a.iter().zip(rest_b).enumerate() {
        let (x, y) = (f64::from(x), f64::from(y));
        diffs[lane] = (y - x).mul_add(y - x, diffs[lane]);
        norms[lane] = x.mul_add(x, norms[lane]);
    }
    (tree(diffs), tree(norms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_libm_over_its_whole_range() {
        for i in 0..=708_000 {
            let x = f64::from(i) * -1e-3;
            let (got, truth) = (exp(x), libm::exp(x));
            assert!((got - truth).abs() <= truth * 2.0_f64.powi(-51), "e^{x}: {got:e}, but {truth:e}");
        }
        assert_eq!((exp(0.0), exp(-708.5), exp(f64::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp(f64::NAN).is_nan());
    }

    #[test]
    fn every_level_gives_the_same_bits() {
        let row = |seed: f32| (0..1003).map(|i| ((i as f32) * seed).sin() * 9.0).collect::<Vec<f32>>();
        let (a, b) = (row(0.37), row(0.371));
        let all = |isa| {
            let p = pair_sums(isa, &a, &b, 9.0, 9.0);
            let (d, n) = square_sums(isa, &a, &b);
            let mut each = vec![0.0; a.len()];
            exp_each(isa, &a, 9.0, &mut each);
            let sum = each.iter().sum::<f64>();
            [p.exp_a, p.exp_b, p.weighted, d, n, log_sum_exp(isa, &a), sum].map(f64::to_bits)
        };
        for isa in Isa::available() {
            assert_eq!(all(isa), all(Isa::SCALAR), "{}", isa.name());
        }
    }

    #[test]
    fn the_first_of_equal_values_is_the_largest() {
        assert_eq!(argmax(Isa::get(), &[1.0, 3.0, f32::NAN, 3.0, 2.0]), Some((1, 3.0)));
        assert_eq!(argmax(Isa::get(), &[f32::NAN]), None);
    }

    #[test]
    fn log_sum_exp_of_equal_logits_is_their_value_and_ln_n() {
        let got = log_sum_exp(Isa::get(), &[5.0; 100]);
        assert!((got - 5.0 - libm::log(100.0)).abs() < 1e-14, "{got}");
        assert!(log_sum_exp(Isa::get(), &[1.0, f32::NAN]).is_nan());
    }
}
