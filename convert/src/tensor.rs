//! Decoded weights: what a checkpoint or bundle hands to the forward pass.

/// A decoded trunk tensor, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Lengths, outermost first.
    pub shape: Vec<usize>,
    /// As many values as the shape says.
    pub data: Vec<f32>,
}

/// A decoded routed expert in canonical orientation, `[out, in]` and row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Expert {
    /// `[inter, hidden]`, where experts have one
    pub gate: Option<Vec<f32>>,
    /// `[inter, hidden]`
    pub up: Vec<f32>,
    /// `[hidden, inter]`
    pub down: Vec<f32>,
    /// `[inter]`
    pub gate_bias: Option<Vec<f32>>,
    /// `[inter]`
    pub up_bias: Option<Vec<f32>>,
    /// `[hidden]`
    pub down_bias: Option<Vec<f32>>,
}
