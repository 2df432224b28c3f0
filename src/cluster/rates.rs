//! How fast one core of this machine does what a job consists of, measured in a few seconds on normal numbers.
//!
//! Matrices of the largest models take too long to try, so smaller ones are, and scaled by what the work grows with: a
//! product by rows × columns, a Hessian by tokens × columns², a solver by its factor, columns³, and by feeding errors
//! forward, rows × columns².

use std::time::Instant;

use moepack_format::Result;
use moepack_quant::gemm::PackedWeights;
use moepack_quant::hessian::HessianSum;
use moepack_quant::solve::{Inputs, Solver};
use moepack_quant::{CodecRef, Isa, Matrix};
use sha2::{Digest, Sha256};

/// Columns of matrices on trial.
const COLS: usize = 1024;
/// Rows of those that are coded: few and more, to tell a solver's factor from the rest.
const ROWS: [usize; 2] = [32, 256];
/// Tokens on trial.
const TOKENS: usize = 192;

/// Seconds that one core takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// To multiply and add once, in a matrix product.
    pub product: f64,
    /// To bring one weight into the order that products want.
    pub pack: f64,
    /// For a token and a pair of columns of a Hessian.
    pub learn: f64,
    /// To code a weight to nearest.
    pub code: f64,
    /// For columns³ of a matrix that is solved, and for rows × columns²; 0 where the solver has no Hessian.
    pub solve: [f64; 2],
    /// To hash a byte.
    pub hash: f64,
}

impl Rates {
    /// Measures them on one core, for a codec and a solver.
    ///
    /// # Errors
    /// A codec that cannot hold a matrix of 1024 columns; threads that cannot be started.
    pub fn measured(codec: Option<&CodecRef>, solver: &dyn Solver) -> Result<Rates> {
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        let one =
            one.map_err(|e| moepack_format::Error::new(moepack_format::Kind::Temporary, e.to_string()))?;
        one.install(|| measure(Isa::get(), codec, solver))
    }
}

fn measure(isa: Isa, codec: Option<&CodecRef>, solver: &dyn Solver) -> Result<Rates> {
    let w = normal(COLS * COLS);
    let (pack, packed) = best(|| PackedWeights::pack(&w, COLS, COLS));
    let (x, mut out) = (normal(TOKENS * COLS), vec![0.0; TOKENS * COLS]);
    let (product, ()) = best(|| packed.matmul(isa, &x, &mut out));
    let mut sum = HessianSum::new(COLS);
    let (learn, learnt) = best(|| sum.add(isa, &x, &[1.0; TOKENS]));
    learnt?;
    let (hash, digest) = best(|| Sha256::digest(vec![1_u8; 4 << 20]));
    let squared = (COLS * COLS) as f64;
    let (code, solve) = match codec {
        None => (0.0, [0.0; 2]),
        Some(codec) => coding(isa, codec, solver, sum, &w)?,
    };
    Ok(Rates {
        product: product / (TOKENS as f64 * squared),
        pack: pack / squared,
        learn: learn / (TOKENS as f64 * squared),
        code,
        solve,
        hash: hash / (4 << 20) as f64 + f64::from(digest.is_empty()),
    })
}

/// To code a weight to nearest, and what a solver with Hessians takes beside.
fn coding(
    isa: Isa,
    codec: &CodecRef,
    solver: &dyn Solver,
    sum: HessianSum,
    w: &[f32],
) -> Result<(f64, [f64; 2])> {
    let matrix = |rows: usize| Matrix { rows, cols: COLS, data: w.get(..rows * COLS).unwrap_or_default() };
    let [few, more] = ROWS;
    let (seconds, coded) = best(|| codec.encode(isa, matrix(more), None));
    coded?;
    let code = seconds / (more * COLS) as f64;
    if !solver.needs_hessian() {
        return Ok((code, [0.0; 2]));
    }
    let hessian = sum.finish();
    let inputs = Inputs { stats: None, hessian: Some(&hessian) };
    let solve = |rows: usize| -> Result<f64> {
        let (seconds, solved) = best(|| solver.solve(isa, matrix(rows), codec.as_ref(), inputs));
        solved.map(|_| seconds)
    };
    let (short, long) = (solve(few)?, solve(more)?);
    let row = ((long - short) / (more - few) as f64).max(0.0);
    let factor = (short - row * few as f64).max(0.0);
    let cols = COLS as f64;
    Ok((code, [factor / (cols * cols * cols), row / (cols * cols)]))
}

/// The shortest of three.
fn best<T>(mut work: impl FnMut() -> T) -> (f64, T) {
    let mut run = || {
        let started = Instant::now();
        let done = work();
        (started.elapsed().as_secs_f64(), done)
    };
    let first = run();
    (0..2).fold(first, |best, _| {
        let next = run();
        if next.0 < best.0 { next } else { best }
    })
}

/// Nearly N(0, 1), as [`crate::engine::prediction`] has them.
fn normal(n: usize) -> Vec<f32> {
    crate::engine::prediction::normal(n)
}
