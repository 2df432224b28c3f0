//! The end of a small matrix, where a byte is a share of the whole: what is coded so far is counted to the word.

use super::choice::Choice;
use super::coder::Coder;
use super::histogram::Histogram;
use super::layout::{list_bits, segments};

/// Columns at the end of a small matrix after each of which its bytes are counted.
const MEASURED_COLUMNS: usize = 6;
/// How many are left when they are counted before that, so that many columns share what was misjudged.
const MEASURED_BEFORE: [usize; 7] = [60, 40, 28, 20, 14, 10, 8];
/// Weights of a small matrix.
const MEASURED_WEIGHTS: usize = 1 << 19;
/// Bits that are left to spare while columns are left.
const SPARE_BITS: f64 = 16.0;
/// What more is spared where steps are fine: a number, and a share of the matrix.
const SPARE_FINE_BITS: f64 = 24.0;
const SPARE_SHARE: f64 = 4.5e-4;
/// Bits a weight from which steps are fine.
const FINE_BITS: f64 = 3.2;
/// How often the last column may be coded again.
const RETRIES: usize = 24;
/// Units by which the steps of the last columns may lie beyond those of the others.
const STEPS_BEYOND: i32 = 1;
/// log2 of deviation over step from which a column's step gets coarser.
const FINE_OCTAVES: f64 = 0.5;
/// What one try changes, in octaves of the step that the price of bits belongs to.
const TRY: f64 = 0.125;

/// Values of side information that the last columns may have: those that others have, so as not to make the values of all
/// columns dearer when the bytes are nearly filled.
pub struct Known {
    pub steps: (i32, i32),
    /// As tables.
    pub classes: (i32, i32),
}

