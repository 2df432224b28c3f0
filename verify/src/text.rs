//! Text → token ids, as the models' golden figures do it: one string, no special tokens added.
//!
//! The tokenizer is the `tokenizers` crate reading the model's own `tokenizer.json`. That file may be hostile and
//! the crate was written for friends: it is looked at first, and a panic inside the crate becomes an error here.

use std::any::Any;
use std::cell::Cell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use moepack_format::{Error, Result};
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use tokenizers::models::ModelWrapper;

/// Largest `tokenizer.json` that is read, in bytes; the largest released ones have 40 MB.
pub const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
/// Largest text that is read, in bytes: it is tokenized in memory, at some 100 bytes a token.
pub const TEXT_BYTES_MAX: u64 = 256 << 20;

/// Most JSON values of normalizer, pre-tokenizer, post-processor and decoder, each: those of released tokenizers have under 200.
const PART_VALUES_MAX: usize = 1000;

/// How many times as long a tokenizer's parts may make a text, as [`growth`] counts; those of released ones come to some tens.
const GROWTH_MAX: f64 = 1024.0;

/// Bytes of a string in a tokenizer; the longest tokens and patterns of released ones have under a thousand.
const STRING_BYTES_MAX: usize = 4096;

/// A model's tokenizer.
pub struct Tokenizer(tokenizers::Tokenizer);

impl Tokenizer {
    /// Reads the content of a `tokenizer.json`. Truncation and padding that it asks for are switched off, and so is
    /// BPE dropout: the same text is to give the same tokens, all of them.
    ///
    /// # Errors
    /// No JSON, no tokenizer, or one that the `tokenizers` crate cannot read.
    pub fn parse(json: &[u8]) -> Result<Tokenizer> {
        let hint = "download tokenizer.json of the model again, or give token ids with --tokens";
        let outline: Outline = serde_json::from_slice(json)
            .map_err(|e| Error::bad_data(format!("not a tokenizer: {e}")).hint(hint))?;
        check_strings(json).and_then(|()| check_growth(json)).map_err(|e| e.hint(hint))?;
        let kind = outline.model.kind.unwrap_or_else(|| "unnamed".to_owned());
        let mut tokenizer = quietly(|| tokenizers::Tokenizer::from_bytes(json))
            .and_then(|r| r.map_err(|e| e.to_string()))
            .map_err(|e| Error::bad_data(format!("not a usable {kind} tokenizer: {e}")).hint(hint))?;
        tokenizer.with_padding(None);
        let untruncated = tokenizer.with_truncation(None).map(|_| ()).map_err(|e| e.to_string());
        untruncated.map_err(|e| Error::bad_data(format!("not a usable tokenizer: {e}")).hint(hint))?;
        if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
            && bpe.dropout.is_some()
        {
            let mut whole = bpe.clone();
            whole.dropout = None;
            tokenizer.with_model(whole);
        }
        Ok(Tokenizer(tokenizer))
    }

    /// The ids of `text`, without special tokens at either end. Those written out in the text count as such, which
    /// is what transformers does too.
    ///
    /// # Errors
    /// An empty text, or a failure of the tokenizer.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Err(Error::bad_data("the text is empty").hint("give a text of a few thousand words"));
        }
        let encoding = quietly(|| self.0.encode_fast(text, false)).and_then(|r| r.map_err(|e| e.to_string()));
        match encoding {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(e) => Err(Error::bad_data(format!("the model's tokenizer cannot encode the text: {e}"))),
        }
    }
}

/// The text in `bytes`.
///
/// # Errors
/// Bytes that are not UTF-8, with the offset of the first one.
pub fn utf8(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).map_err(|e| {
        let what = format!("text is not UTF-8: {}", first_bad(bytes, e.valid_up_to()));
        Error::bad_data(what).at_byte(e.valid_up_to() as u64).hint("convert it, or is it a binary file?")
    })
}

fn first_bad(bytes: &[u8], at: usize) -> String {
    bytes.get(at).map_or_else(|| "it is cut short".to_owned(), |b| format!("found byte 0x{b:02x}"))
}

/// What every tokenizer has, whatever else it has. What is deep in the model is skipped without recursion.
#[derive(Deserialize)]
struct Outline {
    model: OutlineModel,
    #[serde(rename = "normalizer", default)]
    _normalizer: NValues,
    #[serde(rename = "pre_tokenizer", default)]
    _pre_tokenizer: NValues,
    #[serde(rename = "post_processor", default)]
    _post_processor: NValues,
    #[serde(rename = "decoder", default)]
    _decoder: NValues,
    #[serde(rename = "added_tokens", default)]
    _added_tokens: Option<Vec<IgnoredAny>>,
}

