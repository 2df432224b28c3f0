//! What a family says of its experts and routers.

use super::rules::{Factor, Switch};
use crate::hparams::Keys;
use crate::spec::{Choice, GroupScore, RouteWeights, Score};

/// Which layers have experts; the others are dense. `mlp_layer_types`, where it is there, comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MoeLayers {
    /// Every layer.
    All,
    /// Every layer; none where the number of experts is 0.
    AllUnlessZero,
    /// None: a dense model.
    None,
    /// From the layer that this key says; transformers' default where it is missing.
    From(&'static str, usize),
    /// Every n-th (`decoder_sparse_step`, 1 where it is missing), except those in `mlp_only_layers`.
    Sparse,
    /// Every `moe_layer_interval`-th from `moe_layer_start_index` to `moe_layer_end_index` (-1: the last).
    Interval,
    /// Those with a 1 in this list; without it all.
    Flags(&'static str),
    /// As `layers_block_type` or `hybrid_override_pattern` says; the others are no MLPs, or a dense one alone.
    Blocks,
    /// Each `expert_layer_period`-th from `expert_layer_offset`, with transformers' defaults; none with a single expert.
    Period(usize, usize),
    /// Those in `moe_layers`; without the list each `interleave_moe_layer_step`-th.
    Listed,
}

/// Experts of a family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeRule {
    /// Keys for the number of experts.
    pub n_experts: Keys,
    /// Keys for the number of experts that hand their input on; none where they are missing.
    pub n_zero: Keys,
    /// Keys for the number of experts a token uses.
    pub n_experts_used: Keys,
    /// Keys for the rows of an expert's gate and up.
    pub inter: Keys,
    /// Nonlinearity.
    pub activation: ActivationRule,
    /// Shared experts and dense layers have silu without a clamp.
    pub plain_elsewhere: bool,
    /// Keys for the width that experts work on, where it is not that of the stream.
    pub latent: Keys,
    /// Experts have biases.
    pub bias: bool,
    /// A bias is added to their sum.
    pub sum_bias: bool,
    /// The router's weight multiplies what goes into an expert.
    pub weighs_input: bool,
    /// Router.
    pub router: RouterRule,
    /// Shared experts.
    pub shared: SharedRule,
    /// Key that may say `sum` or `average` of shared and routed experts; the latter is the default.
    pub shared_sum: Option<&'static str>,
    /// Gate and up of the shared experts are one matrix.
    pub shared_fused: bool,
    /// The shared expert is an MLP of its own beside the others, with norms before and behind both.
    pub shared_normed: bool,
}

impl MoeRule {
    /// Qwen3's and many others'.
    pub const PLAIN: MoeRule = MoeRule {
        n_experts: &["num_experts", "num_local_experts", "n_routed_experts"],
        n_zero: &[],
        n_experts_used: &["num_experts_per_tok"],
        inter: &["moe_intermediate_size"],
        activation: ActivationRule::Silu,
        plain_elsewhere: false,
        latent: &[],
        bias: false,
        sum_bias: false,
        weighs_input: false,
        router: RouterRule::SOFTMAX,
        shared: SharedRule::None,
        shared_sum: None,
        shared_fused: false,
        shared_normed: false,
    };
}

/// Nonlinearity of a family's MLPs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ActivationRule {
    /// silu(gate) · up
    Silu,
    /// gelu(gate) · up, by tanh
    GeluTanh,
    /// The same of clamped inputs; `swiglu_limit`, with transformers' default.
    ClampedSilu {
        /// Default of `swiglu_limit`.
        limit: f64,
    },
    /// gpt-oss's clamped swish; `swiglu_alpha` and `swiglu_limit`, with transformers' defaults.
    ClampedSwish {
        /// Default of `swiglu_alpha`.
        alpha: f64,
        /// Default of `swiglu_limit`.
        limit: f64,
    },
    /// max(up, 0)², without a gate.
    SquaredRelu,
}

/// Router of a family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterRule {
    /// A bias is added to the logits.
    pub bias: bool,
    /// Key of the logits' soft cap; none where it is 0 or missing.
    pub softcap: Keys,
    /// It norms the stream itself, and weights are multiplied by a factor of each expert.
    pub own_input: bool,
    /// From logits to scores.
    pub score: ScoreRule,
    /// A correction bias is added to the scores for choosing.
    pub correction: bool,
    /// Whether it is there.
    pub correction_if: Switch,
    /// Who is chosen, in layers without a table of tokens.
    pub choice: Choice,
    /// Which layers choose by the token's id.
    pub hash: HashRule,
    /// Score of a group (`n_group`, `topk_group`).
    pub groups: Option<GroupScore>,
    /// Key and the value that it must have for there to be groups.
    pub groups_if: Option<(&'static str, &'static str)>,
    /// From scores to weights.
    pub weights: RouteWeights,
    /// Key that may name another function from scores to weights: `softmax` or `sigmoid`.
    pub weights_key: Option<&'static str>,
    /// Whether the chosen weights are divided by their sum.
    pub renorm: Switch,
    /// What is added to that sum.
    pub renorm_eps: f32,
    /// Factor of the weights.
    pub scale: Factor,
}

impl RouterRule {
    /// Softmax over all experts, the best of them.
    pub const SOFTMAX: RouterRule = RouterRule {
        bias: false,
        softcap: &[],
        own_input: false,
        score: ScoreRule::Is(Score::Softmax),
        correction: false,
        correction_if: Switch::Always,
        choice: Choice::Best,
        hash: HashRule::None,
        groups: None,
        groups_if: None,
        weights: RouteWeights::Scores,
        weights_key: None,
        renorm: Switch::Key("norm_topk_prob", false),
        renorm_eps: 0.0,
        scale: Factor::One,
    };

    /// The best logits, a softmax over them.
    pub const LOGITS: RouterRule = RouterRule {
        score: ScoreRule::Is(Score::Identity),
        weights: RouteWeights::SoftmaxOverChosen,
        renorm: Switch::Never,
        ..RouterRule::SOFTMAX
    };

    /// DeepSeek V3's: sigmoid, corrected for the choice, weights divided by their sum (`noaux_tc`).
    pub const SIGMOID: RouterRule = RouterRule {
        score: ScoreRule::Is(Score::Sigmoid),
        correction: true,
        groups: Some(GroupScore::Top2Sum),
        renorm: Switch::Key("norm_topk_prob", true),
        renorm_eps: 1e-20,
        scale: Factor::Key("routed_scaling_factor", 1.0),
        ..RouterRule::SOFTMAX
    };
}

/// From logits to scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoreRule {
    /// This one.
    Is(Score),
    /// `scoring_func`, with transformers' default.
    ScoringFunc(Score),
}

/// Which layers choose experts by the token's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HashRule {
    /// None.
    None,
    /// Those that `mlp_layer_types` calls `hash_moe`, else the first `num_hash_layers`, with transformers' default.
    First(usize),
}

/// Shared experts of a family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SharedRule {
    /// None.
    None,
    /// As many as this key says, each as wide as a routed expert, stored as one MLP.
    Count(&'static str, usize),
    /// One as wide as this key says; none where it is 0 or missing.
    Width(Keys),
    /// One of a width of its own, its output gated by a sigmoid.
    Gated(Keys),
}
