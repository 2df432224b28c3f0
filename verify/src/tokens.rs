//! Token windows: what the forward pass runs over, made from a text or from a JSON list of ids.
//!
//! The convention is that of the models' golden figures: the text is tokenized as one string without special
//! tokens and cut into windows of `ctx` tokens that do not overlap. Each window is run on its own from position 0,
//! and positions 1.. of each window are scored. A last shorter window is dropped, unless it is the only one.

use std::cell::Cell;
use std::fmt;
use std::ops::Range;

use moepack_format::{Error, Result};
use serde::de::{DeserializeSeed, SeqAccess, Visitor};

/// Most tokens a run may push through a model: 2^28, a gigabyte of ids.
pub const TOKENS_MAX: usize = 1 << 28;
/// Most tokens in one window: attention is quadratic in it, and no released model was trained on more.
pub const WINDOW_TOKENS_MAX: usize = 1 << 20;
/// Fewest tokens of a window: one to condition on and one to score.
pub const WINDOW_TOKENS_MIN: usize = 2;

/// Token windows, each run on its own from position 0.
///
/// `tokens` holds the windows one after the other, `lens` how long each is; every window has at least
/// [`WINDOW_TOKENS_MIN`] tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Windows {
    /// Ids of all windows, concatenated. `[sum of lens]`
    pub tokens: Vec<u32>,
    /// Tokens of each window. `[n_windows]`
    pub lens: Vec<usize>,
}

impl Windows {
    /// Cuts `ids` into windows of `ctx` tokens. With `bos`, each window is that id and `ctx - 1` tokens of the text.
    ///
    /// ```
    /// # use moepack_verify::tokens::Windows;
    /// let w = Windows::cut(&[5, 6, 7, 8, 9], 2, None).unwrap();
    /// assert_eq!(w.iter().collect::<Vec<_>>(), [&[5, 6], &[7, 8]]);
    /// ```
    ///
    /// # Errors
    /// `ctx` of less than 2 or more than [`WINDOW_TOKENS_MAX`] (usage); fewer tokens than make one scored position,
    /// or more than [`TOKENS_MAX`] (bad data).
    pub fn cut(ids: &[u32], ctx: usize, bos: Option<u32>) -> Result<Windows> {
        if !(WINDOW_TOKENS_MIN..=WINDOW_TOKENS_MAX).contains(&ctx) {
            let what =
                format!("windows of {ctx} tokens; {WINDOW_TOKENS_MIN} to {WINDOW_TOKENS_MAX} are possible");
            return Err(Error::usage(what).hint("choose another --ctx; the first token is never scored"));
        }
        let n_bos = usize::from(bos.is_some());
        if ids.len() > TOKENS_MAX {
            return Err(Error::bad_data(format!("{} tokens, at most {TOKENS_MAX} are taken", ids.len())));
        }
        if ids.len() + n_bos < WINDOW_TOKENS_MIN {
            let what = format!("too few tokens: {}, but {} are needed to score one", ids.len(), 2 - n_bos);
            return Err(Error::bad_data(what).hint("give a longer text"));
        }
        let mut windows = Windows::default();
        let whole = ids.chunks_exact(ctx - n_bos);
        let first_short = if whole.len() == 0 { Some(ids) } else { None };
        for text in whole.chain(first_short) {
            windows.tokens.extend(bos.iter().chain(text));
            windows.lens.push(text.len() + n_bos);
        }
        Ok(windows)
    }

    /// Reads a JSON list of windows, each a list of ids, taken whole.
    ///
    /// # Errors
    /// Anything else than that: the message names window and index. Ids of `vocab` or more, a window with fewer than
    /// 2 tokens or more than [`WINDOW_TOKENS_MAX`], more than [`TOKENS_MAX`] in all, no window.
    pub fn from_json(json: &[u8], vocab: usize) -> Result<Windows> {
        let place = Cell::new(Place::default());
        let mut de = serde_json::Deserializer::from_slice(json);
        let windows = List { vocab, place: &place }.deserialize(&mut de).and_then(|w| de.end().map(|()| w));
        windows.map_err(|e| {
            let what = format!("not a JSON list of lists of token ids: {e}{}", place.get());
            Error::bad_data(what).hint("expected [[id, id, …], …], as in [[1, 15, 9], [4, 2]]")
        })
    }

