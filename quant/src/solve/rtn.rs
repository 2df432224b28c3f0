//! `rtn`: round to nearest, with the scales that leave the least squared error in the weights. Needs no calibration.

use moepack_format::Result;

use super::{Inputs, Solver};
use crate::codec::{Codec, Matrix, Planes};
use crate::isa::Isa;

/// Round to nearest.
pub struct Rtn;

impl Solver for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn doc(&self) -> &'static str {
        "round to nearest, scales with the least squared error; no calibration"
    }

    fn needs_stats(&self) -> bool {
        false
    }

    fn solve(&self, isa: Isa, w: Matrix<'_>, codec: &dyn Codec, _inputs: Inputs<'_>) -> Result<Planes> {
        codec.encode(isa, w, None)
    }
}
