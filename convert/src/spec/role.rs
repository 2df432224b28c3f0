//! What tensors are for.

/// What a trunk tensor is for. With a layer index it names exactly one tensor of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "each name is the field's own word for the matrix")]
pub enum Role {
    Embed,
    FinalNorm,
    FinalNormBias,
    LmHead,
    LmHeadBias,
    /// Weights, biases and factor that collapse hyper-connected streams before the final norm.
    HeadMix,
    HeadMixBase,
    HeadMixScale,
    /// Norm, gates and weights of streams that pass gates: of the head, and of each sublayer.
    HeadGateNorm,
    HeadGateDown,
    HeadGateUp,
    AttnGateNorm,
    AttnGateDown,
    AttnGateUp,
    AttnInject,
    MlpGateNorm,
    MlpGateDown,
    MlpGateUp,
    MlpInject,
    /// Embeddings of n-grams: parts of the table, tables of integers that config.json determines, and the rest.
    NgramPart(u16),
    NgramFactors,
    NgramSizes,
    NgramOffsets,
    NgramKey,
    NgramValue,
    NgramKeyNorm,
    NgramQueryNorm,
    NgramConvNorm,
    NgramConv,
    AttnNorm,
    AttnNormBias,
    AttnPostNorm,
    MlpNorm,
    MlpNormBias,
    MlpPostNorm,
    /// What leaves the layer is multiplied by this number.
    LayerScale,
    /// Hyper-connections of a sublayer: weights, biases, and factors of pre, post and C.
    AttnMix,
    AttnMixBase,
    AttnMixScale,
    MlpMix,
    MlpMixBase,
    MlpMixScale,
    Q,
    K,
    V,
    /// q, k and v in one.
    Qkv,
    O,
    QBias,
    KBias,
    VBias,
    OBias,
    QNorm,
    KNorm,
    Sinks,
    AttnGate,
    QA,
    QANorm,
    QB,
    KvA,
    KvANorm,
    KvB,
    QABias,
    KvABias,
    /// The one key that is also the value, and its norm.
    Kv,
    KvNorm,
    /// Output projection of groups of heads, and the one that joins them.
    OA,
    OB,
    /// Compressed entries: values, weights, what is added to weights by position, norm.
    CompressKv,
    CompressGate,
    CompressBias,
    CompressNorm,
    IndexQ,
    IndexQNorm,
    /// Queries of all heads, then the key.
    IndexQk,
    IndexK,
    IndexKNorm,
    IndexKNormBias,
    /// Weight of each of the indexer's heads.
    IndexWeights,
    IndexCompressKv,
    IndexCompressGate,
    IndexCompressBias,
    IndexCompressNorm,
    /// Linear attention: projections (grouped by key heads, or one by one), convolution, steps, decay, norm, output.
    DeltaQkvz,
    DeltaBa,
    DeltaQkv,
    DeltaZ,
    DeltaConvQ,
    DeltaConvK,
    DeltaConvV,
    DeltaGateA,
    DeltaGateB,
    DeltaDecayA,
    DeltaDecayB,
    DeltaB,
    DeltaA,
    DeltaConv,
    DeltaStep,
    DeltaDecay,
    DeltaNorm,
    DeltaOut,
    /// Routed attention: its router, experts' queries and outputs, keys and values in one.
    AttnRouter,
    AttnExpertsIn,
    AttnExpertsOut,
    KeysValues,
    /// State spaces, short convolutions and lightning attention: projections, convolution, norm.
    MixerIn,
    MixerInBias,
    MixerConv,
    MixerConvBias,
    MixerNorm,
    MixerOut,
    MixerOutBias,
    /// State spaces: bias of step sizes, decay, what goes past the state; and what a low rank of step sizes takes.
    StateStep,
    StateDecay,
    StateSkip,
    StateSelect,
    StateStepUp,
    StateStepNorm,
    StateInNorm,
    StateOutNorm,
    DenseGate,
    /// Gate and up in one.
    DenseGateUp,
    DenseUp,
    DenseDown,
    /// Of a layer whose experts are on a shortcut: its second attention and MLP.
    SecondAttnNorm,
    SecondMlpNorm,
    SecondQA,
    SecondQABias,
    SecondQANorm,
    SecondQB,
    SecondKvA,
    SecondKvABias,
    SecondKvANorm,
    SecondKvB,
    SecondO,
    SecondOBias,
    SecondDenseGate,
    SecondDenseUp,
    SecondDenseDown,
    Router,
    RouterBias,
    RouterCorrection,
    /// Factors of the router's own input, and of each expert's weight.
    RouterInput,
    RouterExpertScale,
    /// Experts of each token id; integers.
    RouterTable,
    /// Added to the sum of routed experts.
    ExpertsBias,
    /// To what routed experts work on, and back.
    LatentDown,
    LatentUp,
    SharedGate,
    SharedUp,
    /// Gate and up in one.
    SharedGateUp,
    SharedDown,
    SharedRouter,
    /// Norms of an MLP beside the routed experts, and of their sum.
    SharedNorm,
    SharedPostNorm,
    RoutedPostNorm,
    /// Kept as it is, no part of the forward pass (MTP layers, vision towers …).
    Carried,
}

