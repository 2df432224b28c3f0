//! Drift of the predictions: KL divergence, top-1 agreement and perplexity, position by position.
//!
//! With logits a of the reference and b of the bundle, p = softmax(a) and q = softmax(b):
//!
//! ```text
//! KLD   = Σ p·(ln p − ln q) = Σ p·(a − b) − (lse(a) − lse(b))        in nats
//! NLL   = lse(a) − a[target]                                          in nats
//! top-1 = argmax(a) == argmax(b)                                      the lower index of equal ones
//! ```
//!
//! Identical rows have a KLD of exactly 0. Rounding leaves less than 1e-13 nats below zero elsewhere, which becomes
//! 0. A NaN in a row makes its KLD NaN: it is never hidden, and no gate passes it.

use moepack_format::{Error, Result};
use moepack_quant::Isa;

use super::intervals::{self, Estimate, Unit};
use super::rows;

/// What one scored position says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Position {
    /// KL divergence of the bundle's prediction from the reference's, in nats. Against a baseline: of the two
    /// predictions with the tail taken as one token, which is never more.
    pub kld: f64,
    /// NLL of the target under the reference, in nats.
    pub nll_reference: f64,
    /// NLL of the target under the bundle, in nats.
    pub nll_bundle: f64,
    /// Whether both find the same token most likely.
    pub top1: bool,
}

/// What a baseline leaves open at one position: the tail of the reference is known by its mass and samples only.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TailBound {
    /// Probability that the reference gives to the tokens not kept.
    pub tail_mass: f64,
    /// Estimate of the whole KLD without bias: the coarse one and what the sampled tail tokens say.
    pub estimate: f64,
    /// No reference with this head and tail mass has a larger KLD.
    pub upper: f64,
    /// How far rounding in the baseline may have moved `Position::kld`, either way.
    pub rounding: f64,
}

/// Compares two rows of logits, `[vocab]` each.
///
/// # Errors
/// Rows of different lengths, or a target outside of them.
pub fn compare(isa: Isa, reference: &[f32], bundle: &[f32], target: u32) -> Result<Position> {
    if reference.len() != bundle.len() {
        let what = format!("{} logits of the bundle, {} of the reference", bundle.len(), reference.len());
        return Err(Error::bad_data(what).hint("these are not the same model"));
    }
    let (Some(&target_a), Some(&target_b)) = (reference.get(target as usize), bundle.get(target as usize))
    else {
        return Err(Error::bad_data(format!("token id {target}, the model has {} tokens", reference.len())));
    };
    let (Some((top_a, max_a)), Some((top_b, max_b))) =
        (rows::argmax(isa, reference), rows::argmax(isa, bundle))
    else {
        return Ok(Position { kld: f64::NAN, nll_reference: f64::NAN, nll_bundle: f64::NAN, top1: false });
    };
    let (max_a, max_b) = (f64::from(max_a), f64::from(max_b));
    let sums = rows::pair_sums(isa, reference, bundle, max_a, max_b);
    let (lse_a, lse_b) = (max_a + libm::log(sums.exp_a), max_b + libm::log(sums.exp_b));
    Ok(Position {
        kld: not_negative(sums.weighted / sums.exp_a - (lse_a - lse_b)),
        nll_reference: lse_a - f64::from(target_a),
        nll_bundle: lse_b - f64::from(target_b),
        top1: top_a == top_b,
    })
}

/// Zero for what rounding put below zero; NaN goes through.
pub(crate) fn not_negative(x: f64) -> f64 {
    if x < 0.0 { 0.0 } else { x }
}

/// The scored positions of one window, in order. Windows are accumulated on any thread and put together in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WindowDrift {
    /// What each position says.
    pub positions: Vec<Position>,
    /// What the baseline leaves open at each position; empty against a checkpoint.
    pub tail_bounds: Vec<TailBound>,
}

