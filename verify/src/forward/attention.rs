//! Softmax attention of one window, head by head, and how windows are spread over threads.
//!
//! For a query t of head h, with the keys j that it may see (j <= t, and within the sliding window):
//! ```text
//!     p_j = exp(l_j − m) / (Σ_j exp(l_j − m) + exp(sink − m)),   l_j = scale · q_t · k_j
//!     out_t = Σ_j p_j v_j
//! ```
//! Queries are taken in blocks; the products of a block with all its keys and values are matrix products. Keys that a
//! query of the block may not see get the weight zero.

use moepack_convert::spec::{Attention as Kind, Indexer, Rope};
use moepack_format::Result;
use moepack_quant::gemm::{PackedWeights, Rows};
use moepack_quant::{Isa, math};
use rayon::prelude::*;

use super::compressed::Compressed;
use super::delta::Delta;
use super::gqa::Gqa;
use super::lightning::Lightning;
use super::mla::Mla;
use super::residual::Sublayer;
use super::rope::Table;
use super::routed_attention::RoutedAttention;
use super::short_conv::ShortConv;
use super::state_space::StateSpace;
use super::{Stream, Weights, no_forward, sized};
use crate::tokens::Windows;

/// Queries of a block: a multiple of every tile height.
pub(super) const BLOCK: usize = 48;
/// From this many tokens on, the heads of a window are spread over threads.
pub(super) const PARALLEL_TOKENS: usize = 1024;

/// The weights of a layer's attention.
pub(super) enum Attention {
    Gqa(Box<Gqa>),
    Mla(Box<Mla>),
    Compressed(Box<Compressed>),
    Delta(Box<Delta>),
    Routed(Box<RoutedAttention>),
    StateSpace(Box<StateSpace>),
    ShortConv(Box<ShortConv>),
    Lightning(Box<Lightning>),
    /// The layer is an MLP alone.
    None,
}

/// Rotary tables of a layer.
pub(super) struct Tables {
    pub(super) main: Table,
    /// In texts beyond this many positions.
    long: Option<(usize, Table)>,
    /// Of the indexer.
    pub(super) index: Option<Table>,
}

impl Tables {
    fn new(rope: &Rope, indexer: Option<&Indexer>, positions: usize) -> Tables {
        let long = rope.long.filter(|long| positions > long.positions);
        Tables {
            main: Table::new(rope, rope.amplitude, positions),
            long: long.map(|long| (long.positions, Table::new(rope, long.amplitude, positions))),
            index: indexer.map(|i| Table::new(&i.rope, i.rope.amplitude, positions)),
        }
    }

    /// The table for a window of this length.
    pub(super) fn of_window(&self, len: usize) -> &Table {
        self.long.as_ref().filter(|(positions, _)| len > *positions).map_or(&self.main, |(_, table)| table)
    }
}

impl Attention {
    pub(super) fn load(weights: &dyn Weights, layer: usize, kind: &Kind) -> Result<Attention> {
        Ok(match kind {
            Kind::Gqa(spec) => Attention::Gqa(Box::new(Gqa::load(weights, layer, spec)?)),
            Kind::Mla(spec) => Attention::Mla(Box::new(Mla::load(weights, layer, spec)?)),
            Kind::Delta(spec) => Attention::Delta(Box::new(Delta::load(weights, layer, spec)?)),
            Kind::Carried => return Err(no_forward(weights.spec())),
            Kind::Compressed(spec) => {
                Attention::Compressed(Box::new(Compressed::load(weights, layer, spec)?))
            }
            Kind::Routed(spec) => Attention::Routed(Box::new(RoutedAttention::load(weights, layer, spec)?)),
            Kind::StateSpace(spec) => {
                Attention::StateSpace(Box::new(StateSpace::load(weights, layer, spec)?))
            }
            Kind::ShortConv(spec) => Attention::ShortConv(Box::new(ShortConv::load(weights, layer, spec)?)),
            Kind::Lightning(spec) => Attention::Lightning(Box::new(Lightning::load(weights, layer, spec)?)),
            Kind::None => Attention::None,
        })
    }

