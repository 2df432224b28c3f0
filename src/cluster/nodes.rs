//! The arithmetic of a job on many machines: what is sequential and what is not, and what it reads, stores and sends.
//!
//! ```text
//! plan      one process: hashes the checkpoint                                            sequential
//! forward   M units of the text, each through all layers in order; units side by side     sequential in layers
//! layers    every shard: its experts' Hessians and codes, once its layer's streams are there   parallel
//! trunk     one shard; with Hessians it pushes a sample of the text through the model     beside the others
//! merge     one process: writes the manifest                                              sequential, seconds
//!
//! total = plan + max( all work / nodes, forward + longest shard, trunk shard, bytes read / storage ) + merge
//! ```
//!
//! On one machine shards in order hand their streams on, so that forward costs nothing of its own. Rates are those of one core
//! of this machine ([`Rates`]); cores are taken to add up, reading to go on beside computing.

use moepack_convert::Model;
use moepack_convert::spec::Moe;
use moepack_quant::solve::Solver;
use serde::Serialize;

use crate::cluster::plan::Piece;
use crate::cluster::rates::Rates;
use crate::engine::sizes::Sizes;

/// What a machine of the cluster is taken to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Node {
    /// Cores, each as fast as one of this machine.
    pub cpus: usize,
    /// Bytes a second that it reads from shared storage.
    pub bytes_per_second: u64,
    /// Bytes a second that shared storage gives to all together.
    pub storage_bytes_per_second: u64,
}

/// A job on so many machines.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Machines.
    pub nodes: usize,
    /// Shards.
    pub shards: usize,
    /// Units of the text that travel side by side.
    pub units: usize,
    /// Seconds to plan.
    pub plan_seconds: f64,
    /// Seconds until the text is through all layers.
    pub forward_seconds: f64,
    /// Seconds of all layers' shards, were they shared out evenly.
    pub layers_seconds: f64,
    /// Seconds of the longest of them.
    pub longest_shard_seconds: f64,
    /// Seconds of the trunk's shard.
    pub trunk_seconds: f64,
    /// Seconds that shared storage takes to give what is read.
    pub storage_seconds: f64,
    /// Seconds to merge.
    pub merge_seconds: f64,
    /// From start to end.
    pub total_seconds: f64,
    /// Bytes that are read from shared storage.
    pub read_bytes: u64,
    /// Bytes of activations that are stored until merging.
    pub activation_bytes: u64,
    /// Bytes that go over the network: all that is read and written.
    pub network_bytes: u64,
}

/// A job, as far as it matters here.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// The model.
    pub model: &'a Model,
    /// Bytes of everything.
    pub sizes: &'a Sizes,
    /// The solver.
    pub solver: &'a dyn Solver,
    /// Tokens of the calibration text; 0 without one.
    pub n_tokens: u64,
    /// Units of it.
    pub n_units: usize,
    /// Speed of a core.
    pub rates: Rates,
    /// Speed of a machine.
    pub node: Node,
}

/// Seconds to make the manifest and the files' names durable.
const MERGE_SECONDS: f64 = 2.0;

