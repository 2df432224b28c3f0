//! A causal convolution of each channel with its own kernel.

use moepack_convert::spec::Role;
use moepack_format::Result;

use super::{Weights, tensor};

/// The kernels of all channels.
pub(super) struct Convolution {
    n_channels: usize,
    /// Tokens from one that is looked at to the next.
    apart: usize,
    /// That of the token itself first, then of the one before. `[kernel, n_channels]`
    taps: Vec<f32>,
    /// `[n_channels]`
    bias: Option<Vec<f32>>,
}

impl Convolution {
    /// Kernels `[n_channels, 1, kernel]`, whose last weight is that of the token itself, and biases `[n_channels]`.
    pub(super) fn load(
        weights: &dyn Weights,
        layer: usize,
        [n_channels, kernel]: [usize; 2],
        has_bias: bool,
    ) -> Result<Convolution> {
        let kernels = tensor(weights, Some(layer), Role::MixerConv, &[n_channels, 1, kernel])?;
        let bias = || tensor(weights, Some(layer), Role::MixerConvBias, &[n_channels]);
        let bias = has_bias.then(bias).transpose()?;
        Ok(Convolution { bias, ..Convolution::new(&kernels, n_channels, 1) })
    }

    /// Of kernels `[n_channels, kernel]` that look at tokens so far apart.
    pub(super) fn new(kernels: &[f32], n_channels: usize, apart: usize) -> Convolution {
        let kernel = kernels.len() / n_channels;
        let tap = |back: usize| kernels.iter().skip(kernel - 1 - back).step_by(kernel);
        let taps = (0..kernel).flat_map(tap).copied().collect();
        Convolution { n_channels, apart, taps, bias: None }
    }

    /// `x` and `out` are `[len, n_channels]`.
    pub(super) fn apply(&self, x: &[f32], out: &mut [f32]) {
        let n = self.n_channels;
        for (t, out) in out.chunks_exact_mut(n).enumerate() {
            match &self.bias {
                Some(bias) => out.copy_from_slice(bias),
                None => out.fill(0.0),
            }
            for (back, weights) in self.taps.chunks_exact(n).enumerate().take(t / self.apart + 1) {
                let row = &x[(t - back * self.apart) * n..][..n];
                out.iter_mut().zip(row).zip(weights).for_each(|((o, v), w)| *o += v * w);
            }
        }
    }
}
