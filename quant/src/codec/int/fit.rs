//! The scale, and zero point, with the least squared error: for sixteen groups at a time.
//!
//! For levels `q` the best scale is `d = Σ w x q / Σ w q²`, and the error it leaves is `Σ w x² − (Σ w x q)² / Σ w q²`.
//! So a trial scale only has to propose levels; what it is worth is `A² / B` of the two sums. Trials lie on a grid around
//! the scale that just reaches the largest magnitude; the best one is refined by rounding anew with its own `d`.
//!
//! A symmetric group tries both signs, because the range −2^(b−1) … 2^(b−1)−1 is not symmetric.

use crate::codec::lanes::{LANES, Lanes, clamp, max_magnitude, round};
use crate::minifloat::{F16_MAX, f32_to_f16};

/// What was found for each of sixteen groups.
pub(super) struct Fit {
    /// f16 bits.
    pub scale: [u16; LANES],
    /// Code of zero.
    pub zero: [u8; LANES],
}

/// Trials that run at once, so that their sums do not wait for each other.
const TRIALS: usize = 4;

/// Groups with no larger magnitude than this are zero in f16.
const MAGNITUDE_MIN: f32 = 1e-30;

/// Fits sixteen groups, `x[i]` being weight `i` of each, with one importance for each weight or 1 for all.
#[inline(always)]
pub(super) fn fit(bits: u32, asym: bool, x: &[Lanes], importance: Option<&[Lanes]>) -> Fit {
    match (asym, importance) {
        (false, None) => fit_sym::<false>(bits, x, &[]),
        (false, Some(w)) => fit_sym::<true>(bits, x, w),
        (true, None) => fit_asym::<false>(bits, x, &[]),
        (true, Some(w)) => fit_asym::<true>(bits, x, w),
    }
}

/// Trial scales of a symmetric group: into how many steps the largest magnitude is cut, in units of 2^(b−1).
fn grid(bits: u32) -> &'static [[f32; TRIALS]] {
    match bits {
        2 => &[[0.6, 0.75, 0.875, 1.0], [1.125, 1.25, 1.4, 1.6]],
        3 => &[[0.8, 0.875, 0.95, 1.025], [1.1, 1.2, 1.3, 1.45]],
        4 => &[[0.85, 0.91, 0.96, 1.0], [1.05, 1.12, 1.2, 1.3]],
        _ => &[[0.96, 0.99, 1.02, 1.06]],
    }
}

#[inline(always)]
fn fit_sym<const WEIGHTED: bool>(bits: u32, x: &[Lanes], w: &[Lanes]) -> Fit {
    let half = (1u32 << (bits - 1)) as f32;
    let range = Range { lo: Lanes::splat(-half), hi: Lanes::splat(half - 1.0) };
    let unit = max_magnitude(x).map(|m| half / if m > MAGNITUDE_MIN { m } else { MAGNITUDE_MIN });
    let mut best = Best::NONE;
    for ratios in grid(bits) {
        for sign in [1.0, -1.0] {
            let inverses = ratios.map(|r| unit.map(|u| u * (r * sign)));
            best.try_all::<TRIALS, WEIGHTED>(x, w, inverses, range);
        }
    }
    for _ in 0..2 {
        let inverse = best.scale.map(|d| 1.0 / d);
        best.try_all::<1, WEIGHTED>(x, w, [inverse], range);
    }
    Fit { scale: scales(best.scale), zero: [half as u8; LANES] }
}

#[inline(always)]
fn fit_asym<const WEIGHTED: bool>(bits: u32, x: &[Lanes], w: &[Lanes]) -> Fit {
    let last = ((1u32 << bits) - 1) as f32;
    let (mut least, mut most) = (Lanes::ZERO, Lanes::ZERO);
    for v in x {
        least = least.zip(*v, |m, v| if v < m { v } else { m });
        most = most.zip(*v, |m, v| if v > m { v } else { m });
    }
    let unit = most.zip(least, |hi, lo| last / if hi - lo > MAGNITUDE_MIN { hi - lo } else { MAGNITUDE_MIN });
    let mut best = Best::NONE;
    for ratios in grid(bits) {
        for shift in [-0.5, 0.5] {
            let zero = least.zip(unit, |lo, u| clamp(round(-lo * u + shift), 0.0, last));
            let range = Range { lo: zero.map(|z| -z), hi: zero.map(|z| last - z) };
            best.try_all::<TRIALS, WEIGHTED>(x, w, ratios.map(|r| unit.map(|u| u * r)), range);
        }
    }
    for _ in 0..2 {
        let inverse = best.scale.map(|d| 1.0 / d);
        let range = Range { lo: best.lo, hi: best.lo.map(|lo| last + lo) };
        best.try_all::<1, WEIGHTED>(x, w, [inverse], range);
    }
    let mut zero = [0; LANES];
    for l in 0..LANES {
        zero[l] = -best.lo.0[l] as i32 as u8;
    }
    Fit { scale: scales(best.scale), zero }
}

#[derive(Clone, Copy)]
struct Range {
    lo: Lanes,
    hi: Lanes,
}

/// The best trial so far.
struct Best {
    worth: Lanes,
    scale: Lanes,
    lo: Lanes,
}

impl Best {
    const NONE: Best = Best { worth: Lanes::ZERO, scale: Lanes::ZERO, lo: Lanes::ZERO };

    #[inline(always)]
    fn try_all<const K: usize, const WEIGHTED: bool>(
        &mut self,
        x: &[Lanes],
        w: &[Lanes],
        inverses: [Lanes; K],
        range: Range,
    ) {
        let (a, b) = sums::<K, WEIGHTED>(x, w, &inverses, range);
        for k in 0..K {
            for l in 0..LANES {
                let (a, b) = (a[k].0[l], b[k].0[l]);
                let worth = a * a / b;
                // NaN, where all levels are zero, is not better either.
                let better = worth > self.worth.0[l];
                self.worth.0[l] = if better { worth } else { self.worth.0[l] };
                self.scale.0[l] = if better { a / b } else { self.scale.0[l] };
                self.lo.0[l] = if better { range.lo.0[l] } else { self.lo.0[l] };
            }
        }
    }
}

/// `Σ w x q` and `Σ w q²` for the levels `q` that each trial proposes, summed in the order of the weights.
#[inline(always)]
fn sums<const K: usize, const WEIGHTED: bool>(
    x: &[Lanes],
    w: &[Lanes],
    inverses: &[Lanes; K],
    range: Range,
) -> ([Lanes; K], [Lanes; K]) {
    let (mut a, mut b) = ([Lanes::ZERO; K], [Lanes::ZERO; K]);
    for (i, x) in x.iter().enumerate() {
        let w = if WEIGHTED { w[i] } else { Lanes::splat(1.0) };
        for k in 0..K {
            for l in 0..LANES {
                let q = clamp(round(x.0[l] * inverses[k].0[l]), range.lo.0[l], range.hi.0[l]);
                let wq = if WEIGHTED { w.0[l] * q } else { q };
                a[k].0[l] += x.0[l] * wq;
                b[k].0[l] += q * wq;
            }
        }
    }
    (a, b)
}

/// To f16, at most its largest number; never minus zero.
#[inline(always)]
fn scales(scale: Lanes) -> [u16; LANES] {
    let mut out = [0; LANES];
    for l in 0..LANES {
        let code = f32_to_f16(clamp(scale.0[l], -F16_MAX, F16_MAX));
        out[l] = if code == 0x8000 { 0 } else { code };
    }
    out
}
