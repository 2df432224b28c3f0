//! The Hessian of a matrix's output error: second moments of all pairs of its inputs.
//!
//! The output error of `y = W x` is `Σ_t g_t² ‖(Ŵ − W) x_t‖² = n · tr((Ŵ − W) H (Ŵ − W)ᵀ)` with `H = Σ_t g_t² x_t x_tᵀ / n`
//! (Frantar et al. 2022, "GPTQ", §2; the routing weight `g` is by which an expert's error reaches the output).

use std::ops::Range;

use moepack_format::{Error, Result};

use crate::codec::Matrix;
use crate::gemm::{PackedWeights, Rows};
use crate::isa::Isa;
use crate::stats::check_finite;

/// Mean of `g² x xᵀ`, `[cols, cols]`, symmetric. Finite everywhere.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hessian {
    /// Inputs seen.
    pub n_tokens: u64,
    /// Number of columns.
    pub cols: usize,
    /// Row-major, `[cols, cols]`.
    pub data: Vec<f32>,
}

impl Hessian {
    /// The mean over both this one's inputs and `prior_tokens` inputs of `pool`: `(n·H + κ·H_pool) / (n + κ)`. With few
    /// inputs it is the pool's, with many its own.
    ///
    /// # Errors
    /// Another number of columns.
    pub fn shrink(&mut self, pool: &Hessian, prior_tokens: f64) -> Result<()> {
        if pool.cols != self.cols {
            return Err(Error::bad_data(format!("a pool of {} columns for {}", pool.cols, self.cols)));
        }
        let n = self.n_tokens as f64;
        let own = (n / (n + prior_tokens)) as f32;
        for (a, &b) in self.data.iter_mut().zip(&pool.data) {
            *a = own * *a + (1.0 - own) * b;
        }
        Ok(())
    }

    /// The diagonal: mean squares of the columns.
    pub fn diagonal(&self) -> Vec<f32> {
        self.data.iter().step_by(self.cols + 1).copied().collect()
    }

    /// Mean squared error of the output, `tr(D H Dᵀ)`, if `delta`, `[rows, cols]`, is what was added to the weights.
    /// The products are chains in f32, their sum is one in f64, so the level does not show.
    ///
    /// # Panics
    /// If `delta` does not have as many columns, or not the length of its shape.
    pub fn error(&self, isa: Isa, delta: Matrix<'_>) -> f64 {
        assert_eq!(delta.cols, self.cols, "columns of a difference of weights");
        let (mut packed, mut total) = (PackedWeights::default(), 0.0);
        let mut product = vec![0.0; ROWS_AT_ONCE * SLAB];
        // A slab of the Hessian at a time, so that it is not in memory twice.
        for first in (0..self.cols).step_by(SLAB) {
            let width = SLAB.min(self.cols - first);
            let slab = Rows { data: &self.data[first * self.cols..], stride: self.cols };
            packed.repack(slab, width, self.cols);
            for rows in delta.data.chunks(ROWS_AT_ONCE * self.cols) {
                let product = &mut product[..rows.len() / self.cols * width];
                packed.matmul(isa, rows, product);
                for (product, row) in product.chunks(width).zip(rows.chunks(self.cols)) {
                    total += dot(product, &row[first..first + width]);
                }
            }
        }
        total
    }
}

/// Outputs of a slab, and rows that are multiplied with it at once.
const SLAB: usize = 512;
const ROWS_AT_ONCE: usize = 96;

/// Squared error of the output over all inputs, `Σ_t g_t² ‖D x_t‖²`, for `x`, `[tokens, cols]`, and `weights` `g`,
/// `[tokens]`. What [`Hessian::error`] says from the mean, times the tokens, without a Hessian: cheaper for fewer
/// tokens than columns.
///
/// # Panics
/// If a length is not that of its shape.
pub fn output_error(isa: Isa, delta: Matrix<'_>, x: &[f32], weights: &[f32]) -> f64 {
    assert_eq!(x.len(), weights.len() * delta.cols, "inputs of as many tokens as there are weights");
    let packed = PackedWeights::pack(delta.data, delta.rows, delta.cols);
    let mut outputs = vec![0.0; ROWS_AT_ONCE * delta.rows];
    let mut total = 0.0;
    for (x, weights) in x.chunks((ROWS_AT_ONCE * delta.cols).max(1)).zip(weights.chunks(ROWS_AT_ONCE)) {
        let outputs = &mut outputs[..weights.len() * delta.rows];
        packed.matmul(isa, x, outputs);
        for (y, &g) in outputs.chunks(delta.rows.max(1)).zip(weights) {
            let g = f64::from(g);
            total += g * g * dot(y, y);
        }
    }
    total
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).fold(0.0, |sum, (&a, &b)| sum + f64::from(a) * f64::from(b))
}

