//! A group by itself: the scale, and the minimum, as if both were any numbers.
//!
//! A trial scale proposes levels; what they are worth is what least squares makes of them, and the trial's own scale is
//! forgotten. Trials lie on a grid around the scale that just reaches the widest number; the best one is refined by
//! rounding anew with what it found (Lloyd's method).

use super::{Problem, inverse};
use crate::codec::ggml::kinds::Mins;
use crate::codec::ggml::levels::Nearest;
use crate::codec::lanes::{LANES, Lanes};

/// Trials: how many levels are taken for each level of the scale that just reaches the widest number.
const TWO: [f32; 12] = ratios(0.6, 1.8);
const THREE: [f32; 7] = ratios(0.78, 1.4);
const FOUR: [f32; 12] = ratios(0.85, 1.35);
const FIVE: [f32; 16] = ratios(0.92, 1.15);
const SIX: [f32; 12] = ratios(0.95, 1.08);
const EIGHT: [f32; 12] = ratios(0.98, 1.03);
/// With a minimum, which leaves less to gain from clipping.
const FOUR_AFFINE: [f32; 18] = ratios(0.9, 1.22);
const FIVE_AFFINE: [f32; 18] = ratios(0.94, 1.1);

const fn ratios<const N: usize>(first: f32, last: f32) -> [f32; N] {
    let mut out = [0.0; N];
    let mut i = 0;
    while i < N {
        out[i] = first + (last - first) * i as f32 / (N - 1) as f32;
        i += 1;
    }
    out
}

/// From the lowest level of IQ4 to its highest.
const IQ4_SPAN: f32 = 240.0;

/// The grid for levels that span so much.
fn grid(span: f32) -> &'static [f32] {
    match span as u32 {
        0..4 => &TWO,
        4..8 => &THREE,
        8..16 => &FOUR,
        16..32 => &FIVE,
        32..64 => &SIX,
        _ if span == IQ4_SPAN => &FOUR,
        _ => &EIGHT,
    }
}

/// The best trial so far.
struct Best {
    gain: Lanes,
    scale: Lanes,
    min: Lanes,
}

impl Best {
    #[inline(always)]
    fn take(&mut self, gain: Lanes, scale: Lanes, min: Lanes) {
        self.scale = scale.where_more(gain, self.scale, self.gain);
        self.min = min.where_more(gain, self.min, self.gain);
        self.gain = gain.where_more(gain, self.gain, self.gain);
    }
}

impl<L: Nearest, const ALIKE: bool> Problem<'_, L, ALIKE> {
    /// Scale `D` and minimum `M` of each group, numbers being `D q − M`.
    #[inline(always)]
    pub(super) fn free(&self) -> (Lanes, Lanes) {
        let mut best = Best { gain: Lanes::ZERO, scale: Lanes::ZERO, min: Lanes::ZERO };
        let (lo, hi) = (self.levels.nearest(f32::NEG_INFINITY), self.levels.nearest(f32::INFINITY));
        match self.kind.mins {
            Mins::None => self.symmetric(lo, hi, &mut best),
            Mins::Block => self.affine(hi, false, &mut best),
            Mins::Groups(_) => self.affine(hi, true, &mut best),
        }
        (best.scale, best.min)
    }

    /// The sign that puts the widest number on the lowest level; where levels are few the other one too.
    #[inline(always)]
    fn symmetric(&self, lo: f32, hi: f32, best: &mut Best) {
        let (least, most) = self.extremes();
        let start = least.zip(most, |least, most| lo * inverse(if most > -least { most } else { least }));
        let few = hi - lo < 8.0 || hi - lo == IQ4_SPAN;
        let signs: &[f32] = if few { &[1.0, -1.0] } else { &[1.0] };
        for sign in signs {
            for ratio in grid(hi - lo) {
                self.try_scale(start.map(|s| s * ratio * sign), best);
            }
        }
        self.try_scale(best.scale.map(inverse), best);
    }

    #[inline(always)]
    fn try_scale(&self, by: Lanes, best: &mut Best) {
        let sums = self.sums_by(by, Lanes::ZERO);
        let scale = sums.xq.zip(sums.qq, |a, b| a / b);
        // NaN, where all levels are zero, is not better than anything.
        best.take(sums.xq.zip(scale, |a, d| a * d), scale, Lanes::ZERO);
    }

    /// `positive`: minimums below zero do not exist.
    #[inline(always)]
    fn affine(&self, hi: f32, positive: bool, best: &mut Best) {
        let (least, most) = self.extremes();
        let least = if positive { least.map(|v| if v < 0.0 { v } else { 0.0 }) } else { least };
        let low = least.map(|v| -v);
        best.min = low;
        let by = most.zip(least, |most, least| hi * inverse(most - least));
        let grid: &[f32] = match hi as u32 {
            15 => &FOUR_AFFINE,
            31 => &FIVE_AFFINE,
            _ => grid(hi),
        };
        for ratio in grid {
            self.try_both(by.map(|b| b * ratio), low, low, positive, best);
        }
        for _ in 0..2 {
            self.try_both(best.scale.map(inverse), best.min, low, positive, best);
        }
    }

    /// Least squares for the levels that numbers have with `by` and `min`. Gains are those over `−low` everywhere, and
    /// sums are taken from there on, so that numbers far from zero do not cancel.
    #[inline(always)]
    fn try_both(&self, by: Lanes, min: Lanes, low: Lanes, positive: bool, best: &mut Best) {
        let s = self.sums_by(by, min).shifted(low.zip(min, |low, min| low - min));
        let (mut scale, mut shift) = (Lanes::ZERO, Lanes::ZERO);
        for l in 0..LANES {
            let (n, x, q, qq, xq) = (s.one.0[l], s.x.0[l], s.q.0[l], s.qq.0[l], s.xq.0[l]);
            let det = n * qq - q * q;
            let (d, m) = ((n * xq - q * x) / det, (q * xq - qq * x) / det);
            let both = det > 1e-6 * n * qq && !(positive && m < -low.0[l]);
            // With the minimum at its end, or with one level only, there is one unknown left.
            let end = if positive { -low.0[l] } else { 0.0 };
            let alone = if qq > 0.0 { (xq + end * q) / qq } else { 0.0 };
            let level = if positive || n == 0.0 { end } else { -x / n };
            let alone = if positive { alone } else { 0.0 };
            scale.0[l] = if both { d } else { alone };
            shift.0[l] = if both { m } else { level };
        }
        best.take(s.gain(scale, shift), scale, low.zip(shift, |low, m| low + m));
    }

    /// The least and the largest number of each group.
    #[inline(always)]
    fn extremes(&self) -> (Lanes, Lanes) {
        let first = self.x.first().copied().unwrap_or(Lanes::ZERO);
        let (mut least, mut most) = (first, first);
        for v in self.x {
            least = least.zip(*v, |m, v| if v < m { v } else { m });
            most = most.zip(*v, |m, v| if v > m { v } else { m });
        }
        (least, most)
    }
}
