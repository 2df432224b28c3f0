//! What a solver is, and the table of all of them.
//!
//! A codec knows how to store levels; a solver decides which error matters. All it may use is the matrix and what
//! calibration learnt about the matrix's inputs.

use moepack_format::{Error, Result};

use crate::codec::{Codec, Matrix, Planes};
use crate::hessian::Hessian;
use crate::isa::Isa;
use crate::stats::ColumnStats;

pub mod gptq;
pub mod rtn;
pub mod weighted;

/// Every solver there is.
pub const SOLVERS: &[&dyn Solver] = &[&rtn::Rtn, &weighted::Weighted, &gptq::Gptq];

/// Chooses the levels and scales of a matrix.
pub trait Solver: Send + Sync {
    /// Name in recipes and on the command line.
    fn name(&self) -> &'static str;

    /// One line for help.
    fn doc(&self) -> &'static str;

    /// Whether it is of use only with calibration. Without stats it codes as `rtn` does.
    fn needs_stats(&self) -> bool;

    /// Whether it works with the Hessian of the inputs, so that it is worth making one.
    fn needs_hessian(&self) -> bool {
        false
    }

    /// Encodes `w`.
    ///
    /// # Errors
    /// Those of [`Codec::encode`]; stats of another width.
    fn solve(&self, isa: Isa, w: Matrix<'_>, codec: &dyn Codec, inputs: Inputs<'_>) -> Result<Planes>;
}

/// What calibration learnt about the inputs of one matrix.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inputs<'a> {
    /// Mean squares of the columns, or `None` if there are none.
    pub stats: Option<&'a ColumnStats>,
    /// Second moments of all pairs of columns, or `None` if there are none.
    pub hessian: Option<&'a Hessian>,
}

