//! Compressed entries: vectors that stand for several tokens each (DeepSeek V4 paper, sections 2.3.1 and 2.3.2).
//!
//! ```text
//! v_t = W_kv x_t,  s_t = W_gate x_t + bias[t mod ratio]                          n_series · dim channels
//! entry_i = Σ_t softmax_t(s_t) v_t, channel by channel, over the tokens t of window i;
//!           with overlap over series 0 of window i − 1 and series 1 of window i
//! then norm, and rotation of the last dimensions by the position of the window's first token
//! ```
//!
//! A window that is not complete gives no entry.

use moepack_convert::spec::{Compression, Role};
use moepack_format::Result;
use moepack_quant::{Isa, math};

use super::linear::Linear;
use super::norm::Norm;
use super::rope::Table;
use super::{Weights, tensor};

/// The weights that make entries.
pub(super) struct Compressor {
    ratio: usize,
    dim: usize,
    overlap: bool,
    /// `[n_series · dim, hidden]`
    values: Linear,
    /// `[n_series · dim, hidden]`
    gate: Linear,
    /// `[ratio, n_series · dim]`
    bias: Vec<f32>,
    norm: Norm,
}

impl Compressor {
    pub(super) fn load(
        weights: &dyn Weights,
        layer: usize,
        [values, gate, bias, norm]: [Role; 4],
        compression: &Compression,
        dim: usize,
    ) -> Result<Compressor> {
        let (l, hidden, width) = (Some(layer), weights.spec().hidden, compression.n_series() * dim);
        Ok(Compressor {
            ratio: compression.ratio,
            dim,
            overlap: compression.overlap,
            values: Linear::load(weights, l, (values, None), width, hidden)?,
            gate: Linear::load(weights, l, (gate, None), width, hidden)?,
            bias: tensor(weights, l, bias, &[compression.ratio, width])?,
            norm: Norm::load_with(weights, l, norm, dim, None)?,
        })
    }

    /// The entries of a window of inputs `[len, hidden]`: `[len / ratio, dim]`.
    pub(super) fn entries(&self, isa: Isa, table: &Table, x: &[f32]) -> Vec<f32> {
        let (ratio, width, hidden) = (self.ratio, self.values.n(), self.values.k());
        let n = x.len() / hidden / ratio;
        let x = &x[..n * ratio * hidden];
        let (mut values, mut gates) = (vec![0.0; n * ratio * width], vec![0.0; n * ratio * width]);
        self.values.apply(isa, x, &mut values); // [n · ratio, n_series · dim]
        self.gate.apply(isa, x, &mut gates); // the same
        gates.chunks_exact_mut(self.bias.len()).for_each(|window| math::add(isa, window, &self.bias));
        let mut entries = vec![0.0; n * self.dim]; // [n, dim]
        let mut weights = Vec::new();
        for (i, entry) in entries.chunks_exact_mut(self.dim).enumerate() {
            let slots = self.slots(i);
            weigh(isa, slots.iter().map(|&at| &gates[at..at + self.dim]), &mut weights);
            for (&at, weights) in slots.iter().zip(weights.chunks_exact(self.dim)) {
                let values = &values[at..at + self.dim];
                entry.iter_mut().zip(weights).zip(values).for_each(|((e, w), v)| *e += w * v);
            }
            self.norm.apply_in_place(isa, entry);
            table.rotate_last(i * ratio, entry, self.dim);
        }
        entries
    }

    /// Where the values of an entry begin, in the order of tokens.
    fn slots(&self, entry: usize) -> Vec<usize> {
        let (ratio, width) = (self.ratio, self.values.n());
        let window = |i: usize, series: usize| {
            (i * ratio..(i + 1) * ratio).map(move |t| t * width + series * self.dim)
        };
        match self.overlap {
            false => window(entry, 0).collect(),
            true if entry == 0 => window(0, 1).collect(),
            true => window(entry - 1, 0).chain(window(entry, 1)).collect(),
        }
    }
}

/// Softmax over rows, channel by channel.
pub(super) fn weigh<'a>(isa: Isa, rows: impl Iterator<Item = &'a [f32]>, weights: &mut Vec<f32>) {
    weights.clear();
    let mut max: Vec<f32> = Vec::new();
    for row in rows {
        max.resize(row.len(), f32::NEG_INFINITY);
        max.iter_mut().zip(row).for_each(|(m, &v)| *m = m.max(v));
        weights.extend_from_slice(row);
    }
    let dim = max.len();
    for row in weights.chunks_exact_mut(dim) {
        row.iter_mut().zip(&max).for_each(|(v, m)| *v -= m);
    }
    math::exp_all(isa, weights);
    let mut sums = vec![0.0_f32; dim];
    for row in weights.chunks_exact(dim) {
        sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += v);
    }
    for row in weights.chunks_exact_mut(dim) {
        row.iter_mut().zip(&sums).for_each(|(v, sum)| *v /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_add_up_to_one_in_each_channel() {
        let rows = [[0.0_f32, 1.0], [0.0, 3.0], [f32::NEG_INFINITY, 2.0]];
        let mut weights = Vec::new();
        weigh(Isa::get(), rows.iter().map(|r| &r[..]), &mut weights);
        assert_eq!([weights[0], weights[2], weights[4]], [0.5, 0.5, 0.0]);
        let expected = [0.090_030_57_f32, 0.665_240_94, 0.244_728_48];
        for (got, expected) in [weights[1], weights[3], weights[5]].iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6, "{got}, but {expected}");
        }
    }
}
