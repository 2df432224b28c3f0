//! What calibration knows about the inputs of an expert's matrices, for solvers that work with Hessians.
//!
//! Each expert has two Hessians, made when it is its turn and dropped with it: of the inputs of gate and up, and of the
//! inputs of down, over the tokens that are routed to it, each weighted with its squared routing weight `g²`, by which the
//! expert's error reaches the output. Weights are relative to their root mean square, so that a Hessian of tokens that
//! have no routing weight, the pool's, is of the same size.
//!
//! An expert with few tokens knows too little about its inputs: the Hessian of fewer tokens than columns is singular, and
//! a solver that believes it does worse than rounding. So it is shrunk towards what the layer's tokens are like,
//!
//! ```text
//!     H = (n · H_expert + κ · H_pool) / (n + κ),    κ = columns
//! ```
//!
//! (the idea is that of Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices").
//! For gate and up the pool is an even sample of the layer's tokens. For down, whose columns mean something else in each
//! expert, it is what this expert makes of such a sample. An expert without tokens has the pools alone.
//!
//! What goes into down is taken from gate and up as released. Taken from the coded ones it costs a second pass and gained
//! nothing: mean KLD .01000 instead of .00997 for tiny-deepseek-v3 in int2-g64.
//!
//! Some tokens are held out: no Hessian has seen them, and they decide whether what the solver did is of use.

use std::borrow::Cow;

use moepack_convert::Part;
use moepack_format::Result;
use moepack_quant::hessian::HessianSum;
use moepack_quant::{Hessian, Isa};
use moepack_verify::forward::{Assigned, ExpertOutput, GatedMlp, MoePass, Observer};

use crate::engine::heldout::HeldOut;

/// One token in so many is held out,
const HELD_OUT_EACH: usize = 8;
/// but no more than this: enough to tell two codings apart.
pub const HELD_OUT_MAX: usize = 256;
/// An expert that can hold out fewer of its own is judged by the layer's.
const HELD_OUT_MIN: usize = 16;
/// Tokens of the layer's pool for each column. With so many its own error is small beside what shrinkage mends.
const POOL_TOKENS_A_COLUMN: usize = 4;
/// With so many tokens for each column an expert's Hessian is believed as it is.
const OWN_TOKENS_A_COLUMN: usize = 8;
/// Tokens that go through an expert together.
const BLOCK_TOKENS: usize = 192;

/// Whose inputs a Hessian was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Source {
    /// The expert's own tokens.
    Own,
    /// Its own, and the layer's.
    Shrunk,
    /// The layer's alone.
    Pooled,
}

impl Source {
    /// The name in reports and manifests.
    pub fn name(self) -> &'static str {
        match self {
            Source::Own => "own",
            Source::Shrunk => "shrunk",
            Source::Pooled => "pooled",
        }
    }
}

/// What is known about the inputs of one matrix.
#[derive(Debug)]
pub struct Evidence<'p> {
    /// `[cols, cols]`
    pub hessian: Cow<'p, Hessian>,
    /// Where that came from.
    pub source: Source,
    /// Inputs that it has not seen.
    pub held_out: HeldOut<'p>,
}

/// What is known about the inputs of an expert's matrices; nothing where all matrices that would need it are kept.
#[derive(Debug)]
pub struct ExpertEvidence<'p> {
    /// Inputs of gate and up.
    pub input: Option<Evidence<'p>>,
    /// Inputs of down.
    pub inner: Option<Evidence<'p>>,
}

impl Evidence<'_> {
    /// The Hessian; nothing if no input was ever anything but zero.
    pub fn hessian(&self) -> Option<&Hessian> {
        let diagonal = self.hessian.diagonal();
        diagonal.iter().any(|&v| v > 0.0).then_some(&*self.hessian)
    }
}

impl ExpertEvidence<'_> {
    /// That of the inputs of one matrix.
    pub fn of(&self, part: Part) -> Option<&Evidence<'_>> {
        if part == Part::Down { self.inner.as_ref() } else { self.input.as_ref() }
    }
}

/// Which of an expert's inputs are to be known.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Those of gate and up.
    pub input: bool,
    /// Those of down.
    pub inner: bool,
}

