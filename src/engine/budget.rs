//! What a run will take: memory, disk and time, known before it begins.

use std::collections::BTreeMap;

use moepack_convert::spec::{Attention, Indexer};
use moepack_convert::{Model, ModelSpec, Role};
use moepack_format::{Error, Result};
use moepack_verify::tokens::Windows;

use crate::engine::evidence::HELD_OUT_MAX;
use crate::engine::sizes::Sizes;
use crate::engine::trunk::Learning;
use crate::memory::Limit;
use crate::output::say;
use crate::session::Session;
use crate::size::human;

/// Program and buffers of fixed size.
const PROGRAM_BYTES: u64 = 17 << 20;
/// Of these, what most codecs do without.
const PROGRAM_SPARE_BYTES: u64 = 2 << 20;
/// The same with a tokenizer.
const BASE_BYTES: u64 = 48 << 20;
/// Headers and catalog, for each tensor.
const BYTES_A_TENSOR: u64 = 400;
/// Routing and results of one token in one stream.
const BYTES_A_TOKEN: u64 = 100;
/// Logits that a thread holds at most, and the rows they are of: those of the head (`verify/src/forward/head.rs`).
const LOGITS_MAX: u64 = 4 << 20;
const LOGIT_ROWS: std::ops::RangeInclusive<u64> = 24..=96;
/// A long matrix is decoded in parts of this size, beside what it is packed into.
const PART_BYTES_MAX: u64 = 192 << 20;
/// Results that may wait for their turn, for each thread.
const AHEAD: u64 = 2;
/// What `--memory` is compared with lies above the estimate by one part in so many: allocators keep what was freed.
const MARGIN: u64 = 8;

/// What a run needs.
#[derive(Clone, Debug)]
pub struct Budget {
    bytes: u64,
    /// What of it is seldom taken.
    spare: u64,
}

/// The session with as many of its threads as stay within its memory, and what the run then takes.
///
/// # Errors
/// Not even one thread does (kind `Plan`, with the minimum).
pub fn within_memory(session: &Session, budget: impl Fn(usize) -> Budget) -> Result<(Session, Budget)> {
    let fits = |&threads: &usize| session.memory.is_none_or(|limit| budget(threads).bytes() <= limit.bytes);
    let threads = (1..=session.threads).rev().find(fits).unwrap_or(1);
    let budget = budget(threads);
    budget.check(session.memory)?;
    if threads < session.threads {
        let of = session.memory.map_or("", |limit| limit.of);
        say(&format!("note: {threads} of {} threads, to stay within the memory of {of}", session.threads));
    }
    Ok((Session { threads, ..session.clone() }, budget))
}

impl Budget {
    /// Of quantizing with these texts on the way; `hessians` says whether the solver has them made of the first.
    pub fn of(
        model: &Model,
        sizes: &Sizes,
        threads: usize,
        (calibration, hessians): (Option<&Windows>, bool),
        evaluation: Option<&Windows>,
    ) -> Budget {
        let (spec, threads) = (model.spec(), threads as u64);
        // A thread holds the released expert, one matrix in f32 and one being coded; finished ones wait coded.
        let coded = sizes.expert_coded_bytes_max * (1 + AHEAD);
        let mut layers = threads
            * (sizes.expert_source_bytes_max + expert_bytes(spec) / 3 + coded + sizes.coding_bytes_max);
        // So do the trunk's matrices before them.
        let mut coded_trunk = (threads + AHEAD) * sizes.trunk_coding_bytes_max;
        if let Some(text) = calibration {
            coded_trunk += learning_bytes(model, sizes.trunk_learning, threads, text);
        }
        let (mut streams, mut head) = (0, 0);
        // The evaluation is two streams; an expert's outputs of both wait for their turn, a third one is compared.
        for (windows, n_streams, n_compared) in [(calibration, 1, 0), (evaluation, 2, 1)] {
            let Some(windows) = windows else { continue };
            let n_tokens = windows.tokens.len() as u64;
            streams += stream_bytes(spec, n_streams * n_tokens);
            let held = (threads + 1) * n_streams + threads * n_compared;
            layers += output_bytes(spec, held * n_tokens);
        }
        if hessians && calibration.is_some() {
            layers += hessian_bytes(spec, threads);
        }
        if let Some(ctx) = [calibration, evaluation].into_iter().flatten().map(Windows::ctx).max() {
            let n_trunks = if evaluation.is_some() && coded_trunk > 0 { 2 } else { 1 };
            layers += n_trunks * layer_bytes_max(model)
                + threads * (3 * expert_bytes(spec) + window_bytes(spec, ctx));
            head = if evaluation.is_some() { head_bytes(model) + 2 * threads * logit_bytes(spec) } else { 0 };
        }
        let has_text = calibration.is_some() || evaluation.is_some();
        let base = if has_text { BASE_BYTES } else { PROGRAM_BYTES };
        let bytes = base + header_bytes(model) + streams + layers.max(head).max(coded_trunk);
        // Without a text experts are coded nearly as fast as they are written, and few wait.
        let few_wait = PROGRAM_SPARE_BYTES + sizes.expert_coded_bytes_max * (threads + 1);
        let spare = if has_text { 0 } else { few_wait };
        Budget { bytes, spare }
    }

