//! Final norm, head and negative log-likelihood. Logits exist a few rows at a time.

use moepack_convert::spec::Role;
use moepack_format::{Error, Result};
use moepack_quant::{Isa, math};
use rayon::prelude::*;

use super::gated::{Gated, GatedRoles};
use super::linear::Linear;
use super::norm::Norm;
use super::residual::{Hyper, collapse};
use super::router::softcapped;
use super::{Stream, Weights, sized};
use crate::tokens::Windows;

/// Logits a thread holds at once, so that a large vocabulary takes fewer rows.
const LOGITS_MAX: usize = 4 << 20;
/// Rows at once.
const ROWS: std::ops::RangeInclusive<usize> = 24..=96;

/// Final norm and head.
pub struct Head {
    isa: Isa,
    /// Makes one row of the streams.
    collapse: Collapse,
    norm: Option<Norm>,
    hidden: usize,
    /// `[vocab, hidden]`
    linear: Linear,
    /// Factor of the logits.
    scale: f32,
    /// What they come near to, but do not exceed.
    softcap: Option<f32>,
    /// Values of a token before the head.
    width: usize,
}

/// How the streams of a token become one.
enum Collapse {
    /// There is but one.
    One,
    Mean,
    Weighted(Hyper),
    Gated(Gated),
}

const GATED: GatedRoles =
    GatedRoles { gates: [Role::HeadGateNorm, Role::HeadGateDown, Role::HeadGateUp], inject: None };

/// Buffers of one thread, kept from block to block.
#[derive(Default)]
pub struct HeadScratch {
    mixes: Vec<f32>,
    normed: Vec<f32>,
    logits: Vec<f32>,
}

impl Head {
    /// Reads final norm and head; the embedding where they are tied.
    ///
    /// # Errors
    /// A tensor that cannot be read or does not have the spec's shape.
    pub fn load(isa: Isa, weights: &dyn Weights) -> Result<Head> {
        let spec = weights.spec();
        let role = if spec.tied_head { Role::Embed } else { Role::LmHead };
        let mix = [Role::HeadMix, Role::HeadMixBase, Role::HeadMixScale];
        let gated = spec.hyper.map(|h| Gated::load(weights, None, h, &GATED)).transpose()?.flatten();
        // What passes gates was normed before.
        let final_norm = gated
            .is_none()
            .then(|| Norm::load(weights, None, (Role::FinalNorm, Role::FinalNormBias), spec.hidden));
        let collapse = match (gated, spec.hyper) {
            (Some(gated), _) => Collapse::Gated(gated),
            (None, None) => Collapse::One,
            (None, Some(hyper)) if hyper.mean_head => Collapse::Mean,
            (None, Some(hyper)) => {
                Collapse::Weighted(Hyper::load(weights, None, hyper, mix, hyper.n_streams)?)
            }
        };
        let bias = spec.head_bias.then_some(Role::LmHeadBias);
        Ok(Head {
            isa,
            collapse,
            norm: final_norm.transpose()?.map(|norm| norm.with_eps(spec.final_eps)),
            hidden: spec.hidden,
            linear: Linear::load(weights, None, (role, bias), spec.vocab, spec.hidden)?,
            scale: spec.logit_scale,
            softcap: spec.logit_softcap,
            width: spec.width(),
        })
    }

    /// Number of logits a row.
    pub fn vocab(&self) -> usize {
        self.linear.n()
    }

    /// How many rows are best given to [`Head::logits`] at once.
    pub fn rows(&self) -> usize {
        (LOGITS_MAX / self.vocab().max(1)).clamp(*ROWS.start(), *ROWS.end())
    }

    /// Logits `[n, vocab]` of rows of the stream, `[n, width]`.
    pub fn logits<'s>(&self, rows: &[f32], scratch: &'s mut HeadScratch) -> &'s [f32] {
        let (n, hidden) = (rows.len() / self.width, self.hidden);
        let HeadScratch { mixes, normed, logits } = scratch;
        let x = sized(normed, n * hidden); // [n, hidden]
        match &self.collapse {
            Collapse::One => x.copy_from_slice(rows),
            Collapse::Gated(gated) => gated.collapse(self.isa, rows, x),
            Collapse::Mean => {
                let pre = vec![(1.0 / (self.width / hidden) as f64) as f32; self.width / hidden];
                for (row, x) in rows.chunks_exact(self.width).zip(x.chunks_exact_mut(hidden)) {
                    collapse(self.isa, &pre, row, x);
                }
            }
            Collapse::Weighted(hyper) => {
                hyper.mixes(self.isa, rows, mixes);
                let pre = mixes.chunks_exact(self.width / hidden);
                for ((row, pre), x) in rows.chunks_exact(self.width).zip(pre).zip(x.chunks_exact_mut(hidden))
                {
                    collapse(self.isa, pre, row, x);
                }
            }
        }
        if let Some(norm) = &self.norm {
            norm.apply_in_place(self.isa, x);
        }
        let logits = sized(logits, n * self.vocab()); // [n, vocab]
        self.linear.apply(self.isa, x, logits);
        if self.scale != 1.0 {
            logits.iter_mut().for_each(|v| *v *= self.scale);
        }
        if let Some(cap) = self.softcap {
            logits.iter_mut().for_each(|v| *v = softcapped(*v, cap));
        }
        logits
    }

    /// Negative log-likelihood in nats of every scored token, a list a window: its tokens from the second on.
    /// `consumer` is shown the logits that predict each: the index in `windows.tokens` of the token *before* the
    /// scored one, and `[vocab]`. It is called from many threads, in no particular order.
    ///
    /// # Errors
    /// The stream does not have the windows' tokens, or a token lies beyond the vocabulary.
    pub fn nll(
        &self,
        windows: &Windows,
        stream: &Stream,
        consumer: &(dyn Fn(usize, &[f32]) + Sync),
    ) -> Result<Vec<Vec<f64>>> {
        windows.check_vocab(self.vocab())?;
        if stream.n_tokens() != windows.tokens.len() || stream.width != self.width {
            let (rows, tokens) = (stream.n_tokens(), windows.tokens.len());
            return Err(Error::bad_data(format!("a stream of {rows} rows for {tokens} tokens")));
        }
        // Blocks of rows that predict something: all but the last of each window.
        let blocks: Vec<_> = windows
            .ranges()
            .flat_map(|r| {
                let end = r.end.saturating_sub(1);
                (r.start..end).step_by(self.rows()).map(move |from| from..end.min(from + self.rows()))
            })
            .collect();
        let nlls: Vec<Vec<f64>> = blocks
            .into_par_iter()
            .map_init(HeadScratch::default, |scratch, rows| {
                let hidden = &stream.hidden[rows.start * stream.width..rows.end * stream.width];
                let logits = self.logits(hidden, scratch);
                rows.zip(logits.chunks_exact(self.vocab()))
                    .map(|(row, logits)| {
                        consumer(row, logits);
                        nll(self.isa, logits, windows.tokens[row + 1])
                    })
                    .collect()
            })
            .collect();
        let mut values = nlls.into_iter().flatten();
        Ok(windows.lens.iter().map(|len| values.by_ref().take(len.saturating_sub(1)).collect()).collect())
    }
}

/// −ln of the probability that `logits` give to `token`.
fn nll(isa: Isa, logits: &[f32], token: u32) -> f64 {
    math::log_sum_exp(isa, logits) - f64::from(logits[token as usize])
}
