//! Coding a matrix: columns one after the other (or side by side), then side information and streams.

use moepack_format::{Error, Result};

use super::Tcq;
use super::column::{self, Buffers, LaneBuffers, Price};
use super::layout::{HEADER_BYTES, SIDE_MAX, STEP_OCTAVE, Stored, best_table, segments, step};
use super::rans::LANES_MAX;
use super::rate::{self, Control};
use super::stream;
use super::tables::{self, PER_OCTAVE, TABLE_OF_ONE, TABLES, Table};
use super::trellis::LANES;
use crate::codec::{ColumnCoder, Matrix, Planes};
use crate::isa::Isa;
use crate::math;
use crate::numbers;

/// Weights a lane of the entropy coder has at least, so that its state costs next to nothing.
const WEIGHTS_A_LANE: usize = 8192;
/// What rounding and the ends of lanes may take beyond the estimate.
const SLACK_BITS: f64 = 40.0;
/// The same, for each bit that a matrix may take.
const SLACK_SHARE: f64 = 1e-4;
/// Bits that the states of a lane take beyond what they carry.
const LANE_BITS: f64 = 24.0;
/// log2 of the smallest step: one over it is a number that f32 holds.
const STEP_LOG2_MIN: f64 = -112.0;
/// Columns that are tried before the first, to learn how the rate behaves.
const TRIALS: usize = 4;
/// Columns at the end that are coded one by one, so that the bytes are met.
const LAST_COLUMNS: usize = 40;

/// A matrix being coded.
pub struct Coder<'a> {
    isa: Isa,
    codec: Tcq,
    w: Matrix<'a>,
    /// Bytes it may take.
    limit: u64,
    control: Control,
    /// Place of each column in the order of coding. `[cols]`
    place: Vec<usize>,
    /// `½ log2 c` of each column. `[cols]`
    half_log_cost: Vec<f64>,
    rows: RowClasses,
    stored: Stored,
    /// `[cols][rows]`
    levels: Vec<i16>,
    coded: Vec<bool>,
    n_coded: usize,
    /// What steps and classes are reckoned to take.
    side_bits: f64,
    buffers: Buffers,
    scaled: Vec<f32>,
}

/// Rows of similar size share a class.
struct RowClasses {
    /// Classes that occur, in tables.
    distinct: Vec<i32>,
    /// Which of them each row has. `[rows]`
    of_row: Vec<u8>,
    /// What each row is multiplied by to be of class 0. `[rows]`
    inverse: Vec<f32>,
}