/// Sums on the way to a [`Hessian`]. Each is one chain of fused multiply-adds in f32 in token order,
/// `s = fma(g x_i, g x_j, s)`, stored and taken up again exactly: neither the level nor the number of pieces in which
/// the inputs arrive shows in the bits, only their order.
#[derive(Debug)]
pub struct HessianSum {
    n_tokens: u64,
    cols: usize,
    /// Sum of `g² x xᵀ`, `[cols, cols]`; blocks above the diagonal are not kept.
    sum: Vec<f32>,
}

/// Tokens that are packed at once: the depth of a chunk of the product.
const TOKENS: usize = 256;
/// Rows of a block of the sum; what lies right of its last row's diagonal is not computed.
const BLOCK: usize = 96;
/// Inputs beyond this, times their weight, count as this, so that no sum overflows.
const INPUT_MAX: f32 = 1e14;

impl HessianSum {
    /// Nothing seen yet of `cols` columns.
    pub fn new(cols: usize) -> HessianSum {
        HessianSum { n_tokens: 0, cols, sum: vec![0.0; cols * cols] }
    }

    /// Adds inputs `x`, `[tokens, cols]`, each weighted with the square of its `weights`, `[tokens]`.
    ///
    /// # Errors
    /// NaN or infinity; lengths that do not fit.
    pub fn add(&mut self, isa: Isa, x: &[f32], weights: &[f32]) -> Result<()> {
        if weights.len().checked_mul(self.cols) != Some(x.len()) {
            let (n, n_weights) = (x.len(), weights.len());
            return Err(Error::bad_data(format!(
                "{n} inputs and {n_weights} weights for {} columns",
                self.cols
            )));
        }
        check_finite(isa, x, self.cols)?;
        if let Some((token, g)) = weights.iter().enumerate().find(|(_, g)| !g.is_finite()) {
            return Err(Error::bad_data(format!("weight {g} of token {token}, expected a finite number")));
        }
        let mut scratch = Scratch::default();
        for (x, weights) in x.chunks((TOKENS * self.cols).max(1)).zip(weights.chunks(TOKENS)) {
            scratch.load(x, weights, self.cols);
            scratch.add_to(isa, &mut self.sum, weights.len(), self.cols);
        }
        self.n_tokens += weights.len() as u64;
        Ok(())
    }

    /// The mean.
    pub fn finish(self) -> Hessian {
        let HessianSum { n_tokens, cols, sum: mut data } = self;
        let n = n_tokens.max(1) as f64;
        for (i, row) in data.chunks_mut(cols.max(1)).enumerate() {
            row[..=i].iter_mut().for_each(|v| *v = (f64::from(*v) / n) as f32);
        }
        mirror(&mut data, cols);
        Hessian { n_tokens, cols, data }
    }
}

/// A chunk of weighted inputs, as the product wants them.
#[derive(Default)]
struct Scratch {
    /// `[tokens, cols]`
    weighted: Vec<f32>,
    /// `[BLOCK, TOKENS]`, a block of columns as rows.
    rows: Vec<f32>,
    packed: PackedWeights,
}

impl Scratch {
    fn load(&mut self, x: &[f32], weights: &[f32], cols: usize) {
        self.weighted.clear();
        for (x, &g) in x.chunks(cols.max(1)).zip(weights) {
            self.weighted.extend(x.iter().map(|v| (g * v).clamp(-INPUT_MAX, INPUT_MAX)));
        }
        self.packed.repack_transposed(Rows { data: &self.weighted, stride: cols }, weights.len(), cols);
    }

    /// Columns as rows, a few tokens at a time, which a set of the cache can hold whatever their distance.
    fn load_rows(&mut self, columns: Range<usize>, cols: usize) {
        for (some, tokens) in self.weighted.chunks(8 * cols).enumerate() {
            for (row, c) in self.rows.chunks_mut(TOKENS).zip(columns.clone()) {
                let values = tokens.iter().skip(c).step_by(cols);
                row[some * 8..].iter_mut().zip(values).for_each(|(to, &v)| *to = v);
            }
        }
    }

