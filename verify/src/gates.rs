//! Gates: limits that a drift report must keep, so that a build can fail.
//!
//! A gate compares the figure itself, not an end of its interval: the same run passes or fails however many windows
//! there were, and who wants a margin sets a stricter limit. NaN never passes.
//! Limits and values are in the units of the report: nats and shares, so `--min-top1 97%` is a limit of 0.97.

use moepack_format::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::report::{DriftReport, number, percent};

/// The limits asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    /// Most nats of mean KLD.
    pub max_kld: Option<f64>,
    /// Most that perplexity may grow, as a share: 0.02 for 2 %.
    pub max_ppl_increase: Option<f64>,
    /// Least top-1 agreement, as a share.
    pub min_top1: Option<f64>,
}

/// One limit and whether it was kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gate {
    /// `max_kld`, `max_ppl_increase` or `min_top1`.
    pub name: String,
    /// What was asked for.
    #[serde(deserialize_with = "crate::report::nan_for_null")]
    pub limit: f64,
    /// What was measured.
    #[serde(deserialize_with = "crate::report::nan_for_null")]
    pub value: f64,
    /// Whether the limit holds.
    pub passed: bool,
}

impl Limits {
    /// The gates for `report`, in the order of the fields.
    pub fn gates(&self, report: &DriftReport) -> Vec<Gate> {
        let rows = [
            ("max_kld", self.max_kld, report.kld_mean, false),
            ("max_ppl_increase", self.max_ppl_increase, report.perplexity_ratio - 1.0, false),
            ("min_top1", self.min_top1, report.top1_agreement, true),
        ];
        let gate = |(name, limit, value, at_least): (&str, Option<f64>, f64, bool)| {
            let limit = limit?;
            let passed = if at_least { value >= limit } else { value <= limit };
            Some(Gate { name: name.to_owned(), limit, value, passed })
        };
        rows.into_iter().filter_map(gate).collect()
    }
}

impl Gate {
    /// Limit and value as people read them.
    pub fn shown(&self) -> (String, String) {
        match self.name.as_str() {
            "max_kld" => (number(self.limit), number(self.value)),
            _ => (percent(self.limit), percent(self.value)),
        }
    }

    /// What a failed gate found, in one line.
    pub fn finding(&self) -> String {
        let (limit, value) = self.shown();
        format!("{}: {value}, the limit is {limit}", self.name)
    }
}

/// Reads a percentage such as `3%`, `0.5 %` or `97`, which are always percent; gives the share.
///
/// # Errors
/// No number, or one that is negative or not finite.
pub fn parse_percent(text: &str) -> Result<f64> {
    let digits = text.trim().trim_end_matches('%').trim_end();
    match digits.parse::<f64>() {
        Ok(p) if p >= 0.0 && p.is_finite() => Ok(p / 100.0),
        _ => Err(Error::usage(format!("{text:?} is no percentage")).hint("write it as 3% or 0.5%")),
    }
}

/// Reads a limit in nats.
///
/// # Errors
/// No number, or one that is negative or not finite.
pub fn parse_nats(text: &str) -> Result<f64> {
    match text.trim().parse::<f64>() {
        Ok(x) if x >= 0.0 && x.is_finite() => Ok(x),
        _ => Err(Error::usage(format!("{text:?} is no limit in nats")).hint("write it as 0.03")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Limits = Limits { max_kld: Some(0.03), max_ppl_increase: Some(0.02), min_top1: Some(0.97) };

    fn passed(report: &DriftReport) -> Vec<bool> {
        ALL.gates(report).iter().map(|g| g.passed).collect()
    }

    fn report(kld_mean: f64, perplexity_ratio: f64, top1_agreement: f64) -> DriftReport {
        DriftReport { kld_mean, perplexity_ratio, top1_agreement, ..DriftReport::default() }
    }

    #[test]
    fn a_limit_that_is_met_exactly_holds() {
        assert_eq!(passed(&report(0.03, 1.0, 0.97)), [true, true, true]);
        assert_eq!(passed(&report(0.030_000_1, 1.03, 0.969_9)), [false, false, false]);
    }

    #[test]
    fn nan_never_passes() {
        assert_eq!(passed(&report(f64::NAN, f64::NAN, f64::NAN)), [false, false, false]);
    }

    #[test]
    fn only_what_was_asked_for_is_a_gate() {
        assert!(Limits::default().gates(&report(9.0, 9.0, 0.0)).is_empty());
        let one = Limits { min_top1: Some(0.5), ..Limits::default() };
        assert_eq!(one.gates(&report(9.0, 9.0, 0.6))[0].name, "min_top1");
    }

    #[test]
    fn a_finding_says_both_numbers() {
        let gate = &ALL.gates(&report(0.0, 1.0, 0.9))[2];
        assert_eq!(gate.finding(), "min_top1: 90 %, the limit is 97 %");
    }

    #[test]
    fn percentages_and_nats() {
        for (text, share) in [("3%", 0.03), ("0.5 %", 0.005), ("97", 0.97), ("0%", 0.0)] {
            assert_eq!(parse_percent(text), Ok(share), "{text}");
        }
        for text in ["", "%", "-1%", "nan", "inf%", "three"] {
            assert!(parse_percent(text).is_err() && parse_nats(text).is_err(), "{text}");
        }
        assert_eq!(parse_nats("0.03"), Ok(0.03));
    }
}