    fn tables(&self, positions: usize) -> Tables {
        match self {
            Attention::Gqa(gqa) => Tables::new(gqa.rope(), None, positions),
            Attention::Routed(routed) => Tables::new(routed.rope(), None, positions),
            Attention::Mla(mla) => Tables::new(mla.rope(), mla.indexer(), positions),
            Attention::Compressed(attention) => Tables::new(attention.rope(), None, positions),
            Attention::Delta(_)
            | Attention::StateSpace(_)
            | Attention::ShortConv(_)
            | Attention::Lightning(_)
            | Attention::None => Tables::new(&Rope::NONE, None, 0),
        }
    }

    /// Attention of one window, `[len, hidden]` to the same.
    /// `chosen` are the keys that the last indexer chose, for layers that see the same.
    fn window<'s>(
        &self,
        isa: Isa,
        tables: &Tables,
        x: &[f32],
        chosen: &mut Chosen,
        scratch: &'s mut Scratch,
    ) -> &'s mut [f32] {
        match self {
            Attention::Gqa(gqa) => gqa.window(isa, tables, x, scratch),
            Attention::Mla(mla) => mla.window(isa, tables, x, chosen, scratch),
            Attention::Compressed(attention) => attention.window(isa, &tables.main, x, scratch),
            Attention::Delta(delta) => delta.window(isa, x, scratch),
            Attention::Routed(routed) => routed.window(isa, tables, x, scratch),
            Attention::StateSpace(space) => space.window(isa, x, scratch),
            Attention::ShortConv(conv) => conv.window(isa, x, scratch),
            Attention::Lightning(lightning) => lightning.window(isa, x, scratch),
            Attention::None => {
                let out = sized(&mut scratch.out, x.len());
                out.fill(0.0);
                out
            }
        }
    }

    /// The stream after attention, each window on its own from position 0.
    pub(super) fn run_in_place(&self, isa: Isa, around: &Sublayer, windows: &Windows, stream: &mut Stream) {
        if matches!(self, Attention::None) {
            return;
        }
        let tables = self.tables(windows.ctx());
        stream.chosen.resize_with(windows.n_windows(), Chosen::default);
        let parts = parts(windows, around.width(), &mut stream.hidden);
        let parts: Vec<_> = parts.into_iter().zip(&mut stream.chosen).collect();
        parts.into_par_iter().for_each_init(
            <(Input, Scratch)>::default,
            |(input, scratch), (rows, chosen)| {
                input.read(isa, around, rows);
                let out = self.window(isa, &tables, &input.x, chosen, scratch);
                around.output(isa, out);
                around.joint(&input.notes).join(isa, rows, out, around.hidden(), 0);
            },
        );
    }

    /// What attention gives for a stream of one row a token, `[tokens, hidden]`.
    pub(super) fn run(&self, isa: Isa, around: &Sublayer, windows: &Windows, hidden: &[f32]) -> Vec<f32> {
        let tables = self.tables(windows.ctx());
        let mut target = vec![0.0; hidden.len()]; // [tokens, hidden]
        let parts = parts(windows, around.width(), &mut target);
        let rows = windows.ranges().map(|r| &hidden[r.start * around.width()..r.end * around.width()]);
        let parts: Vec<_> = parts.into_iter().zip(rows).collect();
        parts.into_par_iter().for_each_init(
            <(Input, Scratch)>::default,
            |(input, scratch), (target, rows)| {
                input.read(isa, around, rows);
                let out = self.window(isa, &tables, &input.x, &mut Chosen::default(), scratch);
                around.output(isa, out);
                target.copy_from_slice(out);
            },
        );
        target
    }
}

/// The rows of each window.
fn parts<'a>(windows: &Windows, width: usize, mut rest: &'a mut [f32]) -> Vec<&'a mut [f32]> {
    let mut parts = Vec::with_capacity(windows.n_windows());
    for &len in &windows.lens {
        let (window, after) = rest.split_at_mut(len * width);
        parts.push(window);
        rest = after;
    }
    parts
}

