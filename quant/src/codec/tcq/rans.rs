//! The entropy coder: rANS with interleaved states that share one stream of words.
//!
//! Duda 2013 (arXiv:1311.2540) with the word-based renormalization and interleaving of Giesen 2014 (arXiv:1402.3392). A
//! state `x` lies in 2^16 … 2^32. With 4096 slots, of which a symbol has `f` from `c` on:
//!
//! ```text
//!  decode   slot = x & 4095, which names the symbol;  x = f · (x >> 12) + slot − c;  if x < 2^16: x = x << 16 | next word
//!  encode   if x ≥ f << 20: emit x & 0xffff, x >>= 16;                               x = (x / f) << 12 | (x % f + c)
//! ```
//!
//! An encoder starts with 2^16 in every lane and works backwards, so a decoder must end with 2^16 in every lane and no word
//! left: damage does not go unnoticed.

use moepack_format::{Error, Result};

use super::tables::{self, PROB_BITS, SLOTS, Symbol};

/// Where every lane of an encoder starts and of a decoder ends.
pub const START: u32 = 1 << 16;

/// Most lanes.
pub const LANES_MAX: usize = 64;

/// An encoder of one lane, for side information: its state, and the words so far, last one first.
#[derive(Debug)]
pub struct Encoder {
    state: u32,
    words: Vec<u16>,
}

impl Encoder {
    /// With nothing in it.
    pub fn new() -> Encoder {
        Encoder { state: START, words: Vec::new() }
    }

    /// Encodes a symbol that is there. Symbols come in the reverse order of decoding.
    pub fn put(&mut self, symbol: Symbol) {
        if self.state >> (32 - PROB_BITS) >= u32::from(symbol.freq) {
            self.words.push(self.state as u16);
            self.state >>= 16;
        }
        self.state = symbol.state_after(self.state);
    }

    /// The state, then the words in the order of decoding, little-endian.
    pub fn finish(self) -> Vec<u8> {
        let state = self.state.to_le_bytes();
        state.into_iter().chain(self.words.iter().rev().flat_map(|w| w.to_le_bytes())).collect()
    }
}

/// A decoder of one lane, for side information.
#[derive(Debug)]
pub struct Decoder<'a> {
    state: u32,
    words: &'a [[u8; 2]],
}

impl<'a> Decoder<'a> {
    /// Begins to read what an [`Encoder`] of one lane left.
    ///
    /// # Errors
    /// Not even a state.
    pub fn new(bytes: &'a [u8]) -> Result<Decoder<'a>> {
        let (state, rest) =
            bytes.split_first_chunk::<4>().ok_or_else(|| damaged("side information without a state"))?;
        let (words, odd) = rest.as_chunks::<2>();
        if !odd.is_empty() {
            return Err(damaged("half a word of side information"));
        }
        Ok(Decoder { state: u32::from_le_bytes(*state), words })
    }

    /// The next symbol, by the even numbers of table `q`.
    ///
    /// # Errors
    /// A table that does not exist, or words that are missing.
    pub fn next(&mut self, q: u8) -> Result<u8> {
        let at = usize::from(q) * 2 * SLOTS + (self.state as usize & (SLOTS - 1));
        let entry = *tables::slots()
            .get(at)
            .ok_or_else(|| damaged("side information names a table beyond the last"))?;
        self.state = step(self.state, entry);
        if self.state < START {
            let (word, rest) =
                self.words.split_first().ok_or_else(|| damaged("side information ends early"))?;
            self.state = self.state << 16 | u32::from(u16::from_le_bytes(*word));
            self.words = rest;
        }
        Ok((entry >> 24) as u8)
    }

    /// Compares what is left with what must be.
    ///
    /// # Errors
    /// Words are left, or the state is not where the encoder started.
    pub fn finish(self) -> Result<()> {
        if self.state == START && self.words.is_empty() {
            Ok(())
        } else {
            Err(damaged("side information does not end where it should"))
        }
    }
}

/// A state after a symbol, before renormalization.
#[inline(always)]
pub fn step(state: u32, entry: u32) -> u32 {
    let (freq, place) = ((entry & 4095) + 1, entry >> 12 & 4095);
    // At most 4096 · (2^20 − 1) + 4095 < 2^32.
    freq.wrapping_mul(state >> PROB_BITS).wrapping_add(place)
}

/// A complaint about bytes that no encoder wrote.
pub fn damaged(what: &str) -> Error {
    Error::bad_data(format!("{what} in a matrix of codec tcq"))
        .hint("the file is damaged; run `moepack check`")
}
