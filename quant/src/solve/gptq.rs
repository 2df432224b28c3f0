//! `gptq`: column after column, each one making up for the errors of those before it (Frantar et al. 2022).
//!
//! The output error of a row is `e H eᵀ`, `e` its error and `H` the Hessian of its inputs. Where inputs are correlated,
//! an error in one column can be made up for in others. With `H = U D Uᵀ` ([`crate::linalg`]):
//!
//! ```text
//!  for each column j, in the order of coding:
//!      t = w_j + Σ_{i before j} (w_i − ŵ_i) U_ij            what column j had best be now, for every row
//!      ŵ_j = what the codec makes of t                        costs D_j (t − ŵ_j)²
//! ```
//!
//! - The sum is one chain of fused multiply-adds in the order of coding. Blocks of columns only let all but the last few
//!   links of it be a matrix product, and do not show in the result.
//! - Columns come in order of decreasing `H_jj` ("act-order"), equal ones from the left: what is coded last has nobody to
//!   make up for it, so it had better matter little. Scales are fitted before, by `H_jj` as importance.
//! - `H` is scaled to a mean diagonal of 1 over the columns, and [`DAMPING`] is added to its diagonal: few tokens do not
//!   know about all directions. A column whose inputs were all zero then costs little, but not nothing. If rounding
//!   errors in f32 outgrow that, more is added until they do not.
//!
//! Without a Hessian, or with a codec that does not work by columns, it codes as `weighted` does.

use std::cmp::Reverse;

use moepack_format::{Error, Result};

use super::weighted::Weighted;
use super::{Inputs, Solver};
use crate::codec::{Codec, ColumnCoder, ColumnPlan, Matrix, Planes};
use crate::gemm::PackedWeights;
use crate::hessian::Hessian;
use crate::isa::Isa;
use crate::linalg::Factor;
use crate::numbers;
use crate::per_isa;

/// What is added to the diagonal, in units of its mean.
const DAMPING: f32 = 0.01;
/// What more may be added where rounding errors ask for it, each ten times the one before.
const DAMPING_MAX: f32 = 10.0;
/// Weights beyond this might overflow by feedback and are coded without.
const WEIGHT_MAX: f32 = 1e30;
/// Columns whose targets are begun together, as a matrix product.
const BLOCK: usize = 48;

/// Error feedback between columns.
pub struct Gptq;

impl Solver for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn doc(&self) -> &'static str {
        "columns make up for each other's errors in the output, by second moments of all pairs from calibration"
    }

    fn needs_stats(&self) -> bool {
        true
    }

    fn needs_hessian(&self) -> bool {
        true
    }

    fn solve(&self, isa: Isa, w: Matrix<'_>, codec: &dyn Codec, inputs: Inputs<'_>) -> Result<Planes> {
        let by_columns = match inputs.hessian {
            Some(hessian) => solve_by_columns(isa, w, codec, hessian)?,
            None => None,
        };
        by_columns.map_or_else(|| Weighted.solve(isa, w, codec, inputs), Ok)
    }
}

/// `None` where there is nothing to go by: an empty Hessian, or a codec that does not work by columns.
fn solve_by_columns(isa: Isa, w: Matrix<'_>, codec: &dyn Codec, hessian: &Hessian) -> Result<Option<Planes>> {
    if hessian.cols != w.cols {
        let found = hessian.cols;
        return Err(Error::bad_data(format!("a Hessian of {found} columns for a matrix of {}", w.cols)));
    }
    let feedback_fits = numbers::max_magnitude(isa, w.data).is_some_and(|m| m <= WEIGHT_MAX);
    let Some(problem) = feedback_fits.then(|| Problem::new(isa, hessian)).flatten() else {
        return Ok(None);
    };
    let Some(mut coder) = codec.columns(isa, w, problem.plan())? else {
        return Ok(None);
    };
    problem.feed(isa, w, &mut *coder)?;
    coder.finish().map(Some)
}

/// A damped Hessian, ready for feedback.
struct Problem {
    order: Vec<usize>,
    /// In the order of coding.
    factor: Factor,
    /// By column.
    cost: Vec<f32>,
    importance: Vec<f32>,
}

