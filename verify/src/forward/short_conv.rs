//! A short convolution between two gates: out(c · conv(b · x)), with b, c and x from one projection (LFM2).

use moepack_convert::spec::{Role, ShortConv as Spec};
use moepack_format::Result;
use moepack_quant::Isa;

use super::attention::Scratch;
use super::convolution::Convolution;
use super::linear::Linear;
use super::{Weights, sized};

/// The weights of one layer.
pub(super) struct ShortConv {
    /// b, c and x. `[3 · hidden, hidden]`
    input: Linear,
    conv: Convolution,
    /// `[hidden, hidden]`
    output: Linear,
}

impl ShortConv {
    pub(super) fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<ShortConv> {
        let (l, hidden) = (Some(layer), weights.spec().hidden);
        let linear = |role, bias, n| Linear::load(weights, l, (role, spec.bias.then_some(bias)), n, hidden);
        Ok(ShortConv {
            input: linear(Role::MixerIn, Role::MixerInBias, 3 * hidden)?,
            conv: Convolution::load(weights, layer, [hidden, spec.kernel], spec.bias)?,
            output: linear(Role::MixerOut, Role::MixerOutBias, hidden)?,
        })
    }

    /// One window, `[len, hidden]` to the same.
    pub(super) fn window<'s>(&self, isa: Isa, x: &[f32], scratch: &'s mut Scratch) -> &'s mut [f32] {
        let hidden = self.output.n();
        let Scratch { q, k, v, out, .. } = scratch;
        let all = sized(q, 3 * x.len()); // [len, 3, hidden]
        self.input.apply(isa, x, all);
        let gated = sized(k, x.len()); // [len, hidden], b · x
        for (row, to) in all.chunks_exact(3 * hidden).zip(gated.chunks_exact_mut(hidden)) {
            let (b, x) = (&row[..hidden], &row[2 * hidden..]);
            to.iter_mut().zip(b).zip(x).for_each(|((to, b), x)| *to = b * x);
        }
        let mixed = sized(v, x.len()); // [len, hidden]
        self.conv.apply(gated, mixed);
        for (row, to) in all.chunks_exact(3 * hidden).zip(mixed.chunks_exact_mut(hidden)) {
            to.iter_mut().zip(&row[hidden..]).for_each(|(to, c)| *to *= c);
        }
        let out = sized(out, x.len()); // [len, hidden]
        self.output.apply(isa, mixed, out);
        out
    }
}
