//! The reference forward pass in f32: what a model computes, put together from the parts its [`ModelSpec`] names.
//!
//! It is layer-major: a layer's weights are loaded once and all tokens of all windows pass through, then the next
//! layer. [`run`] is the whole of it and can be read as the manual; the engine makes the same calls and does more
//! between them:
//!
//! ```text
//! stream = embed(weights, windows)                                    [tokens, width]
//! for each layer:
//!     layer = LayerWeights::load(weights, layer)
//!     layer.attention(windows, stream)                                stream += attention(norm(stream))
//!     without experts:  layer.dense(stream)                           stream += mlp(norm(stream))
//!     with experts:     pass = MoePass::begin(layer, tokens, stream)  router: who gets which token
//!                       for each expert, any thread:  out = pass.run_expert(expert, weights)
//!                       in ascending order:           sum.add(out)
//!                       stream.add(pass.finish(sum))                  shared experts, residual
//! Head::load(weights).nll(windows, stream)
//! ```
//!
//! The bits do not depend on the number of threads or the instruction set: products are chains in k order, sums have
//! a fixed tree, and experts are added in ascending order.

mod attention;
mod blocks;
mod compressed;
mod compressor;
mod convolution;
mod delta;
mod experts;
mod gated;
mod gqa;
mod head;
mod indexer;
mod layer;
mod lightning;
mod linear;
mod mla;
mod moe;
mod ngrams;
mod norm;
mod ordered;
mod pools;
mod residual;
mod rope;
mod routed_attention;
mod router;
mod short_conv;
mod shortcut;
mod state_space;
mod stored;
mod tap;

use std::ops::Range;
use std::sync::Arc;

use moepack_convert::Model;
use moepack_convert::spec::{ModelSpec, Role};
use moepack_convert::tensor::{Expert, Tensor};
use moepack_format::{Error, Result};
use moepack_quant::{Isa, math};

pub use experts::GatedMlp;
pub use head::{Head, HeadScratch};
pub use layer::LayerWeights;
pub use moe::{ExpertOutput, MoePass, Observer, RoutedSum};
pub use ordered::ordered;
pub use residual::Delta;
pub use router::{Assigned, Routing};
pub use tap::Tap;

use crate::tokens::Windows;

/// Where a forward pass gets its weights. A checkpoint and a bundle are one; the engine puts coded experts into
/// another.
pub trait Weights: Sync {
    /// The description of the model.
    fn spec(&self) -> &ModelSpec;

    /// A trunk tensor, decoded. `layer` is `None` for embedding, final norm and head.
    ///
    /// # Errors
    /// There is no such tensor, or it cannot be read.
    fn trunk(&self, layer: Option<usize>, role: Role) -> Result<Tensor>;

    /// Some rows of a trunk matrix, decoded: `[rows.len(), cols]`. Worth its own way where a matrix is long.
    ///
    /// # Errors
    /// As [`Weights::trunk`]; rows beyond the matrix.
    fn trunk_rows(&self, layer: Option<usize>, role: Role, rows: Range<usize>) -> Result<Tensor> {
        let whole = self.trunk(layer, role)?;
        let n_rows = whole.shape.first().copied().unwrap_or(0);
        let cols = whole.data.len() / n_rows.max(1);
        let data = whole.data.get(rows.start * cols..rows.end * cols);
        let data =
            data.ok_or_else(|| Error::bad_data(format!("rows {rows:?} of a matrix of {n_rows} rows")))?;
        Ok(Tensor { shape: vec![rows.len(), cols], data: data.to_vec() })
    }

    /// A trunk tensor of integers.
    ///
    /// # Errors
    /// There is no such table, or it cannot be read.
    fn trunk_table(&self, layer: Option<usize>, role: Role) -> Result<Vec<u32>>;

    /// A trunk tensor of integers of any size.
    ///
    /// # Errors
    /// There is no such tensor, or it cannot be read.
    fn trunk_integers(&self, layer: Option<usize>, role: Role) -> Result<Vec<i64>>;

    /// A routed expert, decoded.
    ///
    /// # Errors
    /// There is no such expert, or it cannot be read.
    fn expert(&self, layer: usize, expert: usize) -> Result<Expert>;

    /// What watches the inputs of a trunk matrix, if anything does.
    fn tap(&self, _layer: Option<usize>, _role: Role) -> Option<Arc<Tap>> {
        None
    }
}

