//! What a solver is, and the table of all of them.
//!
//! A codec knows how to store levels; a solver decides which error matters. All it may use is the matrix and what
//! calibration learnt about the matrix's inputs.

use moepack_format::{Error, Result};

use crate::codec::{Codec, Matrix, Planes};
use crate::isa::Isa;
use crate::stats::ColumnStats;

pub mod rtn;
pub mod weighted;

/// Every solver there is.
pub const SOLVERS: &[&dyn Solver] = &[&rtn::Rtn, &weighted::Weighted];

/// Chooses the levels and scales of a matrix.
pub trait Solver: Send + Sync {
    /// Name in recipes and on the command line.
    fn name(&self) -> &'static str;

    /// One line for help.
    fn doc(&self) -> &'static str;

    /// Whether it gains from calibration. Without stats every solver works all the same.
    fn needs_stats(&self) -> bool;

    /// Encodes `w`. `stats` are those of the inputs of this very matrix, or `None` if there are none.
    ///
    /// # Errors
    /// Those of [`Codec::encode`]; stats of another width.
    fn solve(
        &self,
        isa: Isa,
        w: Matrix<'_>,
        codec: &dyn Codec,
        stats: Option<&ColumnStats>,
    ) -> Result<Planes>;
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