/// What the tokens of a layer are like, whichever expert gets them. Made once a layer.
#[derive(Debug)]
pub struct Pool {
    /// Of the inputs of gate and up, `[hidden, hidden]`.
    hessian: Hessian,
    /// Columns of down.
    inter: usize,
    /// Tokens that show each expert's inner activations.
    inner_tokens: Vec<u32>,
    /// Tokens that no Hessian of an expert judged by them sees.
    held_out_tokens: Vec<u32>,
    /// Their inputs, `[held_out_tokens, hidden]`.
    held_out: Vec<f32>,
}

impl Pool {
    /// The pool of a layer whose experts have `inter` inner columns.
    ///
    /// # Errors
    /// An input that is no finite number.
    pub fn of(isa: Isa, pass: &MoePass<'_>, hidden: usize, inter: usize) -> Result<Pool> {
        let n_tokens = u32::try_from(pass.n_tokens()).unwrap_or(u32::MAX);
        let n_held_out = (n_tokens as usize).div_ceil(HELD_OUT_EACH).min(HELD_OUT_MAX);
        let all: Vec<u32> = (0..n_tokens).collect();
        let held_out_tokens = spread(&all, n_held_out);
        let rest: Vec<u32> = all.into_iter().filter(|t| held_out_tokens.binary_search(t).is_err()).collect();
        let sample = spread(&rest, POOL_TOKENS_A_COLUMN * hidden);
        let mut sum = HessianSum::new(hidden);
        for tokens in sample.chunks(BLOCK_TOKENS) {
            sum.add(isa, &pass.inputs(tokens), &vec![1.0; tokens.len()])?;
        }
        Ok(Pool {
            hessian: sum.finish(),
            inter,
            inner_tokens: spread(&sample, inter),
            held_out: pass.inputs(&held_out_tokens),
            held_out_tokens,
        })
    }

    /// The Hessian of what an expert makes of the layer's tokens, `[inter, inter]`.
    fn inner(&self, isa: Isa, pass: &MoePass<'_>, mlp: &GatedMlp) -> Result<Hessian> {
        let mut sum = HessianSum::new(self.inter);
        for tokens in self.inner_tokens.chunks(BLOCK_TOKENS) {
            let a = finite_rows(mlp.inner(isa, &pass.inputs(tokens)), self.inter);
            sum.add(isa, &a, &vec![1.0; a.len() / self.inter.max(1)])?;
        }
        Ok(sum.finish())
    }

    fn held_out_inner(&self, isa: Isa, mlp: &GatedMlp) -> HeldOut<'static> {
        HeldOut::alike(Cow::Owned(finite_rows(mlp.inner(isa, &self.held_out), self.inter)), self.inter)
    }
}

/// Tokens that were never routed to an expert may overflow in it; the model never does that, so they tell nothing.
fn finite_rows(a: Vec<f32>, cols: usize) -> Vec<f32> {
    if a.iter().all(|v| v.is_finite()) {
        return a;
    }
    a.chunks_exact(cols.max(1)).filter(|row| row.iter().all(|v| v.is_finite())).flatten().copied().collect()
}

/// Runs an expert over its tokens and collects what its inputs are like.
///
/// # Errors
/// An input that is no finite number: the forward pass overflowed before.
pub fn run_expert<'p>(
    isa: Isa,
    pass: &MoePass<'_>,
    pool: &'p Pool,
    (expert, mlp): (usize, &GatedMlp),
    needs: Needs,
) -> Result<(ExpertOutput, ExpertEvidence<'p>)> {
    let split = Split::of(pass.routing().tokens_of(expert), &pool.held_out_tokens);
    let mut seen = Seen {
        isa,
        input: needs.input.then(|| Side::new(pool.hessian.cols, &split)),
        inner: needs.inner.then(|| Side::new(pool.inter, &split)),
        split,
        next: 0,
        outcome: Ok(()),
    };
    let output = pass.run_expert(expert, mlp, Some(&mut seen))?;
    seen.outcome?;
    let split = &seen.split;
    let input = seen.input.map(|side| {
        let pooled_held_out = || HeldOut::alike(Cow::Borrowed(pool.held_out.as_slice()), pool.hessian.cols);
        side.finish(split, || Ok(Cow::Borrowed(&pool.hessian)), pooled_held_out)
    });
    let inner = seen.inner.map(|side| {
        side.finish(split, || pool.inner(isa, pass, mlp).map(Cow::Owned), || pool.held_out_inner(isa, mlp))
    });
    Ok((output, ExpertEvidence { input: input.transpose()?, inner: inner.transpose()? }))
}