/// Refuses strings that the crate takes on trust: tokens so long that walking their characters ends the stack, and a table
/// of characters that says it is longer than it is. `json` is valid.
fn check_strings(json: &[u8]) -> Result<()> {
    let (mut rest, mut offset, mut before) = (json, 0, &b""[..]);
    while let Some(start) = rest.iter().position(|&b| b == b'"') {
        let text = rest.get(start + 1..).unwrap_or_default();
        let mut escaped = false;
        let ends = |b: &u8| {
            let ends = *b == b'"' && !escaped;
            escaped = *b == b'\\' && !escaped;
            ends
        };
        let end = text.iter().position(ends).unwrap_or(text.len());
        let (string, at) = (text.get(..end).unwrap_or_default(), offset + start);
        let is_table = before == b"precompiled_charsmap";
        if is_table && !is_whole_table(string) || !is_table && string.len() > STRING_BYTES_MAX {
            let what = format!("a string of {} bytes that is no token and no whole table", string.len());
            return Err(Error::bad_data(what).at_byte(at as u64));
        }
        before = string;
        rest = text.get(end + 1..).unwrap_or_default();
        offset = at + end + 2;
    }
    Ok(())
}

/// Whether a table in Base64 has as many bytes as its first four, little-endian, say of its first part.
fn is_whole_table(base64: &[u8]) -> bool {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |b: &u8| DIGITS.iter().position(|d| d == b).unwrap_or(0) as u64;
    let bits = base64.iter().take(6).fold(0, |n, b| n << 6 | digit(b));
    let size = ((bits >> 4) as u32).swap_bytes();
    base64.len() >= 6 && u64::from(size) <= base64.len() as u64 / 4 * 3
}

/// The parts that rewrite a text before it is cut. They are small, as [`Outline`] has seen.
#[derive(Deserialize)]
struct Rewriting {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
}

/// Refuses parts that one after the other make a text longer and longer: forty times two is a trillion.
fn check_growth(json: &[u8]) -> Result<()> {
    let parts: Rewriting =
        serde_json::from_slice(json).map_err(|e| Error::bad_data(format!("not a tokenizer: {e}")))?;
    match growth(&parts.normalizer) * growth(&parts.pre_tokenizer) {
        times if times > GROWTH_MAX => {
            Err(Error::bad_data(format!("a tokenizer that can make a text {times:.0} times as long")))
        }
        _ => Ok(()),
    }
}

/// How many times as long a part and all in it can make a text, in bytes.
fn growth(part: &Value) -> f64 {
    let inner = |values: &mut dyn Iterator<Item = &Value>| values.map(growth).product::<f64>();
    match part {
        Value::Array(parts) => inner(&mut parts.iter()),
        Value::Object(members) => {
            let has = |key: &str| members.contains_key(key);
            let own = match members.get("content").and_then(Value::as_str) {
                // Where a pattern matches nothing, it does so between all characters.
                Some(content) if has("pattern") => 1.0 + content.len() as f64,
                // A byte becomes a character of at most two.
                _ if has("trim_offsets") => 2.0,
                _ if has("replacement") => 3.0,
                _ => 1.0,
            };
            own * inner(&mut members.values())
        }
        Value::String(kind) if kind == "ByteLevel" => 2.0,
        _ => 1.0,
    }
}

/// How many JSON values there are, each in it counted. None is kept: a file can have millions.
#[derive(Default)]
struct NValues(usize);

impl<'de> Deserialize<'de> for NValues {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<NValues, D::Error> {
        d.deserialize_any(Counter)
    }
}

struct Counter;

