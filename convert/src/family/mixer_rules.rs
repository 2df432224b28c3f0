//! What a family says of layers that mix tokens by a state instead of attention, and which layers these are.

use super::rules::Switch;
use crate::hparams::Keys;

/// What mixes tokens in the layers without attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MixerRule {
    /// A selective state space.
    StateSpace(StateRule),
    /// A short convolution: `conv_L_cache`, `conv_bias`.
    ShortConv,
    /// Lightning attention.
    Lightning,
}

/// Which layers mix by a state, and which by attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MixedLayers {
    /// As `layer_types` says; without the list all mix by a state.
    Listed,
    /// As `layer_types` or `attn_type_list` says; without a list every other one, beginning with the second.
    ListedElseOdd,
    /// Attention in each `attn_layer_period`-th from `attn_layer_offset`; transformers' defaults.
    Period(usize, usize),
    /// As `layers_block_type` or `hybrid_override_pattern` says, where a layer may also be an MLP.
    Blocks,
}

/// A selective state space of a family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StateRule {
    /// Keys for the number of heads; none where each channel is one, `mamba_expand` times as many as the stream has.
    pub n_heads: Keys,
    /// Keys for the channels of a head; `"auto"` divides `mamba_expand` times the stream among them.
    pub head_dim: Keys,
    /// Keys for the number of groups; 1 where they are missing.
    pub n_groups: Keys,
    /// Keys for the values of a channel's state.
    pub state_dim: Keys,
    /// Keys for the length of the convolution; 4 where they are missing.
    pub kernel: Keys,
    /// Bias of the convolution.
    pub conv_bias: Switch,
    /// Biases of the projections.
    pub bias: Switch,
    /// Keys for the rank of step sizes, where they have one; `"auto"` is a sixteenth of the stream.
    pub step_rank: Keys,
    /// Bounds of step sizes.
    pub steps: StepRule,
}

impl StateRule {
    /// Granite's.
    pub const MAMBA_2: StateRule = StateRule {
        n_heads: &["mamba_n_heads"],
        head_dim: &["mamba_d_head"],
        n_groups: &["mamba_n_groups"],
        state_dim: &["mamba_d_state"],
        kernel: &["mamba_d_conv"],
        conv_bias: Switch::Key("mamba_conv_bias", true),
        bias: Switch::Key("mamba_proj_bias", false),
        step_rank: &[],
        steps: StepRule::Limits("time_step_limit"),
    };

    /// Jamba's.
    pub const MAMBA: StateRule = StateRule {
        n_heads: &[],
        step_rank: &["mamba_dt_rank"],
        steps: StepRule::Free,
        ..StateRule::MAMBA_2
    };
}

/// Bounds of step sizes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StepRule {
    /// None.
    Free,
    /// None above; below as these keys say, or transformers' default.
    Least(Keys, f64),
    /// The two that this key lists; none where it is missing.
    Limits(&'static str),
}
