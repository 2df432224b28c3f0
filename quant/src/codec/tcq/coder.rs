//! Coding a matrix: columns one after the other (or side by side), then side information and streams.

use moepack_format::{Error, Result};

use super::Tcq;
use super::choice::Choice;
use super::column::{self, Buffers, Price, Prices};
use super::ending::Known;
use super::histogram::{Histogram, table_at};
use super::lanes::{self, LANES};
use super::layout::{HEADER_BYTES, ROWS_OF_STEPS, Stored, lanes, list_bits, segments, step, step_unit};
use super::rate::{self, Control};
use super::rows::{self, RowClasses, Size, log2_or};
use super::stream;
use super::tables::{PER_OCTAVE, TABLES};
use crate::codec::{ColumnCoder, Matrix, Planes};
use crate::isa::Isa;
use crate::numbers;

/// What rounding and the ends of lanes may take beyond the estimate.
const SLACK_BITS: f64 = 40.0;
/// The same, for each bit that a matrix may take.
const SLACK_SHARE: f64 = 1e-4;
/// Bits of a zero in the table of the smallest width, with some to spare.
const ZERO_BITS: f64 = 0.004;
/// Bits that the states of a lane take beyond what they carry.
const LANE_BITS: f64 = 24.0;
/// Two and a half standard deviations of that.
const LANE_SLACK_BITS: f64 = 12.0;
/// log2 of the smallest step: one over it is a number that f32 holds.
pub const STEP_LOG2_MIN: f64 = -112.0;
/// Columns from which the range of side information is known.
const COLUMNS_KNOWN: usize = 16;
/// Columns that are tried before the first, to learn how the rate behaves.
const TRIALS: usize = 4;
/// Columns at the end that are coded one by one, so that the bytes are met.
const LAST_COLUMNS: usize = 40;
/// Columns that are taken out of a matrix together: a cache line.
const COLUMNS_TAKEN: usize = 16;

/// A matrix being coded.
pub struct Coder<'a> {
    pub(super) isa: Isa,
    codec: Tcq,
    pub(super) w: Matrix<'a>,
    /// Bytes it may take.
    pub(super) limit: u64,
    pub(super) control: Control,
    /// Place of each column in the order of coding. `[cols]`
    place: Vec<usize>,
    /// `½ log2 c` of each column. `[cols]`
    pub(super) half_log_cost: Vec<f64>,
    pub(super) rows: RowClasses,
    pub(super) stored: Stored,
    /// `[cols][rows]`
    pub(super) levels: Vec<i16>,
    pub(super) coded: Vec<bool>,
    pub(super) n_coded: usize,
    /// What steps and classes are reckoned to take.
    side_bits: f64,
    /// Bits kept back for what cannot be foreseen.
    slack: f64,
    /// The range of steps and classes, for the last columns.
    pub(super) known: Option<Known>,
    /// Bits that each lane of each segment takes, of a small matrix.
    pub(super) lane_bits: Vec<f64>,
    /// The bytes, where they are put together already.
    pub(super) assembled: Option<Vec<u8>>,
    buffers: Buffers,
    scaled: Vec<f32>,
    /// Sizes of the columns of `w`. `[cols]`
    pub(super) sizes: Vec<Size>,
}