    /// Of pushing a text through a model, or through two side by side.
    pub fn of_text(models: &[&Model], threads: usize, windows: &Windows) -> Budget {
        let (threads, n_tokens) = (threads as u64, windows.tokens.len() as u64);
        let (mut bytes, mut layers, mut head) = (BASE_BYTES, 0, 0);
        for (i, model) in models.iter().enumerate() {
            let spec = model.spec();
            // The second model's experts run on both streams.
            let outputs = output_bytes(spec, n_tokens * (1 + i as u64) * (threads + 1));
            let thread = 3 * expert_bytes(spec) + window_bytes(spec, windows.ctx());
            layers += outputs;
            bytes += header_bytes(model) + stream_bytes(spec, n_tokens);
            layers += layer_bytes_max(model) + threads * thread;
            head += head_bytes(model) + threads * logit_bytes(spec);
        }
        Budget { bytes: bytes + layers.max(head), spare: 0 }
    }

    /// Of holding `bytes` beside the program.
    pub fn of_bytes(bytes: u64) -> Budget {
        Budget { bytes: BASE_BYTES.saturating_add(bytes), spare: 0 }
    }

    /// Of comparing the experts of two models, one expert of each a thread.
    pub fn of_comparison(models: [&Model; 2], threads: usize) -> Budget {
        let bytes = |m: &Model| header_bytes(m) + threads as u64 * 2 * expert_bytes(m.spec());
        Budget::of_bytes(models.into_iter().map(bytes).sum())
    }

    /// Peak memory in bytes, with a margin: what is compared with `--memory`.
    pub fn bytes(&self) -> u64 {
        self.bytes + self.bytes / MARGIN
    }

    /// Peak memory that is likely, without a margin.
    pub fn likely_bytes(&self) -> u64 {
        self.bytes.saturating_sub(self.spare)
    }

    /// Refuses a run that cannot stay within `limit`.
    ///
    /// # Errors
    /// Kind `Plan`, with the minimum.
    pub fn check(&self, limit: Option<Limit>) -> Result<()> {
        match limit {
            Some(limit) if self.bytes() > limit.bytes => Err(Error::plan(format!(
                "{} of memory by {} is too little, this run takes about {}",
                human(limit.bytes),
                limit.of,
                human(self.bytes())
            ))
            .hint("use fewer --threads, or a shorter text if there is one, or allow more memory")),
            _ => Ok(()),
        }
    }
}

/// Headers and catalog; an expert has up to nine tensors.
fn header_bytes(model: &Model) -> u64 {
    (model.trunk_tensors().len() as u64 + 9 * model.spec().n_experts()) * BYTES_A_TENSOR
}

/// The largest expert in f32.
fn expert_bytes(spec: &ModelSpec) -> u64 {
    4 * spec.moe_layers().map(|(_, moe)| moe.weights_each(spec.hidden)).max().unwrap_or(0)
}

/// Residual streams of so many tokens in all, with the sums of experts that are added to them.
pub fn stream_bytes(spec: &ModelSpec, n_tokens: u64) -> u64 {
    let mixes = spec.hyper.map_or(0, |h| 2 * 4 * h.n_mixes());
    let shortcut = if spec.layers.iter().any(|l| l.shortcut.is_some()) { 4 * spec.hidden as u64 } else { 0 };
    n_tokens * (shortcut + 4 * (spec.width() + spec.hidden) as u64 + mixes as u64 + BYTES_A_TOKEN)
}

/// Outputs of one expert for the share of so many tokens that it gets.
fn output_bytes(spec: &ModelSpec, n_tokens: u64) -> u64 {
    let share =
        |(_, moe): (usize, &moepack_convert::spec::Moe)| moe.n_experts_used as f64 / moe.n_experts as f64;
    let share = spec.moe_layers().map(share).fold(0.0, f64::max);
    ((n_tokens * 4 * spec.hidden as u64) as f64 * share) as u64
}

/// A text on its way through the trunk before it is coded, and coding by what it tells.
fn learning_bytes(model: &Model, learning: Learning, threads: u64, text: &Windows) -> u64 {
    if learning.cols_max == 0 {
        return 0;
    }
    let (spec, n_tokens) = (model.spec(), learning.n_tokens(text) as u64);
    let thread = 3 * expert_bytes(spec) + window_bytes(spec, text.ctx());
    let running = layer_bytes_max(model)
        + threads * thread
        + output_bytes(spec, (threads + 1) * n_tokens)
        + learning.row_bytes_max;
    let coding = threads * learning.solving_bytes_max;
    stream_bytes(spec, n_tokens) + learning.hessian_bytes_max + running.max(coding)
}

