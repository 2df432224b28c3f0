//! From a seed to an input: noise, or one thing changed and everything around it made to fit again.
//!
//! A reader that compares a checksum first is never tried by noise. So a [`Shape`] knows where the fields of a file are
//! ([`Field`]); one of them is changed, and lengths and checksums around it are written anew, which is what an attacker
//! does too.

use std::ops::Range;

use crate::random::Random;

mod binary;
mod bytes;
mod frame;
mod json;
mod lines;
mod text;

/// How a file is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Nothing is known.
    Bytes,
    /// A JSON document.
    Json,
    /// `key = value` lines.
    Toml,
    /// Length, JSON, data.
    Safetensors,
    /// A safetensors file with the index of a bank and a checksum for each record.
    Bank,
    /// JSON that ends with its own SHA-256.
    Manifest,
    /// A header of numbers, and a SHA-256 at the end.
    Baseline,
    /// A GGUF file.
    Gguf,
    /// llama.cpp's earlier importance matrix.
    Dat,
    /// A codec's number, a shape and planes, see `targets/codecs.rs`.
    Planes,
}

/// A thing that can be changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// What it is.
    pub kind: Kind,
    /// Its bytes.
    pub range: Range<usize>,
}

/// What a field is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A JSON value.
    JsonValue,
    /// A JSON key, quotes included.
    JsonKey,
    /// A JSON key with its value, or an element of a list.
    JsonMember,
    /// What stands behind `=`.
    TomlValue,
    /// A line.
    TomlLine,
    /// A little-endian number.
    Number,
}

/// Bytes that take the place of others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Edit {
    pub range: Range<usize>,
    pub with: Vec<u8>,
}

impl Shape {
    /// Everything in `file` that can be changed.
    pub fn fields(self, file: &[u8]) -> Vec<Field> {
        match self {
            Shape::Bytes => Vec::new(),
            Shape::Json | Shape::Manifest => json::fields(file, 0),
            Shape::Toml => lines::fields(file),
            Shape::Safetensors => frame::header_fields(file),
            Shape::Bank => [frame::header_fields(file), frame::index_fields(file)].concat(),
            Shape::Baseline => binary::baseline(file),
            Shape::Gguf => binary::gguf(file),
            Shape::Dat => binary::dat(file),
            Shape::Planes => binary::planes(file),
        }
    }
}

/// Makes an input from `seed`, whose `fields` are those of [`Shape::fields`].
pub fn mutate(random: &mut Random, shape: Shape, seed: &[u8], fields: &[Field], others: &[&[u8]]) -> Vec<u8> {
    if fields.is_empty() || random.once_in(4) {
        let file = bytes::noise(random, seed, others);
        // Half of the noise goes on behind the checksums.
        let same_length = file.len() == seed.len();
        return if same_length && random.once_in(2) { frame::seal(shape, file) } else { file };
    }
    let mut file = change(random, shape, seed, fields);
    while random.once_in(6) {
        let fields = shape.fields(&file);
        file = change(random, shape, &file, &fields);
    }
    file
}

/// Changes one thing and makes the rest fit.
fn change(random: &mut Random, shape: Shape, file: &[u8], fields: &[Field]) -> Vec<u8> {
    let Some(field) = random.pick(fields) else { return file.to_vec() };
    let edit = match field.kind {
        Kind::JsonValue | Kind::JsonKey | Kind::JsonMember => json::edit(random, file, field, fields),
        Kind::TomlValue | Kind::TomlLine => lines::edit(random, file, field, fields),
        Kind::Number => binary::edit(random, file, field, fields),
    };
    frame::apply(shape, file, &edit)
}

/// The bytes of a field.
pub(crate) fn slice<'a>(file: &'a [u8], range: &Range<usize>) -> &'a [u8] {
    file.get(range.clone()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_numbers_make_the_same_input() {
        let seed = br#"{"a": [1, 2, {"b": "c"}], "d": null}"#;
        let fields = Shape::Json.fields(seed);
        let input = |n| mutate(&mut Random::of(3, "t", n), Shape::Json, seed, &fields, &[]);
        let all: Vec<_> = (0..100).map(input).collect();
        assert_eq!(all, (0..100).map(input).collect::<Vec<_>>());
        assert!(all.iter().any(|i| i != &all[0]));
    }
}
