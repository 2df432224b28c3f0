//! How many bits a column takes by any class, without going through it again.

use std::ops::Range;
use std::sync::OnceLock;

use super::rows::RowClasses;
use super::tables::{self, TABLES, Table};
use crate::isa::Isa;
use crate::per_isa;

/// Tables that are counted in by turns.
const TABLES_OF_COUNTS: usize = 4;
/// Levels beyond it have no symbol in any table.
const LEVEL_MAX: i16 = 256;
/// Levels of which a count is kept.
const LEVELS: usize = 2 * LEVEL_MAX as usize;
/// Sums that a vector holds.
const SUMS: usize = 8;

/// How often each level occurs in each row class.
pub struct Histogram {
    /// `[row classes][levels]`, levels from `first` on; a multiple of [`SUMS`] of them.
    counts: Vec<f32>,
    first: i16,
    n_levels: usize,
}

impl Histogram {
    /// Of the levels of `rows`, at most 2^24.
    pub fn of(isa: Isa, levels: &[i16], classes: &RowClasses, rows: Range<usize>) -> Histogram {
        let range = (least(isa, levels), most(isa, levels));
        let (first, last) = (range.0.max(-LEVEL_MAX), range.1.min(LEVEL_MAX - 1));
        let n_levels = ((last - first) as usize + 1).next_multiple_of(SUMS);
        let n = n_levels * classes.distinct.len();
        // Many small tables would take longer to add up than to fill.
        let apart = if n * TABLES_OF_COUNTS <= 2 * levels.len() { n } else { 0 };
        let mut tables = vec![0u32; n + apart * (TABLES_OF_COUNTS - 1)];
        let place =
            |l: i16, class: u8| usize::from(class) * n_levels + (l.clamp(first, last) - first) as usize;
        let (fours, rest) = levels.as_chunks::<TABLES_OF_COUNTS>();
        let (classes, rest_classes) = classes.of_row[rows].as_chunks::<TABLES_OF_COUNTS>();
        for (levels, classes) in fours.iter().zip(classes) {
            // Neighbours count in tables of their own: a count need not wait for the one before it.
            for table in 0..TABLES_OF_COUNTS {
                tables[table * apart + place(levels[table], classes[table])] += 1;
            }
        }
        for (&l, &class) in rest.iter().zip(rest_classes) {
            tables[place(l, class)] += 1;
        }
        let mut counts = vec![0.0; n];
        for table in tables.chunks_exact(n) {
            counts.iter_mut().zip(table).for_each(|(sum, n)| *sum += *n as f32);
        }
        Histogram { counts, first, n_levels }
    }

    /// Bits of all by a column class.
    pub fn bits(&self, isa: Isa, class: i32, row_classes: &[i32]) -> f64 {
        let start = (self.first + LEVEL_MAX) as usize;
        let of_class = |(counts, row_class): (&[f32], &i32)| {
            let bits = &bits_of(class + row_class)[start..][..self.n_levels];
            f64::from(dot(isa, counts, bits))
        };
        self.counts.chunks_exact(self.n_levels).zip(row_classes).map(of_class).sum()
    }
}

/// Table `q`, or the nearest there is.
pub fn table_at(q: i32) -> &'static Table {
    &tables::tables()[q.clamp(0, TABLES as i32 - 1) as usize]
}

/// What each level takes by table `q`, or the nearest there is, from `-LEVEL_MAX` on, and some more.
fn bits_of(q: i32) -> &'static [f32] {
    static BITS: OnceLock<Vec<f32>> = OnceLock::new();
    let each = LEVELS + SUMS;
    let all = BITS.get_or_init(|| {
        let bits = |table: &Table, level: i32| {
            let symbol = tables::symbol(level).unwrap_or(tables::ESCAPES[0]);
            table.parity[(level & 1) as usize].bits[symbol]
        };
        let levels = -i32::from(LEVEL_MAX)..(LEVELS + SUMS) as i32 - i32::from(LEVEL_MAX);
        tables::tables().iter().flat_map(|table| levels.clone().map(move |l| bits(table, l))).collect()
    });
    &all[q.clamp(0, TABLES as i32 - 1) as usize * each..][..each]
}

per_isa! { fn least(levels: &[i16]) -> i16 = least_body; }
per_isa! { fn most(levels: &[i16]) -> i16 = most_body; }

#[inline(always)]
fn least_body(levels: &[i16]) -> i16 {
    levels.iter().fold(0, |least, &l| least.min(l))
}

#[inline(always)]
fn most_body(levels: &[i16]) -> i16 {
    levels.iter().fold(0, |most, &l| most.max(l))
}

per_isa! { fn dot(counts: &[f32], bits: &[f32]) -> f32 = dot_body; }

#[inline(always)]
fn dot_body(counts: &[f32], bits: &[f32]) -> f32 {
    let mut sums = [0.0f32; SUMS];
    for (counts, bits) in counts.as_chunks::<SUMS>().0.iter().zip(bits.as_chunks::<SUMS>().0) {
        for ((sum, n), bits) in sums.iter_mut().zip(counts).zip(bits) {
            *sum = n.mul_add(*bits, *sum);
        }
    }
    sums.iter().sum()
}
