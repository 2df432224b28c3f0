//! 95 % intervals of the drift figures: what another text of the same kind could have given.
//!
//! The unit is the window. Tokens of one window share context and topic, so their errors are correlated and a count
//! of tokens would promise too much; windows of `ctx` tokens are treated as independent draws (clusters of a
//! cluster sample). No random numbers are involved, so the same drift always has the same interval, and an interval
//! always contains its estimate.
//!
//! | figure | interval |
//! |---|---|
//! | mean m (KLD) | m·exp(± t·s/m): Student's t on the log scale, since KLD is positive and skewed |
//! | perplexity, ratio | exp(NLL ± t·s), the ratio from the paired differences of the same tokens |
//! | share p (top-1) | Wilson (1927) with the effective sample size p(1−p)/s² of Korn & Graubard (1998) |
//! | quantile | all values x where q lies in the Wilson interval of the share of values ≤ x (Francisco & Fuller 1991) |
//! | maximum | none: the largest value seen says nothing about values not seen; \[max, max\] |
//!
//! s is the linearised standard error of a ratio Σy/Σn over w windows, s² = w/(w−1) · Σ(y_i − m·n_i)² / (Σn)²
//! (Cochran, Sampling Techniques, 3rd ed., 1977, chapter 6), and t has w − 1 degrees of freedom.
//! Simulated with log-normal values and window effects, 10 to 100 windows hold the truth in 92 % to 97 % of texts.
//! A quantile's high end cannot exceed the largest value seen, so p999 of less than some 10 000 tokens is a low guess.
//!
//! One window cannot tell how windows differ. Its tokens are the units then; the report says so in `ci_unit`, and
//! such an interval is too narrow.

use serde::{Deserialize, Serialize};

/// A figure and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The figure itself.
    pub value: f64,
    /// Low and high end; `low <= value <= high` unless something is NaN.
    pub ci: [f64; 2],
}

/// What the intervals take as independent of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Windows, as it should be.
    Window,
    /// Tokens, since there is one window only.
    Token,
}

/// The unit for so many windows.
pub fn unit(n_windows: usize) -> Unit {
    if n_windows > 1 { Unit::Window } else { Unit::Token }
}

/// Mean of a quantity that is not negative, over all values of all windows.
pub fn positive_mean(windows: &[Vec<f64>]) -> Estimate {
    let m = Mean::of(windows);
    if m.value == 0.0 {
        return Estimate { value: 0.0, ci: [0.0, 0.0] };
    }
    let reach = libm::exp(m.reach() / m.value);
    Estimate { value: m.value, ci: [m.value / reach, m.value * reach] }
}

/// e^mean: a perplexity from NLLs, a ratio of perplexities from differences of NLLs.
pub fn exp_mean(windows: &[Vec<f64>]) -> Estimate {
    let m = Mean::of(windows);
    let value = libm::exp(m.value);
    let reach = libm::exp(m.reach());
    Estimate { value, ci: [value / reach, value * reach] }
}

/// Mean of values that are 0 or 1.
pub fn share(windows: &[Vec<f64>]) -> Estimate {
    let m = Mean::of(windows);
    Estimate { value: m.value, ci: m.wilson() }
}

/// The smallest value that a share `q` of all values do not exceed.
pub fn quantile(windows: &[Vec<f64>], q: f64) -> Estimate {
    let mut sorted: Vec<f64> = windows.iter().flatten().copied().collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return Estimate { value: f64::NAN, ci: [f64::NAN; 2] };
    };
    let at = |rank: usize| sorted.get(rank.min(last)).copied().unwrap_or(f64::NAN);
    let rank = (q * sorted.len() as f64).ceil().max(1.0) as usize - 1;
    let share_below = |x: f64| {
        let below = |w: &Vec<f64>| w.iter().map(|&v| f64::from(u8::from(v <= x))).collect();
        Mean::of(&windows.iter().map(below).collect::<Vec<Vec<f64>>>()).wilson()
    };
    // The share grows with x, so both ends are found by bisection. It is constant up to the next value seen, so the
    // high end is the first value that is too high.
    let low = first(rank, |r| share_below(at(r))[1] >= q);
    let high = rank + first(last - rank, |r| share_below(at(rank + r))[0] > q);
    Estimate { value: at(rank), ci: [at(low), at(high)] }
}

