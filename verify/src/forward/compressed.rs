//! DeepSeek V4's attention (paper, section 2.3): one head of keys that are also the values.
//!
//! ```text
//! q = rotate(rms(W_qb norm(W_qa x))),  k = v = rotate(norm(W_kv x))
//! a query sees the last `window` keys, and compressed entries of windows that ended before it: all, or those that the
//! indexer chooses; softmax over both together and a sink
//! o_h = rotate back(Σ p v)                     because the values turned with their positions
//! out = W_ob [W_oa,g o_g for each group g of heads]
//! ```

use moepack_convert::spec::{Compressed as Spec, Role, Rope};
use moepack_format::{Error, Result};
use moepack_quant::gemm::{PackedWeights, Rows};
use moepack_quant::{Isa, math};
use rayon::prelude::*;

use super::attention::{BLOCK, Chosen, PARALLEL_TOKENS, Scratch};
use super::compressor::Compressor;
use super::indexer::Indexer;
use super::linear::Linear;
use super::norm::Norm;
use super::rope::Table;
use super::{Weights, of_shape, sized, tensor};

/// The weights of one layer.
pub(super) struct Compressed {
    spec: Spec,
    /// `[q_lora, hidden]`
    q_a: Linear,
    q_norm: Norm,
    /// `[n_heads · head_dim, q_lora]`
    q_b: Linear,
    /// Of each head of queries, without weights.
    head_norm: Norm,
    /// `[head_dim, hidden]`
    kv: Linear,
    kv_norm: Norm,
    /// `[n_heads]`
    sinks: Vec<f32>,
    /// One a group: `[o_lora, n_heads · head_dim / n_groups]`
    o_a: Vec<PackedWeights>,
    /// `[hidden, n_groups · o_lora]`
    o_b: Linear,
    compressor: Option<Compressor>,
    chooser: Option<Chooser>,
}

/// The indexer and what makes its keys.
struct Chooser {
    indexer: Indexer,
    compressor: Compressor,
}

impl Compressed {
    pub(super) fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Compressed> {
        let (l, hidden, d) = (Some(layer), weights.spec().hidden, spec.head_dim);
        let linear = |role, n, k| Linear::load(weights, l, (role, None), n, k);
        let norm = |role, width| Norm::load_with(weights, l, role, width, None);
        let compressor = spec.compression.as_ref().map(|c| {
            let roles = [Role::CompressKv, Role::CompressGate, Role::CompressBias, Role::CompressNorm];
            Compressor::load(weights, layer, roles, c, d)
        });
        let chooser = spec.compression.as_ref().and_then(|c| c.indexer.as_ref().map(|i| (c, i)));
        let chooser = chooser.map(|(c, i)| -> Result<Chooser> {
            use Role::{IndexCompressBias, IndexCompressGate, IndexCompressKv, IndexCompressNorm};
            let roles = [IndexCompressKv, IndexCompressGate, IndexCompressBias, IndexCompressNorm];
            Ok(Chooser {
                indexer: Indexer::load(weights, layer, i, spec.q_lora)?,
                compressor: Compressor::load(weights, layer, roles, c, i.head_dim)?,
            })
        });
        Ok(Compressed {
            q_a: linear(Role::QA, spec.q_lora, hidden)?,
            q_norm: norm(Role::QANorm, spec.q_lora)?,
            q_b: linear(Role::QB, spec.n_heads * d, spec.q_lora)?,
            head_norm: Norm::unweighted(d, weights.spec().norm.eps()),
            kv: linear(Role::Kv, d, hidden)?,
            kv_norm: norm(Role::KvNorm, d)?,
            sinks: tensor(weights, l, Role::Sinks, &[spec.n_heads])?,
            o_a: output_groups(weights, layer, spec)?,
            o_b: linear(Role::OB, hidden, spec.n_groups * spec.o_lora)?,
            compressor: compressor.transpose()?,
            chooser: chooser.transpose()?,
            spec: spec.clone(),
        })
    }

    pub(super) fn rope(&self) -> &Rope {
        &self.spec.rope
    }

