//! The trellis, and the search for the cheapest path through it.
//!
//! Numbers fall into four subsets by their remainder modulo 4. In state `s` only one parity is allowed, `z0 = s & 1`:
//! even numbers (subsets 0 and 2) or odd ones (1 and 3). Which of the two subsets the number is of, `z1`, and the state
//! decide the next state (Ungerboeck 1982, systematic feedback form, with his parity-check polynomials `h0`, `h1` for 8, 64 and 256 states):
//!
//! ```text
//!  z1 = (j >> 1) & 1         s' = (s >> 1) ⊕ z0 · (h0 >> 1) ⊕ z1 · (h1 >> 1)
//! ```
//!
//! Every path starts in state 0 and may end anywhere.
//!
//! The search is Viterbi's, in 16-bit integers that saturate, so that every instruction set finds the same path. Since
//! the top bit of `h0 >> 1` is set and that of `h1 >> 1` is not, the top bit of a state tells the parity of the number that
//! led to it, and its two predecessors are
//!
//! ```text
//!  u = s' ⊕ z0 · (h0 >> 1) ⊕ z1 · (h1 >> 1)      s = 2u + z0      for z1 = 0, 1
//! ```
//!
//! so one sample costs each state two additions with the same four numbers for all, a minimum and a bit that says which.
//! Every eighth sample the smallest cost is subtracted from all.

use crate::isa::Isa;
use crate::per_isa;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

/// Most states.
pub const STATES_MAX: usize = 256;
/// Costs of states that cannot be reached yet.
pub const UNREACHED: u16 = u16::MAX;
/// Samples between subtractions of the smallest cost.
pub const RENORMALIZE: usize = 8;

/// A trellis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trellis {
    /// Number of states.
    pub states: usize,
    /// `h0 >> 1`.
    pub h0: u16,
    /// `h1 >> 1`.
    pub h1: u16,
}

/// What coding a sample with the nearest number of each of the four subsets costs.
pub type Metrics = [u16; 4];

impl Trellis {
    /// The trellis with so many states, if there is one.
    pub const fn of(states: usize) -> Option<Trellis> {
        let (h0, h1) = match states {
            8 => (0o13, 0o4),
            64 => (0o103, 0o24),
            256 => (0o515, 0o362),
            _ => return None,
        };
        Some(Trellis { states, h0: h0 >> 1, h1: h1 >> 1 })
    }

    /// The same, of a number of states that is known to be one; evaluated when compiling.
    #[allow(clippy::panic, reason = "another number does not compile")]
    pub const fn known(states: usize) -> Trellis {
        match Trellis::of(states) {
            Some(trellis) => trellis,
            None => panic!("no trellis of so many states"),
        }
    }

    /// The state after a number in state `state`.
    #[inline(always)]
    pub fn next(self, state: u16, level: i32) -> u16 {
        let z0 = (state & 1).wrapping_neg();
        let z1 = ((level >> 1) as u16 & 1).wrapping_neg();
        (state >> 1) ^ (self.h0 & z0) ^ (self.h1 & z1)
    }

    /// The cheapest path: for each sample the subset, 0 … 3.
    pub fn search(self, isa: Isa, metrics: &[Metrics], subsets: &mut [u8], scratch: &mut Scratch) {
        let words = self.states.div_ceil(64);
        scratch.decisions.resize(metrics.len() * words, 0);
        let end = self.forward(isa, metrics, &mut scratch.decisions);
        self.backward(end, &scratch.decisions, subsets);
    }

    /// Leaves a bit for each sample and state: `z1` of the better way into it. Gives the cheapest state at the end.
    fn forward(self, isa: Isa, metrics: &[Metrics], decisions: &mut [u64]) -> u16 {
        #[cfg(target_arch = "x86_64")]
        if self.states > 8 {
            if isa.has_avx512() {
                return avx512::forward(isa, self, metrics, decisions);
            }
            if isa.has_avx2() {
                return avx2::forward(isa, self, metrics, decisions);
            }
        }
        match self.states {
            8 => forward_8(isa, metrics, decisions),
            64 => forward_64(isa, metrics, decisions),
            _ => forward_256(isa, metrics, decisions),
        }
    }

    /// Follows the bits back from state `end`.
    fn backward(self, end: u16, decisions: &[u64], subsets: &mut [u8]) {
        let words = self.states.div_ceil(64);
        let top = self.states.trailing_zeros() - 1;
        let mut state = end;
        for (bits, subset) in decisions.chunks_exact(words).zip(subsets.iter_mut()).rev() {
            let word = bits[usize::from(state) / 64 % words];
            let z1 = (word >> (state % 64)) as u16 & 1;
            let z0 = state >> top;
            let u = state ^ (self.h0 & z0.wrapping_neg()) ^ (self.h1 & z1.wrapping_neg());
            state = 2 * u + z0;
            *subset = (2 * z1 + z0) as u8;
        }
    }
}

