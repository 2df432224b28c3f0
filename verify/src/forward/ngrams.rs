//! Embeddings of hashed n-grams that join a layer's streams (Qwen4).
//!
//! ```text
//! e_t = rows (⊕_{s<n} m_s · id_{t−s}) mod size_h + offset_h, for each head h of each order n
//! key_j = norm(W_k e)_j,  query_j = norm(X_j),  g_j = key_j · query_j / √hidden
//! v_j = sigmoid(√|g_j| sign g_j) W_v e;  X_j += v_j + silu(convolution of norm(v))_j
//! ```
//!
//! A token before the text, or before the last end of one, is that end.

use moepack_convert::spec::{Ngrams as Spec, Role};
use moepack_format::{Error, Result};
use moepack_quant::{Isa, math};
use rayon::prelude::*;

use super::convolution::Convolution;
use super::gated::GroupNorm;
use super::linear::Linear;
use super::{Weights, silu_all, tensor};
use crate::tokens::Windows;

/// Values of a table that is held in memory: 1 GiB.
const TABLE_VALUES_MAX: u64 = 1 << 28;
/// What the root of a gate's size is at least taken of, in the reference.
const GATE_MIN: f32 = 1e-6;

/// The weights of one layer.
pub(super) struct Ngrams {
    spec: Spec,
    hidden: usize,
    /// `[n_rows, dim]`
    table: Vec<f32>,
    /// `[n_streams · hidden, width]`
    key: Linear,
    /// `[hidden, width]`
    value: Linear,
    key_norm: GroupNorm,
    query_norm: GroupNorm,
    conv_norm: GroupNorm,
    /// Of tokens as far apart as the longest n-gram is long.
    conv: Convolution,
}