impl<'de> Visitor<'de> for Counter {
    type Value = NValues;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E>(self) -> std::result::Result<NValues, E> {
        Ok(NValues(1))
    }
    fn visit_bool<E>(self, _: bool) -> std::result::Result<NValues, E> {
        Ok(NValues(1))
    }
    fn visit_u64<E>(self, _: u64) -> std::result::Result<NValues, E> {
        Ok(NValues(1))
    }
    fn visit_i64<E>(self, _: i64) -> std::result::Result<NValues, E> {
        Ok(NValues(1))
    }
    fn visit_f64<E>(self, _: f64) -> std::result::Result<NValues, E> {
        Ok(NValues(1))
    }
    fn visit_str<E>(self, _: &str) -> std::result::Result<NValues, E> {
        Ok(NValues(1))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<NValues, A::Error> {
        let mut n = 1;
        while let Some(NValues(inner)) = seq.next_element()? {
            n = few(n + inner)?;
        }
        Ok(NValues(n))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<NValues, A::Error> {
        let mut n = 1;
        while let Some((IgnoredAny, NValues(inner))) = map.next_entry()? {
            n = few(n + inner)?;
        }
        Ok(NValues(n))
    }
}

/// Each part may bring a pattern, which is compiled when it is read and run over every text.
fn few<E: serde::de::Error>(n: usize) -> std::result::Result<usize, E> {
    match n {
        n if n > PART_VALUES_MAX => Err(E::custom(format!("a part of more than {PART_VALUES_MAX} values"))),
        n => Ok(n),
    }
}

#[derive(Deserialize)]
struct OutlineModel {
    #[serde(rename = "type")]
    kind: Option<String>,
}

thread_local! {
    /// Whether a panic of this thread is expected, and so not printed.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs foreign code; a panic in it becomes the message of an error, and nothing is printed.
fn quietly<T>(f: impl FnOnce() -> T) -> std::result::Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                previous(info);
            }
        }));
    });
    let outer = QUIET.replace(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    QUIET.set(outer);
    result.map_err(|payload| format!("it fails with {:?}", message(payload.as_ref())))
}

fn message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("an unknown panic")
}

#[cfg(test)]
mod tests {
    use super::*;
    use moepack_format::Kind;

    const TOKENIZER: &[u8] = include_bytes!("../../fixtures/tiny-deepseek-v3/tokenizer.json");

    /// `tokenizers.Tokenizer.from_file("fixtures/tiny-deepseek-v3/tokenizer.json").encode(TEXT,
    /// add_special_tokens=False).ids` of Python tokenizers 0.23.3.
    const TEXT: &str = "The quick brown fox\n\n  jumps over 12345 lazy dogs; it's naïve — 東京 <s>ok</s>\t!";
    const IDS: &[u32] = &[
        501, 699, 895, 279, 721, 79, 278, 80, 89, 1061, 635, 382, 1032, 809, 412, 1434, 21, 22, 309, 2018,
        90, 512, 1765, 28, 358, 538, 298, 66, 129, 109, 340, 1224, 244, 222, 164, 253, 111, 162, 120, 107,
        222, 0, 80, 76, 1, 199, 2,
    ];

    fn edited(from: &str, to: &str) -> Vec<u8> {
        let json = utf8(TOKENIZER).unwrap();
        assert!(json.contains(from), "{from}");
        json.replacen(from, to, 1).into_bytes()
    }

    #[test]
    fn ids_are_those_of_the_reference() {
        assert_eq!(Tokenizer::parse(TOKENIZER).unwrap().encode(TEXT).unwrap(), IDS);
    }

