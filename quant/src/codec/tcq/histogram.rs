//! How many bits a column takes by any class, without going through it again.

use super::rows::RowClasses;
use super::tables::{self, TABLES, Table};

/// How often each level occurs in each row class.
pub struct Histogram {
    /// `[row classes][levels]`, levels from `first` on.
    counts: Vec<u32>,
    first: i32,
    n_levels: usize,
}

impl Histogram {
    /// Levels beyond it have no symbol in any table.
    const LEVEL_MAX: i16 = 300;

    pub fn of(levels: &[i16], rows: &RowClasses) -> Histogram {
        let limit = Histogram::LEVEL_MAX;
        let range = levels.iter().fold((0, 0), |(a, b), &l| (l.min(a), l.max(b)));
        let (first, last) = (range.0.max(-limit), range.1.min(limit));
        let n_levels = (last - first) as usize + 1;
        let mut counts = vec![0; n_levels * rows.distinct.len()];
        for (&l, &class) in levels.iter().zip(&rows.of_row) {
            counts[usize::from(class) * n_levels + (l.clamp(first, last) - first) as usize] += 1;
        }
        Histogram { counts, first: first.into(), n_levels }
    }

    /// Bits of all by a column class.
    pub fn bits(&self, class: i32, row_classes: &[i32]) -> f64 {
        let mut sum = 0.0;
        for (counts, row_class) in self.counts.chunks_exact(self.n_levels).zip(row_classes) {
            let table = table_at(class + row_class);
            for (level, &n) in (self.first..).zip(counts).filter(|(_, n)| **n > 0) {
                let symbol = tables::symbol(level).unwrap_or(tables::ESCAPES[0]);
                let bits = table.parity[(level & 1) as usize].bits[symbol];
                sum += f64::from(n) * f64::from(bits);
            }
        }
        sum
    }
}

/// Table `q`, or the nearest there is.
pub fn table_at(q: i32) -> &'static Table {
    &tables::tables()[q.clamp(0, TABLES as i32 - 1) as usize]
}
