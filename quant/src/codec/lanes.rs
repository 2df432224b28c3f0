//! Sixteen groups side by side: lane `l` of every vector belongs to group `l`.
//!
//! A scale search is the same arithmetic for each group. Done for sixteen groups at once, nothing is ever summed across
//! lanes: each sum is one chain over its group, in column order, in scalar code and in vector code alike. The price is
//! one transposition of the weights. A group that is shorter than the others (the last one of a row), or missing, is
//! filled up with zeros, which every codec represents exactly, so they add nothing to any error.

use super::Matrix;

/// Groups handled at once.
pub(crate) const LANES: usize = 16;

/// One number of each of sixteen groups.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Lanes(pub [f32; LANES]);

impl Lanes {
    pub const ZERO: Lanes = Lanes([0.0; LANES]);

    #[inline(always)]
    pub fn splat(v: f32) -> Lanes {
        Lanes([v; LANES])
    }

    #[inline(always)]
    pub fn map(self, f: impl Fn(f32) -> f32) -> Lanes {
        let mut out = Lanes::ZERO;
        for l in 0..LANES {
            out.0[l] = f(self.0[l]);
        }
        out
    }

    #[inline(always)]
    pub fn zip(self, other: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
        let mut out = Lanes::ZERO;
        for l in 0..LANES {
            out.0[l] = f(self.0[l], other.0[l]);
        }
        out
    }

    /// Lane by lane the one of `self` and `other` whose key is larger; `other` if neither is, or a key is NaN.
    #[inline(always)]
    pub fn where_more(self, key: Lanes, other: Lanes, other_key: Lanes) -> Lanes {
        let mut out = Lanes::ZERO;
        for l in 0..LANES {
            out.0[l] = if key.0[l] > other_key.0[l] { self.0[l] } else { other.0[l] };
        }
        out
    }
}

/// `lo ≤ v ≤ hi`, for numbers.
#[inline(always)]
pub(crate) fn clamp(v: f32, lo: f32, hi: f32) -> f32 {
    let v = if v < hi { v } else { hi };
    if v > lo { v } else { lo }
}

/// 1.5 × 2^23. A number of at most 2^22 that is added to it leaves no room for a fraction, so it is rounded to the
/// nearest integer, ties to even; that integer is then in the low bits, as two's complement.
pub(crate) const MAGIC: f32 = 12_582_912.0;

/// To the nearest integer, ties to even, for |v| ≤ 2^22.
#[inline(always)]
pub(crate) fn round(v: f32) -> f32 {
    (v + MAGIC) - MAGIC
}

/// How a matrix falls into groups: along rows, the last one of a row may be shorter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Groups {
    pub rows: usize,
    pub cols: usize,
    pub size: usize,
}

impl Groups {
    pub fn per_row(self) -> usize {
        self.cols.div_ceil(self.size)
    }

    pub fn count(self) -> usize {
        self.rows * self.per_row()
    }

    /// First column and length of the group.
    #[inline(always)]
    pub fn columns(self, group: usize) -> (usize, usize) {
        let start = group % self.per_row() * self.size;
        (start, self.size.min(self.cols - start))
    }

    /// Position of the first weight of the group in the matrix, and its length.
    #[inline(always)]
    pub fn span(self, group: usize) -> (usize, usize) {
        let (start, len) = self.columns(group);
        (group / self.per_row() * self.cols + start, len)
    }

    /// Weights of the groups `first ..` (at most sixteen), transposed: `block[i]` is weight `i` of each group.
    #[inline(always)]
    pub fn load(self, w: Matrix<'_>, first: usize, block: &mut [Lanes]) {
        for l in 0..LANES {
            let (start, len) = if first + l < self.count() { self.span(first + l) } else { (0, 0) };
            fill(block, l, &w.data[start..start + len]);
        }
    }

    /// Weights of the columns that the groups `first ..` cover, transposed in the same way.
    #[inline(always)]
    pub fn load_importance(self, importance: &[f32], first: usize, block: &mut [Lanes]) {
        for l in 0..LANES {
            let (start, len) = if first + l < self.count() { self.columns(first + l) } else { (0, 0) };
            fill(block, l, &importance[start..start + len]);
        }
    }

    /// Importance with the largest of each group of columns made 1, so that no sum can overflow or vanish. A group of
    /// columns that are all without importance counts them all alike.
    pub fn normalise(self, importance: &[f32]) -> Vec<f32> {
        let mut out = importance.to_vec();
        for group in out.chunks_mut(self.size) {
            let largest = group.iter().fold(0.0f32, |m, &v| m.max(v));
            for v in group {
                *v = if largest > 0.0 { *v / largest } else { 1.0 };
            }
        }
        out
    }
}

#[inline(always)]
fn fill(block: &mut [Lanes], lane: usize, values: &[f32]) {
    for (b, &v) in block.iter_mut().zip(values) {
        b.0[lane] = v;
    }
    for b in block.iter_mut().skip(values.len()) {
        b.0[lane] = 0.0;
    }
}

/// The largest magnitude in each lane.
#[inline(always)]
pub(crate) fn max_magnitude(block: &[Lanes]) -> Lanes {
    let mut largest = Lanes::ZERO;
    for x in block {
        largest = largest.zip(*x, |m, v| if v.abs() > m { v.abs() } else { m });
    }
    largest
}
