//! One row of a baseline: what the checkpoint predicted at one position.
//!
//! ```text
//!  0      4           8               8+i·k               8+(i+2)·k
//! +------+-----------+---------------+-------------------+-----------------+-------------------+
//! | NLL  | tail mass | k ids         | k codes           | s sampled ids   | s ln p of samples |
//! | f32  | f32       | u16 or u32    | u16               | u16 or u32      | f32               |
//! +------+-----------+---------------+-------------------+-----------------+-------------------+
//! ```
//!
//! i is 2 bytes an id up to a vocabulary of 65536, else 4. The k most likely tokens come most likely first, of equal
//! ones the lower id; a code c means ln p = −c / 2048, and 65535 an empty slot (id 0, at the end), whose token is so
//! unlikely that it counts as tail.
//! The samples are tokens of the tail, drawn with their probability; with no tail there are none (id 0, −infinity).

use moepack_format::{Error, Result};
use moepack_quant::Isa;

use super::{SAMPLES_MAX, TOP_K_MAX, VOCAB_MAX};
use crate::drift::logits::not_negative;
use crate::drift::rows;

/// Codes per nat.
pub const CODES_PER_NAT: f64 = 2048.0;
/// The code of an empty slot.
pub const NO_CODE: u16 = u16::MAX;
/// Samples of the tail that are written.
pub const SAMPLES: u32 = 8;
/// How far the probabilities of a row may be from adding up to 1; rounding makes 2.5e-4 at most.
pub const SUM_TOLERANCE: f64 = 1e-3;

/// What the rows of a file hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowFormat {
    /// Size of the vocabulary.
    pub vocab: u32,
    /// Tokens kept.
    pub top_k: u32,
    /// Samples of the tail.
    pub n_samples: u32,
}

impl RowFormat {
    /// The format written for a vocabulary: k = vocab / 64, but 32 to 256 and no more than there are.
    ///
    /// # Errors
    /// No token, or more than [`VOCAB_MAX`].
    pub fn for_vocab(vocab: usize) -> Result<RowFormat> {
        match u32::try_from(vocab) {
            Ok(v) if (1..=VOCAB_MAX).contains(&v) => {
                Ok(RowFormat { vocab: v, top_k: (v / 64).clamp(32, 256).min(v), n_samples: SAMPLES })
            }
            _ => Err(Error::bad_data(format!(
                "a vocabulary of {vocab} tokens, at most {VOCAB_MAX} are possible"
            ))),
        }
    }

    /// Bytes of an id.
    pub fn id_bytes(self) -> usize {
        if self.vocab <= 1 << 16 { 2 } else { 4 }
    }

    /// Bytes of a row.
    pub fn bytes(self) -> u64 {
        let id = self.id_bytes() as u64;
        8 + u64::from(self.top_k) * (id + 2) + u64::from(self.n_samples) * (id + 4)
    }

    /// Appends the row of a reference's `logits`, `[vocab]`. `position` numbers the scored positions of the file; it
    /// is all that the choice of samples depends on besides the logits.
    ///
    /// # Errors
    /// Logits of another vocabulary, a target outside of it, or NaN.
    pub fn encode(
        self,
        isa: Isa,
        logits: &[f32],
        target: u32,
        position: u64,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let p = Prediction::of(isa, self, logits, target)?;
        let (kept, tail) = p.split();
        out.extend((p.nll as f32).to_le_bytes());
        out.extend((tail.mass as f32).to_le_bytes());
        let slots = || (0..self.top_k as usize).map(|i| kept.get(i));
        slots().for_each(|slot| self.put_id(out, slot.map_or(0, |s| s.0)));
        slots().for_each(|slot| out.extend(slot.map_or(NO_CODE, |s| s.1).to_le_bytes()));
        let samples = tail.samples(self.n_samples as usize, position);
        let samples = || (0..self.n_samples as usize).map(|i| samples.get(i));
        samples().for_each(|s| self.put_id(out, s.map_or(0, |&id| id as u32)));
        samples()
            .for_each(|s| out.extend(s.map_or(f32::NEG_INFINITY, |&id| p.log_p(id) as f32).to_le_bytes()));
        Ok(())
    }

    /// Appends an id.
    pub(super) fn put_id(self, out: &mut Vec<u8>, id: u32) {
        let bytes = id.to_le_bytes();
        out.extend(bytes.iter().take(self.id_bytes()));
    }

    /// The id in 2 or 4 bytes.
    pub(super) fn id(self, bytes: &[u8]) -> u32 {
        bytes.iter().rev().fold(0, |id, &b| id << 8 | u32::from(b))
    }
}

/// A reference's prediction at one position.
struct Prediction<'a> {
    format: RowFormat,
    logits: &'a [f32],
    /// e^(logit − max). `[vocab]`
    exp: Vec<f64>,
    /// ln Σ e^logit
    lse: f64,
    nll: f64,
}