/// What an expert's tokens are used for.
struct Split {
    /// Of each token, ascending.
    uses: Vec<Use>,
    /// Tokens that the Hessian sees.
    n_seen: usize,
    /// Relative weights of those held out.
    held_out_weights: Vec<f32>,
    /// What makes the mean square of the routing weights 1.
    factor: f32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Seen,
    HeldOut,
    /// The pool holds it out.
    Unused,
}

impl Split {
    /// Holds out some of an expert's own tokens, or, where these are too few, those that the pool holds out.
    fn of(tokens: &[Assigned], pool_held_out: &[u32]) -> Split {
        let mean_square = tokens.iter().map(|t| f64::from(t.weight) * f64::from(t.weight)).sum::<f64>()
            / tokens.len() as f64;
        let factor = (1.0 / mean_square.sqrt()) as f32;
        if !factor.is_finite() {
            // No token, or none that the router gives any weight: nothing of it reaches the output.
            let uses = vec![Use::Unused; tokens.len()];
            return Split { uses, n_seen: 0, held_out_weights: Vec::new(), factor: 0.0 };
        }
        let n_held_out = (tokens.len() / HELD_OUT_EACH).min(HELD_OUT_MAX);
        let mut uses = vec![Use::Seen; tokens.len()];
        if n_held_out >= HELD_OUT_MIN {
            let all: Vec<usize> = (0..tokens.len()).collect();
            for i in spread(&all, n_held_out) {
                uses[i] = Use::HeldOut;
            }
        } else {
            for (t, kind) in tokens.iter().zip(&mut uses) {
                if pool_held_out.binary_search(&t.token).is_ok() {
                    *kind = Use::Unused;
                }
            }
        }
        let n_seen = uses.iter().filter(|u| **u == Use::Seen).count();
        let held_out = tokens.iter().zip(&uses).filter(|(_, u)| **u == Use::HeldOut);
        let held_out_weights = held_out.map(|(t, _)| t.weight * factor).collect();
        Split { uses, n_seen, held_out_weights, factor }
    }
}

/// Sees an expert's tokens go by.
struct Seen {
    isa: Isa,
    split: Split,
    input: Option<Side>,
    inner: Option<Side>,
    /// Tokens that have gone by.
    next: usize,
    outcome: Result<()>,
}

impl Observer for Seen {
    fn block(&mut self, x: &[f32], a: &[f32], weights: &[f32]) {
        let uses = &self.split.uses[self.next..][..weights.len()];
        self.next += weights.len();
        let seen = uses.iter().zip(weights).filter(|(u, _)| **u == Use::Seen);
        let weights: Vec<f32> = seen.map(|(_, w)| w * self.split.factor).collect();
        for (side, values) in [(&mut self.input, x), (&mut self.inner, a)] {
            if let (Some(side), Ok(())) = (side, &self.outcome) {
                self.outcome = side.block(self.isa, values, uses, &weights);
            }
        }
    }
}

/// The inputs of gate and up, or of down.
struct Side {
    cols: usize,
    /// Nothing where the expert has no token to be seen.
    sum: Option<HessianSum>,
    /// `[held out, cols]`
    held_out: Vec<f32>,
}

impl Side {
    fn new(cols: usize, split: &Split) -> Side {
        let sum = (split.n_seen > 0).then(|| HessianSum::new(cols));
        Side { cols, sum, held_out: Vec::with_capacity(split.held_out_weights.len() * cols) }
    }

