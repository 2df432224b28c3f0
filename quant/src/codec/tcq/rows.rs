//! Rows of similar size share a class, so that the tables suit them: what is known of a matrix before its columns are coded.

use super::layout::list_bits;
use super::tables::PER_OCTAVE;
use crate::codec::Matrix;
use crate::isa::Isa;
use crate::math;
use crate::numbers;

/// Rows of similar size share a class.
pub struct RowClasses {
    /// Classes that occur, in tables.
    pub distinct: Vec<i32>,
    /// Which of them each row has. `[rows]`
    pub of_row: Vec<u8>,
    /// What each row is multiplied by to be of class 0. `[rows]`
    inverse: Vec<f32>,
}

impl RowClasses {
    /// Classes in multiples of `unit` where they save more than they take.
    pub fn of(isa: Isa, columns: &[f32], w: Matrix<'_>, unit: i32) -> RowClasses {
        let plain = RowClasses { distinct: vec![0], of_row: vec![0; w.rows], inverse: vec![1.0; w.rows] };
        // Mean square of each row, every column counted alike.
        let mut sums = vec![0.0f32; w.rows];
        for x in columns.chunks_exact(w.rows) {
            let variance = math::sum_squares(isa, x) / w.rows as f32;
            if variance.is_normal() {
                let inverse = 1.0 / variance;
                sums.iter_mut().zip(x).for_each(|(s, v)| *s += v * v * inverse);
            }
        }
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

    /// `½ log2` of a column's mean square, rows brought to class 0, and its largest magnitude.
    pub fn half_log_variance(&self, isa: Isa, x: &[f32], scaled: &mut Vec<f32>) -> (f64, f32) {
        let largest = numbers::max_magnitude(isa, x).unwrap_or(f32::MAX);
        if largest == 0.0 {
            return (f64::NEG_INFINITY, largest);
        }
        scaled.resize(x.len(), 0.0);
        // Squares of the very large and the very small would not be normal numbers.
        let power = if (1e-12..1e12).contains(&largest) { 1.0 } else { 1.0 / largest };
        scaled.iter_mut().zip(x.iter().zip(&self.inverse)).for_each(|(s, (v, i))| *s = v * power * i);
        let mean = f64::from(math::sum_squares(isa, scaled)) / x.len() as f64;
        (0.5 * log2_or(mean, -200.0) - log2_or(f64::from(power), 0.0), largest)
    }
}

/// A column after the other.
pub fn transposed(w: Matrix<'_>) -> Vec<f32> {
    /// Rows and columns of a tile.
    const TILE: usize = 16;
    let mut out = vec![0.0; w.data.len()];
    for (r, rows) in (0..w.rows).step_by(TILE).zip(w.data.chunks(TILE * w.cols)) {
        for c in (0..w.cols).step_by(TILE) {
            let mut tile = [[0.0; TILE]; TILE];
            let n = TILE.min(w.cols - c);
            for (tile, row) in tile.iter_mut().zip(rows.chunks_exact(w.cols)) {
                tile[..n].copy_from_slice(&row[c..c + n]);
            }
            for i in 0..n {
                let column = &mut out[(c + i) * w.rows + r..][..TILE.min(w.rows - r)];
                column.iter_mut().zip(&tile).for_each(|(to, row)| *to = row[i]);
            }
        }
    }
    out
}

/// log2 of a number, or `otherwise` where it has none.
pub fn log2_or(x: f64, otherwise: f64) -> f64 {
    if x > 0.0 && x.is_finite() { math::log(x) / std::f64::consts::LN_2 } else { otherwise }
}