impl<'a> Prediction<'a> {
    fn of(isa: Isa, format: RowFormat, logits: &'a [f32], target: u32) -> Result<Self> {
        if logits.len() != format.vocab as usize {
            let what = format!("{} logits, the baseline has {} tokens", logits.len(), format.vocab);
            return Err(Error::bad_data(what));
        }
        let max = rows::argmax(isa, logits).map_or(f64::NAN, |(_, max)| f64::from(max));
        let mut exp = vec![0.0; logits.len()];
        rows::exp_each(isa, logits, max, &mut exp);
        let lse = rows::log_sum_exp(isa, logits);
        let nll = not_negative(lse - logits.get(target as usize).map_or(f64::NAN, |&l| f64::from(l)));
        if !nll.is_finite() {
            let what = format!("the NLL of token id {target} is {nll}, a baseline needs a finite one");
            return Err(Error::bad_data(what).hint("the checkpoint computes NaN or infinity on this text"));
        }
        Ok(Prediction { format, logits, exp, lse, nll })
    }

    fn log_p(&self, id: usize) -> f64 {
        self.logits.get(id).map_or(f64::NAN, |&l| f64::from(l) - self.lse)
    }

    /// The kept tokens with their codes, most likely first, and the rest.
    fn split(&self) -> (Vec<(u32, u16)>, Tail) {
        let k = self.format.top_k as usize;
        let mut keys: Vec<u64> = self.logits.iter().zip(0..).map(|(&l, id)| likely_first(l, id)).collect();
        if k < keys.len() {
            keys.select_nth_unstable(k);
            keys.truncate(k);
        }
        keys.sort_unstable();
        let ids = keys.into_iter().map(|key| (key & u64::from(u32::MAX)) as usize);
        let code = |id: usize| (-self.log_p(id) * CODES_PER_NAT).round();
        let kept: Vec<(u32, u16)> = ids
            .map_while(|id| (code(id) < f64::from(NO_CODE)).then(|| (id as u32, code(id).max(0.0) as u16)))
            .collect();
        let mut exp = self.exp.clone();
        for &(id, _) in &kept {
            if let Some(e) = exp.get_mut(id as usize) {
                *e = 0.0;
            }
        }
        let sum = exp.iter().sum::<f64>();
        let mass = sum / self.exp.iter().sum::<f64>();
        // Below the normal numbers of f32 a mass would lose its digits; such a tail is none.
        let mass = if mass < f64::from(f32::MIN_POSITIVE) { 0.0 } else { mass };
        (kept, Tail { exp, sum, mass })
    }
}

/// A key that sorts tokens by falling logit, equal ones by rising id, which stands in its low half.
fn likely_first(logit: f32, id: u32) -> u64 {
    // Adding 0 makes -0 equal to 0, as it is for `argmax`. Bits of floats sort as numbers do once the sign is
    // flipped, and all bits of negative ones.
    let bits = (logit + 0.0).to_bits();
    let rising = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!rising) << 32 | u64::from(id)
}

/// The tokens that are not kept.
struct Tail {
    /// e^(logit − max), 0 for the kept. `[vocab]`
    exp: Vec<f64>,
    sum: f64,
    mass: f64,
}

impl Tail {
    /// `n` ids drawn with their probability in the tail, by systematic sampling: the tail is a line on which each
    /// token takes a stretch as long as it is likely, and n points at equal distances are laid on it, the first at
    /// random. None if there is no tail.
    fn samples(&self, n: usize, position: u64) -> Vec<usize> {
        let mut ids = Vec::with_capacity(n);
        if self.mass == 0.0 {
            return ids;
        }
        let start = uniform(position);
        let point = |i: usize| (i as f64 + start) / n as f64 * self.sum;
        let mut end = 0.0;
        let mut last = 0;
        for (id, &e) in self.exp.iter().enumerate().filter(|(_, e)| **e > 0.0) {
            end += e;
            last = id;
            while ids.len() < n && point(ids.len()) < end {
                ids.push(id);
            }
        }
        // Rounding may leave the last point beyond the end.
        ids.resize(n, last);
        ids
    }
}

/// A number in [0, 1) that looks random and depends on `position` alone: SplitMix64 (Steele, Lea & Flood 2014).
fn uniform(position: u64) -> f64 {
    let z = position.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// A row as read, with every rule of the format checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// NLL of the target, nats.
    pub nll: f64,
    /// Probability of the tokens not kept.
    pub tail_mass: f64,
    /// The kept tokens and their ln p, most likely first.
    pub top: Vec<(u32, f64)>,
    /// Whether slots are empty: then even the most likely token of the tail has less than the smallest code says.
    pub has_empty_slots: bool,
    /// Sampled tokens of the tail and their ln p.
    pub samples: Vec<(u32, f64)>,
}

