//! A few experts of a layer coded on trial, as the run will code them: what their outputs will lose, and how long it takes.
//!
//! A solver that feeds errors forward spoils weights more and outputs less than rounding does, and how much less depends on
//! model, text and rate. So what an expert's output loses is measured over inputs that were held out, and told as the
//! noise on weights that would do the same. With `D = Ŵ − W` and inputs `x` of routing weight `g`
//!
//! ```text
//! shrink = −Σ g² ⟨D x, W x⟩ / Σ g² ‖W x‖²                    what of the output is missing: low rates pull levels inwards
//! white  = (Σ g² ‖D x‖² − shrink² Σ g² ‖W x‖²) / unit         the rest, as noise of white · ‖W‖² on the weights
//! unit   = ‖W‖² Σ g² ‖x‖² / cols                              white noise of relative squared error 1 in outputs
//! ```

use std::time::Instant;

use moepack_convert::{CodedExpert, CodedPart, Model};
use moepack_format::Result;
use moepack_quant::{Isa, Matrix};
use moepack_verify::forward::{GatedMlp, LayerWeights, MoePass};
use rayon::prelude::*;

use crate::engine::calibration;
use crate::engine::coder::{Coder, Learnt};
use crate::engine::evidence::{self, Needs, Pool};
use crate::engine::heldout::HeldOut;
use crate::engine::noise::Disturbance;
use crate::recipe::MATRICES;

/// Where of a layer's tokens, in order of how many an expert has, the experts lie that are tried.
const QUANTILES: [f64; 2] = [0.25, 0.75];

/// What trying experts showed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trial {
    /// What coding does to gate, up and down.
    pub disturbances: [Disturbance; 3],
    /// Seconds that one thread took to code.
    pub coding_seconds: f64,
    /// Weights that were coded.
    pub n_weights: usize,
    /// Seconds that one thread took to run experts and to learn about their inputs.
    pub learning_seconds: f64,
    /// Tokens that went through.
    pub n_tokens: usize,
}

impl Trial {
    /// Tries experts of a layer on the tokens of `pass`.
    ///
    /// # Errors
    /// Weights that cannot be read or coded; a forward pass that overflows.
    pub fn of_layer(
        coder: &Coder<'_>,
        model: &Model,
        (layer, weights): (usize, &LayerWeights),
        pass: &MoePass<'_>,
    ) -> Result<Trial> {
        let inter = model.spec().moe(layer).map_or(0, |moe| moe.inter);
        let pool = Pool::of(coder.isa, pass, pass.width(), inter)?;
        let place = Place { coder, model, layer, weights, pass, pool: &pool, inter };
        let trials = sampled(&pass.routing().counts()).into_par_iter().map(|e| place.expert(e));
        Ok(mean(&trials.collect::<Result<Vec<_>>>()?))
    }
}

/// Experts at the quantiles of the layer's tokens, the busiest last; none twice.
fn sampled(counts: &[u64]) -> Vec<usize> {
    let mut by_count: Vec<usize> = (0..counts.len()).collect();
    by_count.sort_by_key(|&e| (counts.get(e).copied(), e));
    let all: u64 = counts.iter().sum();
    let at = |quantile: f64| {
        let mut sum = 0;
        let reached = |&&e: &&usize| {
            sum += counts.get(e).copied().unwrap_or(0);
            sum as f64 >= quantile * all as f64
        };
        by_count.iter().find(reached).copied()
    };
    let mut experts: Vec<usize> = QUANTILES.into_iter().filter_map(at).collect();
    experts.dedup();
    experts
}

/// Disturbances on average, everything else in all.
fn mean(trials: &[Trial]) -> Trial {
    let mut sum = Trial::default();
    for trial in trials {
        for (sum, d) in sum.disturbances.iter_mut().zip(trial.disturbances) {
            sum.white += d.white / trials.len() as f64;
            sum.shrink += d.shrink / trials.len() as f64;
        }
        sum.coding_seconds += trial.coding_seconds;
        sum.n_weights += trial.n_weights;
        sum.learning_seconds += trial.learning_seconds;
        sum.n_tokens += trial.n_tokens;
    }
    sum
}

struct Place<'a> {
    coder: &'a Coder<'a>,
    model: &'a Model,
    layer: usize,
    weights: &'a LayerWeights,
    pass: &'a MoePass<'a>,
    pool: &'a Pool,
    inter: usize,
}

