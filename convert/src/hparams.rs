//! Typed, checked access to config.json: aliases, nested text_config, and a range for every number.
//!
//! Nothing is taken on trust: a value of the wrong type, below one or beyond its cap is refused here, so that
//! what is made of it may be multiplied and allocated. A default is given only where transformers has one, by
//! the caller.

use std::path::{Path, PathBuf};

use moepack_format::{Error, Result};
use serde_json::{Map, Value};

use crate::json;
use crate::limits::CONFIG_VALUES_MAX;

/// A parsed config.json.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    path: PathBuf,
    root: Map<String, Value>,
}

/// Spellings of one key, most common first.
pub type Keys = &'static [&'static str];

impl Config {
    /// Parses the text of a config.json; `path` is for messages.
    ///
    /// # Errors
    /// `BadData` for anything but one JSON object without duplicate keys.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Config> {
        let infinities = json::with_infinities(text);
        let text = infinities.as_deref().unwrap_or(text);
        match json::parse(text, CONFIG_VALUES_MAX).map_err(|e| e.in_file(path))? {
            Value::Object(root) => Ok(Config { path: path.to_owned(), root }),
            other => Err(Error::bad_data(format!("config.json holds {}, expected an object", kind(&other)))
                .in_file(path)),
        }
    }

    /// The value of the first key that is there and not null: inside `text_config` first, then at the top. A key
    /// `a.b` is `b` inside the object `a`.
    pub fn find(&self, keys: &[&'static str]) -> Option<(&'static str, &Value)> {
        let text = self.root.get("text_config").and_then(Value::as_object);
        let places = text.into_iter().chain([&self.root]);
        let mut hits = places.flat_map(|map| keys.iter().filter_map(|&k| inside(map, k).map(|v| (k, v))));
        hits.find(|(_, v)| !v.is_null())
    }

    /// Whether one of the keys is written, even as null.
    pub fn mentions(&self, keys: &[&'static str]) -> bool {
        let text = self.root.get("text_config").and_then(Value::as_object);
        text.into_iter().chain([&self.root]).any(|map| keys.iter().any(|&k| inside(map, k).is_some()))
    }

    /// Names of the model type: at the top, and that of a nested text model.
    pub fn model_types(&self) -> Vec<&str> {
        let text = self.root.get("text_config").and_then(Value::as_object);
        [Some(&self.root), text]
            .into_iter()
            .flatten()
            .filter_map(|m| m.get("model_type"))
            .filter_map(Value::as_str)
            .collect()
    }

    /// An integer of `min ..= max`, if the key is there.
    ///
    /// # Errors
    /// Another type or a value out of range.
    pub fn uint_opt(&self, keys: &[&'static str], min: usize, max: usize) -> Result<Option<usize>> {
        let Some((key, value)) = self.find(keys) else { return Ok(None) };
        let expected = || format!("an integer from {min} to {max}");
        let n = integer(value).ok_or_else(|| self.bad(key, value, &expected()))?;
        match usize::try_from(n) {
            Ok(n) if (min..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.bad(key, value, &expected())),
        }
    }

    /// An integer of `min ..= max` that must be there.
    ///
    /// # Errors
    /// The key is missing, of another type or out of range.
    pub fn uint(&self, keys: &[&'static str], min: usize, max: usize) -> Result<usize> {
        self.uint_opt(keys, min, max)?.ok_or_else(|| self.missing(keys))
    }

    /// An integer of `min ..= max` that must be there: once, or the same for every layer.
    ///
    /// # Errors
    /// The key is missing, of another type or out of range, or a list of different integers.
    pub fn uint_of_layers(&self, keys: &[&'static str], min: usize, max: usize) -> Result<usize> {
        let Some((key, Value::Array(list))) = self.find(keys) else { return self.uint(keys, min, max) };
        let n = list.first().and_then(integer).and_then(|n| usize::try_from(n).ok());
        match n.filter(|n| (min..=max).contains(n) && list.iter().all(|v| Some(v) == list.first())) {
            Some(n) => Ok(n),
            None => {
                let expected =
                    format!("an integer from {min} to {max}, or a list of the same for each layer");
                Err(self.bad(key, &Value::Array(list.clone()), &expected))
            }
        }
    }

    /// A finite number, if the key is there.
    ///
    /// # Errors
    /// Another type, or a value beyond f32.
    pub fn number_opt(&self, keys: &[&'static str]) -> Result<Option<f64>> {
        let Some((key, value)) = self.find(keys) else { return Ok(None) };
        self.number_of(key, value).map(Some)
    }

    /// A boolean, or the default.
    ///
    /// # Errors
    /// Another type.
    pub fn flag(&self, keys: &[&'static str], default: bool) -> Result<bool> {
        match self.find(keys) {
            None => Ok(default),
            Some((_, Value::Bool(b))) => Ok(*b),
            Some((key, value)) => Err(self.bad(key, value, "true or false")),
        }
    }

    /// A list of integers below `max`, if the key is there.
    ///
    /// # Errors
    /// Another type, or an entry out of range.
    pub fn uints_opt(&self, keys: &[&'static str], max: usize) -> Result<Option<Vec<usize>>> {
        let Some((key, value)) = self.find(keys) else { return Ok(None) };
        let expected = format!("a list of integers below {max}");
        let items = value.as_array().ok_or_else(|| self.bad(key, value, &expected))?;
        let one = |v: &Value| integer(v).and_then(|n| usize::try_from(n).ok()).filter(|&n| n < max);
        items
            .iter()
            .map(|v| one(v).ok_or_else(|| self.bad(key, v, &expected)))
            .collect::<Result<_>>()
            .map(Some)
    }

    /// A list of exactly `len` strings, if the key is there.
    ///
    /// # Errors
    /// Another type or length.
    pub fn strings_opt(&self, keys: &[&'static str], len: usize) -> Result<Option<Vec<&str>>> {
        let Some((key, value)) = self.find(keys) else { return Ok(None) };
        let expected = format!("a list of {len} strings");
        let items = value.as_array().filter(|a| a.len() == len);
        let items = items.ok_or_else(|| self.bad(key, value, &expected))?;
        match items.iter().find(|v| !v.is_string()) {
            Some(odd) => Err(self.bad(key, odd, &expected)),
            None => Ok(Some(items.iter().filter_map(Value::as_str).collect())),
        }
    }

    /// An object, if the key is there.
    ///
    /// # Errors
    /// Another type.
    pub fn object_opt(&self, keys: &[&'static str]) -> Result<Option<Section<'_>>> {
        match self.find(keys) {
            None => Ok(None),
            Some((name, Value::Object(map))) => Ok(Some(Section { config: self, name, part: None, map })),
            Some((key, value)) => Err(self.bad(key, value, "an object")),
        }
    }

    /// The error for a value that is not what was expected.
    pub fn bad(&self, key: &str, value: &Value, expected: &str) -> Error {
        Error::bad_data(format!("{key} is {}, expected {expected}", short(value))).in_file(&self.path)
    }

    /// An error about this file.
    pub fn error(&self, what: impl Into<String>) -> Error {
        Error::bad_data(what).in_file(&self.path)
    }

    fn missing(&self, keys: &[&'static str]) -> Error {
        let also = match keys {
            [_, others @ ..] if !others.is_empty() => format!(" (nor {})", others.join(", ")),
            _ => String::new(),
        };
        self.error(format!("{} is missing{also}", keys.first().unwrap_or(&"a key")))
            .hint("restore the config.json of the release; sizes are never guessed")
    }

    fn number_of(&self, key: &str, value: &Value) -> Result<f64> {
        let number = value.as_f64().filter(|n| (*n as f32).is_finite());
        number.ok_or_else(|| self.bad(key, value, "a number that fits f32"))
    }
}

/// An object inside config.json, such as `rope_scaling`.
#[derive(Clone, Copy, Debug)]
pub struct Section<'a> {
    config: &'a Config,
    name: &'static str,
    /// The name of an object inside.
    part: Option<&'a str>,
    map: &'a Map<String, Value>,
}

impl<'a> Section<'a> {
    /// The value of the first key that is there and not null.
    pub fn find(&self, keys: &[&str]) -> Option<&'a Value> {
        keys.iter().filter_map(|&k| self.map.get(k)).find(|v| !v.is_null())
    }

    /// The object with this name inside, if there is one.
    ///
    /// # Errors
    /// Another type.
    pub fn object_opt(&self, key: &str) -> Result<Option<Section<'a>>> {
        match self.map.get_key_value(key) {
            None | Some((_, Value::Null)) => Ok(None),
            Some((part, Value::Object(map))) => Ok(Some(Section { part: Some(part), map, ..*self })),
            Some((_, v)) => Err(self.config.bad(&self.path(key), v, "an object")),
        }
    }

    /// Whether this is the object with this name inside another.
    pub fn is_part(&self, key: &str) -> bool {
        self.part == Some(key)
    }

    /// A list of exactly `len` numbers above 0.
    ///
    /// # Errors
    /// The key is missing, or holds anything else.
    pub fn numbers(&self, key: &str, len: usize) -> Result<Vec<f64>> {
        let expected = format!("must be a list of {len} numbers above 0");
        let list = self.find(&[key]).and_then(Value::as_array).filter(|a| a.len() == len);
        let one = |v: &Value| v.as_f64().filter(|n| *n > 0.0 && (*n as f32).is_finite());
        let numbers = list.and_then(|a| a.iter().map(one).collect::<Option<Vec<_>>>());
        numbers.ok_or_else(|| self.error(key, &expected))
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// A finite number, if the key is there.
    ///
    /// # Errors
    /// Another type, or a value beyond f32.
    pub fn number_opt(&self, key: &str) -> Result<Option<f64>> {
        self.find(&[key]).map(|v| self.config.number_of(&self.path(key), v)).transpose()
    }

    /// A string, if one of the keys is there.
    ///
    /// # Errors
    /// Another type.
    pub fn string_opt(&self, keys: &[&str]) -> Result<Option<&'a str>> {
        let one = |v: &'a Value| {
            v.as_str().ok_or_else(|| self.config.bad(&self.path(keys.first().unwrap_or(&"")), v, "a string"))
        };
        self.find(keys).map(one).transpose()
    }

    /// A boolean, or the default.
    ///
    /// # Errors
    /// Another type.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.find(&[key]) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(v) => Err(self.config.bad(&self.path(key), v, "true or false")),
        }
    }

    /// An error about one key of this section.
    pub fn error(&self, key: &str, what: &str) -> Error {
        self.config.error(format!("{} {what}", self.path(key)))
    }

    fn path(&self, key: &str) -> String {
        match self.part {
            None => format!("{}.{key}", self.name),
            Some(part) => format!("{}.{part}.{key}", self.name),
        }
    }
}

/// The value of a key, or of `a.b` inside the object `a`.
fn inside<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        None => map.get(key),
        Some((outer, inner)) => inside(map.get(outer)?.as_object()?, inner),
    }
}

/// An integer, also one that a Python writer made a float (`4.0`).
fn integer(value: &Value) -> Option<i64> {
    let whole = |f: f64| (f.fract() == 0.0 && f.abs() < 9e15).then_some(f as i64);
    value.as_i64().or_else(|| value.as_f64().filter(|_| value.is_f64()).and_then(whole))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value for a message: scalars as they are, cut to a line; the rest by kind.
fn short(value: &Value) -> String {
    match value {
        Value::Array(_) | Value::Object(_) => kind(value).to_owned(),
        scalar => {
            let text = scalar.to_string();
            let cut: String = text.chars().take(80).collect();
            if cut.len() < text.len() { format!("{cut}…") } else { cut }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(Path::new("config.json"), text.as_bytes()).unwrap()
    }

    #[test]
    fn the_text_model_comes_before_the_top() {
        let c = config(
            r#"{"n": 1, "m": 7, "text_config": {"n": 2, "model_type": "inner"}, "model_type": "outer"}"#,
        );
        assert_eq!(c.uint(&["n"], 1, 9), Ok(2));
        assert_eq!(c.uint(&["absent", "m"], 1, 9), Ok(7));
        assert_eq!(c.model_types(), ["outer", "inner"]);
    }

    #[test]
    fn absurd_values_are_refused_by_name() {
        let c = config(
            r#"{"zero": 0, "neg": -3, "big": 1e300, "half": 1.5, "text": "8", "list": [1], "f": 8.0}"#,
        );
        let cases: &[(Keys, &str)] = &[
            (&["zero"], "zero is 0, expected an integer from 1 to 64"),
            (&["neg"], "neg is -3, expected an integer from 1 to 64"),
            (&["big"], "big is 1e+300, expected an integer from 1 to 64"),
            (&["half"], "half is 1.5, expected an integer from 1 to 64"),
            (&["text"], "text is \"8\", expected an integer from 1 to 64"),
            (&["list"], "list is a list, expected an integer from 1 to 64"),
            (&["gone", "lost"], "gone is missing (nor lost)"),
        ];
        for (keys, expected) in cases {
            assert_eq!(c.uint(keys, 1, 64).unwrap_err().what(), *expected);
        }
        assert_eq!(c.uint(&["f"], 1, 64), Ok(8));
        assert_eq!(
            c.number_opt(&["big"]).unwrap_err().what(),
            "big is 1e+300, expected a number that fits f32"
        );
    }

    #[test]
    fn an_infinity_that_python_wrote_is_read() {
        let c = config(r#"{"a": [0.0, Infinity], "b": "\" Infinity", "c": 1}"#);
        assert_eq!(c.find(&["a"]).unwrap().1, &serde_json::json!([0.0, "Infinity"]));
        assert_eq!(c.find(&["b"]).unwrap().1, "\" Infinity");
        assert_eq!(c.uint(&["c"], 1, 1), Ok(1));
        assert!(Config::parse(Path::new("config.json"), br#"{"a": -Infinity, "b": NaN}"#).is_err());
    }

    #[test]
    fn a_document_that_is_no_object_is_refused() {
        let e = Config::parse(Path::new("config.json"), b"[]").unwrap_err();
        assert_eq!(e.to_string(), "config.json holds a list, expected an object\n  in config.json");
    }
}
