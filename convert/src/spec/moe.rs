//! MLPs, routed experts and routers.

use super::role::Part;

/// The MLP of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Mlp {
    /// One MLP for all tokens.
    Dense {
        /// Rows of gate and up.
        inter: usize,
        /// Nonlinearity.
        activation: Activation,
        /// Where gate and up are.
        gate_up: GateUp,
    },
    /// Routed experts.
    Moe(Moe),
    /// None: the layer is attention alone.
    None,
}

/// Where the gate and up matrices of a dense MLP are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateUp {
    /// Each on its own.
    Two,
    /// In one matrix, gate first.
    One,
    /// In one matrix, under the names that other layers of the family have for shared experts.
    AsShared,
}

impl Mlp {
    /// The routed experts, where there are any.
    pub fn moe(&self) -> Option<&Moe> {
        if let Mlp::Moe(moe) = self { Some(moe) } else { None }
    }
}

/// Routed experts with their router and shared experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// Routed experts.
    pub n_experts: usize,
    /// Experts beyond those that hand their input on and have no weights; the router knows them.
    pub n_zero: usize,
    /// Experts a token uses.
    pub n_experts_used: usize,
    /// Rows of an expert's gate and up.
    pub inter: usize,
    /// Nonlinearity of routed experts.
    pub activation: Activation,
    /// Routed experts work on a projection of this width, and their sum is projected back.
    pub latent: Option<usize>,
    /// Experts have biases.
    pub bias: bool,
    /// A bias is added to their sum.
    pub sum_bias: bool,
    /// The router's weight multiplies what goes into an expert, not what comes out.
    pub weighs_input: bool,
    /// How experts are chosen and weighted.
    pub router: Router,
    /// Shared experts, taken together as one MLP.
    pub shared: Option<Shared>,
}

impl Moe {
    /// Weights of one routed expert in a model of this width.
    pub fn weights_each(&self, hidden: usize) -> u64 {
        self.matrices().len() as u64 * self.width(hidden) as u64 * self.inter as u64
    }

    /// Length of what goes into a routed expert and comes out of it, in a model of this width.
    pub fn width(&self, hidden: usize) -> usize {
        self.latent.unwrap_or(hidden)
    }

    /// Matrices of a routed expert, in the order of a record.
    pub fn matrices(&self) -> &'static [Part] {
        if self.activation.is_gated() { &[Part::Gate, Part::Up, Part::Down] } else { &[Part::Up, Part::Down] }
    }
}

/// Experts on a shortcut (LongCat-Flash technical report, arXiv 2509.01322, section 2.1.2): they take what the first
/// attention of the layer left; a dense MLP, a second attention like the first and a second dense MLP follow that
/// attention, and what the experts give is added behind them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shortcut {
    /// Rows of gate and up of both dense MLPs.
    pub inter: usize,
    /// Nonlinearity of both.
    pub activation: Activation,
}

/// Shared experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shared {
    /// Rows of gate and up, all shared experts together.
    pub inter: usize,
    /// Output is multiplied by sigmoid(w · x).
    pub gated: bool,
    /// Gate and up are one matrix, gate first.
    pub fused: bool,
    /// Nonlinearity.
    pub activation: Activation,
    /// It is an MLP beside the routed experts, with norms of its own before and behind it; so is their sum normed.
    pub normed: bool,
    /// How it joins the routed experts.
    pub sum: SharedSum,
}

/// How shared experts join the routed ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedSum {
    /// Their sum.
    Sum,
    /// Half of their sum.
    Mean,
}

/// How experts are chosen and weighted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Router {
    /// The router has a bias, added to the logits.
    pub bias: bool,
    /// Logits become this · tanh(logit / this).
    pub softcap: Option<f32>,
    /// Its input is the stream itself, normed without weights and multiplied by learnt factors over the root of their number.
    pub own_input: bool,
    /// Weights are multiplied by a learnt factor of each expert.
    pub expert_scale: bool,
    /// From logits to scores.
    pub score: Score,
    /// A correction bias is added to the scores for choosing only.
    pub correction: bool,
    /// Who is chosen.
    pub choice: Choice,
    /// Experts compete in groups.
    pub groups: Option<Groups>,
    /// From scores to weights of the chosen.
    pub weights: RouteWeights,
    /// Weights are divided by their sum plus this.
    pub renorm: Option<f32>,
    /// Weights are multiplied by this.
    pub scale: f32,
}

/// From logits to scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
    /// sqrt(ln(1 + e^logit)) of each.
    SqrtSoftplus,
    /// The logits themselves.
    Identity,
}

/// Who is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Choice {
    /// Those with the best corrected scores.
    Best,
    /// Those that a table has for the token's id.
    ByToken,
    /// One after the other, each weighed by a softmax over the scores near its own (Liu et al. 2023, arXiv 2310.00811,
    /// at inference): those of the remaining m with (max − m) / max(|m|, max) of at most this.
    SparseMixer(f32),
}

/// Group-limited choice: only experts of the best groups may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Groups; divides `n_experts`.
    pub n_groups: usize,
    /// Groups kept.
    pub n_groups_used: usize,
    /// Score of a group.
    pub score: GroupScore,
}

/// Score of a group of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// The largest.
    Max,
    /// Sum of the two largest.
    Top2Sum,
}

/// From scores to weights of the chosen experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteWeights {
    /// The (unbiased) scores.
    Scores,
    /// Softmax over the chosen experts' scores.
    SoftmaxOverChosen,
    /// Sigmoid of each chosen expert's score.
    Sigmoid,
}

/// Nonlinearity of an MLP.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// silu(gate) · up
    Silu,
    /// gelu(gate) · up, in the form with tanh: g · sigmoid(√(8/π) · (g + 0.044715 g³))
    GeluTanh,
    /// silu(min(gate, limit)) · clamp(up, ±limit)
    ClampedSilu {
        /// Clamp of gate (from above) and up (both sides).
        limit: f32,
    },
    /// (clamp(up) + 1) · g · sigmoid(alpha · g), g = min(gate, limit)
    ClampedSwish {
        /// Slope inside the sigmoid.
        alpha: f32,
        /// Clamp of gate (from above) and up (both sides).
        limit: f32,
    },
    /// max(up, 0)²; there is no gate.
    SquaredRelu,
}

impl Activation {
    /// Whether the MLP has a gate.
    pub fn is_gated(self) -> bool {
        self != Activation::SquaredRelu
    }
}