impl WindowDrift {
    /// Adds the next position, from two rows of logits.
    ///
    /// # Errors
    /// As [`compare`].
    pub fn add(&mut self, isa: Isa, reference: &[f32], bundle: &[f32], target: u32) -> Result<()> {
        self.positions.push(compare(isa, reference, bundle, target)?);
        Ok(())
    }

    /// Adds the next position, from a baseline.
    pub fn add_bounded(&mut self, position: Position, bound: TailBound) {
        self.positions.push(position);
        self.tail_bounds.push(bound);
    }
}

/// The positions of all windows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogitDrift {
    /// In window order.
    pub windows: Vec<WindowDrift>,
}

/// The figures of the report.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitSummary {
    /// Scored positions.
    pub tokens_scored: usize,
    /// Windows they come from.
    pub n_windows: usize,
    /// What the intervals take as independent.
    pub ci_unit: Unit,
    /// Mean KLD, nats.
    pub kld_mean: Estimate,
    /// 99 % quantile of the KLD, nats.
    pub kld_p99: Estimate,
    /// 99.9 % quantile of the KLD, nats.
    pub kld_p999: Estimate,
    /// Largest KLD, nats.
    pub kld_max: Estimate,
    /// Share of positions where both find the same token most likely.
    pub top1_agreement: Estimate,
    /// exp of the mean NLL under the reference.
    pub perplexity_reference: Estimate,
    /// exp of the mean NLL under the bundle.
    pub perplexity_bundle: Estimate,
    /// Bundle over reference, paired.
    pub perplexity_ratio: Estimate,
    /// What a baseline leaves open; none against a checkpoint.
    pub tail: Option<TailSummary>,
}

/// What a baseline leaves open, over all positions.
#[derive(Clone, Debug, PartialEq)]
pub struct TailSummary {
    /// Mean probability of the tokens not kept.
    pub tail_mass: f64,
    /// Mean KLD, estimated without bias from the sampled tail.
    pub estimate: Estimate,
    /// The true mean is no less.
    pub lower: f64,
    /// The true mean is no more.
    pub upper: f64,
    /// How far rounding in the file may have moved the mean, either way.
    pub rounding: f64,
}

impl LogitDrift {
    /// The figures of the report.
    pub fn summary(&self) -> LogitSummary {
        let kld = self.values(|p| p.kld);
        let paired = self.values(|p| p.nll_bundle - p.nll_reference);
        LogitSummary {
            tokens_scored: self.windows.iter().map(|w| w.positions.len()).sum(),
            n_windows: self.windows.len(),
            ci_unit: intervals::unit(self.windows.len()),
            kld_mean: intervals::positive_mean(&kld),
            kld_p99: intervals::quantile(&kld, 0.99),
            kld_p999: intervals::quantile(&kld, 0.999),
            kld_max: intervals::maximum(&kld),
            top1_agreement: intervals::share(&self.values(|p| f64::from(u8::from(p.top1)))),
            perplexity_reference: intervals::exp_mean(&self.values(|p| p.nll_reference)),
            perplexity_bundle: intervals::exp_mean(&self.values(|p| p.nll_bundle)),
            perplexity_ratio: intervals::exp_mean(&paired),
            tail: self.tail(),
        }
    }

    fn values(&self, of: impl Fn(&Position) -> f64) -> Vec<Vec<f64>> {
        self.windows.iter().map(|w| w.positions.iter().map(&of).collect()).collect()
    }

