//! Which records and tensors a check by sample looks at.

use crate::manifest::{LayerEntry, Manifest};

/// A share of all records and trunk tensors, drawn in the same way each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// How many of a million.
    pub per_million: u32,
    /// Another seed draws others.
    pub seed: u64,
}

impl Sample {
    /// The experts of a layer that are looked at, ascending: the share rounded up, so at least one.
    pub fn experts(&self, layer: &LayerEntry) -> Vec<u32> {
        self.draw(u64::from(layer.layer), layer.n_experts)
    }

    /// The tensors of the `nth` trunk file, from 0, that are looked at, by their place in it.
    pub(super) fn tensors(&self, nth: usize, n_tensors: u32) -> Vec<u32> {
        // Layers count up from 0, trunk files down from the end.
        self.draw(u64::MAX.wrapping_sub(nth as u64), n_tensors)
    }

    /// How many trunk tensors that is.
    pub fn n_tensors(&self, manifest: &Manifest) -> usize {
        let of_file = |(i, n)| self.tensors(i, n).len();
        manifest.trunk.iter().map(|t| t.n_tensors()).enumerate().map(of_file).sum()
    }

    fn draw(&self, salt: u64, n: u32) -> Vec<u32> {
        let share = u64::from(n).saturating_mul(u64::from(self.per_million)).div_ceil(1_000_000);
        let mut items: Vec<u32> = (0..n).collect();
        items.sort_by_key(|&item| (mix(mix(self.seed ^ mix(salt)) ^ u64::from(item)), item));
        items.truncate(usize::try_from(share).unwrap_or(usize::MAX));
        items.sort_unstable();
        items
    }
}

/// The output function of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
fn mix(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_rounded_up_and_drawn_alike_each_time() {
        let five = Sample { per_million: 50_000, seed: 0 };
        assert_eq!(five.draw(3, 256).len(), 13);
        assert_eq!(five.draw(3, 256), five.draw(3, 256));
        assert_ne!(five.draw(3, 256), five.draw(4, 256));
        assert_ne!(five.draw(3, 256), Sample { seed: 1, ..five }.draw(3, 256));
        assert_eq!((five.draw(3, 1), five.draw(3, 0).len()), (vec![0], 0));
        assert_eq!(Sample { per_million: 1_000_000, seed: 9 }.draw(0, 5), [0, 1, 2, 3, 4]);
    }
}
