//! Ways to mix tokens that carry a state from token to token, besides the delta rule.

/// A selective state space: Mamba (Gu and Dao 2023, arXiv 2312.00752) and Mamba 2 (Dao and Gu 2024, arXiv 2405.21060).
#[derive(Clone, Debug, PartialEq)]
pub struct StateSpace {
    /// Heads, each with a step size and a decay of its own; in Mamba each channel is one.
    pub n_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Groups of heads that share what goes into their states and what is read from them; divides `n_heads`.
    pub n_groups: usize,
    /// Values that each channel's state has.
    pub state_dim: usize,
    /// Tokens that the convolution looks at.
    pub kernel: usize,
    /// The convolution has a bias.
    pub conv_bias: bool,
    /// Input and output projections have biases.
    pub bias: bool,
    /// Rank of the step sizes: then they, what goes into states and what is read come from the convolved channels, each
    /// normed (Mamba as Jamba has it). `None` where one projection of the token gives all (Mamba 2).
    pub step_rank: Option<usize>,
    /// Least and largest step size.
    pub steps: [f32; 2],
}

impl StateSpace {
    /// Channels of all heads.
    pub fn inner(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Channels of the convolution.
    pub fn n_channels(&self) -> usize {
        let shared = if self.step_rank.is_some() { 0 } else { 2 * self.n_groups * self.state_dim };
        self.inner() + shared
    }

    /// Rows of the input projection: gates and channels, and step sizes where these come from it.
    pub fn n_projected(&self) -> usize {
        self.inner() + self.n_channels() + if self.step_rank.is_some() { 0 } else { self.n_heads }
    }
}

/// A short convolution between two gates (LFM2): out(c · conv(b · x)), with b, c and x from one projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShortConv {
    /// Tokens that the convolution looks at.
    pub kernel: usize,
    /// Projections and convolution have biases.
    pub bias: bool,
}

/// Lightning attention (Qin et al. 2024, arXiv 2401.04658; MiniMax-01, arXiv 2501.08313, section 2.2): linear attention
/// whose state decays at a fixed rate.
#[derive(Clone, Debug, PartialEq)]
pub struct Lightning {
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Each head's state is multiplied by exp(−this) at every token. `[n_heads]`
    pub slopes: Vec<f32>,
}

impl Lightning {
    /// Channels of all heads.
    pub fn inner(&self) -> usize {
        self.slopes.len() * self.head_dim
    }
}
