//! Rotary position encoding: pairs of dimensions turn by an angle that grows with the position.
//!
//! (a, b) becomes (a·cos − b·sin, b·cos + a·sin) with angle = position · inv_freq, computed in f32 as the reference
//! implementations do. Every scaling rule is already in the frequencies and the amplitude.

use moepack_convert::spec::{Pairing, Rope};
use moepack_quant::math;

/// Cosines and sines of all positions of a window.
pub(super) struct Table {
    pairing: Pairing,
    pairs: usize,
    /// `[positions, pairs]`
    cos: Vec<f32>,
    /// `[positions, pairs]`
    sin: Vec<f32>,
}

impl Table {
    /// For positions `0 .. positions`; cosines and sines are multiplied by `amplitude`.
    pub(super) fn new(rope: &Rope, amplitude: f32, positions: usize) -> Table {
        let pairs = rope.inv_freq.len();
        let (mut cos, mut sin) =
            (Vec::with_capacity(positions * pairs), Vec::with_capacity(positions * pairs));
        for position in 0..positions {
            for &inv_freq in &rope.inv_freq {
                let (s, c) = math::sin_cos(position as f32 * inv_freq);
                cos.push(c * amplitude);
                sin.push(s * amplitude);
            }
        }
        Table { pairing: rope.pairing, pairs, cos, sin }
    }

    /// Rotates the first dimensions of each head of one position in place: `heads` is `[n_heads, head_dim]`.
    pub(super) fn rotate(&self, position: usize, heads: &mut [f32], head_dim: usize) {
        if self.pairs == 0 {
            return;
        }
        heads
            .chunks_exact_mut(head_dim)
            .for_each(|head| self.turn(position, &mut head[..2 * self.pairs], 1.0));
    }

    /// Rotates the last dimensions of each head.
    pub(super) fn rotate_last(&self, position: usize, heads: &mut [f32], head_dim: usize) {
        let first = head_dim - 2 * self.pairs;
        heads.chunks_exact_mut(head_dim).for_each(|head| self.turn(position, &mut head[first..], 1.0));
    }

    /// The inverse of [`Table::rotate_last`] where the amplitude is 1: by the opposite angle.
    pub(super) fn rotate_last_back(&self, position: usize, heads: &mut [f32], head_dim: usize) {
        let first = head_dim - 2 * self.pairs;
        heads.chunks_exact_mut(head_dim).for_each(|head| self.turn(position, &mut head[first..], -1.0));
    }

    fn turn(&self, position: usize, rotary: &mut [f32], sign: f32) {
        let at = position * self.pairs..(position + 1) * self.pairs;
        let angles = self.cos[at.clone()].iter().zip(&self.sin[at]).map(|(&c, &s)| (c, sign * s));
        match self.pairing {
            Pairing::Half => {
                let (a, b) = rotary.split_at_mut(self.pairs);
                a.iter_mut().zip(b).zip(angles).for_each(|((a, b), (c, s))| turn(a, b, c, s));
            }
            Pairing::Adjacent => {
                let (pairs, _) = rotary.as_chunks_mut::<2>();
                pairs.iter_mut().zip(angles).for_each(|([a, b], (c, s))| turn(a, b, c, s));
            }
        }
    }
}

fn turn(a: &mut f32, b: &mut f32, cos: f32, sin: f32) {
    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(pairing: Pairing) -> Rope {
        Rope { inv_freq: vec![1.0, 0.1], pairing, amplitude: 2.0, long: None }
    }

    #[test]
    fn pairs_turn_by_position_times_frequency() {
        let (c0, s0, c1, s1) = (libm(3.0).0, libm(3.0).1, libm(0.3).0, libm(0.3).1);
        let mut half = [1.0, 2.0, 3.0, 4.0, 9.0, 9.0];
        Table::new(&rope(Pairing::Half), 2.0, 4).rotate(3, &mut half, 6);
        let expected = [c0 - 3.0 * s0, 2.0 * c1 - 4.0 * s1, 3.0 * c0 + s0, 4.0 * c1 + 2.0 * s1];
        close(&half[..4], &expected);
        assert_eq!(half[4..], [9.0, 9.0], "dimensions beyond the rotary ones stay");
        let mut adjacent = [1.0, 3.0, 2.0, 4.0, 9.0, 9.0];
        Table::new(&rope(Pairing::Adjacent), 2.0, 4).rotate(3, &mut adjacent, 6);
        close(&adjacent[..4], &[expected[0], expected[2], expected[1], expected[3]]);
    }

    /// 2·cos and 2·sin, for the amplitude.
    fn libm(angle: f64) -> (f32, f32) {
        (2.0 * angle.cos() as f32, 2.0 * angle.sin() as f32)
    }

    fn close(got: &[f32], expected: &[f32]) {
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-5, "{got}, but {expected}");
        }
    }

    #[test]
    fn position_zero_and_no_frequencies_turn_nothing() {
        let mut heads = [1.0, 2.0, 3.0, 4.0];
        let still = Rope { amplitude: 1.0, ..rope(Pairing::Half) };
        Table::new(&still, 1.0, 1).rotate(0, &mut heads, 4);
        let none = Rope { inv_freq: vec![], ..still };
        Table::new(&none, 1.0, 9).rotate(8, &mut heads, 4);
        assert_eq!(heads, [1.0, 2.0, 3.0, 4.0]);
    }
}
