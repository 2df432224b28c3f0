//! The Hessian of a matrix's output error: second moments of all pairs of its inputs.
//!
//! The output error of `y = W x` is `Σ_t g_t² ‖(Ŵ − W) x_t‖² = n · tr((Ŵ − W) H (Ŵ − W)ᵀ)` with `H = Σ_t g_t² x_t x_tᵀ / n`
//! (Frantar et al. 2022, "GPTQ", §2; the routing weight `g` is by which an expert's error reaches the output).

use moepack_format::{Error, Result};

use crate::gemm::{PackedWeights, Rows};
use crate::isa::Isa;

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
}

/// Sums on the way to a [`Hessian`]. The bits do not depend on in how many pieces the inputs arrive.
#[derive(Debug)]
pub struct HessianSum {
    n_tokens: u64,
    cols: usize,
    /// Sum of `g² x xᵀ`, `[cols, cols]`; blocks above the diagonal are not kept.
    sum: Vec<f32>,
}

impl HessianSum {
    /// Nothing seen yet of `cols` columns.
    pub fn new(cols: usize) -> HessianSum {
        HessianSum { n_tokens: 0, cols, sum: vec![0.0; cols * cols] }
    }

    /// Adds inputs `x`, `[tokens, cols]`, each weighted with the square of its `weights`, `[tokens]`.
    ///
    /// # Errors
    /// NaN or infinity; lengths that do not fit.
    pub fn add(&mut self, _isa: Isa, _x: &[f32], _weights: &[f32]) -> Result<()> {
        let _ = (PackedWeights::pack, |r: Rows<'_>| r.stride, &self.sum);
        Err(Error::bad_data("to be written"))
    }

    /// The mean.
    pub fn finish(self) -> Hessian {
        Hessian { n_tokens: self.n_tokens, cols: self.cols, data: self.sum }
    }
}
