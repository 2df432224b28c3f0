//! Scales and minimums with the least weighted squared error, for sixteen groups at a time.
//!
//! A number becomes `D q − M`, `q` a level, `D = d × scale` and `M = dmin × minimum` of its group. The steps:
//!
//! 1. Each group by itself, as if `D` and `M` were any numbers (`free.rs`): trials propose levels, least squares says
//!    what they are worth.
//! 2. With those levels the error of a group is a quadratic in `D` and `M`, and six sums tell it. So many pairs
//!    `(d, dmin)` are tried for each block, all groups rounding their scales to them.
//! 3. The best pair is kept. Every group then tries the scales and minimums next to its own by what the numbers lose
//!    when they are rounded anew, and least squares finds `(d, dmin)` for the levels that come of it; twice.
//!
//! llama.cpp (`make_qkx3_quants`, `make_qp_quants`) does 1, then rounds scales to the largest one or to a search over the
//! scales alone, without looking at the numbers again. Step 3 is what gains over it.
//!
//! A lane is a group. Sums over a block are sums over its lanes by a fixed tree, which leaves the total in each of them.

use super::kinds::{Kind, Mins};
use super::levels::{Levels, Nearest};
use crate::codec::lanes::{LANES, Lanes, clamp, round};
use crate::minifloat::{F16_MAX, f16_to_f32, f32_to_f16};

pub(super) mod alike;
mod free;

/// What was found for each of sixteen groups; block numbers stand in each lane of the block.
#[derive(Clone, Copy)]
pub(super) struct Fit {
    /// f16 as f32.
    d: Lanes,
    dmin: Lanes,
    scale: Lanes,
    min: Lanes,
}

impl Fit {
    /// f16 bits of the block that lane `l` is of.
    #[inline(always)]
    pub fn block(&self, l: usize) -> (u16, u16) {
        (f32_to_f16(self.d.0[l]), f32_to_f16(self.dmin.0[l]))
    }

    /// Scale and minimum of the group.
    #[inline(always)]
    pub fn group(&self, l: usize) -> (i8, i8) {
        (self.scale.0[l] as i32 as i8, self.min.0[l] as i32 as i8)
    }

    /// What numbers are multiplied by, after the minimum was added to them, to become levels; and that minimum.
    #[inline(always)]
    pub fn inverse_factors(&self) -> (Lanes, Lanes) {
        let (wide, low) = self.factors();
        (wide.map(inverse), low)
    }

    #[inline(always)]
    fn factors(&self) -> (Lanes, Lanes) {
        (self.d.zip(self.scale, |d, s| d * s), self.dmin.zip(self.min, |d, m| d * m))
    }
}

/// Fits sixteen groups: `x[i]` is number `i` of each, `w[i]` its weight, which is 1 if all are `ALIKE`.
#[inline(always)]
pub(super) fn fit<const ALIKE: bool>(kind: &Kind, x: &[Lanes], w: &[Lanes]) -> Fit {
    match kind.levels {
        Levels::Linear(levels) => Problem::<_, ALIKE> { kind, x, w, levels }.solve(),
        Levels::Table(levels) => Problem::<_, ALIKE> { kind, x, w, levels }.solve(),
    }
}

/// Rounds that step 3 takes.
const ROUNDS: usize = 2;
/// Trial pairs: parts of the largest scale, and of the largest minimum, that the highest code stands for.
const REACH_FINE: [f32; 6] = [0.90, 0.94, 0.97, 1.0, 1.02, 1.05];
const REACH_COARSE: [f32; 8] = [0.80, 0.85, 0.90, 0.95, 1.0, 1.05, 1.1, 1.2];

/// How far from their own the groups look for scales and minimums: a step of Q6_K's scales is a small one.
const STEPS: [f32; 3] = [0.0, -1.0, 1.0];
const STEPS_FINE: [f32; 7] = [0.0, -1.0, 1.0, -2.0, 2.0, -3.0, 3.0];

