//! Whether bytes are better spent on the trunk or on experts, where a budget counts both.
//!
//! A trunk of BF16 is more exact than experts of three bits can make use of: in int8 it loses little, and what it gives back
//! makes every expert finer. So the drift is predicted for both, from what the first pass measured or stated defaults, and
//! the smaller one decides. The comparison is in docs/allocation.md.

use moepack_quant::rates::relative_error;

use crate::engine::prediction::KLD_PER_ERROR;
use crate::engine::sensitivity::FirstPass;

/// What the trunk is coded by.
pub const TRUNK_CODED: &str = "int8-g64";
/// Its relative squared error on trained matrices.
const CODED_ERROR: f64 = 6e-5;

/// Mean KLD (nats) that is expected with the trunk as released and with it coded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trade {
    /// As released.
    pub released: f64,
    /// Coded, and experts finer.
    pub coded: f64,
}

impl Trade {
    /// Of two bundles of one size, whose experts have so many bits a weight with the trunk coded and with it as released; the
    /// first pass was one with it coded.
    pub fn of([coded, released]: [f64; 2], first: Option<&FirstPass>) -> Trade {
        let error = relative_error;
        let per_error = match first {
            Some(first) => first.expert_kld() / error(coded),
            None => KLD_PER_ERROR,
        };
        let trunk = first.map_or(KLD_PER_ERROR * CODED_ERROR, |first| first.trunk_kld.unwrap_or(0.0));
        Trade { released: per_error * error(released), coded: per_error * error(coded) + trunk }
    }

    /// Whether coding the trunk is expected to lose less.
    pub fn is_for_coding(&self) -> bool {
        self.coded < self.released
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coarse_experts_gain_more_than_the_trunk_loses() {
        let first = FirstPass { kld: 0.005, trunk_kld: Some(0.0002), ..FirstPass::default() };
        assert!(Trade::of([2.5, 2.0], Some(&first)).is_for_coding());
        let fine = FirstPass { kld: 0.000_05, ..first };
        assert!(!Trade::of([4.5, 4.0], Some(&fine)).is_for_coding());
        assert!(Trade::of([3.2, 3.0], None).is_for_coding());
        assert!(!Trade::of([6.6, 6.5], None).is_for_coding());
    }
}