impl Place<'_> {
    fn expert(&self, e: usize) -> Result<Trial> {
        let isa = self.coder.isa;
        let source = self.model.expert(self.layer, e)?;
        let mlp = self.weights.pack_expert(&source.decode(isa)?)?;
        let mut trial = Trial { n_tokens: self.pass.routing().tokens_of(e).len(), ..Trial::default() };
        // Judged by inputs that were held out, whatever the solver works with.
        let all = Needs { input: true, inner: true };
        let (seconds, (_, evidence)) =
            timed(|| evidence::run_expert(isa, self.pass, self.pool, (e, &mlp), all))?;
        let (learning, coding, coded) = if self.coder.solver.needs_hessian() {
            let learnt = Learnt::Evidence(&evidence);
            let (coding, coded) = timed(|| self.coder.code(self.layer, e, source.clone(), learnt))?;
            (seconds, coding, coded.expert)
        } else {
            self.by_stats(e, &mlp, source.clone())?
        };
        (trial.learning_seconds, trial.coding_seconds) = (learning, coding);
        for (disturbance, part) in trial.disturbances.iter_mut().zip(MATRICES) {
            let (Some(before), Some(after)) = (source.part(part), coded.part(part)) else { continue };
            if let (false, Some(evidence)) = (before.planes == after.planes, evidence.of(part)) {
                *disturbance = disturbance_of(isa, before, after, &evidence.held_out)?;
                trial.n_weights += before.rows * before.cols;
            }
        }
        Ok(trial)
    }

    /// Coded by a solver that knows mean squares at most; with the seconds to learn these and to code.
    fn by_stats(&self, e: usize, mlp: &GatedMlp, source: CodedExpert) -> Result<(f64, f64, CodedExpert)> {
        let dims = (self.pass.width(), self.inter);
        let (learning, (_, stats)) =
            timed(|| calibration::run_expert(self.coder.isa, self.pass, e, mlp, dims))?;
        let (coding, coded) = timed(|| self.coder.code(self.layer, e, source, Learnt::Stats(&stats)))?;
        Ok((learning, coding, coded.expert))
    }
}

/// The noise that spoils the output as much as coding did.
fn disturbance_of(
    isa: Isa,
    before: &CodedPart,
    after: &CodedPart,
    held_out: &HeldOut<'_>,
) -> Result<Disturbance> {
    let (w, mut coded) = (before.decode(isa)?, after.decode(isa)?);
    let squares =
        |data: &[f32]| held_out.output_squares(isa, Matrix { rows: before.rows, cols: before.cols, data });
    let (was, is) = (squares(&w), squares(&coded));
    coded.iter_mut().zip(&w).for_each(|(coded, w)| *coded -= w);
    let lost = squares(&coded);
    let energy: f64 = w.iter().map(|&w| f64::from(w) * f64::from(w)).sum();
    let unit = energy * held_out.input_squares() / before.cols.max(1) as f64;
    if !(was > 0.0 && unit > 0.0 && lost.is_finite()) {
        // Nothing was held out, or all of it is zero: what is lost of the weights has to do.
        let difference: f64 = coded.iter().map(|&d| f64::from(d) * f64::from(d)).sum();
        return Ok(Disturbance { white: if energy > 0.0 { difference / energy } else { 0.0 }, shrink: 0.0 });
    }
    // ‖Ŵ x‖² = ‖W x‖² + 2 ⟨W x, D x⟩ + ‖D x‖²
    let shrink = (was + lost - is) / (2.0 * was);
    Ok(Disturbance { white: ((lost - shrink * shrink * was) / unit).max(0.0), shrink })
}

/// What work gives, and the seconds that it took.
///
/// # Errors
/// Those of the work.
pub fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let started = Instant::now();
    let done = work()?;
    Ok((started.elapsed().as_secs_f64(), done))
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use moepack_convert::{Origin, Part};
    use moepack_quant::codec;

    use super::*;

    #[test]
    fn experts_are_taken_where_the_tokens_are() {
        assert_eq!(sampled(&[0, 10, 0, 30, 20, 40]), [4, 5]);
        assert_eq!(sampled(&[7]), [0]);
        assert_eq!(sampled(&[0, 0]), [0]);
        assert!(sampled(&[]).is_empty());
    }

    #[test]
    fn noise_and_shrinkage_are_told_apart() {
        let (rows, cols, n) = (64, 64, 400);
        let isa = Isa::get();
        let number = |i: usize| {
            let z = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            ((z ^ z >> 27) >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let w: Vec<f32> = (0..rows * cols).map(number).collect();
        let noise = |i: usize| 0.1 * number(i + (1 << 20));
        let plain = codec("f32").unwrap();
        let part = |data: &[f32]| {
            let planes = plain.encode(isa, Matrix { rows, cols, data }, None).unwrap();
            CodedPart { part: Part::Up, codec: plain.clone(), rows, cols, planes, source: Origin::default() }
        };
        let coded: Vec<f32> = w.iter().enumerate().map(|(i, w)| 0.9 * w + noise(i)).collect();
        let x: Vec<f32> = (0..n * cols).map(|i| number(i + (1 << 21))).collect();
        let held_out = HeldOut::alike(Cow::Borrowed(&x), cols);
        let found = disturbance_of(isa, &part(&w), &part(&coded), &held_out).unwrap();
        assert!((found.shrink - 0.1).abs() < 0.01, "{found:?}");
        assert!((found.white - 0.01).abs() < 0.001, "{found:?}");
    }
}
