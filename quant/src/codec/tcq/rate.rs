//! How coarse each column may be, so that the matrix fills its bytes.
//!
//! With a level `θ` that every column's weighted error is to reach, a column of deviation `σ` whose squared error costs `c`
//! takes `u = ½ log2(σ² c / θ)` bits a number above the coder's gap, or nothing where `u ≤ 0`: reverse water-filling (Cover
//! and Thomas 2006, §10.3.3; for columns of GPTQ's factor WaterSIC, arXiv:2603.04956). Before each column `θ` is chosen anew, so
//! that what is left of the bytes is what the columns that are left will take; what was mispredicted before is spread over
//! all of them.

/// Step over deviation, as octaves, for `u`, where the code meets the level exactly; measured on Gaussian samples. Beyond the last,
/// `u − 1`.
const STEPS: [(f64, f64); 8] = [
    (-1.0, -0.75),
    (0.0, -0.4),
    (0.02, -0.25),
    (0.685, 0.0),
    (1.11, 0.25),
    (1.395, 0.5),
    (1.97, 1.0),
    (3.0, 2.0),
];

/// Bits a number at most: the widest table holds no finer steps.
pub const BITS_MAX: f64 = 6.9;

/// log2 of deviation over step.
pub fn octaves(u: f64) -> f64 {
    let last = STEPS.len() - 1;
    if u >= STEPS[last].0 {
        return u - 1.0;
    }
    let i = STEPS.iter().rposition(|s| s.0 <= u).unwrap_or(0).min(last - 1);
    let ((x0, y0), (x1, y1)) = (STEPS[i], STEPS[i + 1]);
    y0 + (u.max(-1.0) - x0) * (y1 - y0) / (x1 - x0)
}

/// `λκ` (see `column.rs`) for a deviation of `2^octaves` steps; measured likewise.
pub fn shrink(octaves: f64) -> f64 {
    let low = (1.0 - octaves).clamp(0.0, 2.0);
    0.25 * libm::exp2(-2.0 * octaves.max(-1.0)) * (1.0 + 1.5 * low * low)
}

/// The table that will fit, before anything is coded: its place relative to that of width 1.
pub fn table_octaves(octaves: f64) -> f64 {
    let low = (1.0 - octaves).clamp(0.0, 1.5);
    octaves - 0.375 * low * low
}

/// Bits a number above the gap.
fn bits(u: f64) -> f64 {
    u.max(0.0)
}

/// Follows the bytes of a matrix from column to column.
#[derive(Debug)]
pub struct Control {
    rows: f64,
    /// `½ log2(σ² c)` of each column still to come, by its place in the order.
    importance: Vec<f64>,
    next: usize,
    /// `½ log2 θ`.
    pub level: f64,
    /// Bits a number beyond [`bits`], of columns that have any.
    bias: f64,
    /// Bits that all numbers together may take.
    pub budget: f64,
    /// Bits of the columns that were coded.
    pub spent: f64,
}

impl Control {
    /// For columns of `rows` numbers with these `½ log2(σ² c)` in order of coding; a dead column has minus infinity.
    pub fn new(rows: usize, importance: Vec<f64>, budget: f64) -> Control {
        let level = importance.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut control =
            Control { rows: rows as f64, importance, next: 0, level, bias: 0.05, budget, spent: 0.0 };
        control.solve();
        control
    }

    /// `u` of a column with this `½ log2(σ² c)`.
    pub fn u(&self, importance: f64) -> f64 {
        (importance - self.level).min(BITS_MAX)
    }

    /// What a trial with this `u` took, before the first column.
    pub fn calibrate(&mut self, trials: &[(f64, f64)]) {
        let (n, sum) = trials
            .iter()
            .filter(|t| t.0 > 0.3)
            .fold((0.0, 0.0), |(n, sum), (u, taken)| (n + 1.0, sum + taken / self.rows - bits(*u)));
        if n > 0.0 {
            self.bias = sum / n;
            self.solve();
        }
    }

    /// A column was coded: it was predicted with `u`, and took so many bits.
    pub fn took(&mut self, u: f64, taken: f64) {
        /// Share of a column in what is believed of the bias.
        const TRUST: f64 = 0.08;
        self.spent += taken;
        self.next += 1;
        if u > 0.3 {
            self.bias += TRUST * (taken / self.rows - bits(u) - self.bias).clamp(-0.5, 0.5);
        }
    }

    /// Chooses the level anew from what is left.
    pub fn solve(&mut self) {
        let left = (self.budget - self.spent) / self.rows;
        let rest = self.importance.get(self.next..).unwrap_or_default();
        // The sum falls with the level, steeper the lower it is: Newton from above never overshoots by much.
        for _ in 0..60 {
            let (mut sum, mut slope) = (0.0, 0.0);
            for i in rest {
                let u = i - self.level;
                if u > 0.0 {
                    // Between nothing and a third of a bit the bias grows.
                    let part = (u * 3.0).min(1.0);
                    sum += u.min(BITS_MAX) + self.bias * part;
                    slope +=
                        if u < BITS_MAX { 1.0 } else { 0.0 } + if part < 1.0 { 3.0 * self.bias } else { 0.0 };
                }
            }
            if slope == 0.0 {
                // Nothing can be finer, or nothing is left to be.
                if sum > left && sum > 0.0 {
                    self.level += 0.1;
                    continue;
                }
                if sum > 0.0 || left <= 0.0 || rest.iter().all(|i| *i == f64::NEG_INFINITY) {
                    return;
                }
                self.level -= 0.1;
                continue;
            }
            let change = ((sum - left) / slope).clamp(-4.0, 4.0);
            self.level += change;
            if change.abs() < 1e-7 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_leaves_each_column_its_share() {
        let importance = vec![0.0, 1.0, 2.0, f64::NEG_INFINITY];
        let mut control = Control::new(100, importance, 600.0);
        control.calibrate(&[(1.0, 105.0)]);
        // 100 · ((2 − l) + (1 − l) + (0 − l) + 3 · 0.05) = 600, and none is below the level.
        assert!((control.level - (-0.95)).abs() < 1e-5, "{}", control.level);
        control.took(control.u(0.0), 200.0);
        control.solve();
        assert!(control.level > -0.95, "what was overspent is taken from the rest: {}", control.level);
    }

    #[test]
    fn a_poor_budget_drops_the_least_important() {
        let control = Control::new(100, vec![0.0, 8.0], 100.0);
        assert!(control.u(0.0) < 0.0 && control.u(8.0) > 0.8, "{control:?}");
    }

    #[test]
    fn steps_and_shrinkage_are_continuous() {
        let mut u = -2.0;
        while u < 6.0 {
            assert!((octaves(u + 0.01) - octaves(u)).abs() < 0.2 && octaves(u + 0.01) >= octaves(u), "{u}");
            assert!(shrink(u) > 0.0 && shrink(u) < 10.0);
            u += 0.01;
        }
    }
}