    /// Attention of one window, `[len, hidden]` to the same.
    pub(super) fn window<'s>(
        &self,
        isa: Isa,
        table: &Table,
        x: &[f32],
        scratch: &'s mut Scratch,
    ) -> &'s mut [f32] {
        let (spec, d) = (&self.spec, self.spec.head_dim);
        let len = x.len() / self.o_b.n();
        let Scratch { q, k, latent, heads, mixed, out, .. } = scratch;
        let latent = sized(latent, len * spec.q_lora); // [len, q_lora]
        self.q_a.apply(isa, x, latent);
        self.q_norm.apply_in_place(isa, latent);
        let q = sized(q, len * spec.n_heads * d); // [len, n_heads, head_dim]
        self.queries(isa, table, latent, q);
        let kv = sized(k, len * d); // [len, head_dim]
        self.kv.apply(isa, x, kv);
        self.kv_norm.apply_in_place(isa, kv);
        kv.chunks_exact_mut(d).enumerate().for_each(|(t, row)| table.rotate_last(t, row, d));
        let entries = self.compressor.as_ref().map(|c| c.entries(isa, table, x)); // [n_entries, head_dim]
        let chosen = self.chooser.as_ref().map(|c| self.choose(isa, table, c, x, latent));
        let keys = Keys::new(kv, entries.as_deref().unwrap_or_default(), d);
        let mixed = sized(mixed, len * spec.n_heads * d); // [len, n_heads, head_dim]
        self.mix(isa, q, &keys, chosen.as_ref(), heads, mixed);
        mixed
            .chunks_exact_mut(spec.n_heads * d)
            .enumerate()
            .for_each(|(t, o)| table.rotate_last_back(t, o, d));
        let out = sized(out, x.len()); // [len, hidden]
        self.output(isa, mixed, out);
        out
    }

    /// Queries of all heads, normed, rotated and scaled.
    fn queries(&self, isa: Isa, table: &Table, latent: &[f32], q: &mut [f32]) {
        let d = self.spec.head_dim;
        self.q_b.apply(isa, latent, q);
        self.head_norm.apply_in_place(isa, q);
        for (t, row) in q.chunks_exact_mut(self.spec.n_heads * d).enumerate() {
            table.rotate_last(t, row, d);
            row.iter_mut().for_each(|v| *v *= self.spec.scale);
        }
    }

    /// The entries that each query sees.
    fn choose(&self, isa: Isa, table: &Table, chooser: &Chooser, x: &[f32], latent: &[f32]) -> Chosen {
        let len = x.len() / self.o_b.n();
        let keys = chooser.compressor.entries(isa, table, x); // [n_entries, index_dim]
        let n = chooser.indexer.queries.n();
        let mut q = vec![0.0; len * n]; // [len, index_heads, index_dim]
        chooser.indexer.queries.apply(isa, latent, &mut q);
        let d = chooser.indexer.head_dim();
        q.chunks_exact_mut(n).enumerate().for_each(|(t, row)| table.rotate_last(t, row, d));
        let mut chosen = Chosen::default();
        chooser.indexer.choose(isa, x, &q, &keys, |t| self.n_ended(t), &mut chosen);
        chosen
    }

    /// Entries whose windows ended before query `t` or with it.
    fn n_ended(&self, t: usize) -> usize {
        self.spec.compression.as_ref().map_or(0, |c| (t + 1) / c.ratio)
    }

    /// Mixes the keys of one window: `q` and `out` are `[len, n_heads, head_dim]`, `heads` is a buffer.
    fn mix(
        &self,
        isa: Isa,
        q: &[f32],
        keys: &Keys,
        chosen: Option<&Chosen>,
        heads: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let (d, n_heads) = (self.spec.head_dim, self.spec.n_heads);
        let (len, head_size) = (keys.raw.n(), keys.raw.n() * d);
        let heads = sized(heads, n_heads * head_size); // [n_heads, len, head_dim]
        let one =
            |work: &mut Work, (h, out): (usize, &mut [f32])| self.head(isa, h, q, keys, chosen, work, out);
        if len < PARALLEL_TOKENS {
            let mut work = Work::default();
            heads.chunks_exact_mut(head_size).enumerate().for_each(|part| one(&mut work, part));
        } else {
            heads.par_chunks_exact_mut(head_size).enumerate().for_each_init(Work::default, one);
        }
        for (t, row) in out.chunks_exact_mut(n_heads * d).enumerate() {
            for (h, to) in row.chunks_exact_mut(d).enumerate() {
                to.copy_from_slice(&heads[h * head_size + t * d..][..d]);
            }
        }
    }

    /// One query head: `out` is `[len, head_dim]`.
    #[allow(clippy::too_many_arguments, reason = "a kernel's inputs and buffers, each of its own shape")]
    fn head(
        &self,
        isa: Isa,
        head: usize,
        q: &[f32],
        keys: &Keys,
        chosen: Option<&Chosen>,
        work: &mut Work,
        out: &mut [f32],
    ) {
        let (d, len) = (self.spec.head_dim, keys.raw.n());
        let stride = self.spec.n_heads * d;
        for from in (0..len).step_by(BLOCK) {
            let to = len.min(from + BLOCK);
            // The earliest key that the block's first query sees, down to where a panel begins.
            let first = self.first_key(from) / 16 * 16;
            let (n_raw, n_entries) = (to - first, self.n_ended(to - 1).min(keys.entries.n()));
            let raw = sized(&mut work.raw, BLOCK * n_raw); // [queries, keys]
            let entries = sized(&mut work.entries, BLOCK * n_entries); // [queries, entries]
            let queries = Rows { data: &q[from * stride + head * d..], stride };
            keys.raw.matmul_part(isa, queries, to - from, first..to, 0..d, raw, n_raw);
            if n_entries > 0 {
                keys.entries.matmul_part(isa, queries, to - from, 0..n_entries, 0..d, entries, n_entries);
            }
            for t in from..to {
                let raw = &mut raw[(t - from) * n_raw..][..n_raw];
                let entries = &mut entries[(t - from) * n_entries..][..n_entries];
                let seen = self.first_key(t) - first..t + 1 - first;
                self.weigh(isa, t, (raw, seen), entries, chosen, self.sinks[head], &mut work.seen);
            }
            let out = &mut out[from * d..to * d];
            let weights = Rows { data: raw, stride: n_raw };
            keys.raw_values.matmul_part(isa, weights, to - from, 0..d, first..to, out, d);
            if n_entries > 0 {
                let part = sized(&mut work.out, out.len()); // [queries, head_dim]
                let weights = Rows { data: entries, stride: n_entries };
                keys.entry_values.matmul_part(isa, weights, to - from, 0..d, 0..n_entries, part, d);
                math::add(isa, out, part);
            }
        }
    }

    /// Softmax over the entries and keys that query `t` sees; the others become 0.
    #[allow(clippy::too_many_arguments, reason = "a kernel's inputs and buffers, each of its own shape")]
    fn weigh(
        &self,
        isa: Isa,
        t: usize,
        (raw, range): (&mut [f32], std::ops::Range<usize>),
        entries: &mut [f32],
        chosen: Option<&Chosen>,
        sink: f32,
        seen: &mut Vec<f32>,
    ) {
        seen.clear();
        match chosen {
            None => seen.extend_from_slice(&entries[..self.n_ended(t)]),
            Some(chosen) => seen.extend(chosen.of(t).iter().map(|&e| entries[e as usize])),
        }
        let n = seen.len();
        seen.extend_from_slice(&raw[range.clone()]);
        math::softmax(isa, seen, Some(sink));
        entries.fill(0.0);
        match chosen {
            None => entries[..n].copy_from_slice(&seen[..n]),
            Some(chosen) => chosen.of(t).iter().zip(&*seen).for_each(|(&e, &p)| entries[e as usize] = p),
        }
        raw[..range.start].fill(0.0);
        raw[range.end..].fill(0.0);
        raw[range].copy_from_slice(&seen[n..]);
    }

    fn first_key(&self, t: usize) -> usize {
        (t + 1).saturating_sub(self.spec.window)
    }

    /// Output projection of `[len, n_heads, head_dim]`, by groups of heads.
    fn output(&self, isa: Isa, mixed: &[f32], out: &mut [f32]) {
        let (stride, rank) = (self.spec.n_heads * self.spec.head_dim, self.o_b.k());
        let len = mixed.len() / stride;
        let mut latent = vec![0.0; len * rank]; // [len, n_groups, o_lora]
        for (g, group) in self.o_a.iter().enumerate() {
            let rows = Rows { data: &mixed[g * group.k()..], stride };
            group.matmul_part(isa, rows, len, 0..group.n(), 0..group.k(), &mut latent[g * group.n()..], rank);
        }
        self.o_b.apply(isa, &latent, out);
    }
}