impl Problem {
    fn new(isa: Isa, hessian: &Hessian) -> Option<Problem> {
        let diagonal = hessian.diagonal();
        let mean = diagonal.iter().map(|&v| f64::from(v)).sum::<f64>() / diagonal.len() as f64;
        if hessian.n_tokens == 0 || !mean.is_finite() || mean <= 0.0 {
            return None;
        }
        let mut order: Vec<usize> = (0..hessian.cols).collect();
        order.sort_by_key(|&c| Reverse(diagonal.get(c).map_or(0, |v| v.to_bits())));
        let factor = factorize(isa, hessian, &order, 1.0 / mean)?;
        let mut cost = vec![0.0; hessian.cols];
        for (&column, &pivot) in order.iter().zip(factor.pivots()) {
            cost[column] = pivot;
        }
        let importance = diagonal.iter().map(|&v| (f64::from(v) / mean) as f32 + DAMPING).collect();
        Some(Problem { order, factor, cost, importance })
    }

    fn plan(&self) -> ColumnPlan<'_> {
        ColumnPlan { order: &self.order, cost: &self.cost, importance: &self.importance }
    }

    /// Has all columns of `w` coded.
    fn feed(&self, isa: Isa, w: Matrix<'_>, coder: &mut dyn ColumnCoder) -> Result<()> {
        let rows = w.rows;
        // Errors of the columns coded so far, as weights of a product: outputs are rows, inputs are columns.
        let mut errors = PackedWeights::zeros(rows, w.cols);
        let mut block = Block { weights: vec![0.0; BLOCK * rows], sums: vec![0.0; BLOCK * rows] };
        let mut wanted = vec![0.0; rows];
        for (start, columns) in (0..w.cols).step_by(BLOCK).zip(self.order.chunks(BLOCK)) {
            let before = self.factor.feedback_rows(start);
            errors.matmul_part(isa, before, columns.len(), 0..rows, 0..start, &mut block.sums, rows);
            block.load(w, columns);
            for (i, &column) in columns.iter().enumerate() {
                let feedback = &self.factor.feedback(start + i)[start..];
                let (done, sum, weights) = block.at(i, rows);
                target(isa, done, feedback, sum, weights, &mut wanted);
                // What was decoded takes the place of the sum.
                coder.code(column, &wanted, sum)?;
                subtract(isa, sum, weights);
                errors.set_input(start + i, weights);
            }
        }
        Ok(())
    }
}

/// `U D Uᵀ` of the Hessian in the order of coding, times `scale`, with as little damping as works.
fn factorize(isa: Isa, hessian: &Hessian, order: &[usize], scale: f64) -> Option<Factor> {
    let (n, mut damping) = (hessian.cols, DAMPING);
    while damping <= DAMPING_MAX {
        let mut h = vec![0.0; n * n];
        for (i, (row, &from)) in h.chunks_exact_mut(n).zip(order).enumerate() {
            let source = &hessian.data[from * n..][..n];
            for (to, &c) in row[..=i].iter_mut().zip(order) {
                *to = (f64::from(source[c]) * scale) as f32;
            }
            row[i] += damping;
        }
        // In exact arithmetic no pivot is below the damping.
        let factor = Factor::new(isa, h, n, damping / 2.0);
        if factor.is_some() {
            return factor;
        }
        damping *= 10.0;
    }
    None
}

/// The columns that are being coded.
struct Block {
    /// Weights of the columns, `[BLOCK, rows]`; once a column is coded, its errors.
    weights: Vec<f32>,
    /// Feedback from all columns before the block, `[BLOCK, rows]`.
    sums: Vec<f32>,
}

impl Block {
    fn load(&mut self, w: Matrix<'_>, columns: &[usize]) {
        for (r, row) in w.data.chunks_exact(w.cols).enumerate() {
            for (i, &c) in columns.iter().enumerate() {
                self.weights[i * w.rows + r] = row[c];
            }
        }
    }

    /// Errors of the columns of the block before column `i`, its sum and its weights.
    fn at(&mut self, i: usize, rows: usize) -> (&[f32], &mut [f32], &mut [f32]) {
        let (done, rest) = self.weights.split_at_mut(i * rows);
        (done, &mut self.sums[i * rows..][..rows], &mut rest[..rows])
    }
}

