//! Drift of the routing: does the bundle send a token to the experts that the checkpoint sends it to?

/// Mean over tokens of |chosen by the reference ∩ chosen by the bundle| / k.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoutingOverlap {
    n_shared: u64,
    n_chosen: u64,
}

impl RoutingOverlap {
    /// Adds tokens: `k` chosen experts each, in any order. `[n_tokens, k]`
    pub fn add<T: PartialEq>(&mut self, reference: &[T], bundle: &[T], k: usize) {
        debug_assert_eq!(reference.len(), bundle.len());
        for (a, b) in reference.chunks(k.max(1)).zip(bundle.chunks(k.max(1))) {
            self.n_shared += a.iter().filter(|e| b.contains(e)).count() as u64;
            self.n_chosen += a.len() as u64;
        }
    }

    /// Adds what another one counted; counts are whole numbers, so the order does not matter.
    pub fn merge(&mut self, other: &RoutingOverlap) {
        self.n_shared += other.n_shared;
        self.n_chosen += other.n_chosen;
    }

    /// The mean, or none without tokens.
    pub fn mean(&self) -> Option<f64> {
        (self.n_chosen > 0).then(|| self.n_shared as f64 / self.n_chosen as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_does_not_matter_and_every_token_counts_alike() {
        let mut overlap = RoutingOverlap::default();
        assert_eq!(overlap.mean(), None);
        overlap.add(&[1, 2, 3, 4], &[2, 1, 3, 7], 2);
        assert_eq!(overlap.mean(), Some(0.75));
        let mut other = RoutingOverlap::default();
        other.add(&[5_u16, 6], &[7, 8], 2);
        overlap.merge(&other);
        assert_eq!(overlap.mean(), Some(0.5));
    }
}