    fn tail(&self) -> Option<TailSummary> {
        let n: usize = self.windows.iter().map(|w| w.tail_bounds.len()).sum();
        if n == 0 {
            return None;
        }
        let values = |of: fn(&TailBound) -> f64| -> Vec<Vec<f64>> {
            self.windows.iter().map(|w| w.tail_bounds.iter().map(of).collect()).collect()
        };
        let mean = |of: fn(&TailBound) -> f64| values(of).iter().flatten().sum::<f64>() / n as f64;
        let coarse = intervals::positive_mean(&self.values(|p| p.kld)).value;
        let rounding = mean(|b| b.rounding);
        Some(TailSummary {
            tail_mass: mean(|b| b.tail_mass),
            estimate: intervals::positive_mean(&values(|b| b.estimate)),
            lower: not_negative(coarse - rounding),
            upper: mean(|b| b.upper),
            rounding,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn isa() -> Isa {
        Isa::get()
    }

    #[test]
    fn two_tokens_by_hand() {
        // p = (1/2, 1/2), q = (3/4, 1/4): KLD = ln(2/3)/2 + ln(2)/2.
        let p = compare(isa(), &[0.0, 0.0], &[3.0_f32.ln(), 0.0], 1).unwrap();
        assert!((p.kld - 0.143_841_036_225_890_45).abs() < 1e-8, "{}", p.kld);
        assert!((p.nll_reference - std::f64::consts::LN_2).abs() < 1e-15);
        assert!((p.nll_bundle - 4.0_f64.ln()).abs() < 1e-7);
        assert!(p.top1, "of equal logits the lower index counts");
    }

    /// Numbers of torch 2.15.0, in float64:
    /// `a = (i*37 % 101) / 8; b = a + (i*53 % 97 - 48) / step; la, lb = a.log_softmax(0), b.log_softmax(0)` for
    /// i < 1000; `kl_div(lb, la, log_target=True, reduction="sum"), -la[500], -lb[500]`.
    #[test]
    fn torch_finds_the_same() {
        let goldens = [
            (64.0, 0.091_494_331_943_257_57, 15.366_794_396_246_91),
            (65536.0, 8.927_056_198_934_25e-8, 14.813_904_506_131_824),
        ];
        for (step, kld, nll) in goldens {
            let a: Vec<f32> = (0..1000).map(|i| (i * 37 % 101) as f32 / 8.0).collect();
            let b: Vec<f32> = (0..1000).map(|i| a[i] + ((i * 53 % 97) as f32 - 48.0) / step).collect();
            for isa in Isa::available() {
                let p = compare(isa, &a, &b, 500).unwrap();
                assert!((p.kld - kld).abs() < 1e-13, "{}: {:e}, but {kld:e}", isa.name(), p.kld);
                assert!((p.nll_reference - 14.813_453_394_723).abs() < 1e-12, "{}", p.nll_reference);
                assert!((p.nll_bundle - nll).abs() < 1e-12, "{}", p.nll_bundle);
                assert!(!p.top1, "30 leads a, 333 leads b");
            }
        }
    }

    #[test]
    fn identical_rows_have_no_drift_at_all() {
        for scale in [1e-3_f32, 1.0, 40.0, 1e4] {
            let row: Vec<f32> = (0..1001).map(|i| (i as f32 * 1.7).sin() * scale).collect();
            let p = compare(isa(), &row, &row, 3).unwrap();
            assert_eq!((p.kld, p.nll_reference, p.top1), (0.0, p.nll_bundle, true));
        }
    }

    #[test]
    fn a_shift_of_all_logits_is_no_drift() {
        let row: Vec<f32> = (0..500).map(|i| (i * 37 % 101) as f32 / 8.0).collect();
        let shifted: Vec<f32> = row.iter().map(|v| v + 64.0).collect();
        assert!(compare(isa(), &row, &shifted, 0).unwrap().kld < 1e-13);
    }

    #[test]
    fn nan_is_never_hidden() {
        let p = compare(isa(), &[0.0, 1.0], &[f32::NAN, 1.0], 1).unwrap();
        assert!(p.kld.is_nan());
        let p = compare(isa(), &[0.0, 1.0], &[f32::NAN, f32::NAN], 1).unwrap();
        assert!(p.kld.is_nan() && !p.top1);
    }

    #[test]
    fn rows_of_other_models_are_refused() {
        assert!(compare(isa(), &[0.0], &[0.0, 1.0], 0).is_err());
        assert!(compare(isa(), &[0.0, 1.0], &[0.0, 1.0], 2).is_err());
    }
}
