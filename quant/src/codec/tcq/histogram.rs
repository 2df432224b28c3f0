//! How many bits a column takes by any class, without going through it again.

use super::rows::RowClasses;
use super::tables::{self, TABLES, Table};

/// Tables that are counted in by turns.
const TABLES_OF_COUNTS: usize = 4;

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
        let n = n_levels * rows.distinct.len();
        let mut tables = vec![0u32; TABLES_OF_COUNTS * n];
        let place =
            |l: i16, class: u8| usize::from(class) * n_levels + (l.clamp(first, last) - first) as usize;
        let (fours, rest) = levels.as_chunks::<TABLES_OF_COUNTS>();
        let (classes, rest_classes) = rows.of_row.as_chunks::<TABLES_OF_COUNTS>();
        for (levels, classes) in fours.iter().zip(classes) {
            // Neighbours count in tables of their own: a count need not wait for the one before it.
            for table in 0..TABLES_OF_COUNTS {
                tables[table * n + place(levels[table], classes[table])] += 1;
            }
        }
        for (&l, &class) in rest.iter().zip(rest_classes) {
            tables[place(l, class)] += 1;
        }
        let mut counts = vec![0u32; n];
        for table in tables.chunks_exact(n) {
            counts.iter_mut().zip(table).for_each(|(sum, n)| *sum += n);
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