/// Buffers that a search keeps for the next.
#[derive(Debug, Default)]
pub struct Scratch {
    decisions: Vec<u64>,
}

per_isa! { fn forward_8(metrics: &[Metrics], decisions: &mut [u64]) -> u16 = forward_body::<8>; }
per_isa! { fn forward_64(metrics: &[Metrics], decisions: &mut [u64]) -> u16 = forward_body::<64>; }
per_isa! { fn forward_256(metrics: &[Metrics], decisions: &mut [u64]) -> u16 = forward_body::<256>; }

#[inline(always)]
fn forward_body<const N: usize>(metrics: &[Metrics], decisions: &mut [u64]) -> u16 {
    let mut cost = [UNREACHED; N];
    cost[0] = 0;
    let mut new = [0; N];
    let trellis = const { Trellis::known(N) };
    let (h0, h1) = (usize::from(trellis.h0), usize::from(trellis.h1));
    for (i, (m, bits)) in metrics.iter().zip(decisions.chunks_exact_mut(N.div_ceil(64))).enumerate() {
        bits.fill(0);
        for z0 in 0..2 {
            for d in z0 * N / 2..(z0 + 1) * N / 2 {
                let u = d ^ (h0 * z0);
                let stay = cost[(2 * u + z0) % N].saturating_add(m[z0]);
                let turn = cost[(2 * (u ^ h1) + z0) % N].saturating_add(m[z0 + 2]);
                new[d] = stay.min(turn);
                bits[d / 64] |= u64::from(turn < stay) << (d % 64);
            }
        }
        cost = new;
        if i % RENORMALIZE == RENORMALIZE - 1 {
            let least = cost.iter().fold(u16::MAX, |a, &b| a.min(b));
            cost.iter_mut().for_each(|c| *c -= least);
        }
    }
    cheapest(&cost)
}

/// The first of the cheapest states.
fn cheapest(cost: &[u16]) -> u16 {
    let least = cost.iter().min();
    cost.iter().position(|c| Some(c) == least).unwrap_or(0) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u32) -> Vec<Metrics> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 20) as u16
        };
        (0..n).map(|_| [next(), next(), next(), next()]).collect()
    }

    /// A path that the trellis allows, and its cost.
    fn cost_of(trellis: Trellis, metrics: &[Metrics], subsets: &[u8]) -> u64 {
        let mut state = 0;
        let mut cost = 0;
        for (m, &subset) in metrics.iter().zip(subsets) {
            assert_eq!(state & 1, u16::from(subset & 1), "a number of the wrong parity");
            cost += u64::from(m[usize::from(subset)]);
            state = trellis.next(state, i32::from(subset));
        }
        cost
    }

    #[test]
    fn the_path_is_the_cheapest_of_all() {
        for states in [8, 64, 256] {
            let trellis = Trellis::of(states).unwrap();
            for seed in 0..20 {
                let metrics = noise(10, seed);
                let mut subsets = vec![0; 10];
                trellis.search(Isa::get(), &metrics, &mut subsets, &mut Scratch::default());
                let best = (0..1u32 << 10)
                    .map(|choice| {
                        let (mut state, mut cost) = (0u16, 0);
                        for (i, m) in metrics.iter().enumerate() {
                            let subset = (state & 1) as usize + 2 * (choice >> i & 1) as usize;
                            cost += u64::from(m[subset]);
                            state = trellis.next(state, subset as i32);
                        }
                        cost
                    })
                    .min();
                assert_eq!(Some(cost_of(trellis, &metrics, &subsets)), best, "{states} states, seed {seed}");
            }
        }
    }

    #[test]
    fn every_level_finds_the_same_path() {
        for states in [8, 64, 256] {
            let trellis = Trellis::of(states).unwrap();
            for n in [0, 1, 7, 8, 9, 100, 1000] {
                let mut metrics = noise(n, n as u32 + 5);
                // Ties, and costs that saturate.
                metrics.iter_mut().skip(50).take(20).for_each(|m| *m = [9; 4]);
                metrics.iter_mut().skip(80).take(9).for_each(|m| *m = [40_000, 60_000, u16::MAX, 50_000]);
                let path = |isa| {
                    let mut subsets = vec![9; n];
                    trellis.search(isa, &metrics, &mut subsets, &mut Scratch::default());
                    subsets
                };
                let expected = path(Isa::SCALAR);
                cost_of(trellis, &metrics, &expected);
                for isa in Isa::available() {
                    assert!(path(isa) == expected, "{states} states, {n} samples, {}", isa.name());
                }
            }
        }
    }
}
