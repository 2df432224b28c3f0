//! The end of a small matrix, where a byte is a share of the whole: what is coded so far is counted to the word.

use super::coder::{Choice, Coder};
use super::histogram::Histogram;
use super::layout::{Stored, segments};

/// Columns at the end of a small matrix after each of which its bytes are counted.
const MEASURED_COLUMNS: usize = 6;
/// Weights of a small matrix.
const MEASURED_WEIGHTS: usize = 1 << 19;
/// Bits that are left to spare while columns are left.
const SPARE_BITS: f64 = 8.0;
/// What more is spared where steps are fine: a number, and a share of the matrix.
const SPARE_FINE_BITS: f64 = 24.0;
const SPARE_SHARE: f64 = 4.5e-4;
/// Bits a weight from which steps are fine.
const FINE_BITS: f64 = 3.2;
/// How often the last column may be coded again.
const RETRIES: usize = 24;
/// Units by which the steps of the last columns may lie beyond those of the others.
const STEPS_BEYOND: i32 = 2;
/// What one try changes, in octaves of the step that the price of bits belongs to.
const TRY: f64 = 0.125;

/// Values of side information that the last columns may have: those that others have, so as not to make the values of all
/// columns dearer when the bytes are nearly filled.
pub struct Known {
    pub steps: (i32, i32),
    /// As tables.
    pub classes: (i32, i32),
}

impl Known {
    pub fn of(stored: &Stored, coded: &[bool]) -> Known {
        let range = |list: &[i8]| {
            let values = list.iter().zip(coded).filter(|(_, c)| **c).map(|(v, _)| i32::from(*v));
            values.fold((i32::MAX, i32::MIN), |(a, b), v| (a.min(v), b.max(v)))
        };
        let (least, most) = range(&stored.steps);
        Known { steps: (least - STEPS_BEYOND, most + STEPS_BEYOND), classes: range(&stored.classes) }
    }
}

impl Coder<'_> {
    /// Whether the column that was coded last is one of the last of a small matrix.
    pub(super) fn is_measured(&self) -> bool {
        self.n_left() < MEASURED_COLUMNS && self.is_small()
    }

    /// Whether a byte is a share of the matrix that counts.
    pub(super) fn is_small(&self) -> bool {
        self.w.data.len() <= MEASURED_WEIGHTS
    }

    /// Sees to it that the columns that are left can take what is left. The one that was coded last, for `choice` and in `own`
    /// bits, gets coarser if not even zeros would fit behind it; the last of all gets finer until the bytes are filled.
    pub(super) fn measure(&mut self, column: usize, x: &[f32], choice: Choice, own: f64) {
        let (limit, zeros) = (self.limit as f64 * 8.0, self.zero_bits());
        let room = limit - self.n_left() as f64 * zeros;
        let mut ending = Ending { column, choice, own, measured: self.bits_so_far(zeros), own_measured: own };
        for _ in 0..RETRIES {
            if ending.measured <= room {
                break;
            }
            while ending.bits() > room && ending.choice.octaves > choice.octaves - TRY * RETRIES as f64 {
                ending.retry(self, x, -TRY);
            }
            ending.measure(self, zeros);
        }
        if self.n_left() > 0 {
            self.control.budget = self.control.spent + limit - ending.measured - self.spare_bits();
            return self.control.solve();
        }
        let fits = ending.choice.octaves;
        while ending.bits() <= limit && ending.choice.octaves < fits + TRY * RETRIES as f64 {
            ending.retry(self, x, TRY);
        }
        while ending.choice.octaves > fits + TRY / 2.0 {
            ending.measure(self, zeros);
            if ending.measured <= limit {
                break;
            }
            while ending.bits() > limit && ending.choice.octaves > fits + TRY / 2.0 {
                ending.retry(self, x, -TRY);
            }
        }
        self.assembled = self.assemble().ok();
        // A word more than was reckoned, once in a while.
        for _ in 0..RETRIES {
            if self.assembled.as_ref().is_none_or(|bytes| bytes.len() as u64 <= self.limit) {
                break;
            }
            ending.retry(self, x, -TRY);
            self.assembled = self.assemble().ok();
        }
    }

    /// Bits that are left to spare while columns are left. Where steps are fine, bits weighing more hardly makes a column coarser,
    /// and what the last one may not take must be there.
    fn spare_bits(&self) -> f64 {
        let bits = self.limit as f64 * 8.0;
        let fine = bits > FINE_BITS * self.w.data.len() as f64;
        SPARE_BITS + if fine { SPARE_FINE_BITS + SPARE_SHARE * bits } else { 0.0 }
    }

    /// Columns that are not coded yet.
    pub(super) fn n_left(&self) -> usize {
        self.w.cols - self.n_coded
    }

    /// Bits of a column of zeros of the commonest class.
    fn zero_bits(&self) -> f64 {
        let zeros = Histogram::of(&vec![0; self.w.rows], &self.rows, 0..self.w.rows);
        zeros.bits(self.isa, self.in_units(&self.coded_classes()).0.into(), &self.rows.distinct)
    }

    /// Bits of the matrix if the columns that are left took none instead of `zeros`. A lane leaves a word for every 16 bits that
    /// it takes, so what its columns take tells its words.
    fn bits_so_far(&self, zeros: f64) -> f64 {
        let side = self.stored_so_far().assemble(&[], &[]).len() + 4 * segments(self.w.rows).len();
        let words: f64 = self.lane_bits.iter().map(|bits| 32.0 + 16.0 * (bits / 16.0).floor()).sum();
        8.0 * side as f64 + words - self.n_left() as f64 * zeros
    }

    /// Adds the bits of a column to those of its lane, or takes them away again.
    pub(super) fn tally(&mut self, column: usize, levels: &[i16], sign: f64) {
        let lanes = 1 << self.stored.lanes_log2;
        let class = self.stored.classes[column].into();
        for (i, rows) in segments(self.w.rows).enumerate() {
            let histogram = Histogram::of(&levels[rows.clone()], &self.rows, rows);
            let bits = histogram.bits(self.isa, class, &self.rows.distinct);
            self.lane_bits[i * lanes + column % lanes] += sign * bits;
        }
    }
}

/// A column that is coded again and again.
struct Ending {
    column: usize,
    choice: Choice,
    /// Bits of its numbers.
    own: f64,
    /// Bits of the matrix when they were measured, and of the column's numbers then.
    measured: f64,
    own_measured: f64,
}

impl Ending {
    /// Bits of the matrix, near enough.
    fn bits(&self) -> f64 {
        self.measured + self.own - self.own_measured
    }

    fn measure(&mut self, coder: &Coder<'_>, zeros: f64) {
        (self.measured, self.own_measured) = (coder.bits_so_far(zeros), self.own);
    }

    /// Codes it again, bits weighing more or less. The step stays, since another would be one more value to tell.
    fn retry(&mut self, coder: &mut Coder<'_>, x: &[f32], octaves: f64) {
        self.choice.octaves += octaves;
        let mut levels = std::mem::take(&mut coder.levels);
        let own = &mut levels[self.column * coder.w.rows..][..coder.w.rows];
        coder.tally(self.column, own, -1.0);
        coder.search(x, self.choice, own);
        let (class, bits) = coder.fit(own, self.choice.table);
        (coder.stored.classes[self.column], self.own) = (class as i8, bits);
        coder.tally(self.column, own, 1.0);
        coder.levels = levels;
    }
}