    /// `values` is `[uses, cols]`; `weights` are those of the tokens that are seen.
    fn block(&mut self, isa: Isa, values: &[f32], uses: &[Use], weights: &[f32]) -> Result<()> {
        let rows = || values.chunks_exact(self.cols).zip(uses);
        let of = |kind: Use| rows().filter(move |(_, u)| **u == kind).flat_map(|(row, _)| row);
        self.held_out.extend(of(Use::HeldOut));
        let Some(sum) = &mut self.sum else { return Ok(()) };
        if weights.len() == uses.len() {
            return sum.add(isa, values, weights);
        }
        let seen: Vec<f32> = of(Use::Seen).copied().collect();
        sum.add(isa, &seen, weights)
    }

    /// The evidence; the pool's Hessian and inputs are only made where they are needed.
    fn finish<'p>(
        self,
        split: &Split,
        pool: impl FnOnce() -> Result<Cow<'p, Hessian>>,
        pool_held_out: impl FnOnce() -> HeldOut<'p>,
    ) -> Result<Evidence<'p>> {
        let (hessian, source) = match self.sum.map(HessianSum::finish) {
            None => (pool()?, Source::Pooled),
            Some(own) if split.n_seen >= OWN_TOKENS_A_COLUMN * self.cols => (Cow::Owned(own), Source::Own),
            Some(mut own) => {
                own.shrink(&*pool()?, self.cols as f64)?;
                (Cow::Owned(own), Source::Shrunk)
            }
        };
        let held_out = if self.held_out.is_empty() {
            pool_held_out()
        } else {
            HeldOut::new(Cow::Owned(self.held_out), split.held_out_weights.clone())
        };
        Ok(Evidence { hessian, source, held_out })
    }
}

/// `n` of the items, evenly spread and in order; all if there are not more. Not every k-th: where k has a factor in common
/// with the length of the windows, those would all stand at the same few places of a window. So the place within each
/// stretch moves on by the golden ratio.
fn spread<T: Copy>(items: &[T], n: usize) -> Vec<T> {
    /// 2³² divided by the golden ratio.
    const GOLDEN: u64 = 2_654_435_769;
    if n >= items.len() {
        return items.to_vec();
    }
    let place = |i: usize| {
        let (start, end) = (i * items.len() / n, (i + 1) * items.len() / n);
        let share = (i as u64).wrapping_mul(GOLDEN) & 0xffff_ffff;
        start + (((end - start) as u64 * share) >> 32) as usize
    };
    (0..n).filter_map(|i| items.get(place(i)).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_even_ascending_and_at_all_places_of_a_window() {
        let items: Vec<usize> = (0..65_536).collect();
        let sample = spread(&items, 256);
        assert!(sample.windows(2).all(|w| w[0] < w[1]) && sample.len() == 256);
        assert!(sample.iter().enumerate().all(|(i, s)| s / 256 == i), "one of each stretch");
        let places: std::collections::BTreeSet<usize> = sample.iter().map(|s| s % 256).collect();
        assert!(places.len() > 200, "{} places", places.len());
        assert_eq!(spread(&items[..5], 9), [0, 1, 2, 3, 4]);
        assert!(spread(&items, 0).is_empty());
    }

    fn assigned(n: u32, weight: f32) -> Vec<Assigned> {
        (0..n).map(|token| Assigned { token: token * 3, weight }).collect()
    }

    #[test]
    fn tokens_are_held_out_once_and_weights_are_relative() {
        let count = |s: &Split, kind| s.uses.iter().filter(|u| **u == kind).count();
        let many = Split::of(&assigned(10_000, 0.25), &[0, 3]);
        assert_eq!((count(&many, Use::HeldOut), many.n_seen, many.factor), (256, 9_744, 4.0));
        assert!(many.held_out_weights.iter().all(|&w| w == 1.0) && many.held_out_weights.len() == 256);
        let few = Split::of(&assigned(100, 0.5), &[0, 3, 4, 297]);
        assert_eq!((count(&few, Use::HeldOut), count(&few, Use::Unused), few.n_seen), (0, 3, 97));
        for none in [Split::of(&[], &[1]), Split::of(&assigned(500, 0.0), &[1])] {
            assert_eq!((none.n_seen, none.factor, none.held_out_weights.len()), (0, 0.0, 0));
        }
    }
}