/// The first of `0..n` that `holds`, which those behind it do too; `n` if none.
fn first(n: usize, holds: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, n);
    while low < high {
        let middle = low + (high - low) / 2;
        if holds(middle) { high = middle } else { low = middle + 1 }
    }
    low
}

/// The largest value. Its interval is itself: see the table above.
pub fn maximum(windows: &[Vec<f64>]) -> Estimate {
    let larger = |a: f64, b: f64| if b > a || b.is_nan() { b } else { a };
    let value = windows.iter().flatten().copied().reduce(larger).unwrap_or(f64::NAN);
    Estimate { value, ci: [value, value] }
}

/// A mean over tokens with the standard error that clusters give it.
struct Mean {
    value: f64,
    /// Square of the standard error.
    variance: f64,
    n_values: f64,
    /// 97.5 % point of Student's t.
    t: f64,
}

impl Mean {
    fn of(windows: &[Vec<f64>]) -> Mean {
        let n_values: f64 = windows.iter().map(|w| w.len() as f64).sum();
        let sums: Vec<f64> = windows.iter().map(|w| w.iter().sum()).collect();
        let value = sums.iter().sum::<f64>() / n_values;
        let (squares, n_units) = match unit(windows.len()) {
            Unit::Window => {
                let residuals = windows.iter().zip(&sums).map(|(w, sum)| sum - value * w.len() as f64);
                (residuals.map(|r| r * r).sum::<f64>(), windows.len())
            }
            Unit::Token => {
                let residuals = windows.iter().flatten().map(|v| v - value);
                (residuals.map(|r| r * r).sum::<f64>(), windows.iter().map(Vec::len).sum())
            }
        };
        let df = n_units.saturating_sub(1);
        let factor = if df == 0 { 0.0 } else { n_units as f64 / df as f64 };
        Mean { value, variance: factor * squares / (n_values * n_values), n_values, t: t_975(df) }
    }

    /// Half the width of the interval around the mean.
    fn reach(&self) -> f64 {
        if self.variance == 0.0 { 0.0 } else { self.t * self.variance.sqrt() }
    }

    /// Wilson's interval of a share, with n replaced by the number of independent draws of the same variance, but
    /// never by more than there are values, and corrected for the windows being few: n · (z/t)².
    fn wilson(&self) -> [f64; 2] {
        let p = self.value;
        let spread = p * (1.0 - p);
        let n = if self.variance > 0.0 { (spread / self.variance).min(self.n_values) } else { self.n_values };
        let n = n * (Z_975 / self.t) * (Z_975 / self.t);
        let z2 = Z_975 * Z_975 / n;
        let centre = (p + z2 / 2.0) / (1.0 + z2);
        let reach = (z2 * (spread + z2 / 4.0)).sqrt() / (1.0 + z2);
        // Rounding must not put the estimate outside; NaN goes through.
        let low = if centre - reach > p { p } else { centre - reach };
        let high = if centre + reach < p { p } else { centre + reach };
        [if low < 0.0 { 0.0 } else { low }, if high > 1.0 { 1.0 } else { high }]
    }
}

/// 97.5 % point of the normal distribution.
const Z_975: f64 = 1.959_963_984_540_054;