/// Hessians of the largest layer: the pool's, and in each thread those of an expert, the factor of one of them, the
/// errors that are fed forward, and the inputs that are held out.
fn hessian_bytes(spec: &ModelSpec, threads: u64) -> u64 {
    let width = |moe: &moepack_convert::spec::Moe| moe.width(spec.hidden) as u64;
    let square = |n: u64| 4 * n * n;
    let held_out = |hidden: u64, inter: u64| 4 * HELD_OUT_MAX as u64 * (hidden + inter);
    let thread = |hidden: u64, inter: u64| {
        square(hidden)
            + square(inter)
            + square(hidden.max(inter))
            + 2 * 4 * hidden * inter
            + held_out(hidden, inter)
    };
    let largest = spec.moe_layers().map(|(_, moe)| thread(width(moe), moe.inter as u64)).max().unwrap_or(0);
    let pool = spec.moe_layers().map(|(_, moe)| width(moe)).max().unwrap_or(0);
    square(pool) + held_out(pool, 0) + threads * largest
}

/// Queries, keys, values and outputs of one window of `ctx` tokens.
fn window_bytes(spec: &ModelSpec, ctx: usize) -> u64 {
    let values = |attention: &Attention| match attention {
        Attention::Gqa(a) => {
            let gates = if a.gate.is_some() { 3 * a.n_heads * a.v_dim } else { 0 };
            (a.n_heads + a.n_kv_heads) * a.head_dim + (2 * a.n_heads + a.n_kv_heads) * a.v_dim + gates
        }
        Attention::Mla(a) => {
            a.n_heads * (2 * a.nope_dim + a.rope_dim + 3 * a.v_dim) + index_values(a.choice.indexer(), ctx)
        }
        Attention::Routed(a) => (3 * a.n_used + 2) * a.n_kv_heads * a.head_dim,
        Attention::StateSpace(a) => {
            let selected = a.n_heads + 2 * a.n_groups * a.state_dim;
            a.n_projected() + 2 * a.n_channels() + 2 * a.inner() + 2 * selected
        }
        Attention::ShortConv(_) => 5 * spec.hidden,
        Attention::Lightning(a) => 9 * a.inner(),
        Attention::None => 0,
        Attention::Carried => 0,
        Attention::Delta(a) => 2 * a.n_channels() + 4 * a.n_v_heads * a.v_dim + 2 * a.n_v_heads,
        Attention::Compressed(a) => {
            let indexer = a.compression.as_ref().and_then(|c| c.indexer.as_ref());
            let entries = a.compression.as_ref().map_or(0, |c| 2 * c.n_series() * a.head_dim);
            let latents = a.q_lora + a.n_groups * a.o_lora;
            (3 * a.n_heads + 6) * a.head_dim + latents + entries + index_values(indexer, ctx)
        }
    };
    let values = spec.layers.iter().map(|l| values(&l.attention)).max().unwrap_or(0);
    4 * ctx as u64 * (2 * spec.hidden + values) as u64
}

/// Queries of an indexer and the keys it chose, for each token of a window.
fn index_values(indexer: Option<&Indexer>, ctx: usize) -> usize {
    indexer.map_or(0, |i| i.n_heads * i.head_dim + i.n_used.min(ctx))
}

/// The trunk of the largest layer, packed in f32, and the largest of its matrices as it comes.
fn layer_bytes_max(model: &Model) -> u64 {
    let mut layers = BTreeMap::<usize, (u64, u64)>::new();
    let used = |t: &&moepack_convert::TrunkTensor| !t.is_scale && t.role != Role::Carried;
    for tensor in model.trunk_tensors().iter().filter(used) {
        let Some(layer) = tensor.layer else { continue };
        let bytes = 4 * tensor.decoded.iter().product::<u64>();
        let (sum, largest) = layers.entry(layer).or_default();
        (*sum, *largest) = (*sum + bytes, bytes.max(*largest));
    }
    layers.into_values().map(|(sum, largest)| sum + largest).max().unwrap_or(0)
}

/// Logits that one thread holds.
fn logit_bytes(spec: &ModelSpec) -> u64 {
    let vocab = spec.vocab.max(1) as u64;
    4 * vocab * (LOGITS_MAX / vocab).clamp(*LOGIT_ROWS.start(), *LOGIT_ROWS.end())
}

/// The head packed in f32, and the part of it that is being packed.
fn head_bytes(model: &Model) -> u64 {
    let bytes = 4 * model.spec().vocab as u64 * model.spec().hidden as u64;
    bytes + bytes.min(PART_BYTES_MAX)
}