    /// Checks every id against the model's vocabulary.
    ///
    /// # Errors
    /// The first id of `vocab` or more, with its window and index.
    pub fn check_vocab(&self, vocab: usize) -> Result<()> {
        for (w, ids) in self.iter().enumerate() {
            if let Some((i, id)) = ids.iter().enumerate().find(|&(_, &id)| id as usize >= vocab) {
                let what = format!("token id {id} in window {w}, index {i}: the model has {vocab} tokens");
                return Err(
                    Error::bad_data(what).hint("these ids come from another tokenizer than the model's")
                );
            }
        }
        Ok(())
    }

    /// The windows in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u32]> {
        self.ranges().map(|r| self.tokens.get(r).unwrap_or(&[]))
    }

    /// Where each window lies in `tokens`.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        self.lens.iter().scan(0_usize, |end, &len| {
            let start = *end;
            *end = start.saturating_add(len);
            Some(start..*end)
        })
    }

    /// Number of windows.
    pub fn n_windows(&self) -> usize {
        self.lens.len()
    }

    /// Number of scored positions: all but the first of each window.
    pub fn n_scored(&self) -> usize {
        self.lens.iter().map(|len| len.saturating_sub(1)).sum()
    }

    /// The longest window, in tokens; what a report calls `ctx`.
    pub fn ctx(&self) -> usize {
        self.lens.iter().copied().max().unwrap_or(0)
    }
}

/// Where in the JSON the reader is, for messages.
#[derive(Clone, Copy, Default)]
struct Place {
    window: Option<usize>,
    index: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.window, self.index) {
            (Some(w), Some(i)) => write!(f, " (window {w}, index {i})"),
            (Some(w), None) => write!(f, " (window {w})"),
            _ => Ok(()),
        }
    }
}

/// The outer list.
struct List<'a> {
    vocab: usize,
    place: &'a Cell<Place>,
}

impl<'de> DeserializeSeed<'de> for List<'_> {
    type Value = Windows;
    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> std::result::Result<Windows, D::Error> {
        d.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for List<'_> {
    type Value = Windows;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of windows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Windows, A::Error> {
        let mut windows = Windows::default();
        loop {
            let window = windows.n_windows();
            self.place.set(Place { window: Some(window), index: None });
            let start = windows.tokens.len();
            let inner =
                Window { vocab: self.vocab, window, place: self.place, start, tokens: &mut windows.tokens };
            let Some(len) = seq.next_element_seed(inner)? else { break };
            windows.lens.push(len);
        }
        self.place.set(Place::default());
        match windows.n_windows() {
            0 => Err(serde::de::Error::custom("no window in it")),
            _ => Ok(windows),
        }
    }
}

/// One window; gives its length and appends its ids to `tokens`.
struct Window<'a> {
    vocab: usize,
    window: usize,
    place: &'a Cell<Place>,
    start: usize,
    tokens: &'a mut Vec<u32>,
}