/// What a window's rows give to attention.
#[derive(Default)]
struct Input {
    /// `[len, n_notes]`
    notes: Vec<f32>,
    /// `[len, hidden]`
    x: Vec<f32>,
}

impl Input {
    fn read(&mut self, isa: Isa, around: &Sublayer, rows: &[f32]) {
        let len = rows.len() / around.width();
        self.notes.resize(len * around.n_notes(), 0.0);
        self.x.resize(len * around.hidden(), 0.0);
        around.notes(isa, rows, &mut self.notes);
        around.inputs(isa, rows, &self.notes, &mut self.x);
    }
}

/// Buffers of one thread, kept from window to window.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    pub(super) gates: Vec<f32>,
    pub(super) latent: Vec<f32>,
    pub(super) heads: Vec<f32>,
    pub(super) mixed: Vec<f32>,
    pub(super) out: Vec<f32>,
}

/// Everything about the heads but their numbers.
pub(super) struct Heads<'a> {
    pub(super) n_heads: usize,
    pub(super) n_kv_heads: usize,
    /// Dimensions of queries and keys.
    pub(super) k_dim: usize,
    /// Dimensions of values.
    pub(super) v_dim: usize,
    /// Keys `t - window + 1 ..= t` only.
    pub(super) window: Option<usize>,
    /// Keys of the query's own chunk of this length only.
    pub(super) chunk: Option<usize>,
    /// Which keys each query sees, where that is not all of the others: for all heads, or each for equally many
    /// consecutive heads.
    pub(super) chosen: Option<&'a [Chosen]>,
    /// `[n_heads]`
    pub(super) sinks: Option<&'a [f32]>,
}

impl Heads<'_> {
    /// Mixes the values of one window.
    ///
    /// `q` is `[len, n_heads, k_dim]`, already scaled; `out` is `[len, n_heads, v_dim]`, and `heads` a buffer.
    /// `pack` packs the keys `[len, k_dim]` and the transposed values `[v_dim, len]` of a key-value head.
    pub(super) fn mix(
        &self,
        isa: Isa,
        q: &[f32],
        pack: impl Fn(usize, &mut PackedWeights, &mut PackedWeights) + Sync,
        heads: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let (len, group) = (q.len() / (self.n_heads * self.k_dim), self.n_heads / self.n_kv_heads);
        let head_size = len * self.v_dim;
        let heads = sized(heads, self.n_heads * head_size); // [n_heads, len, v_dim]
        let of_kv_head = |work: &mut Work, (kv, out): (usize, &mut [f32])| {
            pack(kv, &mut work.keys, &mut work.values);
            for (g, out) in out.chunks_exact_mut(head_size).enumerate() {
                self.head(isa, kv * group + g, q, work, out);
            }
        };
        if len < PARALLEL_TOKENS {
            let mut work = Work::default();
            heads
                .chunks_exact_mut(group * head_size)
                .enumerate()
                .for_each(|part| of_kv_head(&mut work, part));
        } else {
            let parts = heads.par_chunks_exact_mut(group * head_size).enumerate();
            parts.for_each_init(Work::default, of_kv_head);
        }
        // [n_heads, len, v_dim] to [len, n_heads, v_dim]
        for (t, row) in out.chunks_exact_mut(self.n_heads * self.v_dim).enumerate() {
            for (h, to) in row.chunks_exact_mut(self.v_dim).enumerate() {
                to.copy_from_slice(&heads[h * head_size + t * self.v_dim..][..self.v_dim]);
            }
        }
    }

    /// One query head: `out` is `[len, v_dim]`.
    fn head(&self, isa: Isa, head: usize, q: &[f32], work: &mut Work, out: &mut [f32]) {
        let (len, stride) = (work.keys.n(), self.n_heads * self.k_dim);
        let sink = self.sinks.map(|s| s[head]);
        let chosen = self.chosen.and_then(|c| c.get(head * c.len() / self.n_heads));
        for from in (0..len).step_by(BLOCK) {
            let to = len.min(from + BLOCK);
            // The earliest key that the block's first query sees, down to where a panel begins.
            let first = self.first_key(from) / 16 * 16;
            let n_keys = to - first;
            let p = sized(&mut work.scores, BLOCK * n_keys); // [queries, keys]
            let queries = Rows { data: &q[from * stride + head * self.k_dim..], stride };
            work.keys.matmul_part(isa, queries, to - from, first..to, 0..self.k_dim, p, n_keys);
            for (t, row) in (from..to).zip(p.chunks_exact_mut(n_keys)) {
                let seen = self.first_key(t) - first..t + 1 - first;
                row[..seen.start].fill(0.0);
                row[seen.end..].fill(0.0);
                match chosen {
                    None => math::softmax(isa, &mut row[seen], sink),
                    Some(chosen) => softmax_of(isa, &mut row[seen], first, chosen.of(t), sink),
                }
            }
            let (weights, out) = (Rows { data: p, stride: n_keys }, &mut out[from * self.v_dim..]);
            work.values.matmul_part(isa, weights, to - from, 0..self.v_dim, first..to, out, self.v_dim);
        }
    }

    fn first_key(&self, t: usize) -> usize {
        let window = self.window.map_or(0, |w| (t + 1).saturating_sub(w));
        self.chunk.map_or(window, |c| window.max(t / c * c))
    }
}