impl Weights for Model {
    fn spec(&self) -> &ModelSpec {
        Model::spec(self)
    }

    fn trunk(&self, layer: Option<usize>, role: Role) -> Result<Tensor> {
        Model::trunk(self, layer, role)
    }

    fn trunk_rows(&self, layer: Option<usize>, role: Role, rows: Range<usize>) -> Result<Tensor> {
        Model::trunk_rows(self, layer, role, rows)
    }

    fn trunk_table(&self, layer: Option<usize>, role: Role) -> Result<Vec<u32>> {
        Model::trunk_table(self, layer, role)
    }

    fn trunk_integers(&self, layer: Option<usize>, role: Role) -> Result<Vec<i64>> {
        Model::trunk_integers(self, layer, role)
    }

    fn expert(&self, layer: usize, expert: usize) -> Result<Expert> {
        Model::expert(self, layer, expert)?.decode(Isa::get())
    }
}

/// Refuses a model whose forward pass is not described.
pub fn no_forward(spec: &ModelSpec) -> Error {
    Error::bad_data(format!("the forward pass of {} is not implemented", spec.family))
        .hint("inspect, plan, check, and quantize without --calibrate and --verify do without one")
}

/// The residual stream: one row a token, windows one after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Stream {
    /// Length of a row: all streams of the model together.
    pub width: usize,
    /// `[tokens, width]`
    pub hidden: Vec<f32>,
    /// What a parallel attention adds together with the MLP. `[tokens, width]`
    pending: Option<Vec<f32>>,
    /// What experts on a shortcut take. `[tokens, width]`
    shortcut: Option<Vec<f32>>,
    /// The keys that the last layer with an indexer chose, window by window.
    chosen: Vec<attention::Chosen>,
}

impl Stream {
    /// Rows of this length, `[tokens, width]`.
    pub fn new(width: usize, hidden: Vec<f32>) -> Stream {
        Stream { width, hidden, pending: None, shortcut: None, chosen: Vec::new() }
    }

    /// The rows of `windows`, which are the first of this stream's, as they are between attention and MLP.
    pub fn first(&self, windows: &Windows) -> Stream {
        let n_values = windows.tokens.len() * self.width;
        let part = |values: &[f32]| values.get(..n_values).unwrap_or_default().to_vec();
        Stream {
            width: self.width,
            hidden: part(&self.hidden),
            pending: self.pending.as_deref().map(part),
            shortcut: self.shortcut.as_deref().map(part),
            chosen: self.chosen.iter().take(windows.lens.len()).cloned().collect(),
        }
    }

    /// Appends the rows of other windows, both streams being between two layers.
    pub fn append(&mut self, later: Stream) {
        self.hidden.extend(later.hidden);
        self.chosen.extend(later.chosen);
    }

    /// Number of rows.
    pub fn n_tokens(&self) -> usize {
        self.hidden.len() / self.width.max(1)
    }

    /// The rows that the layer's MLP takes, `[tokens, width]`.
    fn taken(&self) -> &[f32] {
        self.shortcut.as_deref().unwrap_or(&self.hidden)
    }

    /// One token's row.
    pub fn row(&self, token: usize) -> &[f32] {
        &self.hidden[token * self.width..][..self.width]
    }
}

/// Values of the embedding that are read at a time.
const EMBED_VALUES: usize = 16 << 20;

/// Rows that are worked on together: as many as make a matrix kernel fast while buffers stay in the cache.
const ROWS: usize = 192;

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Layer in work; `n_layers` while the head runs.
    pub layer: usize,
    /// Layers of the model.
    pub n_layers: usize,
    /// Experts of this layer that are done.
    pub experts_done: usize,
    /// Routed experts of this layer.
    pub n_experts: usize,
}

/// Told of progress; an error it returns (the user's interrupt) ends the run.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) -> Result<()> + Sync);

/// Runs the whole model over the windows and gives the negative log-likelihood (nats) of every scored token, a list
/// a window: its tokens from the second on.
///
/// # Errors
/// Weights that cannot be read or do not have the spec's shapes, token ids beyond the vocabulary, and whatever
/// `progress` returns.
pub fn run(
    isa: Isa,
    weights: &dyn Weights,
    windows: &Windows,
    progress: OnProgress<'_>,
) -> Result<Vec<Vec<f64>>> {
    let stream = run_layers(isa, weights, windows, progress)?;
    let n_layers = weights.spec().layers.len();
    progress(Progress { layer: n_layers, n_layers, experts_done: 0, n_experts: 0 })?;
    Head::load(isa, weights)?.nll(windows, &stream, &|_, _| ())
}

