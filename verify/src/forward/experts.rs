//! An MLP: y = down(act(gate x, up x)), or y = down(act(up x)) where there is no gate. Routed experts, shared experts and
//! dense layers are one.

use moepack_convert::spec::{Activation, Role};
use moepack_convert::tensor::Expert;
use moepack_format::{Error, Result};
use moepack_quant::{Isa, math};

use super::linear::Linear;
use super::{Weights, sized, tensor};

/// The weights of an MLP, packed; most have a gate.
pub struct GatedMlp {
    /// `[inter, hidden]`, where the activation takes one
    gate: Option<Linear>,
    /// `[inter, hidden]`
    up: Linear,
    /// `[hidden, inter]`
    down: Linear,
    activation: Activation,
}

/// Buffers of one thread, kept from block to block.
#[derive(Default)]
pub(super) struct Scratch {
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl GatedMlp {
    pub(super) fn load(
        weights: &dyn Weights,
        layer: usize,
        [gate, up, down]: [Role; 3],
        inter: usize,
        activation: Activation,
    ) -> Result<GatedMlp> {
        let (l, hidden) = (Some(layer), weights.spec().hidden);
        Ok(GatedMlp {
            gate: activation
                .is_gated()
                .then(|| Linear::load(weights, l, (gate, None), inter, hidden))
                .transpose()?,
            up: Linear::load(weights, l, (up, None), inter, hidden)?,
            down: Linear::load(weights, l, (down, None), hidden, inter)?,
            activation,
        })
    }

    /// Gate and up from one matrix `[2 · inter, hidden]`, gate first.
    pub(super) fn load_fused(
        weights: &dyn Weights,
        layer: usize,
        [gate_up, down]: [Role; 2],
        inter: usize,
        activation: Activation,
    ) -> Result<GatedMlp> {
        let (l, hidden) = (Some(layer), weights.spec().hidden);
        let both = tensor(weights, l, gate_up, &[2 * inter, hidden])?;
        let (gate, up) = both.split_at(inter * hidden);
        Ok(GatedMlp {
            gate: Some(Linear::new(gate, None, inter, hidden).watched(weights.tap(l, gate_up))),
            up: Linear::new(up, None, inter, hidden),
            down: Linear::load(weights, l, (down, None), hidden, inter)?,
            activation,
        })
    }

    /// Packs a routed expert.
    ///
    /// # Errors
    /// A matrix or bias of another size.
    pub fn of_expert(
        expert: &Expert,
        hidden: usize,
        inter: usize,
        activation: Activation,
    ) -> Result<GatedMlp> {
        let linear = |name: &str, w: &[f32], bias: &Option<Vec<f32>>, n: usize, k: usize| {
            let n_bias = bias.as_ref().map_or(n, Vec::len);
            if w.len() != n * k || n_bias != n {
                let (found, expected) = (w.len(), n * k);
                let what =
                    format!("{found} weights and {n_bias} biases in {name}, but [{n}, {k}] takes {expected}");
                return Err(Error::bad_data(what));
            }
            Ok(Linear::new(w, bias.clone(), n, k))
        };
        if expert.gate.is_some() != activation.is_gated() {
            let (found, expected) = (expert.gate.is_some(), activation.is_gated());
            let says = |gate| if gate { "a gate" } else { "no gate" };
            return Err(Error::bad_data(format!(
                "an expert with {}, expected {}",
                says(found),
                says(expected)
            )));
        }
        let gate = |gate: &Vec<f32>| linear("gate_proj", gate, &expert.gate_bias, inter, hidden);
        Ok(GatedMlp {
            gate: expert.gate.as_ref().map(gate).transpose()?,
            up: linear("up_proj", &expert.up, &expert.up_bias, inter, hidden)?,
            down: linear("down_proj", &expert.down, &expert.down_bias, hidden, inter)?,
            activation,
        })
    }

    /// `x` and `out` are `[t, hidden]`; returns what goes into `down`, `[t, inter]`.
    pub(super) fn apply<'s>(
        &self,
        isa: Isa,
        x: &[f32],
        out: &mut [f32],
        scratch: &'s mut Scratch,
    ) -> &'s [f32] {
        let a = self.inner_in(isa, x, scratch);
        self.down.apply(isa, a, out);
        a
    }

    /// What goes into `down` for inputs `x`, `[t, hidden]`: `[t, inter]`.
    pub fn inner(&self, isa: Isa, x: &[f32]) -> Vec<f32> {
        self.inner_in(isa, x, &mut Scratch::default()).to_vec()
    }

    fn inner_in<'s>(&self, isa: Isa, x: &[f32], scratch: &'s mut Scratch) -> &'s [f32] {
        let t = x.len() / self.down.n();
        let up = sized(&mut scratch.up, t * self.up.n()); // [t, inter]
        self.up.apply(isa, x, up);
        let gate = sized(&mut scratch.gate, up.len()); // [t, inter]
        if let Some(linear) = &self.gate {
            linear.apply(isa, x, gate);
        }
        match self.activation {
            Activation::Silu => math::silu_mul(isa, gate, up),
            Activation::GeluTanh => gelu_mul(isa, gate, up),
            Activation::ClampedSilu { limit } => {
                // Comparisons with NaN are false, so NaN goes through.
                gate.iter_mut().for_each(|g| *g = if *g > limit { limit } else { *g });
                up.iter_mut().for_each(|u| *u = u.clamp(-limit, limit));
                math::silu_mul(isa, gate, up);
            }
            Activation::ClampedSwish { alpha, limit } => math::clamped_swish(isa, gate, up, alpha, limit),
            Activation::SquaredRelu => {
                // Comparisons with NaN are false, so NaN goes through.
                let square = |u: f32| if u < 0.0 { 0.0 } else { u * u };
                gate.iter_mut().zip(&*up).for_each(|(a, &u)| *a = square(u));
            }
        }
        gate
    }
}

/// gate = gelu(gate) · up with tanh written as a sigmoid: (1 + tanh z) / 2 = sigmoid(2z).
fn gelu_mul(isa: Isa, gate: &mut [f32], up: &[f32]) {
    /// 2 · √(2/π)
    const SLOPE: f32 = std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::SQRT_2;
    let mut factors: Vec<f32> = gate.iter().map(|&g| SLOPE * (g + 0.044_715 * g * g * g)).collect();
    math::sigmoid_all(isa, &mut factors);
    gate.iter_mut().zip(factors).zip(up).for_each(|((g, factor), u)| *g = *g * factor * u);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gelu_is_that_of_tanh() {
        let mut gate = [-3.0, -0.5, 0.0, 1.0, 4.0];
        gelu_mul(Isa::get(), &mut gate, &[1.0, 2.0, 1.0, 1.0, 1.0]);
        // torch.nn.functional.gelu(x, approximate="tanh")
        let expected = [-0.003_637_36, -0.308_571_6, 0.0, 0.841_192, 3.999_93];
        for (got, expected) in gate.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-5, "{got}, but {expected}");
        }
    }
}