/// The keys that each query of a window sees, ascending.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Chosen {
    keys: Vec<u32>,
    /// Where those of each query begin, and the end. `[len + 1]`
    starts: Vec<usize>,
}

impl Chosen {
    /// Nothing chosen yet.
    pub(super) fn clear(&mut self) {
        self.keys.clear();
        self.starts.clear();
        self.starts.push(0);
    }

    /// Adds the next query: the keys of the `n` largest scores, the lower index first where they are equal.
    pub(super) fn push_best(&mut self, scores: &[f32], n: usize) {
        let from = self.keys.len();
        self.keys.extend(0..scores.len() as u32);
        if scores.len() > n {
            let keys = &mut self.keys[from..];
            keys.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
            keys[..n].sort_unstable();
            self.keys.truncate(from + n);
        }
        self.starts.push(self.keys.len());
    }

    /// Adds the next query: these keys, ascending.
    pub(super) fn push(&mut self, keys: impl Iterator<Item = u32>) {
        self.keys.extend(keys);
        self.starts.push(self.keys.len());
    }

    /// Queries that have chosen.
    pub(super) fn n_queries(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    /// The keys of all queries, and where those of each begin.
    pub(super) fn parts(&self) -> (&[u32], &[usize]) {
        (&self.keys, &self.starts)
    }

    /// From these; `None` if they do not fit each other.
    pub(super) fn of_parts(keys: Vec<u32>, starts: Vec<usize>) -> Option<Chosen> {
        let fit = match (starts.first(), starts.last()) {
            (None, None) => keys.is_empty(),
            (first, last) => first == Some(&0) && last == Some(&keys.len()) && starts.is_sorted(),
        };
        fit.then_some(Chosen { keys, starts })
    }

    /// Of one query.
    pub(super) fn of(&self, query: usize) -> &[u32] {
        &self.keys[self.starts[query]..self.starts[query + 1]]
    }
}

/// Softmax over some entries of a row that begins with key `first`; the others become 0.
pub(super) fn softmax_of(isa: Isa, row: &mut [f32], first: usize, keys: &[u32], sink: Option<f32>) {
    let places = || keys.iter().map(|&k| k as usize).filter(|&k| k >= first && k < first + row.len());
    let places: Vec<usize> = places().map(|k| k - first).collect();
    let mut seen: Vec<f32> = places.iter().map(|&at| row[at]).collect();
    math::softmax(isa, &mut seen, sink);
    row.fill(0.0);
    places.into_iter().zip(seen).for_each(|(at, p)| row[at] = p);
}

/// Buffers of one thread inside a window.
#[derive(Default)]
struct Work {
    keys: PackedWeights,
    values: PackedWeights,
    scores: Vec<f32>,
}