impl Row {
    /// Reads a row of `format.bytes()` bytes.
    ///
    /// # Errors
    /// `BadData` with the offset in the row for anything that the writer would not have written.
    pub fn decode(format: RowFormat, bytes: &[u8]) -> Result<Row> {
        let (k, s, i) = (format.top_k as usize, format.n_samples as usize, format.id_bytes());
        let ends = [8 + k * i, 8 + k * (i + 2), 8 + k * (i + 2) + s * i, 8 + k * (i + 2) + s * (i + 4)];
        let part = |start: usize, end: usize| bytes.get(start..end).unwrap_or(&[]);
        let f32s =
            |b: &[u8]| b.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
        let ids = |b: &[u8]| b.chunks_exact(i).map(|b| format.id(b)).collect::<Vec<u32>>();
        let head: Vec<f64> = f32s(part(0, 8));
        let codes = part(ends[0], ends[1]).as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
        let &[nll, tail_mass] = head.as_slice() else {
            return Err(Error::bad_data(format!("a row of {} bytes", bytes.len())).at_byte(0));
        };
        if bytes.len() as u64 != format.bytes() || format.top_k > TOP_K_MAX || format.n_samples > SAMPLES_MAX
        {
            return Err(Error::bad_data(format!("a row of {} bytes", bytes.len())).at_byte(0));
        }
        let top = top(format, &ids(part(8, ends[0])), &codes.collect::<Vec<u16>>(), ends[0])?;
        let log_p: Vec<f64> = f32s(part(ends[2], ends[3]));
        let row = Row {
            nll,
            tail_mass,
            has_empty_slots: top.len() < k,
            samples: samples(format, &ids(part(ends[1], ends[2])), &log_p, tail_mass, ends[1])?,
            top,
        };
        row.check(ends[1])?;
        Ok(row)
    }

    /// What the numbers of a row must be together.
    fn check(&self, samples_offset: usize) -> Result<()> {
        let refuse = |at: usize, what: String| Err(Error::bad_data(what).at_byte(at as u64));
        if !(self.nll.is_finite() && self.nll >= 0.0) {
            return refuse(0, format!("an NLL of {}", self.nll));
        }
        if !(0.0..=1.0).contains(&self.tail_mass) {
            return refuse(4, format!("a tail mass of {}", self.tail_mass));
        }
        let sum = self.top.iter().map(|t| libm::exp(t.1)).sum::<f64>() + self.tail_mass;
        if (sum - 1.0).abs() > SUM_TOLERANCE {
            return refuse(4, format!("probabilities that add up to {sum}"));
        }
        let mut kept: Vec<u32> = self.top.iter().map(|t| t.0).collect();
        kept.sort_unstable();
        if let Some(twice) = kept.windows(2).find(|w| w.first() == w.last()) {
            return refuse(8, format!("token id {} twice", twice.first().copied().unwrap_or(0)));
        }
        match self.samples.iter().find(|s| kept.binary_search(&s.0).is_ok()) {
            Some(s) => {
                refuse(samples_offset, format!("token id {} both kept and sampled from the tail", s.0))
            }
            None => Ok(()),
        }
    }
}

/// The filled slots: ids in the vocabulary, most likely first, empty ones at the end.
fn top(format: RowFormat, ids: &[u32], codes: &[u16], codes_offset: usize) -> Result<Vec<(u32, f64)>> {
    let mut top = Vec::with_capacity(ids.len());
    let mut least = 0;
    for (slot, (&id, &code)) in ids.iter().zip(codes).enumerate() {
        if id >= format.vocab {
            let what = format!("token id {id}, the vocabulary has {}", format.vocab);
            return Err(Error::bad_data(what).at_byte((8 + slot * format.id_bytes()) as u64));
        }
        if code < least || (code == NO_CODE && id != 0) || (slot == 0 && code == NO_CODE) {
            let what = format!("code {code} of token id {id} in slot {slot}, after code {least}");
            return Err(Error::bad_data(what).at_byte((codes_offset + 2 * slot) as u64));
        }
        least = code;
        if code != NO_CODE {
            top.push((id, -f64::from(code) / CODES_PER_NAT));
        }
    }
    Ok(top)
}

/// The samples: all of them if there is a tail, else none.
fn samples(format: RowFormat, ids: &[u32], log_p: &[f64], tail: f64, at: usize) -> Result<Vec<(u32, f64)>> {
    let possible = |&(&id, &l): &(&u32, &f64)| match tail > 0.0 {
        true => id < format.vocab && l.is_finite() && l <= libm::log(tail) + 1e-3,
        false => id == 0 && l == f64::NEG_INFINITY,
    };
    if let Some((id, l)) = ids.iter().zip(log_p).find(|s| !possible(s)) {
        let what = format!("sampled token id {id} with ln p {l}, of a tail with mass {tail}");
        return Err(Error::bad_data(what).at_byte(at as u64));
    }
    let samples = ids.iter().copied().zip(log_p.iter().copied());
    Ok(if tail > 0.0 { samples.collect() } else { Vec::new() })
}
