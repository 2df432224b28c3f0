//! A bundle's logits against a row of a baseline: a lower bound of the KLD, an estimate, and an upper bound.
//!
//! `BASELINE.md` derives what is computed here, in the same words: coarse, estimate, upper, rounding.

use moepack_format::{Error, Result};
use moepack_quant::Isa;

use super::row::{CODES_PER_NAT, NO_CODE, Row};
use crate::drift::logits::not_negative;
use crate::drift::rows;
use crate::drift::{Position, TailBound, WindowDrift};

/// Largest error of a stored ln p: half a code.
const HALF_CODE: f64 = 0.5 / CODES_PER_NAT;
/// Relative error of the tail mass, which is an f32, and a little for the arithmetic here.
const TAIL_ERROR: f64 = 1e-7;

impl Row {
    /// Compares the prediction of a bundle, `logits` `[vocab]`, with this row.
    ///
    /// # Errors
    /// Ids or a target that the logits do not have: they are another model's.
    pub fn compare(&self, isa: Isa, logits: &[f32], target: u32) -> Result<(Position, TailBound)> {
        let ids = self.top.iter().chain(&self.samples).map(|s| s.0).chain([target]);
        if let Some(id) = ids.into_iter().find(|&id| id as usize >= logits.len()) {
            return Err(Error::bad_data(format!("token id {id}, the bundle has {} tokens", logits.len())));
        }
        let bundle = Bundle::of(isa, self, logits);
        let coarse = Coarse::of(self, &bundle);
        let tail_kld = self.tail_mass * self.tail_estimate(&bundle);
        let hidden = self.tail_mass * (1.0 + TAIL_ERROR) * self.tail_upper(&bundle);
        let kld = not_negative(coarse.kld);
        let position = Position {
            kld,
            nll_reference: self.nll,
            nll_bundle: bundle.lse - bundle.logit(target),
            top1: rows::argmax(isa, logits).map(|a| a.0) == self.top.first().map(|t| t.0 as usize),
        };
        let bound = TailBound {
            tail_mass: self.tail_mass,
            estimate: kld + if self.tail_mass > 0.0 { tail_kld } else { 0.0 },
            upper: kld + coarse.rounding + if self.tail_mass > 0.0 { hidden } else { 0.0 },
            rounding: coarse.rounding,
        };
        Ok((position, bound))
    }

    /// KL divergence of the tails, each taken as a distribution of its own, from the samples: the mean of
    /// e^−δ − 1 + δ with δ = ln w − ln r. Its expectation is that of δ, since Σ w·e^−δ = Σ r = 1, and no term is
    /// negative.
    fn tail_estimate(&self, bundle: &Bundle) -> f64 {
        let log_mass = libm::log(self.tail_mass);
        let term = |&(id, log_p): &(u32, f64)| {
            let delta = (log_p - log_mass) - (bundle.logit(id) - bundle.tail_lse);
            not_negative(libm::expm1(-delta) + delta)
        };
        if self.samples.is_empty() {
            return 0.0;
        }
        self.samples.iter().map(term).sum::<f64>() / self.samples.len() as f64
    }

    /// The largest KL divergence that the tails, each as a distribution of its own, can have: no token of the tail
    /// is more likely than the least likely kept one, which is a share `cap` of the tail. KL is convex, so the worst
    /// tail is a corner: as many tokens as possible with `cap`, one with the rest, and all of them where the bundle
    /// expects least.
    fn tail_upper(&self, bundle: &Bundle) -> f64 {
        let least = match self.top.last() {
            Some(t) if !self.has_empty_slots => libm::exp(t.1 + HALF_CODE),
            _ => libm::exp(-(f64::from(NO_CODE) - 0.5) / CODES_PER_NAT),
        };
        let cap = (least / self.tail_mass * (1.0 + TAIL_ERROR)).min(1.0);
        let n_full = libm::floor(1.0 / cap) as usize;
        let mut tail = bundle.tail.clone();
        let n = (n_full + 1).min(tail.len());
        if n < tail.len() {
            tail.select_nth_unstable_by(n, f32::total_cmp);
        }
        tail.truncate(n);
        tail.sort_unstable_by(f32::total_cmp);
        let (full, rest) = tail.split_at(n_full.min(tail.len()));
        let sum_of = |logits: &[f32]| logits.iter().map(|&l| f64::from(l)).sum::<f64>();
        // Σ share·ln(share / r) over tokens with one share.
        let kld = |share: f64, logits: &[f32]| {
            share * (logits.len() as f64 * (libm::log(share) + bundle.tail_lse) - sum_of(logits))
        };
        let rest_share = 1.0 - n_full as f64 * cap;
        kld(cap, full) + if rest_share > 0.0 { kld(rest_share, rest) } else { 0.0 }
    }
}

/// What a bundle predicts, cut as the row is.
struct Bundle<'a> {
    logits: &'a [f32],
    /// ln Σ e^logit
    lse: f64,
    /// The logits of the tokens that the row does not keep, by id.
    tail: Vec<f32>,
    /// ln Σ e^logit over the tail.
    tail_lse: f64,
}

impl<'a> Bundle<'a> {
    fn of(isa: Isa, row: &Row, logits: &'a [f32]) -> Self {
        let mut kept: Vec<usize> = row.top.iter().map(|t| t.0 as usize).collect();
        kept.sort_unstable();
        let mut tail = Vec::with_capacity(logits.len());
        let mut next = 0;
        for id in kept {
            tail.extend_from_slice(logits.get(next..id).unwrap_or(&[]));
            next = id + 1;
        }
        tail.extend_from_slice(logits.get(next..).unwrap_or(&[]));
        let tail_lse = rows::log_sum_exp(isa, &tail);
        Bundle { logits, lse: rows::log_sum_exp(isa, logits), tail, tail_lse }
    }

    fn logit(&self, id: u32) -> f64 {
        self.logits.get(id as usize).map_or(f64::NAN, |&l| f64::from(l))
    }
}

/// The KLD with the tail as one token.
struct Coarse {
    kld: f64,
    rounding: f64,
}

impl Coarse {
    fn of(row: &Row, bundle: &Bundle) -> Coarse {
        // Rounded probabilities do not add up to 1; made to, their error has no effect of first order.
        let log_sum = libm::log(row.top.iter().map(|t| libm::exp(t.1)).sum::<f64>() + row.tail_mass);
        let cell = |log_p: f64, log_q: f64| (libm::exp(log_p - log_sum), log_p - log_sum - log_q);
        let mut cells: Vec<(f64, f64)> =
            row.top.iter().map(|&(id, log_p)| cell(log_p, bundle.logit(id) - bundle.lse)).collect();
        if row.tail_mass > 0.0 {
            cells.push(cell(libm::log(row.tail_mass), bundle.tail_lse - bundle.lse));
        }
        let kld: f64 = cells.iter().map(|(p, d)| p * d).sum();
        let spread: f64 = cells.iter().map(|(p, d)| p * (d - kld).abs()).sum();
        let theta = libm::expm1(HALF_CODE + log_sum.abs());
        Coarse { kld, rounding: theta * spread + theta * theta }
    }
}

impl WindowDrift {
    /// Adds the next position, from a row of a baseline and the bundle's logits.
    ///
    /// # Errors
    /// As [`Row::compare`].
    pub fn add_row(&mut self, isa: Isa, row: &Row, bundle: &[f32], target: u32) -> Result<()> {
        let (position, bound) = row.compare(isa, bundle, target)?;
        self.add_bounded(position, bound);
        Ok(())
    }
}