impl<'a> Coder<'a> {
    /// Begins a matrix, `columns` being its transpose, whose columns come in `order`; `cost` is that of a squared error in
    /// each.
    pub fn new(
        isa: Isa,
        codec: Tcq,
        w: Matrix<'a>,
        columns: &[f32],
        limit: u64,
        order: &[usize],
        cost: &[f32],
    ) -> Coder<'a> {
        let half_log_cost = half_log2(cost);
        let class_unit = if w.rows < 1024 { 2 } else { 1 };
        let rows = RowClasses::of(isa, columns, w, class_unit);
        let mut scaled = Vec::new();
        let deviation: Vec<f64> =
            columns.chunks_exact(w.rows).map(|x| rows.half_log_variance(isa, x, &mut scaled).0).collect();
        let mut place = vec![0; w.cols];
        order.iter().enumerate().for_each(|(i, &c)| place[c] = i);
        let importance = order.iter().map(|&c| deviation[c] + half_log_cost[c]).collect();
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
            + LANE_BITS * (lanes * segments(w.rows).len()) as f64
            + SLACK_BITS;
        let budget = limit as f64 * 8.0 * (1.0 - SLACK_SHARE) - fixed;
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
            buffers: Buffers::default(),
            scaled,
        };
        coder.begin(columns, order, &deviation, budget);
        coder
    }

    /// Codes a few columns on trial, and chooses the scale.
    fn begin(&mut self, columns: &[f32], order: &[usize], deviation: &[f64], budget: f64) {
        let n = TRIALS.min(self.w.cols);
        let tried: Vec<usize> = (0..n).map(|i| order[(2 * i + 1) * self.w.cols / (2 * n)]).collect();
        let importance: Vec<f64> = deviation.iter().zip(&self.half_log_cost).map(|(d, c)| d + c).collect();
        for round in 0..2 {
            let level = self.control.level;
            let u = |c: usize| (importance[c] - level).min(rate::BITS_MAX);
            let mut shifts: Vec<f64> = (0..self.w.cols)
                .map(|c| deviation[c] - rate::octaves(u(c)))
                .filter(|s| s.is_finite())
                .collect();
            shifts.sort_by(f64::total_cmp);
            let middle = shifts.get(shifts.len() / 2).copied().unwrap_or(0.0);
            self.stored.scale =
                (libm::exp2(middle.clamp(STEP_LOG2_MIN, -STEP_LOG2_MIN)) as f32).max(f32::MIN_POSITIVE);
            if round == 1 {
                break;
            }
            let mut trials = Vec::new();
            let mut levels = vec![0; self.w.rows];
            for &c in tried.iter().filter(|&&c| deviation[c].is_finite()) {
                let x = &columns[c * self.w.rows..][..self.w.rows];
                let choice =
                    self.choose(deviation[c], u(c), numbers::max_magnitude(self.isa, x).unwrap_or(0.0));
                self.search(x, choice, &mut levels);
                trials.push((u(c), self.fit(&levels, choice.table).1));
            }
            self.side_bits = self.side_estimate();
            self.control.budget = budget - self.side_bits;
            self.control.calibrate(&trials);
            self.control.solve();
        }
    }

    /// Step and table of a column of this `log2 σ`.
    fn choose(&self, half_log_variance: f64, u: f64, largest: f32) -> Choice {
        let unit = f64::from(self.stored.step_unit) / STEP_OCTAVE;
        let scale = math::log(f64::from(self.stored.scale)) / std::f64::consts::LN_2;
        let wanted = half_log_variance - rate::octaves(u);
        let least = math::log(f64::from(largest) / f64::from(column::SAMPLE_MAX)) / std::f64::consts::LN_2;
        let value = if half_log_variance.is_finite() { ((wanted - scale) / unit).round() } else { 0.0 };
        let value = value.max(((least.max(STEP_LOG2_MIN) - scale) / unit).ceil());
        let value = value.clamp(f64::from(-SIDE_MAX), f64::from(SIDE_MAX)) as i8;
        let step = step(self.stored.scale, self.stored.step_unit, value);
        let octaves = if half_log_variance.is_finite() {
            half_log_variance - math::log(f64::from(step)) / std::f64::consts::LN_2
        } else {
            -2.0
        };
        let table = TABLE_OF_ONE as f64 + PER_OCTAVE * rate::table_octaves(octaves);
        Choice { value, step, octaves, table: table.round().clamp(0.0, TABLES as f64 - 1.0) as i32 }
    }

    /// Prices of each row class.
    fn prices(&self, choice: Choice) -> Vec<Price> {
        let price = |&class: &i32| {
            let shrink = rate::shrink(choice.octaves + f64::from(class) / PER_OCTAVE);
            Price::new(table_at(choice.table + class), choice.step, shrink)
        };
        self.rows.distinct.iter().map(price).collect()
    }

    fn search(&mut self, x: &[f32], choice: Choice, levels: &mut [i16]) {
        let prices = self.prices(choice);
        for rows in segments(self.w.rows) {
            let (x, of_row) = (&x[rows.clone()], &self.rows.of_row[rows.clone()]);
            column::code(
                self.isa,
                self.codec.trellis,
                x,
                &prices,
                of_row,
                &mut levels[rows],
                &mut self.buffers,
            );
        }
    }

    /// The class near `table` that codes the levels in the fewest bits, and how many.
    fn fit(&self, levels: &[i16], table: i32) -> (i32, f64) {
        let histogram = Histogram::of(levels, &self.rows);
        let unit = i32::from(self.stored.class_unit);
        // Classes are multiples of the unit from the base, which is even.
        let near = |i: i32| (table.div_euclid(unit) + i) * unit;
        let (mut best, mut at) = ((0, f64::INFINITY), 0);
        let mut try_class = |i: i32| {
            let class = near(i).clamp(0, TABLES as i32 - 1) / unit * unit;
            let bits = histogram.bits(class, &self.rows.distinct);
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
        let (deviation, largest) = self.rows.half_log_variance(self.isa, x, &mut self.scaled);
        let u = self.control.u(deviation + self.half_log_cost[column]);
        let choice = self.choose(deviation, u, largest);
        let mut levels = std::mem::take(&mut self.levels);
        let own = &mut levels[column * self.w.rows..][..self.w.rows];
        self.search(x, choice, own);
        self.note(column, choice, u, own);
        self.levels = levels;
        self.adjust();
    }

    /// Notes what a column became.
    fn note(&mut self, column: usize, choice: Choice, u: f64, levels: &[i16]) {
        let (class, bits) = self.fit(levels, choice.table);
        self.stored.steps[column] = choice.value;
        // In tables for now; `finish` makes units of it.
        self.stored.classes[column] = class as i8;
        self.coded[column] = true;
        self.n_coded += 1;
        self.control.took(u, bits);
    }

    /// Chooses the level anew, now and then, and after each of the last columns.
    fn adjust(&mut self) {
        let every = (self.w.cols / 256).max(1);
        let left = self.w.cols - self.n_coded;
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
    fn side_estimate(&self) -> f64 {
        if self.n_coded == 0 {
            return 3.0 * self.w.cols as f64;
        }
        let done = |list: &[i8]| -> Vec<i8> {
            list.iter().zip(&self.coded).filter(|(_, c)| **c).map(|(v, _)| *v).collect()
        };
        let classes = self.in_units(&done(&self.stored.classes)).1;
        list_bits(&done(&self.stored.steps), self.w.cols) + list_bits(&classes, self.w.cols)
    }

    /// Classes that are tables as base and values.
    fn in_units(&self, tables: &[i8]) -> (u8, Vec<i8>) {
        let unit = i32::from(self.stored.class_unit);
        let mut sorted = tables.to_vec();
        sorted.sort_unstable();
        let base = sorted.get(sorted.len() / 2).copied().unwrap_or(0);
        let value = |&t: &i8| ((i32::from(t) - i32::from(base)) / unit) as i8;
        (base as u8, tables.iter().map(value).collect())
    }

    /// The bytes.
    fn assemble(&self) -> Result<Vec<u8>> {
        let (class_base, classes) = self.in_units(&self.stored.classes);
        let stored = Stored { class_base, classes, ..self.stored.clone() };
        let side = stored.side()?;
        let mut exceptions = Vec::new();
        let mut streams = Vec::new();
        for rows in segments(self.w.rows) {
            let (bytes, more) = stream::encode(&side, &self.levels, self.w.rows, rows);
            streams.push(bytes);
            exceptions.extend(more);
        }
        exceptions.sort_unstable();
        Ok(stored.assemble(&exceptions, &streams))
    }

    /// Everything that is left, in ascending order and without feedback: the columns of `w` themselves.
    pub fn code_all(&mut self, columns: &[f32]) {
        let mut first = 0;
        if self.codec.trellis.states == 8 {
            let mut buffers = LaneBuffers::default();
            while self.w.cols - first >= LANES + LAST_COLUMNS {
                self.lanes(columns, first, &mut buffers);
                first += LANES;
            }
        }
        for (c, x) in columns.chunks_exact(self.w.rows).enumerate().skip(first) {
            self.column(c, x);
        }
    }

    /// [`LANES`] columns side by side.
    fn lanes(&mut self, columns: &[f32], first: usize, buffers: &mut LaneBuffers) {
        let (n, cols) = (self.w.rows, self.w.cols);
        let mut chosen = Vec::with_capacity(LANES);
        let mut prices = vec![[Price::default(); LANES]; self.rows.distinct.len()];
        for (l, x) in columns.chunks_exact(n).skip(first).take(LANES).enumerate() {
            let (deviation, largest) = self.rows.half_log_variance(self.isa, x, &mut self.scaled);
            let u = self.control.u(deviation + self.half_log_cost[first + l]);
            let choice = self.choose(deviation, u, largest);
            for (prices, price) in prices.iter_mut().zip(self.prices(choice)) {
                prices[l] = price;
            }
            chosen.push((choice, u));
        }
        let mut levels = std::mem::take(&mut self.levels);
        let own = &mut levels[first * n..(first + LANES) * n];
        for rows in segments(n) {
            let (x, of_row) = (&self.w.data[rows.start * cols + first..], &self.rows.of_row[rows.clone()]);
            column::code_lanes(self.isa, x, cols, &prices, of_row, (&mut own[rows.start..], n), buffers);
        }
        for (l, (choice, u)) in chosen.into_iter().enumerate() {
            self.note(first + l, choice, u, &own[l * n..(l + 1) * n]);
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
        let mut bytes = self.assemble()?;
        // Hardly ever: the last columns, which matter least, give way.
        let mut order: Vec<usize> = (0..self.w.cols).collect();
        order.sort_by_key(|&c| std::cmp::Reverse(self.place[c]));
        for c in order {
            if bytes.len() as u64 <= self.limit {
                break;
            }
            self.levels[c * self.w.rows..][..self.w.rows].fill(0);
            self.stored.classes[c] = 0;
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

/// How a column is coded.
#[derive(Clone, Copy, Debug)]
struct Choice {
    /// Step in units from the scale.
    value: i8,
    step: f32,
    /// log2 of deviation over step.
    octaves: f64,
    table: i32,
}

/// How often each level occurs in each row class.
struct Histogram {
    /// `[row classes][levels]`, levels from `first` on.
    counts: Vec<u32>,
    first: i32,
    n_levels: usize,
}

impl Histogram {
    /// Levels beyond it have no symbol in any table.
    const LEVEL_MAX: i16 = 300;

    fn of(levels: &[i16], rows: &RowClasses) -> Histogram {
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
    fn bits(&self, class: i32, row_classes: &[i32]) -> f64 {
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

impl RowClasses {
    /// Classes in multiples of `unit` where they save more than they take.
    fn of(isa: Isa, columns: &[f32], w: Matrix<'_>, unit: i32) -> RowClasses {
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
    fn half_log_variance(&self, isa: Isa, x: &[f32], scaled: &mut Vec<f32>) -> (f64, f32) {
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

/// Bytes in which any matrix of this shape can be coded, if only as zeros.
pub fn least_bytes(rows: usize, cols: usize) -> u64 {
    let (weights, n_segments) = (rows * cols, segments(rows).len());
    let fixed = HEADER_BYTES + 4 + n_segments * (4 + 4 * lanes(weights));
    // Zeros take 1/400 bit, values of side information at most a byte or so.
    (fixed + 2 * cols + rows + weights / 512 + 8) as u64
}

fn table_at(q: i32) -> &'static Table {
    &tables::tables()[q.clamp(0, TABLES as i32 - 1) as usize]
}

fn log2_or(x: f64, otherwise: f64) -> f64 {
    if x > 0.0 && x.is_finite() { math::log(x) / std::f64::consts::LN_2 } else { otherwise }
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

/// Lanes of the entropy coder for so many weights.
fn lanes(weights: usize) -> usize {
    (weights / WEIGHTS_A_LANE).clamp(1, LANES_MAX).next_power_of_two().clamp(stream::LANES_MIN, LANES_MAX)
}

/// Sixteenths of an octave that a unit of the steps counts. Finer steps fit better, and take more bits a column; where all columns
/// cost alike, they take next to none.
fn step_unit(rows: usize, cost: &[f32]) -> u8 {
    let alike = cost.windows(2).all(|w| w[0] == w[1]);
    if alike || rows >= 4096 {
        1
    } else if rows >= 1024 {
        2
    } else {
        4
    }
}

/// Bits of a list in side information, if `list` is typical of one of length `n`.
fn list_bits(list: &[i8], n: usize) -> f64 {
    if list.is_empty() {
        return 0.0;
    }
    let parity = &tables::tables()[usize::from(best_table(list))].parity[0];
    let bits: f32 = list.iter().map(|&v| parity.bits[(i32::from(v) + tables::SYMBOL_OF_ZERO) as usize]).sum();
    f64::from(bits) * n as f64 / list.len() as f64
}