per_isa! {
    /// `wanted = weights + sum`, after the chains of `sum` went on over the errors `done`, `[feedback.len(), rows]`.
    fn target(
        done: &[f32],
        feedback: &[f32],
        sum: &[f32],
        weights: &[f32],
        wanted: &mut [f32],
    ) = target_body;
}
per_isa! {
    /// `b = b − a`.
    fn subtract(a: &[f32], b: &mut [f32]) = subtract_body;
}

/// Rows whose chains stay in registers.
const LANES: usize = 64;

#[inline(always)]
fn target_body(done: &[f32], feedback: &[f32], sum: &[f32], weights: &[f32], wanted: &mut [f32]) {
    let rows = wanted.len();
    for first in (0..rows).step_by(LANES) {
        let end = rows.min(first + LANES);
        let mut chains = [0.0; LANES];
        chains[..end - first].copy_from_slice(&sum[first..end]);
        for (errors, &u) in done.chunks_exact(rows).zip(feedback) {
            match errors[first..end].first_chunk::<LANES>() {
                Some(errors) => chains.iter_mut().zip(errors).for_each(|(s, &e)| *s = e.mul_add(u, *s)),
                None => chains.iter_mut().zip(&errors[first..end]).for_each(|(s, &e)| *s = e.mul_add(u, *s)),
            }
        }
        for ((wanted, &w), &s) in wanted[first..end].iter_mut().zip(&weights[first..end]).zip(&chains) {
            *wanted = w + s;
        }
    }
}