/// The solver of that name.
///
/// # Errors
/// An unknown name (kind `Usage`), with the known ones.
pub fn solver(name: &str) -> Result<&'static dyn Solver> {
    SOLVERS.iter().copied().find(|s| s.name() == name).ok_or_else(|| {
        let known: Vec<_> = SOLVERS.iter().map(|s| s.name()).collect();
        Error::usage(format!("unknown solver {name:?}, known are {}", known.join(" ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{CODECS, ColumnPlan, codec};

    const ROWS: usize = 24;
    const COLS: usize = 256;

    /// Weights around zero, and second moments over four orders of magnitude, one column in 16 never seen.
    fn case() -> (Vec<f32>, ColumnStats) {
        let mut state = 1u32;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 16_777_216.0
        };
        let data = (0..ROWS * COLS).map(|_| uniform() + uniform() + uniform() - 1.5).collect();
        let moment = |c: usize| if c % 16 == 3 { 0.0 } else { 10f32.powi(c as i32 % 5 - 2) };
        (data, ColumnStats { n_tokens: 1000, second_moment: (0..COLS).map(moment).collect() })
    }

    #[test]
    fn names_are_found_and_an_unknown_one_is_answered_with_the_known() {
        for s in SOLVERS {
            assert_eq!(solver(s.name()).unwrap().name(), s.name());
        }
        let e = solver("gptq9").err().unwrap();
        assert!(SOLVERS.iter().all(|s| e.what().contains(s.name())), "{e}");
    }

    #[test]
    fn without_stats_or_tokens_every_solver_rounds_to_nearest() {
        let (data, stats) = case();
        let w = Matrix { rows: ROWS, cols: COLS, data: &data };
        let unseen = ColumnStats { n_tokens: 0, second_moment: vec![0.0; COLS] };
        let silent = ColumnStats { n_tokens: 9, ..unseen.clone() };
        for name in CODECS.iter().flat_map(|f| f.examples) {
            let codec = codec(name).unwrap();
            let expected = codec.encode(Isa::get(), w, None).unwrap();
            for s in SOLVERS {
                let empty = Hessian { n_tokens: 0, cols: COLS, data: vec![0.0; COLS * COLS] };
                let zero = Hessian { n_tokens: 9, ..empty.clone() };
                for stats in [None, Some(&unseen), Some(&silent)] {
                    for hessian in [None, Some(&empty), Some(&zero)] {
                        let planes = s.solve(Isa::get(), w, &*codec, Inputs { stats, hessian }).unwrap();
                        assert!(planes == expected, "{} {name}", s.name());
                    }
                }
                assert!(
                    s.solve(Isa::get(), w, &*codec, Inputs { stats: Some(&stats), hessian: None }).is_ok(),
                    "{} {name}",
                    s.name()
                );
            }
        }
    }

    #[test]
    fn stats_lower_the_error_of_the_output() {
        let (data, stats) = case();
        let w = Matrix { rows: ROWS, cols: COLS, data: &data };
        for name in ["int2-g64", "int3-g64-asym", "int4-g64", "int4-g32", "mxfp4", "nvfp4"] {
            let codec = codec(name).unwrap();
            let output_error = |s: &dyn Solver| -> f64 {
                let planes =
                    s.solve(Isa::get(), w, &*codec, Inputs { stats: Some(&stats), hessian: None }).unwrap();
                let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
                let mut decoded = vec![0.0; data.len()];
                codec.decode(Isa::get(), &planes, ROWS, COLS, 0, &mut decoded).unwrap();
                let term = |(i, (d, v)): (usize, (&f32, &f32))| {
                    f64::from(stats.second_moment[i % COLS]) * (f64::from(*d) - f64::from(*v)).powi(2)
                };
                decoded.iter().zip(&data).enumerate().map(term).sum()
            };
            for s in SOLVERS.iter().filter(|s| s.needs_stats()) {
                let (with, without) = (output_error(*s), output_error(&rtn::Rtn));
                assert!(with < without * 0.99, "{} {name}: {with:.4} instead of {without:.4}", s.name());
            }
        }
    }

    /// Inputs that depend on 24 hidden ones, columns of different size.
    fn correlated(tokens: usize) -> (Hessian, ColumnStats) {
        let mut state = 7u32;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        let mixing: Vec<f32> = (0..COLS * 24).map(|_| uniform()).collect();
        let hidden: Vec<f32> = (0..tokens * 24).map(|_| uniform()).collect();
        let mut x = vec![0.0; tokens * COLS];
        crate::gemm::matmul_t(Isa::get(), &hidden, &mixing, tokens, 24, COLS, &mut x);
        x.iter_mut().enumerate().for_each(|(i, v)| *v = (*v + uniform()) * 2f32.powi((i % COLS) as i32 % 4));
        let mut sum = crate::hessian::HessianSum::new(COLS);
        sum.add(Isa::get(), &x, &vec![1.0; tokens]).unwrap();
        let hessian = sum.finish();
        let stats = ColumnStats { n_tokens: tokens as u64, second_moment: hessian.diagonal() };
        (hessian, stats)
    }

    #[test]
    fn a_hessian_lowers_the_error_of_the_output_at_every_level_alike() {
        let (data, _) = case();
        let w = Matrix { rows: ROWS, cols: COLS, data: &data };
        let (hessian, stats) = correlated(1000);
        let inputs = Inputs { stats: Some(&stats), hessian: Some(&hessian) };
        for name in CODECS.iter().flat_map(|f| f.examples) {
            let codec = codec(name).unwrap();
            let (order, ones) = ((0..COLS).collect::<Vec<_>>(), vec![1.0; COLS]);
            let plan = ColumnPlan { order: &order, cost: &ones, importance: &ones };
            if codec.columns(Isa::get(), w, plan).unwrap().is_none() {
                continue;
            }
            let error = |s: &dyn Solver| {
                let planes = s.solve(Isa::get(), w, &*codec, inputs).unwrap();
                for isa in Isa::available() {
                    let other = s.solve(isa, w, &*codec, inputs).unwrap();
                    assert!(other == planes, "{} {name}: other bytes on {}", s.name(), isa.name());
                }
                let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
                let mut delta = vec![0.0; data.len()];
                codec.decode(Isa::get(), &planes, ROWS, COLS, 0, &mut delta).unwrap();
                delta.iter_mut().zip(&data).for_each(|(d, v)| *d -= v);
                hessian.error(Isa::get(), Matrix { data: &delta, ..w })
            };
            let (rtn, weighted) = (error(&rtn::Rtn), error(&weighted::Weighted));
            for s in SOLVERS.iter().filter(|s| s.needs_hessian()) {
                let found = error(*s);
                println!(
                    "{} {name}: {:.3} of rtn, {:.3} of weighted",
                    s.name(),
                    found / rtn,
                    found / weighted
                );
                assert!(found < rtn.min(weighted) * 0.9, "{} {name}: {found}", s.name());
            }
        }
    }

    #[test]
    fn stats_of_another_width_are_refused() {
        let (data, mut stats) = case();
        stats.second_moment.pop();
        let w = Matrix { rows: ROWS, cols: COLS, data: &data };
        for s in SOLVERS.iter().filter(|s| s.needs_stats()) {
            let e = s
                .solve(Isa::get(), w, &*codec("int4").unwrap(), Inputs { stats: Some(&stats), hessian: None })
                .unwrap_err();
            assert!(e.what().contains("255"), "{e}");
        }
    }
}