impl<'de> DeserializeSeed<'de> for Window<'_> {
    type Value = usize;
    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> std::result::Result<usize, D::Error> {
        d.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Window<'_> {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of token ids")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<usize, A::Error> {
        use serde::de::Error as _;
        loop {
            let index = self.tokens.len() - self.start;
            self.place.set(Place { window: Some(self.window), index: Some(index) });
            let Some(id) = seq.next_element::<u32>()? else { break };
            if id as usize >= self.vocab {
                return Err(A::Error::custom(format!("id {id}, but the model has {} tokens", self.vocab)));
            }
            if index == WINDOW_TOKENS_MAX || self.tokens.len() == TOKENS_MAX {
                let caps = format!("{WINDOW_TOKENS_MAX} a window, {TOKENS_MAX} in all");
                return Err(A::Error::custom(format!("more tokens than are taken: {caps}")));
            }
            self.tokens.push(id);
        }
        let len = self.tokens.len() - self.start;
        self.place.set(Place { window: Some(self.window), index: None });
        if len < WINDOW_TOKENS_MIN {
            return Err(A::Error::custom(format!("{len} tokens, but a window needs {WINDOW_TOKENS_MIN}")));
        }
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moepack_format::Kind;

    fn cut(ids: &[u32], ctx: usize, bos: Option<u32>) -> Vec<Vec<u32>> {
        let windows = Windows::cut(ids, ctx, bos).unwrap();
        assert_eq!(windows.tokens.len(), windows.lens.iter().sum::<usize>());
        windows.iter().map(<[u32]>::to_vec).collect()
    }

    #[test]
    fn the_last_shorter_window_is_dropped_unless_it_is_the_only_one() {
        assert_eq!(cut(&[1, 2, 3, 4, 5], 2, None), [[1, 2], [3, 4]]);
        assert_eq!(cut(&[1, 2, 3, 4], 2, None), [[1, 2], [3, 4]]);
        assert_eq!(cut(&[1, 2, 3], 4, None), [[1, 2, 3]]);
        assert_eq!(cut(&[1, 2, 3, 4], 4, None), [[1, 2, 3, 4]]);
    }

    #[test]
    fn bos_begins_each_window_and_counts() {
        assert_eq!(cut(&[1, 2, 3, 4, 5], 3, Some(0)), [[0, 1, 2], [0, 3, 4]]);
        assert_eq!(cut(&[1], 3, Some(0)), [[0, 1]]);
    }

    #[test]
    fn what_cannot_be_scored_is_refused() {
        assert_eq!(
            Windows::cut(&[1], 8, None).unwrap_err().what(),
            "too few tokens: 1, but 2 are needed to score one"
        );
        assert_eq!(Windows::cut(&[], 8, Some(0)).unwrap_err().kind(), Kind::BadData);
        assert_eq!(Windows::cut(&[1, 2, 3], 1, None).unwrap_err().kind(), Kind::Usage);
        assert_eq!(Windows::cut(&[1, 2, 3], WINDOW_TOKENS_MAX + 1, None).unwrap_err().kind(), Kind::Usage);
    }

    #[test]
    fn scored_positions_are_all_but_the_first_of_each_window() {
        let windows = Windows::from_json(b" [[1,2,3],[4,5]] ", 6).unwrap();
        assert_eq!((windows.n_windows(), windows.n_scored(), windows.ctx()), (2, 3, 3));
        assert_eq!(windows.ranges().collect::<Vec<_>>(), [0..3, 3..5]);
    }

    #[test]
    fn bad_json_names_window_and_index() {
        let cases: &[(&str, &str)] = &[
            ("", "EOF"),
            ("[]", "no window"),
            ("[[]]", "0 tokens"),
            ("[[1,2],[1]]", "(window 1)"),
            ("[[1,2],[1,8]]", "id 8, but the model has 8 tokens"),
            ("[[1,2],[1,8]]", "(window 1, index 1)"),
            ("[[1,-2]]", "(window 0, index 1)"),
            ("[[1,2.5]]", "(window 0, index 1)"),
            ("[[1,1e0]]", "(window 0, index 1)"),
            ("[[1,4294967296]]", "(window 0, index 1)"),
            ("[[1,\"2\"]]", "(window 0, index 1)"),
            ("[[1,null]]", "(window 0, index 1)"),
            ("[[1,[2]]]", "(window 0, index 1)"),
            ("[1,2]", "(window 0)"),
            ("{\"a\":1}", "a list of windows"),
            ("[[1,2]] x", "trailing"),
            ("[[1,2],]", "trailing comma"),
            ("\u{feff}[[1,2]]", "expected value"),
            ("[[1,2]", "EOF"),
        ];
        for (json, part) in cases {
            let error = Windows::from_json(json.as_bytes(), 8).unwrap_err();
            assert_eq!(error.kind(), Kind::BadData, "{json}");
            assert!(error.what().contains(part), "{json}: {:?} lacks {part:?}", error.what());
        }
        let bomb = "[".repeat(100_000);
        assert_eq!(Windows::from_json(bomb.as_bytes(), 8).unwrap_err().kind(), Kind::BadData);
    }

    #[test]
    fn ids_beyond_the_vocabulary_are_named() {
        let windows = Windows::cut(&[1, 2, 3, 9, 5, 6], 3, None).unwrap();
        assert_eq!(windows.check_vocab(10), Ok(()));
        let error = windows.check_vocab(9).unwrap_err();
        assert_eq!(error.what(), "token id 9 in window 1, index 0: the model has 9 tokens");
    }
}