    fn add_to(&mut self, isa: Isa, sum: &mut [f32], tokens: usize, cols: usize) {
        self.rows.resize(BLOCK * TOKENS, 0.0);
        for first in (0..cols).step_by(BLOCK) {
            let end = cols.min(first + BLOCK);
            self.load_rows(first..end, cols);
            let x = Rows { data: &self.rows, stride: TOKENS };
            let out = &mut sum[first * cols..];
            self.packed.matmul_part_onto(isa, x, end - first, 0..end, 0..tokens, out, cols);
        }
    }
}

/// Copies what is below the diagonal to above it, in tiles that stay in the first-level cache.
fn mirror(data: &mut [f32], n: usize) {
    const TILE: usize = 32;
    for rows in (0..n).step_by(TILE) {
        for cols in (0..=rows).step_by(TILE) {
            for r in rows..n.min(rows + TILE) {
                for c in cols..r.min(cols + TILE) {
                    data[c * n + r] = data[r * n + c];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mix = |i: u32| i.wrapping_add(seed).wrapping_mul(2_654_435_761) ^ (i << 7);
        (0..n as u32).map(|i| (mix(i).wrapping_mul(2_246_822_519) >> 8) as f32 / 8_388_608.0 - 1.0).collect()
    }

    fn made(isa: Isa, x: &[f32], weights: &[f32], cols: usize, piece: usize) -> Hessian {
        let mut sum = HessianSum::new(cols);
        for (x, g) in x.chunks(cols * piece).zip(weights.chunks(piece)) {
            sum.add(isa, x, g).unwrap();
        }
        sum.finish()
    }

    #[test]
    fn each_element_is_one_chain_whatever_the_pieces_and_the_level() {
        for (cols, tokens) in [(1, 3), (37, 50), (130, 300), (97, 1)] {
            let (x, g) = (numbers(cols * tokens, 1), numbers(tokens, 2));
            let found = made(Isa::get(), &x, &g, cols, tokens);
            for (i, j) in (0..cols).flat_map(|i| (0..cols).map(move |j| (i, j))) {
                let (hi, lo) = (i.max(j), i.min(j));
                let at = |t: usize, c: usize| g[t] * x[t * cols + c];
                let chain = (0..tokens).fold(0.0f32, |s, t| at(t, hi).mul_add(at(t, lo), s));
                let expected = (f64::from(chain) / tokens as f64) as f32;
                assert_eq!(found.data[i * cols + j].to_bits(), expected.to_bits(), "[{i}, {j}] of {cols}");
            }
            for isa in Isa::available() {
                for piece in [1, 7, 256] {
                    assert!(made(isa, &x, &g, cols, piece) == found, "{} {cols} by {piece}", isa.name());
                }
            }
        }
    }

    #[test]
    fn the_error_of_the_mean_is_the_mean_of_the_errors() {
        let (rows, cols, tokens) = (110, 530, 70);
        let (x, g, delta) = (numbers(cols * tokens, 3), numbers(tokens, 4), numbers(rows * cols, 5));
        let delta = Matrix { rows, cols, data: &delta };
        let mean = made(Isa::get(), &x, &g, cols, tokens).error(Isa::get(), delta) * tokens as f64;
        let sum = output_error(Isa::get(), delta, &x, &g);
        assert!((mean / sum - 1.0).abs() < 1e-5, "{mean} and {sum}");
        for isa in Isa::available() {
            assert_eq!(output_error(isa, delta, &x, &g).to_bits(), sum.to_bits(), "{}", isa.name());
        }
    }

    #[test]
    fn what_is_no_number_is_refused_with_its_place_and_what_is_large_stays_finite() {
        let mut sum = HessianSum::new(2);
        let e = sum.add(Isa::get(), &[0.0, 0.0, 0.0, f32::NAN], &[1.0, 1.0]).unwrap_err();
        assert!(e.what().contains("token 1, column 1"), "{e}");
        assert!(sum.add(Isa::get(), &[0.0; 2], &[f32::INFINITY]).is_err());
        assert!(sum.add(Isa::get(), &[0.0; 3], &[1.0]).is_err());
        sum.add(Isa::get(), &[f32::MAX, f32::MIN, 0.0, 1.0], &[f32::MAX, 1.0]).unwrap();
        let hessian = sum.finish();
        assert_eq!(hessian.n_tokens, 2);
        assert!(hessian.data.iter().all(|v| v.is_finite()), "{hessian:?}");
    }

    #[test]
    fn nothing_seen_is_zero() {
        assert_eq!(HessianSum::new(2).finish(), Hessian { n_tokens: 0, cols: 2, data: vec![0.0; 4] });
        assert_eq!(HessianSum::new(0).finish(), Hessian::default());
    }
}