impl Coder<'_> {
    /// The values of columns that are coded, and those that the others will have by what is known of them.
    pub(super) fn known(&self) -> Known {
        let mut known = Known { steps: (i32::MAX, i32::MIN), classes: (i32::MAX, i32::MIN) };
        let unit = i32::from(self.stored.class_unit);
        for c in 0..self.w.cols {
            let (step, class) = if self.coded[c] {
                (self.stored.steps[c], self.stored.classes[c].into())
            } else {
                let u = self.control.u(self.sizes[c].deviation + self.half_log_cost[c]);
                let choice = self.choose(self.sizes[c], u);
                (choice.value, choice.table / unit * unit)
            };
            known.steps = (known.steps.0.min(step.into()), known.steps.1.max(step.into()));
            known.classes = (known.classes.0.min(class), known.classes.1.max(class));
        }
        Known { steps: (known.steps.0 - STEPS_BEYOND, known.steps.1 + STEPS_BEYOND), ..known }
    }

    /// Whether bytes are counted after the column that was coded last.
    pub(super) fn is_measured(&self) -> bool {
        self.is_small() && (self.n_left() < MEASURED_COLUMNS || MEASURED_BEFORE.contains(&self.n_left()))
    }

    /// Whether the next column is one of the last of a small matrix, each of which is made to fit by [`Coder::measure`].
    pub(super) fn is_fitted_next(&self) -> bool {
        self.is_small() && self.n_left() <= MEASURED_COLUMNS
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
        let measured = self.bits_so_far();
        let mut ending = Ending { column, choice, own, measured, own_measured: own };
        for _ in 0..RETRIES {
            if ending.measured <= room || self.n_left() >= MEASURED_COLUMNS {
                break;
            }
            while ending.bits() > room && ending.choice.octaves > choice.octaves - TRY * RETRIES as f64 {
                ending.retry(self, x, -TRY);
            }
            ending.measure(self);
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
            ending.measure(self);
            if ending.measured <= limit {
                break;
            }
            while ending.bits() > limit && ending.choice.octaves > fits + TRY / 2.0 {
                ending.retry(self, x, -TRY);
            }
        }
        self.assembled = self.assemble().ok();
        // A word more than was reckoned, once in a while.
        ending.choice.octaves = ending.choice.octaves.min(fits);
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

    /// Bits of a column of zeros.
    fn zero_bits(&self) -> f64 {
        let zeros = Histogram::of(self.isa, &vec![0; self.w.rows], &self.rows, 0..self.w.rows);
        let class = self.known.as_ref().map_or(0, |known| known.classes.0);
        zeros.bits(self.isa, class, &self.rows.distinct)
    }

    /// Bits of the columns so far and of all side information. A lane leaves a word for every 16 bits that it takes, so what
    /// its columns take tells its words.
    fn bits_so_far(&self) -> f64 {
        let stored = self.stored_so_far();
        let side = stored.assemble(&[], &[]).len() + 4 * segments(self.w.rows).len();
        let words: f64 = self.lane_bits.iter().map(|bits| 32.0 + 16.0 * (bits / 16.0).floor()).sum();
        // Columns that are left will not all have the commonest step and class.
        let told = list_bits(&stored.steps, self.w.cols) + list_bits(&stored.classes, self.w.cols);
        let untold = if self.n_left() > 0 { (self.side_estimate() - told).max(0.0) } else { 0.0 };
        8.0 * side as f64 + words + untold
    }

    /// Adds the `bits` of a column to those of its lane, or takes them away again.
    pub(super) fn tally(&mut self, column: usize, levels: &[i16], bits: f64, sign: f64) {
        let lanes = 1 << self.stored.lanes_log2;
        let n_segments = segments(self.w.rows).len();
        let class = self.stored.classes[column].into();
        for (i, rows) in segments(self.w.rows).enumerate() {
            let of_segment = || Histogram::of(self.isa, &levels[rows.clone()], &self.rows, rows.clone());
            let bits =
                if n_segments == 1 { bits } else { of_segment().bits(self.isa, class, &self.rows.distinct) };
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

    fn measure(&mut self, coder: &Coder<'_>) {
        (self.measured, self.own_measured) = (coder.bits_so_far(), self.own);
    }

    /// Codes it again, bits weighing more or less, or with another step where steps are fine: there the weight of bits hardly
    /// matters. Otherwise the step stays, since another would be one more value to tell.
    fn retry(&mut self, coder: &mut Coder<'_>, x: &[f32], octaves: f64) {
        match coder.neighbour(self.choice, if octaves < 0.0 { 1 } else { -1 }) {
            Some(neighbour) if self.choice.octaves > FINE_OCTAVES => self.choice = neighbour,
            _ => self.choice.octaves += octaves,
        }
        coder.stored.steps[self.column] = self.choice.value;
        let mut levels = std::mem::take(&mut coder.levels);
        let own = &mut levels[self.column * coder.w.rows..][..coder.w.rows];
        coder.tally(self.column, own, self.own, -1.0);
        coder.search(x, self.choice, own);
        let (class, bits) = coder.fit(own, self.choice.table);
        (coder.stored.classes[self.column], self.own) = (class as i8, bits);
        coder.tally(self.column, own, self.own, 1.0);
        coder.levels = levels;
    }
}

#[cfg(test)]
mod tests {
    use crate::codec::codec;
    use crate::{Isa, Matrix};

    /// Nearly N(0, 1), columns getting larger where `skewed`.
    fn weights(rows: usize, cols: usize, skewed: bool) -> Vec<f32> {
        let mut state = (rows * 31 + cols) as u32;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 16_777_216.0 - 0.5
        };
        let scale = |i: usize| if skewed { 1.0 + 0.1 * (i % cols) as f32 } else { 1.0 };
        (0..rows * cols).map(|i| (uniform() + uniform() + uniform() + uniform()) * scale(i)).collect()
    }

    /// Small matrices fill their bytes, and no column pays for what was misjudged before it.
    #[test]
    fn small_matrices_end_well_at_every_rate() {
        for (rows, cols) in [(64, 192), (128, 128), (256, 64), (130, 160), (2500, 40)] {
            for (bits, skewed) in
                [1.2, 2.0, 2.375, 3.0, 4.5, 6.5].into_iter().zip([true, false].into_iter().cycle())
            {
                let data = weights(rows, cols, skewed);
                let tcq = codec("tcq8").unwrap().at_rate(bits).unwrap();
                let planes = tcq.encode(Isa::get(), Matrix { rows, cols, data: &data }, None).unwrap();
                let mut out = vec![0.0; data.len()];
                tcq.decode(Isa::get(), &[&planes[0]], rows, cols, 0, &mut out).unwrap();
                let what =
                    format!("[{rows}, {cols}] at {bits} bits, {}", if skewed { "skewed" } else { "even" });
                let (limit, taken) = (bits * data.len() as f64 / 8.0, planes[0].len() as f64);
                assert!(taken <= limit && taken >= 0.995 * limit - 4.0, "{what}: {taken} of {limit} bytes");
                // Against R(D) of columns of one deviation; water-filling makes it less where they differ.
                let sum = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v * v)).sum::<f64>();
                let error =
                    sum(&mut out.iter().zip(&data).map(|(a, b)| a - b)) / sum(&mut data.iter().copied());
                let gap = 8.0 * taken / data.len() as f64 + 0.5 * libm::log2(error);
                assert!(gap < 0.45, "{what}: {gap:.3} bits above the limit");
            }
        }
    }
}