/// What a layer whose experts are on a shortcut has twice.
const TWICE: &[(Role, Role)] = &[
    (Role::AttnNorm, Role::SecondAttnNorm),
    (Role::MlpNorm, Role::SecondMlpNorm),
    (Role::QA, Role::SecondQA),
    (Role::QABias, Role::SecondQABias),
    (Role::QANorm, Role::SecondQANorm),
    (Role::QB, Role::SecondQB),
    (Role::KvA, Role::SecondKvA),
    (Role::KvABias, Role::SecondKvABias),
    (Role::KvANorm, Role::SecondKvANorm),
    (Role::KvB, Role::SecondKvB),
    (Role::O, Role::SecondO),
    (Role::OBias, Role::SecondOBias),
    (Role::DenseGate, Role::SecondDenseGate),
    (Role::DenseUp, Role::SecondDenseUp),
    (Role::DenseDown, Role::SecondDenseDown),
];

impl Role {
    /// The second of what a layer has twice.
    pub fn second(self) -> Option<Role> {
        TWICE.iter().find(|(first, _)| *first == self).map(|(_, second)| *second)
    }

    /// The first, if this is the second.
    pub fn first(self) -> Option<Role> {
        TWICE.iter().find(|(_, second)| *second == self).map(|(first, _)| *first)
    }

    /// Whether the tensor holds integers, not weights.
    pub const fn is_table(self) -> bool {
        matches!(self, Role::RouterTable | Role::NgramFactors | Role::NgramSizes | Role::NgramOffsets)
    }

    /// The role of one of several tensors that a rule stands for.
    pub fn of_part(self, part: Option<usize>) -> Role {
        match (self, part.map(u16::try_from)) {
            (Role::NgramPart(_), Some(Ok(part))) => Role::NgramPart(part),
            (role, _) => role,
        }
    }

    /// Whether this tensor stands outside the layers.
    pub const fn is_global(self) -> bool {
        use Role::{
            Embed, FinalNorm, FinalNormBias, HeadGateDown, HeadGateNorm, HeadGateUp, HeadMix, HeadMixBase,
            HeadMixScale, LmHead, LmHeadBias,
        };
        matches!(
            self,
            Embed
                | FinalNorm
                | FinalNormBias
                | HeadGateDown
                | HeadGateNorm
                | HeadGateUp
                | HeadMix
                | HeadMixBase
                | HeadMixScale
                | LmHead
                | LmHeadBias
        )
    }
}
/// One matrix (or bias) of a routed expert, in canonical orientation `[out, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub enum Part {
    /// `[inter, hidden]`
    Gate,
    /// `[inter, hidden]`
    Up,
    /// `[hidden, inter]`
    Down,
    /// `[1, inter]`
    GateBias,
    /// `[1, inter]`
    UpBias,
    /// `[1, hidden]`
    DownBias,
}

impl Part {
    /// Order inside a record.
    pub const ALL: [Part; 6] =
        [Part::Gate, Part::Up, Part::Down, Part::GateBias, Part::UpBias, Part::DownBias];

    /// Name in a bundle.
    pub const fn name(self) -> &'static str {
        match self {
            Part::Gate => "gate_proj",
            Part::Up => "up_proj",
            Part::Down => "down_proj",
            Part::GateBias => "gate_proj_bias",
            Part::UpBias => "up_proj_bias",
            Part::DownBias => "down_proj_bias",
        }
    }

    /// Whether this is a matrix, which codecs may quantize; biases never are.
    pub const fn is_matrix(self) -> bool {
        matches!(self, Part::Gate | Part::Up | Part::Down)
    }
}