/// 97.5 % point of Student's t with `df` degrees of freedom: a table, and beyond it the expansion of Abramowitz &
/// Stegun 26.7.5 (its error is below 2e-6). None at all counts as one.
fn t_975(df: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.706_204_74,
        4.302_652_73,
        3.182_446_31,
        2.776_445_11,
        2.570_581_84,
        2.446_911_85,
        2.364_624_25,
        2.306_004_14,
        2.262_157_16,
        2.228_138_85,
        2.200_985_16,
        2.178_812_83,
        2.160_368_66,
        2.144_786_69,
        2.131_449_55,
        2.119_905_30,
        2.109_815_58,
        2.100_922_04,
        2.093_024_05,
        2.085_963_45,
        2.079_613_84,
        2.073_873_07,
        2.068_657_61,
        2.063_898_56,
        2.059_538_55,
        2.055_529_44,
        2.051_830_52,
        2.048_407_14,
        2.045_229_64,
        2.042_272_46,
    ];
    if let Some(&t) = TABLE.get(df.max(1) - 1) {
        return t;
    }
    let (z, n) = (Z_975, df as f64);
    let z2 = z * z;
    let g1 = (z2 + 1.0) * z / 4.0;
    let g2 = ((5.0 * z2 + 16.0) * z2 + 3.0) * z / 96.0;
    let g3 = (((3.0 * z2 + 19.0) * z2 + 17.0) * z2 - 15.0) * z / 384.0;
    z + (g1 + (g2 + g3 / n) / n) / n
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn student_t_is_the_published_one() {
        for (df, t) in [(1, 12.706_204_74), (10, 2.228_138_85), (31, 2.039_513_446), (461, 1.965_123_216)] {
            assert!((t_975(df) - t).abs() < 2e-6, "{df}: {}, but {t}", t_975(df));
        }
        assert_eq!(t_975(0), t_975(1));
    }

    #[test]
    fn a_mean_by_hand() {
        // Windows of 2 and 1 values, mean 2; residuals 3 - 4 and 3 - 2; variance 2/1 · 2 / 9.
        let m = Mean::of(&[vec![1.0, 2.0], vec![3.0]]);
        assert_eq!((m.value, m.variance, m.t), (2.0, 4.0 / 9.0, 12.706_204_74));
        let e = positive_mean(&[vec![1.0, 2.0], vec![3.0]]);
        let reach = libm::exp(12.706_204_74 * (2.0 / 3.0) / 2.0);
        assert_eq!(e.ci, [2.0 / reach, 2.0 * reach]);
    }

    #[test]
    fn wilson_is_the_published_one() {
        // 81 of 263, one of the examples of Newcombe (1998), Statistics in Medicine 17:857: 0.2553 to 0.3662.
        let p = 81.0 / 263.0;
        let mean = Mean { value: p, variance: 0.0, n_values: 263.0, t: Z_975 };
        let [low, high] = mean.wilson();
        assert!((low - 0.2553).abs() < 5e-5 && (high - 0.3662).abs() < 5e-5, "{low} {high}");
    }

    #[test]
    fn agreement_everywhere_is_not_certainty() {
        let all = share(&vec![vec![1.0; 255]; 40]);
        assert_eq!((all.value, all.ci[1]), (1.0, 1.0));
        assert!(all.ci[0] < 1.0 && all.ci[0] > 0.999, "{}", all.ci[0]);
    }

    #[test]
    fn a_quantile_is_a_value_seen() {
        let windows: Vec<Vec<f64>> =
            (0..10).map(|w| (0..100).map(|i| f64::from(i * 10 + w)).collect()).collect();
        let e = quantile(&windows, 0.99);
        assert_eq!(e.value, 989.0);
        assert!(e.ci[0] < 989.0 && e.ci[1] > 989.0, "{:?}", e.ci);
        assert_eq!(quantile(&[vec![3.0]], 0.999), Estimate { value: 3.0, ci: [3.0, 3.0] });
        assert_eq!(maximum(&windows).value, 999.0);
        assert!(maximum(&[vec![1.0, f64::NAN], vec![2.0]]).value.is_nan());
    }

    #[test]
    fn no_drift_has_no_width() {
        let zero = vec![vec![0.0; 10]; 5];
        assert_eq!(positive_mean(&zero).ci, [0.0, 0.0]);
        assert_eq!(exp_mean(&zero), Estimate { value: 1.0, ci: [1.0, 1.0] });
        assert_eq!(quantile(&zero, 0.999).ci, [0.0, 0.0]);
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let nan = vec![vec![f64::NAN, 1.0], vec![1.0, 2.0]];
        assert!(positive_mean(&nan).value.is_nan() && positive_mean(&nan).ci[0].is_nan());
        assert!(exp_mean(&nan).ci[1].is_nan());
    }

    /// A small generator with its seed in sight: PCG-XSH-RR 64/32 (O'Neill 2014).
    struct Pcg(u64);

    impl Pcg {
        fn uniform(&mut self) -> f64 {
            let old = self.0;
            self.0 = old.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let mixed = (((old >> 18) ^ old) >> 27) as u32;
            (f64::from(mixed.rotate_right((old >> 59) as u32)) + 0.5) / 4_294_967_296.0
        }
        fn normal(&mut self) -> f64 {
            let (u, v) = (self.uniform(), self.uniform());
            (-2.0 * libm::log(u)).sqrt() * libm::cos(std::f64::consts::TAU * v)
        }
        /// Windows of KLD-like values: log-normal, with an effect that a window's tokens share.
        fn windows(&mut self, n_windows: usize, n_tokens: usize) -> Vec<Vec<f64>> {
            let window = |_| {
                let effect = 0.5 * self.normal();
                (0..n_tokens).map(|_| libm::exp(effect + self.normal() - 5.0)).collect()
            };
            (0..n_windows).map(window).collect()
        }
    }

    /// Share of `n` simulated texts whose interval holds the truth.
    fn coverage(n: usize, mut holds: impl FnMut(&mut Pcg) -> bool) -> f64 {
        let mut rng = Pcg(42);
        (0..n).filter(|_| holds(&mut rng)).count() as f64 / n as f64
    }

    fn inside(e: &Estimate, truth: f64) -> bool {
        assert!(e.ci[0] <= e.value && e.value <= e.ci[1], "{e:?}");
        e.ci[0] <= truth && truth <= e.ci[1]
    }

    #[test]
    fn intervals_hold_the_truth_as_often_as_they_say() {
        // log x is N(-5, 1.25): the mean is e^(-5 + 1.25/2), quantiles are e^(-5 + z·√1.25).
        let (mean, sd) = (libm::exp(-5.0 + 0.625), 1.25_f64.sqrt());
        let p99 = libm::exp(-5.0 + 2.326_347_874 * sd);
        for n_windows in [10, 30, 100] {
            let mean_kld = coverage(2000, |r| inside(&positive_mean(&r.windows(n_windows, 60)), mean));
            assert!((0.92..=0.97).contains(&mean_kld), "mean of {n_windows} windows: {mean_kld}");
            let quantiles = coverage(1000, |r| inside(&quantile(&r.windows(n_windows, 60), 0.99), p99));
            assert!((0.92..=0.97).contains(&quantiles), "p99 of {n_windows} windows: {quantiles}");
            let shares = coverage(2000, |r| {
                let below = |v: &f64| f64::from(u8::from(*v <= p99));
                inside(
                    &share(
                        &r.windows(n_windows, 60)
                            .iter()
                            .map(|w| w.iter().map(below).collect())
                            .collect::<Vec<_>>(),
                    ),
                    0.99,
                )
            });
            assert!((0.92..=0.97).contains(&shares), "share in {n_windows} windows: {shares}");
            let ratios = coverage(2000, |r| {
                let logs: Vec<Vec<f64>> = r
                    .windows(n_windows, 60)
                    .iter()
                    .map(|w| w.iter().map(|&v| libm::log(v)).collect())
                    .collect();
                inside(&exp_mean(&logs), libm::exp(-5.0))
            });
            assert!((0.93..=0.97).contains(&ratios), "perplexity of {n_windows} windows: {ratios}");
        }
    }

    #[test]
    fn tokens_as_units_promise_too_much() {
        let mean = libm::exp(-5.0 + 0.625);
        let one = coverage(1000, |r| inside(&positive_mean(&r.windows(1, 600)), mean));
        assert!(one < 0.5, "{one}");
        assert_eq!((unit(1), unit(2)), (Unit::Token, Unit::Window));
    }
}
