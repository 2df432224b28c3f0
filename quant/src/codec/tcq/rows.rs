//! Rows of similar size share a class, so that the tables suit them: what is known of a matrix before its columns are coded.

use super::layout::list_bits;
use super::tables::PER_OCTAVE;
use crate::codec::Matrix;
use crate::isa::Isa;
use crate::math;
use crate::numbers;
use crate::per_isa;

/// Rows of similar size share a class.
pub struct RowClasses {
    /// Classes that occur, in tables.
    pub distinct: Vec<i32>,
    /// Which of them each row has. `[rows]`
    pub of_row: Vec<u8>,
    /// What each row is multiplied by to be of class 0. `[rows]`
    inverse: Vec<f32>,
}

/// How large the numbers of a column are.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// `½ log2` of the mean square, rows brought to class 0; minus infinity of zeros.
    pub deviation: f64,
    /// Largest magnitude.
    pub largest: f32,
}

impl RowClasses {
    /// Classes in multiples of `unit` where they save more than they take. `largest` becomes the largest magnitudes of the columns.
    pub fn of(isa: Isa, w: Matrix<'_>, largest: &mut [f32], unit: i32) -> RowClasses {
        let plain = RowClasses { distinct: vec![0], of_row: vec![0; w.rows], inverse: vec![1.0; w.rows] };
        // Mean square of each row, every column counted alike.
        let mut factors = vec![0.0f32; w.cols];
        column_extents(isa, w.data, &mut factors, largest);
        for (factor, &mut largest) in factors.iter_mut().zip(largest) {
            let variance = *factor / w.rows as f32;
            let counts = variance.is_normal() && SQUARES_FIT.contains(&largest);
            *factor = if counts { 1.0 / variance.sqrt() } else { 0.0 };
        }
        let mut sums = vec![0.0f32; w.rows];
        row_squares(isa, w.data, &factors, &mut sums);
        let octaves: Vec<f64> = sums.iter().map(|&s| 0.5 * log2_or(f64::from(s), 0.0)).collect();
        let mean = octaves.iter().sum::<f64>() / w.rows as f64;
        let value = |o: &f64| ((o - mean) * PER_OCTAVE / f64::from(unit)).round().clamp(-15.0, 15.0) as i32;
        let values: Vec<i32> = octaves.iter().map(value).collect();
        let list: Vec<i8> = values.iter().map(|&v| v as i8).collect();
        // What knowing the size of a row saves: the mean of squares against their geometric mean.
        let power = |v: &i32| libm::exp2(2.0 * f64::from(v * unit) / PER_OCTAVE);
        let arithmetic = values.iter().map(power).sum::<f64>() / w.rows as f64;
        let geometric = values.iter().map(|&v| f64::from(v * unit) / PER_OCTAVE).sum::<f64>() / w.rows as f64;
        let saved = (0.5 * log2_or(arithmetic, 0.0) - geometric) * w.data.len() as f64;
        if saved <= list_bits(&list, w.rows) - list_bits(&vec![0; w.rows], w.rows) {
            return plain;
        }
        let mut distinct: Vec<i32> = values.iter().map(|v| v * unit).collect();
        distinct.sort_unstable();
        distinct.dedup();
        let index = |v: &i32| distinct.binary_search(&(v * unit)).unwrap_or(0) as u8;
        let inverse = |v: &i32| libm::exp2(-f64::from(v * unit) / PER_OCTAVE) as f32;
        RowClasses {
            of_row: values.iter().map(index).collect(),
            inverse: values.iter().map(inverse).collect(),
            distinct,
        }
    }

    /// Sizes of all columns of a matrix.
    pub fn sizes(&self, isa: Isa, w: Matrix<'_>, largest: &[f32]) -> Vec<Size> {
        let mut squares = vec![0.0; w.cols];
        column_squares(isa, w.data, &self.inverse, &mut squares);
        let (mut x, mut scaled) = (Vec::new(), Vec::new());
        let mut size = |(c, (&sum, &largest)): (usize, (&f32, &f32))| {
            if largest == 0.0 || SQUARES_FIT.contains(&largest) {
                return size_of(sum, largest, w.rows);
            }
            columns(w, c, 1, &mut x);
            self.size(isa, &x, &mut scaled)
        };
        squares.iter().zip(largest).enumerate().map(&mut size).collect()
    }