/// The output projection of each group.
fn output_groups(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Vec<PackedWeights>> {
    let (n, k) = (spec.o_lora, spec.n_heads * spec.head_dim / spec.n_groups.max(1));
    if spec.n_groups == 0 {
        return Err(Error::bad_data("an output projection without groups"));
    }
    let group = |g: usize| {
        let rows = weights.trunk_rows(Some(layer), Role::OA, g * n..(g + 1) * n)?; // [o_lora, k]
        Ok(PackedWeights::pack(&of_shape(rows, Some(layer), Role::OA, &[n, k])?, n, k))
    };
    (0..spec.n_groups).map(group).collect()
}

/// Keys of a window, and the same as values.
struct Keys {
    raw: PackedWeights,
    raw_values: PackedWeights,
    entries: PackedWeights,
    entry_values: PackedWeights,
}

impl Keys {
    /// From `[len, d]` and `[n_entries, d]`.
    fn new(raw: &[f32], entries: &[f32], d: usize) -> Keys {
        let keys = |rows: &[f32]| PackedWeights::pack(rows, rows.len() / d, d);
        let values = |rows: &[f32]| {
            let mut packed = PackedWeights::default();
            packed.repack_transposed(Rows { data: rows, stride: d }, rows.len() / d, d);
            packed
        };
        Keys {
            raw: keys(raw),
            raw_values: values(raw),
            entries: keys(entries),
            entry_values: values(entries),
        }
    }
}

/// Buffers of one thread inside a window.
#[derive(Default)]
struct Work {
    raw: Vec<f32>,
    entries: Vec<f32>,
    seen: Vec<f32>,
    out: Vec<f32>,
}