/// Sixteen groups to fit.
struct Problem<'a, L, const ALIKE: bool> {
    kind: &'a Kind,
    x: &'a [Lanes],
    w: &'a [Lanes],
    levels: L,
}

/// Sums over a group, weighted: of 1, of the numbers x and of the levels q.
#[derive(Clone, Copy)]
struct Sums {
    one: Lanes,
    x: Lanes,
    q: Lanes,
    qq: Lanes,
    xq: Lanes,
}

impl<L: Nearest, const ALIKE: bool> Problem<'_, L, ALIKE> {
    #[inline(always)]
    fn solve(&self) -> Fit {
        let (scale, min) = self.free();
        let mut fit = if self.kind.n_groups() == 1 {
            let ones = Lanes::splat(1.0);
            Fit { d: half(scale), dmin: half(min), scale: ones, min: Lanes::splat(-1.0) }
                .with_min_of(self.kind.mins)
        } else {
            self.first_pair(scale, min)
        };
        let mut error = self.error_of(&fit);
        for _ in 0..ROUNDS {
            if self.kind.n_groups() > 1 {
                error = self.neighbours(&mut fit, error);
            }
            error = self.refit(&mut fit, error);
        }
        fit
    }

    /// Step 2: the pair `(d, dmin)` for which the groups lose least with the levels they have.
    #[inline(always)]
    fn first_pair(&self, scale: Lanes, min: Lanes) -> Fit {
        let sums = self.sums(scale, min);
        let (lo, hi) = self.kind.scales;
        let (lo, hi) = (f32::from(lo), f32::from(hi));
        let end = if lo < 0.0 { lo } else { hi };
        let widest = self.over_block(scale, |a, b| if b.abs() > a.abs() { b } else { a });
        // Of two numbers of equal size and opposite sign each lane would keep its own.
        let widest =
            self.over_block(scale, f32::max).zip(widest, |most, w| if w.abs() <= most { most } else { w });
        let highest = self.over_block(min, f32::max);
        let grid: &[f32] = if hi > 15.0 { &REACH_FINE } else { &REACH_COARSE };
        let most = match self.kind.mins {
            Mins::Groups(most) => f32::from(most),
            _ => 0.0,
        };
        let min_grid = if most > 0.0 { grid } else { &[1.0] };
        let mut best = Fit { d: Lanes::ZERO, dmin: Lanes::ZERO, scale: Lanes::ZERO, min: Lanes::ZERO };
        let mut best_gain = Lanes::splat(f32::NEG_INFINITY);
        for a in grid {
            let d = half(widest.map(|s| s * a / end));
            let chosen = scale.zip(d, |s, d| clamp(round(clamp(s * inverse(d), lo, hi)), lo, hi));
            let wide = chosen.zip(d, |s, d| s * d);
            let wanted = sums.min_for(wide);
            for b in min_grid {
                let dmin = half(highest.map(|m| if most > 0.0 { m * b / most } else { 0.0 }));
                let min = wanted.zip(dmin, |m, d| round(clamp(m * inverse(d), 0.0, most)));
                let gain = self.total(sums.gain(wide, min.zip(dmin, |m, d| m * d)));
                best.d = d.where_more(gain, best.d, best_gain);
                best.dmin = dmin.where_more(gain, best.dmin, best_gain);
                best.scale = chosen.where_more(gain, best.scale, best_gain);
                best.min = min.where_more(gain, best.min, best_gain);
                best_gain = gain.where_more(gain, best_gain, best_gain);
            }
        }
        best
    }

    /// Each group tries the scales and minimums next to its own; returns the errors.
    #[inline(always)]
    fn neighbours(&self, fit: &mut Fit, error: Lanes) -> Lanes {
        let (lo, hi) = (f32::from(self.kind.scales.0), f32::from(self.kind.scales.1));
        let (most, min_steps) = match self.kind.mins {
            Mins::Groups(most) => (f32::from(most), &STEPS[..]),
            _ => (0.0, &[0.0][..]),
        };
        let (from, mut least) = (*fit, error);
        let scale_steps: &[f32] = if hi > 100.0 { &STEPS_FINE } else { &STEPS };
        for &scale_step in scale_steps {
            for &min_step in min_steps {
                let trial = Fit {
                    scale: from.scale.map(|s| clamp(s + scale_step, lo, hi)),
                    min: from.min.map(|m| clamp(m + min_step, 0.0, most)),
                    ..from
                };
                if scale_step == 0.0 && min_step == 0.0 {
                    continue;
                }
                let error = self.error_of(&trial);
                fit.scale = trial.scale.where_more(least, fit.scale, error);
                fit.min = trial.min.where_more(least, fit.min, error);
                least = least.zip(error, |a, b| if b < a { b } else { a });
            }
        }
        least
    }

    /// `(d, dmin)` by least squares for the levels that numbers have now, if they lose less then; returns the errors.
    #[inline(always)]
    fn refit(&self, fit: &mut Fit, error: Lanes) -> Lanes {
        let (wide, low) = fit.factors();
        let s = self.sums(wide, low);
        let (scale, min) = (fit.scale, fit.min);
        let a = self.total(s.qq.zip(scale, |v, s| v * s * s));
        let b = self.total(s.q.zip(scale, |v, s| v * s).zip(min, |v, m| v * m));
        let c = self.total(s.one.zip(min, |v, m| v * m * m));
        let p = self.total(s.xq.zip(scale, |v, s| v * s));
        let q = self.total(s.x.zip(min, |v, m| v * m));
        let mut trial = *fit;
        for l in 0..LANES {
            let (a, b, c, p, q) = (a.0[l], b.0[l], c.0[l], p.0[l], q.0[l]);
            let det = a * c - b * b;
            let dmin = if det > 1e-6 * a * c { (p * b - a * q) / det } else { fit.dmin.0[l] };
            let d = (p + b * dmin) / a;
            trial.dmin.0[l] = dmin;
            trial.d.0[l] = if a > 0.0 { d } else { fit.d.0[l] };
        }
        trial.d = half(trial.d);
        trial.dmin = half(trial.dmin);
        let found = self.error_of(&trial);
        let (before, after) = (self.total(error), self.total(found));
        fit.d = trial.d.where_more(before, fit.d, after);
        fit.dmin = trial.dmin.where_more(before, fit.dmin, after);
        found.where_more(before, error, after)
    }

    #[inline(always)]
    fn error_of(&self, fit: &Fit) -> Lanes {
        let (wide, low) = fit.factors();
        self.error(wide, low)
    }

    /// Weighted squared error when numbers are rounded to the nearest levels of `wide × q − low`.
    #[inline(always)]
    fn error(&self, wide: Lanes, low: Lanes) -> Lanes {
        let inverse = wide.map(inverse);
        let mut error = Lanes::ZERO;
        for (x, w) in self.x.iter().zip(self.w) {
            for l in 0..LANES {
                let x = self.above(x.0[l], low.0[l]);
                let e = self.levels.nearest(x * inverse.0[l]).mul_add(-wide.0[l], x);
                let we = if ALIKE { e } else { w.0[l] * e };
                error.0[l] = we.mul_add(e, error.0[l]);
            }
        }
        error
    }

    /// Sums for the nearest levels of `wide × q − low`.
    #[inline(always)]
    fn sums(&self, wide: Lanes, low: Lanes) -> Sums {
        self.sums_by(wide.map(inverse), low).shifted(low.map(|m| -m))
    }

    /// Sums of numbers that are larger by `low`, `inverse` to one level.
    #[inline(always)]
    fn sums_by(&self, inverse: Lanes, low: Lanes) -> Sums {
        let mut s =
            Sums { one: Lanes::ZERO, x: Lanes::ZERO, q: Lanes::ZERO, qq: Lanes::ZERO, xq: Lanes::ZERO };
        for (x, w) in self.x.iter().zip(self.w) {
            for l in 0..LANES {
                let (x, w) = (self.above(x.0[l], low.0[l]), w.0[l]);
                let q = self.levels.nearest(x * inverse.0[l]);
                let wq = if ALIKE { q } else { w * q };
                s.one.0[l] += if ALIKE { 1.0 } else { w };
                s.x.0[l] = if ALIKE { s.x.0[l] + x } else { w.mul_add(x, s.x.0[l]) };
                s.q.0[l] += wq;
                s.qq.0[l] = wq.mul_add(q, s.qq.0[l]);
                s.xq.0[l] = wq.mul_add(x, s.xq.0[l]);
            }
        }
        s
    }

    /// `x + low`, where there are minimums.
    #[inline(always)]
    fn above(&self, x: f32, low: f32) -> f32 {
        if self.kind.mins == Mins::None { x } else { x + low }
    }

    /// The sum over the lanes of a block, in each of them.
    #[inline(always)]
    fn total(&self, v: Lanes) -> Lanes {
        self.over_block(v, |a, b| a + b)
    }

    /// Combines the lanes of a block pair by pair, then pairs of pairs: `f` must not care which comes first.
    #[inline(always)]
    fn over_block(&self, v: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
        // Through memory: else the compiler sorts the lanes of the loops before by the order of this tree.
        let mut v = std::hint::black_box(v);
        let mut distance = 1;
        while distance < self.kind.n_groups() {
            let from = v;
            for l in 0..LANES {
                v.0[l] = f(from.0[l], from.0[l ^ distance]);
            }
            distance *= 2;
        }
        v
    }
}