    /// The size of one column.
    pub fn size(&self, isa: Isa, x: &[f32], scaled: &mut Vec<f32>) -> Size {
        let largest = numbers::max_magnitude(isa, x).unwrap_or(f32::MAX);
        scaled.resize(x.len(), 0.0);
        let power = if largest == 0.0 || SQUARES_FIT.contains(&largest) { 1.0 } else { 1.0 / largest };
        scaled.iter_mut().zip(x.iter().zip(&self.inverse)).for_each(|(s, (v, i))| *s = v * power * i);
        let size = size_of(math::sum_squares(isa, scaled), largest, x.len());
        Size { deviation: size.deviation - log2_or(f64::from(power), 0.0), largest }
    }
}

/// Largest magnitudes whose squares, and sums of them, are normal numbers.
const SQUARES_FIT: std::ops::Range<f32> = 1e-12..1e12;

fn size_of(sum: f32, largest: f32, rows: usize) -> Size {
    let mean = f64::from(sum) / rows as f64;
    let deviation = if largest == 0.0 { f64::NEG_INFINITY } else { 0.5 * log2_or(mean, -200.0) };
    Size { deviation, largest }
}

/// The columns `first ..` of a matrix, at most `n`, one after the other.
pub fn columns(w: Matrix<'_>, first: usize, n: usize, x: &mut Vec<f32>) {
    let n = n.min(w.cols - first);
    x.resize(n * w.rows, 0.0);
    for (r, row) in w.data.chunks_exact(w.cols).enumerate() {
        row[first..first + n].iter().zip(x[r..].iter_mut().step_by(w.rows)).for_each(|(v, to)| *to = *v);
    }
}

per_isa! {
    /// Sum of squares and largest magnitude of each column of finite numbers.
    fn column_extents(w: &[f32], sums: &mut [f32], largest: &mut [f32]) = column_extents_body;
}
per_isa! {
    /// Sum over rows of (value · the row's factor)², for each column.
    fn column_squares(w: &[f32], factors: &[f32], sums: &mut [f32]) = column_squares_body;
}
per_isa! {
    /// Sum over columns of (value · the column's factor)², for each row.
    fn row_squares(w: &[f32], factors: &[f32], sums: &mut [f32]) = row_squares_body;
}

#[inline(always)]
fn column_extents_body(w: &[f32], sums: &mut [f32], largest: &mut [f32]) {
    sums.fill(0.0);
    largest.fill(0.0);
    for row in w.chunks_exact(sums.len().max(1)) {
        for ((sum, most), v) in sums.iter_mut().zip(largest.iter_mut()).zip(row) {
            let v = v.abs();
            *sum = v.mul_add(v, *sum);
            *most = if v > *most { v } else { *most };
        }
    }
}

#[inline(always)]
fn column_squares_body(w: &[f32], factors: &[f32], sums: &mut [f32]) {
    sums.fill(0.0);
    for (row, factor) in w.chunks_exact(sums.len().max(1)).zip(factors) {
        for (sum, v) in sums.iter_mut().zip(row) {
            let v = v * factor;
            *sum = v.mul_add(v, *sum);
        }
    }
}

#[inline(always)]
fn row_squares_body(w: &[f32], factors: &[f32], sums: &mut [f32]) {
    /// Chains of a row.
    const CHAINS: usize = 16;
    for (row, sum) in w.chunks_exact(factors.len().max(1)).zip(sums) {
        let mut chains = [0.0f32; CHAINS];
        for (row, factors) in row.chunks(CHAINS).zip(factors.chunks(CHAINS)) {
            for (chain, (v, factor)) in chains.iter_mut().zip(row.iter().zip(factors)) {
                let v = v * factor;
                *chain = v.mul_add(v, *chain);
            }
        }
        *sum = chains.iter().sum();
    }
}

/// log2 of a number, or `otherwise` where it has none.
pub fn log2_or(x: f64, otherwise: f64) -> f64 {
    if x > 0.0 && x.is_finite() { math::log(x) / std::f64::consts::LN_2 } else { otherwise }
}