impl Work<'_> {
    /// The job on `nodes` machines, cut into these shards.
    pub fn on(&self, nodes: usize, shards: &[Vec<Piece>]) -> Row {
        let nodes = nodes.max(1);
        // One machine hands its streams on from shard to shard.
        let alone = nodes == 1 || self.n_tokens == 0;
        let units = if self.n_tokens == 0 { 0 } else { self.n_units.max(1) };
        let unit = if alone { Cost::default() } else { self.unit(units) };
        let rounds = units.div_ceil(nodes.min(units).max(1)) as f64;
        let costs: Vec<Cost> = shards.iter().map(|pieces| self.shard(pieces)).collect();
        let layers: f64 = costs.iter().map(|c| c.seconds).sum::<f64>() - self.trunk().seconds;
        let longest = costs.iter().map(|c| c.seconds).fold(0.0, f64::max);
        let (trunk, plan) = (self.trunk().seconds, self.plan());
        let forward = unit.seconds * rounds;
        let all = layers + trunk + unit.seconds * units as f64;
        let read = costs.iter().map(|c| c.bytes).sum::<u64>() + unit.bytes * units as u64;
        let storage = read as f64 / self.node.storage_bytes_per_second.max(1) as f64;
        let busy = [all / nodes as f64, forward + longest, trunk, storage].into_iter().fold(0.0, f64::max);
        let activation_bytes = self.activation_bytes() * self.sizes.layers.len() as u64;
        Row {
            nodes,
            shards: shards.len(),
            units,
            plan_seconds: plan.seconds,
            forward_seconds: forward,
            layers_seconds: layers / nodes as f64,
            longest_shard_seconds: longest,
            trunk_seconds: trunk,
            storage_seconds: storage,
            merge_seconds: MERGE_SECONDS,
            total_seconds: plan.seconds + busy + MERGE_SECONDS,
            read_bytes: read + plan.bytes,
            activation_bytes,
            network_bytes: read + plan.bytes + activation_bytes + self.sizes.bundle_bytes(),
        }
    }

    /// Computing on all cores beside reading.
    fn cost(&self, core_seconds: f64, bytes: u64) -> Cost {
        let reading = bytes as f64 / self.node.bytes_per_second.max(1) as f64;
        Cost { seconds: (core_seconds / self.node.cpus.max(1) as f64).max(reading), bytes }
    }

    fn plan(&self) -> Cost {
        self.cost(self.rates.hash * self.sizes.source_bytes as f64, self.sizes.source_bytes)
    }

    /// Bytes of the text's stream.
    fn activation_bytes(&self) -> u64 {
        4 * self.model.spec().width() as u64 * self.n_tokens
    }

    /// A unit through all layers.
    fn unit(&self, units: usize) -> Cost {
        let n_tokens = self.n_tokens as f64 / units.max(1) as f64;
        let stored = self.activation_bytes() / units.max(1) as u64;
        let layers = self.layers().map(|layer| {
            let experts = layer.experts * layer.n_experts;
            let core = (layer.trunk + experts) * self.rates.pack
                + n_tokens * (layer.trunk + layer.used * layer.experts) * self.rates.product;
            self.cost(core, layer.bytes + stored)
        });
        layers.fold(Cost::default(), Cost::add)
    }

    fn shard(&self, pieces: &[Piece]) -> Cost {
        let costs = pieces.iter().map(|piece| match *piece {
            Piece::Trunk => self.trunk(),
            Piece::Bank { layer } => self.experts(layer, None),
            Piece::Experts { layer, first, end } => self.experts(layer, Some(end - first)),
        });
        costs.fold(Cost::default(), Cost::add)
    }

    /// Experts of a layer: all of them, or so many.
    fn experts(&self, layer: usize, n: Option<usize>) -> Cost {
        let Some(layer) = self.layers().find(|l| l.layer == layer) else { return Cost::default() };
        let (n, rates) = (n.map_or(layer.n_experts, |n| n as f64), &self.rates);
        let share = n / layer.n_experts.max(1.0);
        let weights = layer.experts * n;
        let mut core = weights * (rates.pack + rates.code);
        let mut bytes = (self.sizes.layer_source_bytes(layer.layer) as f64 * share) as u64;
        if self.n_tokens > 0 {
            let tokens = self.n_tokens as f64;
            // Whoever codes some experts of a layer runs its attention over all tokens, too.
            core += layer.trunk * rates.pack + tokens * layer.trunk * rates.product;
            core += tokens * share * layer.used * layer.experts * rates.product;
            bytes += layer.trunk_bytes + self.activation_bytes();
        }
        if self.n_tokens > 0 && self.solver.needs_hessian() {
            let pairs: f64 = [layer.hidden, layer.inter].iter().map(|c| c * c).sum();
            core += self.n_tokens as f64 * share * layer.used * pairs * rates.learn;
            let [factor, feed] = rates.solve;
            let solved = |rows: f64, cols: f64| cols * cols * (cols * factor + rows * feed);
            let input = (layer.n_matrices - 1.0) * solved(layer.inter, layer.hidden);
            core += n * (input + solved(layer.hidden, layer.inter));
        }
        self.cost(core, bytes)
    }

    /// Trunk and side files; with Hessians of its inputs, a sample of the text through the whole model.
    fn trunk(&self) -> Cost {
        let learning = &self.sizes.trunk_learning;
        let experts: u64 = self.sizes.layers.iter().map(|l| l.source_bytes).sum();
        let own = self.sizes.source_bytes.saturating_sub(experts);
        let mut core = learning.n_weights as f64 * (self.rates.pack + self.rates.code);
        let mut bytes = own;
        if self.n_tokens > 0 && self.solver.needs_hessian() && learning.cols_max > 0 {
            let tokens = (self.n_tokens as f64).min((8 * learning.cols_max) as f64);
            let (cols, [factor, feed]) = (learning.cols_max as f64, self.rates.solve);
            core +=
                learning.n_weights as f64 * cols * (factor + feed) + tokens * cols * cols * self.rates.learn;
            core += (self.layers())
                .map(|l| {
                    (l.trunk + l.experts * l.n_experts) * self.rates.pack
                        + tokens * (l.trunk + l.used * l.experts) * self.rates.product
                })
                .sum::<f64>();
            bytes = self.sizes.source_bytes;
        }
        self.cost(core, bytes)
    }

    fn layers(&self) -> impl Iterator<Item = Layer> {
        let spec = self.model.spec();
        (0..spec.layers.len()).map(|layer| {
            let of_layer = || self.model.trunk_tensors().iter().filter(move |t| t.layer == Some(layer));
            let weights = of_layer().filter(|t| !t.is_scale && t.decoded.len() == 2);
            let trunk_bytes = of_layer().map(|t| t.bytes).sum::<u64>();
            let moe = spec.moe(layer);
            let of = |value: fn(&Moe) -> usize| moe.map_or(0.0, |moe| value(moe) as f64);
            Layer {
                layer,
                trunk: weights.map(|t| t.decoded.iter().product::<u64>()).sum::<u64>() as f64,
                trunk_bytes,
                bytes: trunk_bytes + self.sizes.layer_source_bytes(layer),
                n_experts: of(|moe| moe.n_experts),
                used: of(|moe| moe.n_experts_used),
                experts: moe.map_or(0.0, |moe| moe.weights_each(spec.hidden) as f64),
                n_matrices: of(|moe| moe.matrices().len()),
                hidden: moe.map_or(0.0, |moe| moe.width(spec.hidden) as f64),
                inter: of(|moe| moe.inter),
            }
        })
    }
}

/// A layer in weights.
struct Layer {
    layer: usize,
    /// Weights that every token is multiplied with.
    trunk: f64,
    trunk_bytes: u64,
    /// Trunk and experts as released.
    bytes: u64,
    n_experts: f64,
    /// Experts of a token.
    used: f64,
    /// Weights of an expert.
    experts: f64,
    n_matrices: f64,
    hidden: f64,
    inter: f64,
}

/// Of some work on one machine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Cost {
    seconds: f64,
    /// That are read from shared storage.
    bytes: u64,
}

impl Cost {
    fn add(self, other: Cost) -> Cost {
        Cost { seconds: self.seconds + other.seconds, bytes: self.bytes + other.bytes }
    }
}