    #[test]
    fn truncation_padding_and_dropout_are_ignored() {
        let cut =
            r#""truncation": {"direction":"Right","max_length":4,"strategy":"LongestFirst","stride":0}"#;
        let cut = edited(r#""truncation": null"#, cut);
        assert_eq!(Tokenizer::parse(&cut).unwrap().encode(TEXT).unwrap(), IDS);
        let dropout = edited(r#""dropout": null"#, r#""dropout": 1.0"#);
        assert_eq!(Tokenizer::parse(&dropout).unwrap().encode(TEXT).unwrap(), IDS);
    }

    #[test]
    fn a_broken_tokenizer_is_refused() {
        let half = TOKENIZER.get(..TOKENIZER.len() / 2).unwrap().to_vec();
        let bomb = format!("{{\"model\":{{\"a\":{}", "[".repeat(100_000)).into_bytes();
        let cases: [(Vec<u8>, &str); 6] = [
            (Vec::new(), "EOF"),
            (half, "EOF"),
            (b"{}".to_vec(), "missing field `model`"),
            (b"[1]".to_vec(), "not a tokenizer"),
            (b"{\"model\":{\"type\":\"Magic\"}}".to_vec(), "not a usable Magic tokenizer"),
            (bomb, "EOF"),
        ];
        for (json, part) in &cases {
            let error = Tokenizer::parse(json).map(|_| ()).unwrap_err();
            assert_eq!(error.kind(), Kind::BadData);
            assert!(error.what().contains(part), "{:?} lacks {part:?}", error.what());
        }
    }

    #[test]
    fn a_tokenizer_of_thousands_of_patterns_is_refused() {
        let replace = r#"{"type":"Replace","pattern":{"Regex":"a+"},"content":"b"}"#;
        let all =
            format!(r#""normalizer": {{"type":"Sequence","normalizers":[{}]}}"#, [replace; 300].join(","));
        let error = Tokenizer::parse(&edited(r#""normalizer": null"#, &all)).map(|_| ()).unwrap_err();
        assert!(error.what().contains("a part of more than 1000 values"), "{error}");
    }

    #[test]
    fn a_tokenizer_that_makes_texts_longer_without_end_is_refused() {
        let byte_level =
            r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}"#;
        let replace = r#"{"type":"Replace","pattern":{"String":"a"},"content":"aa"}"#;
        for (part, one, parts) in
            [("pre_tokenizer", byte_level, "pretokenizers"), ("normalizer", replace, "normalizers")]
        {
            let json: Value = serde_json::from_slice(TOKENIZER).unwrap();
            let with = |n: usize| {
                let mut json = json.clone();
                let all: Vec<Value> = vec![serde_json::from_str(one).unwrap(); n];
                json[part] = serde_json::json!({ "type": "Sequence", parts: all });
                Tokenizer::parse(&serde_json::to_vec(&json).unwrap()).map(|_| ())
            };
            assert_eq!(with(2), Ok(()));
            assert!(with(41).unwrap_err().what().contains("times as long"), "{part}");
        }
    }

    #[test]
    fn strings_that_end_the_stack_or_the_memory_are_refused() {
        let long = format!("\"{}\": 2,", "a\\\"".repeat(2000));
        let error = Tokenizer::parse(&edited("\"!\": 2,", &long)).map(|_| ()).unwrap_err();
        assert!(error.what().contains("a string of 6000 bytes"), "{error}");
        let table = |base64: &str| {
            let part = format!(r#""normalizer": {{"type":"Precompiled","precompiled_charsmap":"{base64}"}}"#);
            Tokenizer::parse(&edited(r#""normalizer": null"#, &part)).map(|_| ())
        };
        // Two gigabytes, of which six bytes are there; then a table of eight bytes, all there.
        assert!(table("aaaaaaaa").unwrap_err().what().contains("no whole table"));
        assert!(is_whole_table(b"CAAAAAAAAAAAAAAA") && !is_whole_table(b"CAAAAAAA"));
    }

    #[test]
    fn a_damaged_tokenizer_never_panics() {
        let mut state = 1_u32;
        for n in 0..60 {
            let mut json = TOKENIZER.to_vec();
            for _ in 0..=n % 4 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // The first kilobytes hold the structure, the rest is vocabulary and merges.
                let at = (state >> 8) as usize % if n % 2 == 0 { 1200 } else { json.len() };
                json[at] = b"\"{}[],:019x\0\xff"[(state >> 4) as usize % 13];
            }
            if let Err(error) = Tokenizer::parse(&json).and_then(|t| t.encode(TEXT)) {
                assert_eq!(error.kind(), Kind::BadData);
            }
        }
    }

    #[test]
    fn a_panic_inside_the_crate_is_an_error() {
        assert_eq!(quietly(|| panic!("deep {}", 7)), Err::<(), _>("it fails with \"deep 7\"".to_owned()));
        assert!(!QUIET.get());
    }

    #[test]
    fn text_that_is_none_is_refused() {
        assert_eq!(Tokenizer::parse(TOKENIZER).unwrap().encode("").unwrap_err().what(), "the text is empty");
        let error = utf8(b"caf\xe9!").unwrap_err();
        assert_eq!((error.what(), error.byte()), ("text is not UTF-8: found byte 0xe9", Some(3)));
    }

    #[test]
    fn a_megabyte_is_one_string() {
        let text = TEXT.repeat(12_000);
        let start = std::time::Instant::now();
        let ids = Tokenizer::parse(TOKENIZER).unwrap().encode(&text).unwrap();
        println!("{} bytes, {} tokens, {:?}", text.len(), ids.len(), start.elapsed());
        assert!(ids.len() > 12_000 * 40);
    }
}