impl Ngrams {
    pub(super) fn load(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Ngrams> {
        let (l, hidden, width) = (Some(layer), weights.spec().hidden, weights.spec().width());
        let norm = |role| GroupNorm::load(weights, l, role);
        check_tables(weights, layer, spec)?;
        let kernels = tensor(weights, l, Role::NgramConv, &[width, 1, spec.kernel])?;
        Ok(Ngrams {
            spec: spec.clone(),
            hidden,
            table: table(weights, layer, spec)?,
            key: Linear::load(weights, l, (Role::NgramKey, None), width, spec.width())?,
            value: Linear::load(weights, l, (Role::NgramValue, None), hidden, spec.width())?,
            key_norm: norm(Role::NgramKeyNorm)?,
            query_norm: norm(Role::NgramQueryNorm)?,
            conv_norm: norm(Role::NgramConvNorm)?,
            conv: Convolution::new(&kernels, width, spec.factors.len()),
        })
    }

    /// Adds the embeddings to a stream `[tokens, n_streams · hidden]`, each window on its own.
    pub(super) fn add(&self, isa: Isa, windows: &Windows, mut rows: &mut [f32]) {
        let mut parts = Vec::with_capacity(windows.n_windows());
        for range in windows.ranges() {
            let (part, rest) = rows.split_at_mut(range.len() * self.key.n());
            parts.push((&windows.tokens[range], part));
            rows = rest;
        }
        parts.into_par_iter().for_each(|(tokens, rows)| self.window(isa, tokens, rows));
    }

    fn window(&self, isa: Isa, tokens: &[u32], rows: &mut [f32]) {
        let (len, width, hidden) = (tokens.len(), self.key.n(), self.hidden);
        let e = self.embeddings(tokens); // [len, width of an embedding]
        let (mut keys, mut values) = (vec![0.0; len * width], vec![0.0; len * hidden]);
        self.key.apply(isa, &e, &mut keys);
        self.value.apply(isa, &e, &mut values);
        self.key_norm.apply_in_place(isa, &mut keys);
        let mut queries = rows.to_vec(); // [len, n_streams · hidden]
        self.query_norm.apply_in_place(isa, &mut queries);
        let root = (1.0 / (hidden as f64).sqrt()) as f32;
        let mut gates: Vec<f32> = keys
            .chunks_exact(hidden)
            .zip(queries.chunks_exact(hidden))
            .map(|(k, q)| gate(k.iter().zip(q).fold(0.0, |sum: f32, (&k, &q)| k.mul_add(q, sum)) * root))
            .collect(); // [len, n_streams]
        math::sigmoid_all(isa, &mut gates);
        let n_streams = width / hidden;
        let mut gated = vec![0.0; len * width]; // [len, n_streams · hidden]
        for (i, (out, g)) in gated.chunks_exact_mut(hidden).zip(&gates).enumerate() {
            math::add_scaled(isa, out, *g, &values[i / n_streams * hidden..][..hidden]);
        }
        math::add(isa, rows, &gated);
        self.conv_norm.apply_in_place(isa, &mut gated);
        let mut convolved = vec![0.0; gated.len()]; // [len, n_streams · hidden]
        self.conv.apply(&gated, &mut convolved);
        silu_all(isa, &mut convolved);
        math::add(isa, rows, &convolved);
    }

    /// The rows of the table that each token's n-grams hash to.
    fn embeddings(&self, tokens: &[u32]) -> Vec<f32> {
        let Spec { factors, sizes, dim, .. } = &self.spec;
        let mut e = Vec::with_capacity(tokens.len() * self.spec.width());
        for t in 0..tokens.len() {
            let (mut hash, mut offset) = (0, 0);
            let mut sizes = sizes.chunks(self.spec.heads_of_order());
            for (shift, factor) in factors.iter().enumerate() {
                hash ^= factor.wrapping_mul(u64::from(before(tokens, t, shift, self.spec.end)));
                // One token alone is no n-gram.
                let of_order = if shift == 0 { &[][..] } else { sizes.next().unwrap_or_default() };
                for size in of_order {
                    let row = (offset + hash % size) as usize;
                    e.extend_from_slice(&self.table[row * dim..][..*dim]);
                    offset += size;
                }
            }
        }
        e
    }
}

/// The token `shift` before `t`, or `end` where a text ends between them.
fn before(tokens: &[u32], t: usize, shift: usize, end: u32) -> u32 {
    match t.checked_sub(shift) {
        Some(from) if !tokens[from..t].contains(&end) => tokens[from],
        _ => end,
    }
}

/// The root of a number's size, with its sign.
fn gate(g: f32) -> f32 {
    let root = g.abs().max(GATE_MIN).sqrt();
    if g == 0.0 { 0.0 } else { root.copysign(g) }
}

/// All parts of the table.
fn table(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<Vec<f32>> {
    let n_values = spec.n_rows.saturating_mul(spec.dim as u64);
    if n_values > TABLE_VALUES_MAX {
        let what = format!(
            "the table of n-grams of layer {layer} has {n_values} numbers, which a forward pass cannot hold"
        );
        return Err(
            Error::bad_data(what).hint("quantize without calibration, and verify weights instead of logits")
        );
    }
    let mut table = Vec::with_capacity(n_values as usize);
    for part in 0..spec.n_parts {
        table.extend(weights.trunk(Some(layer), Role::NgramPart(0).of_part(Some(part)))?.data);
    }
    if table.len() as u64 == n_values {
        return Ok(table);
    }
    let what =
        format!("{} numbers in the table of n-grams of layer {layer}, expected {n_values}", table.len());
    Err(Error::bad_data(what))
}

/// Factors, sizes and offsets that the checkpoint has are those that config.json makes.
fn check_tables(weights: &dyn Weights, layer: usize, spec: &Spec) -> Result<()> {
    let mut next = 0;
    let offset_of = |size: &u64| {
        next += size;
        next - size
    };
    let offsets: Vec<u64> = spec.sizes.iter().map(offset_of).collect();
    let tables = [
        (Role::NgramFactors, &spec.factors),
        (Role::NgramOffsets, &offsets),
        (Role::NgramSizes, &spec.sizes),
    ];
    for (role, expected) in tables {
        let found = weights.trunk_integers(Some(layer), role)?;
        if !found.iter().map(|&n| n as u64).eq(expected.iter().copied()) {
            let what = format!("{role:?} of layer {layer} are {found:?}, but config.json makes {expected:?}");
            return Err(Error::bad_data(what));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_before_an_end_are_the_end() {
        let tokens = [5, 9, 6, 7];
        let all = |t| [0, 1, 2, 3].map(|shift| before(&tokens, t, shift, 9));
        assert_eq!(all(0), [5, 9, 9, 9]);
        assert_eq!(all(1), [9, 5, 9, 9]);
        assert_eq!(all(3), [7, 6, 9, 9]);
    }
}
