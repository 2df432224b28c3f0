//! Strict JSON: duplicate keys, deep nesting and endless documents are refused, which serde_json alone would
//! take.
#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

use std::fmt;

use moepack_format::{Error, Result};
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::limits::JSON_DEPTH_MAX;

/// Parses one JSON document of at most `values_max` values.
///
/// # Errors
/// `BadData` for anything that is not one JSON document, for a key that stands twice in one object, for
/// nesting beyond [`JSON_DEPTH_MAX`] and for too many values, with line and column.
pub fn parse(bytes: &[u8], values_max: usize) -> Result<Value> {
    let mut left = values_max;
    let mut de = serde_json::Deserializer::from_slice(bytes);
    let seed = Strict { depth: 0, left: &mut left };
    let value = seed.deserialize(&mut de).and_then(|v| de.end().map(|()| v));
    value.map_err(|e| Error::bad_data(format!("not valid JSON: {e}")).at_byte(byte_of(bytes, &e)))
}

/// The document with each `Infinity` outside of strings, which Python writes and JSON has not, as a string; `None` where
/// there is none.
pub fn with_infinities(bytes: &[u8]) -> Option<Vec<u8>> {
    const WORD: &[u8] = b"Infinity";
    let mut out = Vec::with_capacity(bytes.len().saturating_add(16));
    let (mut in_string, mut found, mut rest) = (false, false, bytes);
    while let Some((&byte, after)) = rest.split_first() {
        if let (false, Some(after)) = (in_string, rest.strip_prefix(WORD)) {
            out.extend_from_slice(b"\"Infinity\"");
            (found, rest) = (true, after);
            continue;
        }
        out.push(byte);
        rest = after;
        match (byte, in_string) {
            (b'"', _) => in_string = !in_string,
            (b'\\', true) => {
                if let Some((&escaped, after)) = rest.split_first() {
                    out.push(escaped);
                    rest = after;
                }
            }
            _ => {}
        }
    }
    found.then_some(out)
}

/// Byte offset of an error's line and column.
fn byte_of(bytes: &[u8], error: &serde_json::Error) -> u64 {
    let lines = bytes.split_inclusive(|&b| b == b'\n').take(error.line().saturating_sub(1));
    let before: usize = lines.map(<[u8]>::len).sum();
    before.saturating_add(error.column().saturating_sub(1)) as u64
}

struct Strict<'a> {
    depth: usize,
    left: &'a mut usize,
}

impl Strict<'_> {
    fn inner(&mut self) -> Strict<'_> {
        Strict { depth: self.depth.saturating_add(1), left: self.left }
    }
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, de: D) -> std::result::Result<Value, D::Error> {
        *self.left = self.left.checked_sub(1).ok_or_else(|| D::Error::custom("too many values"))?;
        if self.depth > JSON_DEPTH_MAX {
            return Err(D::Error::custom(format!("nested deeper than {JSON_DEPTH_MAX}")));
        }
        de.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_bool<E>(self, v: bool) -> std::result::Result<Value, E> {
        Ok(Value::Bool(v))
    }
    fn visit_u64<E>(self, v: u64) -> std::result::Result<Value, E> {
        Ok(Value::Number(v.into()))
    }
    fn visit_i64<E>(self, v: i64) -> std::result::Result<Value, E> {
        Ok(Value::Number(v.into()))
    }
    fn visit_f64<E: serde::de::Error>(self, v: f64) -> std::result::Result<Value, E> {
        Number::from_f64(v).map(Value::Number).ok_or_else(|| E::custom("a number beyond f64"))
    }
    fn visit_str<E>(self, v: &str) -> std::result::Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }
    fn visit_string<E>(self, v: String) -> std::result::Result<Value, E> {
        Ok(Value::String(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> std::result::Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(self.inner())? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> std::result::Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format!("key {key:?} stands twice")));
            }
            let value = map.next_value_seed(self.inner())?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &[u8]) -> String {
        parse(text, 1000).unwrap_err().to_string()
    }

    #[test]
    fn what_serde_takes_is_refused() {
        let cases: &[(&[u8], &str)] = &[
            (b"{\"a\":1,\"a\":2}", "key \"a\" stands twice at line 1 column 10"),
            (b"", "EOF while parsing a value at line 1 column 0"),
            (b"{} x", "trailing characters at line 1 column 4"),
            (b"{\"a\":\n NaN}", "expected value at line 2 column 2"),
            (b"\xef\xbb\xbf{}", "expected value at line 1 column 1"),
            (b"{\"a\":1e999}", "number out of range at line 1 column 10"),
        ];
        for (text, expected) in cases {
            let message = refusal(text);
            assert!(message.contains(expected), "{}\n{message}", String::from_utf8_lossy(text));
        }
    }

    #[test]
    fn nesting_and_length_are_capped() {
        assert!(refusal(&[b'['; 100_000]).contains("nested deeper than 64"));
        let long = format!("[{}1]", "1,".repeat(2000));
        assert!(refusal(long.as_bytes()).contains("too many values"));
    }

    #[test]
    fn a_document_comes_back_in_order() {
        let value = parse(b" {\"b\":[1,-2,0.5,null,true],\"a\":{\"c\":\"d\"}}\n", 100).unwrap();
        assert_eq!(value.to_string(), "{\"b\":[1,-2,0.5,null,true],\"a\":{\"c\":\"d\"}}");
    }
}
