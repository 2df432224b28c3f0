//! Caps on what a checkpoint may claim. Each is far beyond any published model and small enough that a
//! hostile file cannot make us allocate or loop without end.

/// Bytes of a config.json; published ones stay under 100 kB, those with per-layer lists included.
pub const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// Bytes of a model.safetensors.index.json; DeepSeek V3's, with 92 k tensors, has 9 MB.
pub const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Values in one JSON document; an index of two million tensors fits.
pub const JSON_VALUES_MAX: usize = 4 << 20;
/// Values in a config.json.
pub const CONFIG_VALUES_MAX: usize = 200_000;
/// Nesting of a JSON document; published ones stay under 8.
pub const JSON_DEPTH_MAX: usize = 64;
/// Weight files of one checkpoint; the largest published ones have a few hundred.
pub const SHARDS_MAX: usize = 65_536;
/// Tensors of one checkpoint; Kimi K2 has 145 k with its scales.
pub const TENSORS_MAX: usize = 4_000_000;
/// Entries of a checkpoint directory that are looked at.
pub const DIR_ENTRIES_MAX: usize = 1 << 20;
/// Bytes of a file that is copied beside the weights; tokenizer.json reaches 35 MB.
pub const SIDE_FILE_BYTES_MAX: u64 = 256 << 20;

/// Layers; published models stay under 130.
pub const LAYERS_MAX: usize = 1024;
/// Width of the stream; published models stay under 20 k.
pub const HIDDEN_MAX: usize = 1 << 18;
/// Rows of a dense MLP.
pub const INTER_MAX: usize = 1 << 20;
/// Rows of the embedding.
pub const VOCAB_MAX: usize = 1 << 26;
/// Attention heads.
pub const HEADS_MAX: usize = 4096;
/// Dimensions of a head; bounds the rotary table of a layer.
pub const HEAD_DIM_MAX: usize = 4096;
/// Ranks of low-rank projections.
pub const RANK_MAX: usize = 1 << 18;
/// Routed experts of a layer; K3 has 896.
pub const EXPERTS_MAX: usize = 1 << 16;
/// Values that a channel's state has; published models have 256 at most.
pub const STATE_MAX: usize = 1 << 16;
/// Groups of heads of a state space.
pub const GROUPS_MAX: usize = 4096;
/// Tokens that a convolution looks at; published models have 4.
pub const KERNEL_MAX: usize = 1024;
/// Streams of hyper-connections; published models have 4.
pub const STREAMS_MAX: usize = 64;
/// Sinkhorn steps; published models take 20.
pub const SINKHORN_MAX: usize = 1000;
/// Side of an FP8 block.
pub const BLOCK_SIDE_MAX: u64 = 1 << 20;
/// Shared experts of a layer.
pub const SHARED_MAX: usize = 1024;
/// Positions a model was made for.
pub const POSITIONS_MAX: usize = 1 << 32;

/// Names listed in one message; the rest is counted.
pub const LISTED_MAX: usize = 20;
/// Weight files held open at once: a few hundred shards must not need as many file descriptors.
pub const OPEN_FILES_MAX: usize = 16;

/// Tokens of an n-gram; released are 3.
pub const NGRAM_MAX: usize = 16;

/// Heads of n-grams in all layers together; each takes a prime number to be found.
pub const NGRAM_HEADS_MAX: usize = 4096;

/// Where the search for these begins; released are 20 million.
pub const NGRAM_BASE_MAX: usize = 1 << 27;