/// Embedding and all layers: the stream that [`Head`] takes.
///
/// # Errors
/// As [`run`].
pub fn run_layers(
    isa: Isa,
    weights: &dyn Weights,
    windows: &Windows,
    progress: OnProgress<'_>,
) -> Result<Stream> {
    let mut stream = embed(weights, windows)?;
    let n_layers = weights.spec().layers.len();
    for l in 0..n_layers {
        let layer = LayerWeights::load(isa, weights, l)?;
        let n_experts = layer.n_experts();
        let step = |experts_done| progress(Progress { layer: l, n_layers, experts_done, n_experts });
        step(0)?;
        layer.attention(windows, &mut stream)?;
        if n_experts == 0 {
            layer.dense(&mut stream)?;
            continue;
        }
        let pass = MoePass::begin(&layer, &windows.tokens, &stream)?;
        let mut sum = RoutedSum::new(&pass);
        let work = |e| pass.run_expert(e, &layer.pack_expert(&weights.expert(l, e)?)?, None);
        ordered(n_experts, work, |e, output| {
            sum.add(&output);
            step(e + 1)
        })?;
        let delta = pass.finish(sum)?;
        stream.add(isa, &delta);
    }
    Ok(stream)
}

/// The rows of the embedding that the windows name, once for each stream of the model.
///
/// # Errors
/// A token id beyond the vocabulary; an embedding that cannot be read or has another shape.
pub fn embed(weights: &dyn Weights, windows: &Windows) -> Result<Stream> {
    let spec = weights.spec();
    let (hidden, width) = (spec.hidden, spec.width());
    windows.check_vocab(spec.vocab)?;
    let mut stream = vec![0.0; windows.tokens.len() * width]; // [tokens, streams, hidden]
    let n_rows = (EMBED_VALUES / hidden.max(1)).max(1);
    for first in (0..spec.vocab).step_by(n_rows) {
        let rows = first..spec.vocab.min(first + n_rows);
        let part = weights.trunk_rows(None, Role::Embed, rows.clone())?; // [rows, hidden]
        let mut part = of_shape(part, None, Role::Embed, &[rows.len(), hidden])?;
        if spec.embed_scale != 1.0 {
            part.iter_mut().for_each(|v| *v *= spec.embed_scale);
        }
        for (to, id) in stream.chunks_exact_mut(width).zip(windows.tokens.iter().map(|&id| id as usize)) {
            if rows.contains(&id) {
                let from = &part[(id - first) * hidden..][..hidden];
                to.chunks_exact_mut(hidden).for_each(|to| to.copy_from_slice(from));
            }
        }
    }
    Ok(Stream::new(width, stream))
}

/// A trunk tensor's values, which must have this shape.
fn tensor(weights: &dyn Weights, layer: Option<usize>, role: Role, shape: &[usize]) -> Result<Vec<f32>> {
    of_shape(weights.trunk(layer, role)?, layer, role, shape)
}

fn of_shape(tensor: Tensor, layer: Option<usize>, role: Role, shape: &[usize]) -> Result<Vec<f32>> {
    if tensor.shape != shape || tensor.data.len() != shape.iter().product::<usize>() {
        let (found, values) = (&tensor.shape, tensor.data.len());
        let place = layer.map_or(String::new(), |l| format!(" of layer {l}"));
        let what = format!(
            "shape {found:?} with {values} values for {role:?}{place}, but the model takes {shape:?}"
        );
        return Err(Error::bad_data(what));
    }
    Ok(tensor.data)
}

/// The first `len` values of a buffer that only ever grows.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// x = x · sigmoid(x)
fn silu_all(isa: Isa, x: &mut [f32]) {
    let mut gates = [0.0; 1024];
    for x in x.chunks_mut(gates.len()) {
        let gates = &mut gates[..x.len()];
        gates.copy_from_slice(x);
        math::sigmoid_all(isa, gates);
        x.iter_mut().zip(&*gates).for_each(|(x, g)| *x *= g);
    }
}