#[inline(always)]
fn subtract_body(a: &[f32], b: &mut [f32]) {
    for (b, &a) in b.iter_mut().zip(a) {
        *b -= a;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::codec;
    use crate::hessian::HessianSum;
    use proptest::prelude::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        (0..n).map(|_| uniform() + uniform() + uniform()).collect()
    }

    /// Tokens whose neighbouring columns are alike; every seventh column is always zero.
    fn hessian(cols: usize, tokens: usize, seed: u32) -> Hessian {
        let mut x = numbers(cols * tokens, seed);
        for row in x.chunks_mut(cols) {
            (1..cols).for_each(|c| row[c] = 0.7 * row[c - 1] + row[c]);
            row.iter_mut().skip(3).step_by(7).for_each(|v| *v = 0.0);
        }
        let mut sum = HessianSum::new(cols);
        sum.add(Isa::get(), &x, &numbers(tokens, seed + 1)).unwrap();
        sum.finish()
    }

    /// Errors of the whole when coded with the Hessian, `[rows, cols]`.
    fn delta(isa: Isa, name: &str, w: Matrix<'_>, hessian: &Hessian) -> Vec<f32> {
        let codec = codec(name).unwrap();
        let planes = Gptq.solve(isa, w, &*codec, Inputs { stats: None, hessian: Some(hessian) }).unwrap();
        let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
        let mut decoded = vec![0.0; w.data.len()];
        codec.decode(isa, &planes, w.rows, w.cols, 0, &mut decoded).unwrap();
        decoded.iter().zip(w.data).map(|(d, v)| d - v).collect()
    }

    /// The definition, column by column in f64, with the codec's own rounding: `round(row, column, target)`.
    fn definition(
        w: Matrix<'_>,
        h: &[f64],
        order: &[usize],
        round: impl Fn(usize, usize, f64) -> f64,
    ) -> f64 {
        let n = w.cols;
        let mut at: Vec<f64> = order.iter().flat_map(|&a| order.iter().map(move |&b| h[a * n + b])).collect();
        let (mut u, mut loss) = (vec![0.0; n * n], 0.0);
        for j in (0..n).rev() {
            (0..j).for_each(|i| u[i * n + j] = at[i * n + j] / at[j * n + j]);
            for (a, b) in (0..j).flat_map(|a| (0..j).map(move |b| (a, b))) {
                at[a * n + b] -= u[a * n + j] * at[j * n + j] * u[b * n + j];
            }
        }
        for (r, row) in w.data.chunks(n).enumerate() {
            let mut errors = vec![0.0; n];
            for j in 0..n {
                let value = f64::from(row[order[j]]);
                let t = value + (0..j).map(|i| errors[i] * u[i * n + j]).sum::<f64>();
                let decoded = round(r, order[j], t);
                errors[j] = value - decoded;
                loss += at[j * n + j] * (t - decoded).powi(2);
            }
        }
        loss
    }

    #[test]
    fn the_loss_is_that_of_the_definition() {
        let (rows, cols) = (40, 200);
        let (data, hessian) = (numbers(rows * cols, 5), hessian(cols, 300, 9));
        let w = Matrix { rows, cols, data: &data };
        let delta = delta(Isa::get(), "int8-g64", w, &hessian);
        let problem = Problem::new(Isa::get(), &hessian).unwrap();
        let mean = hessian.diagonal().iter().map(|&v| f64::from(v)).sum::<f64>() / cols as f64;
        let mut h: Vec<f64> = hessian.data.iter().map(|&v| f64::from(v) / mean).collect();
        (0..cols).for_each(|i| h[i * cols + i] += f64::from(DAMPING));
        // The scales of int8 with the same importance, so that rounding is the same.
        let codec = codec("int8-g64").unwrap();
        let planes = codec.encode(Isa::get(), w, Some(&problem.importance)).unwrap();
        let scale = |r: usize, c: usize| {
            let bytes = planes[1].as_chunks::<2>().0[r * cols.div_ceil(64) + c / 64];
            f64::from(crate::minifloat::f16_to_f32(u16::from_le_bytes(bytes)))
        };
        let round = |r, c, t: f64| (t / scale(r, c)).round_ties_even().clamp(-128.0, 127.0) * scale(r, c);
        let expected = definition(w, &h, &problem.order, round);
        let damped = Hessian { n_tokens: 1, cols, data: h.iter().map(|&v| v as f32).collect() };
        let found = damped.error(Isa::get(), Matrix { data: &delta, ..w });
        assert!((found / expected - 1.0).abs() < 0.01, "{found} instead of {expected}");
    }

    #[test]
    fn a_hessian_of_another_width_is_refused() {
        let (data, hessian) = ([1.0; 64], hessian(63, 5, 1));
        let w = Matrix { rows: 1, cols: 64, data: &data };
        let inputs = Inputs { stats: None, hessian: Some(&hessian) };
        let e = Gptq.solve(Isa::get(), w, &*codec("int4").unwrap(), inputs).unwrap_err();
        assert!(e.what().contains("63 columns for a matrix of 64"), "{e}");
    }

    #[test]
    fn huge_weights_are_coded_without_feedback() {
        let hessian = hessian(64, 5, 1);
        for name in ["mxfp4", "fp8-block", "nvfp4"] {
            let data: Vec<f32> = numbers(64, 3).iter().map(|v| v * 5e37).collect();
            let delta = delta(Isa::get(), name, Matrix { rows: 1, cols: 64, data: &data }, &hessian);
            assert!(delta.iter().all(|v| v.is_finite()), "{name}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

        /// Any shape, also with fewer tokens than columns: numbers, the same at every level, and on what was measured
        /// no worse than rounding.
        #[test]
        fn any_shape_and_rank_gives_numbers(
            rows in 1usize..40, cols in 1usize..180, tokens in 1usize..40, seed: u32, exponent in -40i32..12, which in 0usize..5,
        ) {
            let name = ["int4-g32", "int3-g64-asym", "int2-g128", "mxfp4", "fp8-block-3x50"][which];
            let cols = if name == "mxfp4" { cols.next_multiple_of(32) } else { cols };
            let data: Vec<f32> = numbers(rows * cols, seed).iter().map(|v| v * 2f32.powi(exponent)).collect();
            let w = Matrix { rows, cols, data: &data };
            let hessian = hessian(cols, tokens, seed ^ 77);
            let expected = delta(Isa::SCALAR, name, w, &hessian);
            prop_assert!(expected.iter().all(|v| v.is_finite()));
            for isa in Isa::available() {
                prop_assert_eq!(&delta(isa, name, w, &hessian), &expected, "{}", isa.name());
            }
        }
    }
}