impl<'a> Coder<'a> {
    /// Begins a matrix whose columns come in `order`; `cost` is that of a squared error in each.
    pub fn new(isa: Isa, codec: Tcq, w: Matrix<'a>, limit: u64, order: &[usize], cost: &[f32]) -> Coder<'a> {
        let half_log_cost = if w.rows < ROWS_OF_STEPS { vec![0.0; w.cols] } else { half_log2(cost) };
        let class_unit = if w.rows < 1024 { 2 } else { 1 };
        let mut largest = vec![0.0; w.cols];
        let rows = RowClasses::of(isa, w, &mut largest, class_unit);
        let sizes = rows.sizes(isa, w, &largest);
        let mut place = vec![0; w.cols];
        order.iter().enumerate().for_each(|(i, &c)| place[c] = i);
        let importance = order.iter().map(|&c| sizes[c].deviation + half_log_cost[c]).collect();
        let lanes = lanes(w.rows * w.cols);
        let stored = Stored {
            lanes_log2: lanes.trailing_zeros() as u8,
            step_unit: step_unit(w.rows, cost),
            class_unit: class_unit as u8,
            class_base: 0,
            scale: 1.0,
            steps: vec![0; w.cols],
            classes: vec![0; w.cols],
            rows: rows.of_row.iter().map(|&i| (rows.distinct[usize::from(i)] / class_unit) as i8).collect(),
        };
        let fixed = 8.0 * (HEADER_BYTES + 4 * segments(w.rows).len() + 4) as f64
            + list_bits(&stored.rows, w.rows)
            + LANE_BITS * (lanes * segments(w.rows).len()) as f64;
        let n_lanes = (lanes * segments(w.rows).len()) as f64;
        let slack = SLACK_BITS + LANE_SLACK_BITS * n_lanes.sqrt() + SLACK_SHARE * 8.0 * limit as f64;
        let budget = limit as f64 * 8.0 - fixed - slack;
        let mut coder = Coder {
            isa,
            codec,
            w,
            limit,
            control: Control::new(w.rows, importance, budget),
            place,
            half_log_cost,
            rows,
            stored,
            levels: vec![0; w.rows * w.cols],
            coded: vec![false; w.cols],
            n_coded: 0,
            side_bits: 0.0,
            slack,
            known: None,
            lane_bits: vec![0.0; lanes * segments(w.rows).len()],
            assembled: None,
            buffers: Buffers::default(),
            scaled: Vec::new(),
            sizes,
        };
        coder.begin(order, budget);
        coder
    }

    /// Codes a few columns on trial, and chooses the scale.
    fn begin(&mut self, order: &[usize], budget: f64) {
        let n = TRIALS.min(self.w.cols);
        let tried: Vec<usize> = (0..n).map(|i| order[(2 * i + 1) * self.w.cols / (2 * n)]).collect();
        let importance: Vec<f64> =
            self.sizes.iter().zip(&self.half_log_cost).map(|(s, c)| s.deviation + c).collect();
        for round in 0..2 {
            let level = self.control.level;
            let u = |c: usize| (importance[c] - level).min(rate::BITS_MAX);
            let mut shifts: Vec<f64> = (0..self.w.cols)
                .map(|c| self.sizes[c].deviation - rate::octaves(u(c)))
                .filter(|s| s.is_finite())
                .collect();
            shifts.sort_by(f64::total_cmp);
            let middle = shifts.get(shifts.len() / 2).copied().unwrap_or(0.0);
            self.stored.scale =
                (libm::exp2(middle.clamp(STEP_LOG2_MIN, -STEP_LOG2_MIN)) as f32).max(f32::MIN_POSITIVE);
            if self.w.rows < ROWS_OF_STEPS {
                let octaves = (0..self.w.cols).map(|c| rate::octaves(u(c))).sum::<f64>() / self.w.cols as f64;
                let class = self.class_of(octaves);
                self.known = Some(Known { steps: (0, 0), classes: (class, class) });
            }
            if round == 1 {
                break;
            }
            let mut trials = Vec::new();
            let (mut x, mut levels) = (Vec::new(), vec![0; self.w.rows]);
            for &c in &tried {
                if !self.sizes[c].deviation.is_finite() {
                    continue;
                }
                rows::columns(self.w, c, 1, &mut x);
                let choice = self.choose(self.sizes[c], u(c));
                self.search(&x, choice, &mut levels);
                trials.push((u(c), self.fit(&levels, choice.table).1));
            }
            self.side_bits = self.side_estimate();
            self.control.budget = budget - self.side_bits;
            self.control.calibrate(&trials);
            self.control.solve();
        }
    }

    /// Prices of each row class.
    fn prices(&self, choice: Choice) -> Vec<Price> {
        let price = |&class: &i32| {
            let shrink = rate::shrink(choice.octaves + f64::from(class) / PER_OCTAVE);
            Price::new(table_at(choice.table + class), choice.step, shrink)
        };
        self.rows.distinct.iter().map(price).collect()
    }

    pub(super) fn search(&mut self, x: &[f32], choice: Choice, levels: &mut [i16]) {
        let prices = self.prices(choice);
        for rows in segments(self.w.rows) {
            let (x, of_row) = (&x[rows.clone()], &self.rows.of_row[rows.clone()]);
            column::code(
                self.isa,
                self.codec.trellis,
                x,
                (&prices, of_row),
                &mut levels[rows],
                &mut self.buffers,
            );
        }
    }

    /// The class near `table` that codes the levels in the fewest bits, and how many.
    pub(super) fn fit(&self, levels: &[i16], table: i32) -> (i32, f64) {
        let histogram = Histogram::of(self.isa, levels, &self.rows, 0..levels.len());
        let unit = i32::from(self.stored.class_unit);
        // Classes are multiples of the unit from the base, which is even.
        let near = |i: i32| (table.div_euclid(unit) + i) * unit;
        let (mut best, mut at) = ((0, f64::INFINITY), 0);
        let mut try_class = |i: i32| {
            let class = near(i).clamp(0, TABLES as i32 - 1) / unit * unit;
            let class = self.known.as_ref().map_or(class, |k| class.clamp(k.classes.0, k.classes.1));
            let bits = histogram.bits(self.isa, class, &self.rows.distinct);
            let better = bits < best.1;
            if better {
                best = (class, bits);
            }
            better
        };
        try_class(0);
        // Downhill: the bits have one minimum.
        for direction in [1, -1] {
            while at < 64 && try_class(direction * (at + 1)) {
                at += 1;
            }
            if at > 0 {
                break;
            }
        }
        best
    }

    /// Codes a column whose place in the order is next.
    fn column(&mut self, column: usize, x: &[f32]) {
        let size = self.rows.size(self.isa, x, &mut self.scaled);
        let u = self.control.u(size.deviation + self.half_log_cost[column]);
        let choice = self.choose(size, u);
        let mut levels = std::mem::take(&mut self.levels);
        let own = &mut levels[column * self.w.rows..][..self.w.rows];
        self.search(x, choice, own);
        let bits = self.note(column, choice, u, own);
        self.levels = levels;
        self.adjust();
        if self.is_measured() {
            self.measure(column, x, choice, bits);
        }
    }

    /// Notes what a column became; gives its bits.
    fn note(&mut self, column: usize, choice: Choice, u: f64, levels: &mut [i16]) -> f64 {
        let (mut class, mut bits) = self.fit(levels, choice.table);
        // Zeros cost next to nothing, and so do the columns that are left if they must be zeros too.
        let left = self.n_left() as f64 * self.w.rows as f64 * ZERO_BITS;
        if !self.is_fitted_next() && self.control.spent + bits + left > self.control.budget + self.slack / 4.0
        {
            levels.fill(0);
            (class, bits) = self.fit(levels, 0);
        }
        self.stored.steps[column] = choice.value;
        // In tables for now; `stored_so_far` makes units of it.
        self.stored.classes[column] = class as i8;
        self.coded[column] = true;
        self.n_coded += 1;
        if self.is_small() {
            self.tally(column, levels, bits, 1.0);
        }
        self.control.took(u, bits);
        if self.known.is_none() && self.n_coded >= COLUMNS_KNOWN && self.n_left() <= LAST_COLUMNS {
            self.known = Some(self.known());
        }
        bits
    }

    /// Chooses the level anew, now and then, and after each of the last columns.
    fn adjust(&mut self) {
        let every = (self.w.cols / 256).max(1);
        let left = self.n_left();
        if self.n_coded.is_multiple_of(every) || left <= LAST_COLUMNS {
            if self.n_coded.is_multiple_of(16 * every) || left <= LAST_COLUMNS {
                let bits = self.side_estimate();
                self.control.budget += self.side_bits - bits;
                self.side_bits = bits;
            }
            self.control.solve();
        }
    }

    /// Bits of steps and classes of all columns, from those so far.
    pub(super) fn side_estimate(&self) -> f64 {
        if self.n_coded == 0 {
            return 3.0 * self.w.cols as f64;
        }
        let classes = self.in_units(&self.coded_classes()).1;
        let steps = self.stored.steps.iter().zip(&self.coded).filter(|(_, c)| **c);
        let steps: Vec<i8> = steps.map(|(v, _)| *v).collect();
        list_bits(&steps, self.w.cols) + list_bits(&classes, self.w.cols)
    }

    /// Classes, as tables, of the columns so far.
    pub(super) fn coded_classes(&self) -> Vec<i8> {
        let classes = self.stored.classes.iter().zip(&self.coded).filter(|(_, c)| **c);
        classes.map(|(v, _)| *v).collect()
    }

    /// Classes that are tables as base and values.
    pub(super) fn in_units(&self, tables: &[i8]) -> (u8, Vec<i8>) {
        let unit = i32::from(self.stored.class_unit);
        let mut sorted = tables.to_vec();
        let middle = sorted.len() / 2;
        let base = if sorted.is_empty() { 0 } else { *sorted.select_nth_unstable(middle).1 };
        let value = |&t: &i8| ((i32::from(t) - i32::from(base)) / unit) as i8;
        (base as u8, tables.iter().map(value).collect())
    }

    /// What is stored; columns that were not coded yet are of the commonest class.
    pub(super) fn stored_so_far(&self) -> Stored {
        let base = self.in_units(&self.coded_classes()).0;
        let known = self.stored.classes.iter().zip(&self.coded);
        let classes: Vec<i8> = known.map(|(&class, &coded)| if coded { class } else { base as i8 }).collect();
        let (class_base, classes) = self.in_units(&classes);
        Stored { class_base, classes, ..self.stored.clone() }
    }

    /// The bytes.
    pub(super) fn assemble(&self) -> Result<Vec<u8>> {
        let stored = self.stored_so_far();
        let side = stored.side()?;
        let mut exceptions = Vec::new();
        let mut streams = Vec::new();
        for rows in segments(self.w.rows) {
            let (bytes, more) = stream::encode(self.isa, &side, &self.levels, self.w.rows, rows);
            streams.push(bytes);
            exceptions.extend(more);
        }
        exceptions.sort_unstable();
        Ok(stored.assemble(&exceptions, &streams))
    }

    /// All columns of `w`, in ascending order and without feedback.
    pub fn code_all(&mut self) {
        let mut first = 0;
        if self.codec.trellis.states == 8 {
            let mut buffers = lanes::Buffers::default();
            while self.w.cols - first >= LANES + LAST_COLUMNS {
                self.lanes(first, &mut buffers);
                first += LANES;
            }
        }
        let mut x = Vec::new();
        for first in (first..self.w.cols).step_by(COLUMNS_TAKEN) {
            rows::columns(self.w, first, COLUMNS_TAKEN, &mut x);
            for (c, x) in (first..).zip(x.chunks_exact(self.w.rows)) {
                self.column(c, x);
            }
        }
    }

    /// [`LANES`] columns side by side.
    fn lanes(&mut self, first: usize, buffers: &mut lanes::Buffers) {
        let (n, cols) = (self.w.rows, self.w.cols);
        let mut chosen = Vec::with_capacity(LANES);
        let mut prices = vec![Prices::default(); self.rows.distinct.len()];
        for l in 0..LANES {
            let size = self.sizes[first + l];
            let u = self.control.u(size.deviation + self.half_log_cost[first + l]);
            let choice = self.choose(size, u);
            prices.iter_mut().zip(self.prices(choice)).for_each(|(prices, price)| prices.set(l, price));
            chosen.push((choice, u));
        }
        let mut levels = std::mem::take(&mut self.levels);
        let own = &mut levels[first * n..(first + LANES) * n];
        for rows in segments(n) {
            let (x, of_row) = (&self.w.data[rows.start * cols + first..], &self.rows.of_row[rows.clone()]);
            lanes::code(self.isa, (x, cols), &prices, of_row, (&mut own[rows.start..], n), buffers);
        }
        for (l, (choice, u)) in chosen.into_iter().enumerate() {
            self.note(first + l, choice, u, &mut own[l * n..(l + 1) * n]);
        }
        self.levels = levels;
        self.adjust();
    }

    /// The plane.
    ///
    /// # Errors
    /// A column is missing.
    pub fn into_planes(mut self) -> Result<Planes> {
        if let Some(missing) = self.coded.iter().position(|c| !c) {
            return Err(Error::bad_data(format!("column {missing} was not coded")));
        }
        let mut bytes = match self.assembled.take() {
            Some(bytes) => bytes,
            None => self.assemble()?,
        };
        // Hardly ever, since `note` watches the bits: the last columns, which matter least, give way.
        let mut order: Vec<usize> = (0..self.w.cols).collect();
        order.sort_by_key(|&c| std::cmp::Reverse(self.place[c]));
        for c in order {
            if bytes.len() as u64 <= self.limit {
                break;
            }
            self.levels[c * self.w.rows..][..self.w.rows].fill(0);
            bytes = self.assemble()?;
        }
        if bytes.len() as u64 > self.limit {
            let what = format!(
                "{} bytes are too few for a matrix [{}, {}], {} are the least",
                self.limit,
                self.w.rows,
                self.w.cols,
                bytes.len()
            );
            return Err(Error::plan(what).hint("allow more bits for this matrix"));
        }
        Ok(vec![bytes])
    }
}

impl ColumnCoder for Coder<'_> {
    fn code(&mut self, column: usize, wanted: &[f32], decoded: &mut [f32]) -> Result<()> {
        check_column(self.isa, self.w, column, wanted, decoded)?;
        self.column(column, wanted);
        let step = step(self.stored.scale, self.stored.step_unit, self.stored.steps[column]);
        let levels = &self.levels[column * self.w.rows..][..self.w.rows];
        decoded.iter_mut().zip(levels).for_each(|(d, &l)| *d = f32::from(l) * step);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Planes> {
        self.into_planes()
    }
}

/// What [`ColumnCoder::code`] refuses.
fn check_column(isa: Isa, w: Matrix<'_>, column: usize, wanted: &[f32], decoded: &[f32]) -> Result<()> {
    if column >= w.cols {
        return Err(Error::bad_data(format!("column {column} of a matrix with {}", w.cols)));
    }
    if wanted.len() != w.rows || decoded.len() != w.rows {
        let found = wanted.len().min(decoded.len());
        return Err(Error::bad_data(format!("a column of {found} values, expected {}", w.rows)));
    }
    match numbers::max_magnitude(isa, wanted) {
        Some(_) => Ok(()),
        None => Err(Error::bad_data(format!("column {column} has values that are no numbers"))),
    }
}

/// `½ log2` of each cost; what is next to nothing counts as little.
fn half_log2(cost: &[f32]) -> Vec<f64> {
    let largest = cost.iter().fold(0.0f32, |a, &b| a.max(b));
    if largest <= 0.0 || cost.iter().all(|&c| c == largest) {
        return vec![0.0; cost.len()];
    }
    let floor = f64::from(largest) * 1e-9;
    cost.iter().map(|&c| 0.5 * log2_or(f64::from(c).max(floor), 0.0)).collect()
}