impl Sums {
    /// The same for numbers that are larger by `more`.
    #[inline(always)]
    fn shifted(mut self, more: Lanes) -> Sums {
        for l in 0..LANES {
            self.x.0[l] += more.0[l] * self.one.0[l];
            self.xq.0[l] += more.0[l] * self.q.0[l];
        }
        self
    }

    /// The minimum that loses least with a scale: zero of the derivative.
    #[inline(always)]
    fn min_for(&self, wide: Lanes) -> Lanes {
        let mut out = Lanes::ZERO;
        for l in 0..LANES {
            let wanted = wide.0[l] * self.q.0[l] - self.x.0[l];
            out.0[l] = if self.one.0[l] > 0.0 { wanted / self.one.0[l] } else { 0.0 };
        }
        out
    }

    /// How much less `wide × q − low` loses than zeros.
    #[inline(always)]
    fn gain(&self, wide: Lanes, low: Lanes) -> Lanes {
        let mut out = Lanes::ZERO;
        for l in 0..LANES {
            let (d, m) = (wide.0[l], low.0[l]);
            let linear = 2.0 * (d * self.xq.0[l] - m * self.x.0[l]);
            let square = d * (d * self.qq.0[l] - 2.0 * m * self.q.0[l]) + m * m * self.one.0[l];
            out.0[l] = linear - square;
        }
        out
    }
}

impl Fit {
    /// Without a minimum there is none to fit.
    #[inline(always)]
    fn with_min_of(mut self, mins: Mins) -> Fit {
        if mins == Mins::None {
            self.min = Lanes::ZERO;
            self.dmin = Lanes::ZERO;
        } else {
            self.dmin = self.dmin.map(|m| -m);
        }
        self
    }
}

/// What numbers are multiplied by to become levels. A scale of zero has one level.
#[inline(always)]
pub(super) fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// As f16 has it: at most its largest number, and not zero where there is anything.
#[inline(always)]
fn half(v: Lanes) -> Lanes {
    const LEAST: f32 = 1.0 / 16_777_216.0;
    v.map(|v| {
        let v = clamp(v, -F16_MAX, F16_MAX);
        let rounded = f16_to_f32(f32_to_f16(v));
        let least = if v < 0.0 { -LEAST } else { LEAST };
        let nothing = v.abs() < TINY;
        if nothing {
            0.0
        } else if rounded == 0.0 {
            least
        } else {
            rounded
        }
    })
}

/// Scales below this are none.
const TINY: f32 = 1e-30;
