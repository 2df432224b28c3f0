//! JSON as text: so that a key may stand twice and a number may be of any length, no tree is built.

use std::ops::Range;

use super::text::{hostile, near};
use super::{Edit, Field, Kind, slice};
use crate::random::Random;

/// Values, keys and members of the document that begins at `start`, as far as it is JSON.
pub(super) fn fields(file: &[u8], start: usize) -> Vec<Field> {
    let mut walk = Walk { file, at: start, fields: Vec::new() };
    walk.value(0);
    walk.fields
}

/// Deeper than this nothing is looked at.
const DEPTH_MAX: usize = 100;

struct Walk<'a> {
    file: &'a [u8],
    at: usize,
    fields: Vec<Field>,
}

impl Walk<'_> {
    fn peek(&mut self) -> Option<u8> {
        while self.file.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        self.file.get(self.at).copied()
    }

    fn take(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.at += 1)
    }

    fn push(&mut self, kind: Kind, range: Range<usize>) {
        self.fields.push(Field { kind, range });
    }

    fn value(&mut self, depth: usize) -> Option<Range<usize>> {
        let first = self.peek()?;
        let start = self.at;
        match first {
            b'{' if depth < DEPTH_MAX => self.object(depth)?,
            b'[' if depth < DEPTH_MAX => self.list(depth)?,
            b'"' => self.string()?,
            _ => self.word()?,
        }
        self.push(Kind::JsonValue, start..self.at);
        Some(start..self.at)
    }

    fn object(&mut self, depth: usize) -> Option<()> {
        self.take(b'{')?;
        while self.peek()? != b'}' {
            self.peek()?;
            let start = self.at;
            self.string()?;
            self.push(Kind::JsonKey, start..self.at);
            self.take(b':')?;
            let value = self.value(depth + 1)?;
            self.push(Kind::JsonMember, start..value.end);
            if self.take(b',').is_none() {
                break;
            }
        }
        self.take(b'}')
    }

    fn list(&mut self, depth: usize) -> Option<()> {
        self.take(b'[')?;
        while self.peek()? != b']' {
            let element = self.value(depth + 1)?;
            self.push(Kind::JsonMember, element);
            if self.take(b',').is_none() {
                break;
            }
        }
        self.take(b']')
    }

    fn string(&mut self) -> Option<()> {
        self.take(b'"')?;
        loop {
            match self.file.get(self.at)? {
                b'"' => break,
                b'\\' => self.at += 2,
                _ => self.at += 1,
            }
        }
        self.at += 1;
        Some(())
    }

    fn word(&mut self) -> Option<()> {
        let start = self.at;
        let is_word = |b: &u8| b.is_ascii_alphanumeric() || b"+-.".contains(b);
        while self.file.get(self.at).is_some_and(is_word) {
            self.at += 1;
        }
        (self.at > start).then_some(())
    }
}

/// A change of one field.
pub(super) fn edit(random: &mut Random, file: &[u8], field: &Field, fields: &[Field]) -> Edit {
    let old = slice(file, &field.range);
    let mut other = |kind: Kind| {
        let found = (0..8).find_map(|_| random.pick(fields).filter(|f| f.kind == kind));
        found.map(|f| slice(file, &f.range).to_vec())
    };
    let (other_value, other_key) = (other(Kind::JsonValue), other(Kind::JsonKey));
    let replace = |with: Vec<u8>| Edit { range: field.range.clone(), with };
    match field.kind {
        Kind::JsonKey if random.once_in(2) => replace(other_key.unwrap_or_else(|| b"\"\"".to_vec())),
        Kind::JsonKey => replace(hostile(random)),
        Kind::JsonMember => match random.below(4) {
            0 | 1 => remove(file, &field.range),
            2 => replace([old, b",", old].concat()),
            _ => {
                let n = [3, 40, 3000]
                    .get(random.below(3))
                    .copied()
                    .unwrap_or(3)
                    .min(1 + (1 << 20) / old.len().max(1));
                replace([old, b","].concat().repeat(n).into_iter().chain(old.iter().copied()).collect())
            }
        },
        _ => replace(value(random, old, other_value)),
    }
}

/// Another value in place of `old`.
fn value(random: &mut Random, old: &[u8], other: Option<Vec<u8>>) -> Vec<u8> {
    if let (Some(inner), true) = (document_within(old), random.below(4) > 0) {
        let fields = fields(inner.as_bytes(), 0);
        if let Some(field) = random.pick(&fields) {
            let edit = edit(random, inner.as_bytes(), field, &fields);
            let text = applied(inner.as_bytes(), &edit);
            return serde_json::to_vec(&String::from_utf8_lossy(&text)).unwrap_or_default();
        }
    }
    let text = std::str::from_utf8(old).unwrap_or_default();
    match random.below(8) {
        0 | 1 if text.starts_with(|c: char| c.is_ascii_digit() || c == '-') => near(random, text),
        0 | 1 if text.starts_with('"') => string(random, text),
        2 => other.unwrap_or_else(|| hostile(random)),
        3 => [b"[", old, b"]"].concat(),
        _ => hostile(random),
    }
}

/// A string with one thing changed.
fn string(random: &mut Random, old: &str) -> Vec<u8> {
    let inner = old.trim_matches('"');
    let cut = inner.floor_char_boundary(random.below(inner.len() + 1));
    let (a, b) = inner.split_at(cut);
    let with = [
        "",
        "\\u0000",
        "\\n",
        "/../",
        "999999999999",
        "{L}",
        "*",
        "\u{202e}",
        ".",
        "-",
        "[",
        "\\\\",
        "(a+)+$",
    ];
    let with = random.pick(&with).copied().unwrap_or_default();
    let skipped = random.below(3);
    let b = b.get(b.ceil_char_boundary(skipped)..).unwrap_or_default();
    format!("\"{a}{with}{b}\"").into_bytes()
}

/// The JSON document that a string holds, as string tables of headers do.
fn document_within(old: &[u8]) -> Option<String> {
    let is_one = old.starts_with(b"\"{") || old.starts_with(b"\"[");
    is_one.then(|| serde_json::from_slice(old).ok()).flatten()
}

fn applied(file: &[u8], edit: &Edit) -> Vec<u8> {
    let (head, tail) = (slice(file, &(0..edit.range.start)), slice(file, &(edit.range.end..file.len())));
    [head, &edit.with, tail].concat()
}

/// Takes a member away with one of the commas around it.
fn remove(file: &[u8], range: &Range<usize>) -> Edit {
    let blank = |b: &&u8| b.is_ascii_whitespace();
    let behind = file.iter().skip(range.end).take_while(blank).count();
    if file.get(range.end + behind) == Some(&b',') {
        return Edit { range: range.start..range.end + behind + 1, with: Vec::new() };
    }
    let before = slice(file, &(0..range.start)).iter().rev().take_while(blank).count();
    let comma = range.start.checked_sub(before + 1).filter(|&at| file.get(at) == Some(&b','));
    Edit { range: comma.unwrap_or(range.start)..range.end, with: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_where_they_are() {
        let text = br#" {"a": [1, "b\"c"], "d": {}} "#;
        let found: Vec<_> = fields(text, 0)
            .iter()
            .map(|f| (f.kind, String::from_utf8_lossy(slice(text, &f.range)).into_owned()))
            .collect();
        let values: Vec<_> = found.iter().filter(|f| f.0 == Kind::JsonValue).map(|f| f.1.as_str()).collect();
        assert_eq!(values, ["1", r#""b\"c""#, r#"[1, "b\"c"]"#, "{}", r#"{"a": [1, "b\"c"], "d": {}}"#]);
        let keys: Vec<_> = found.iter().filter(|f| f.0 == Kind::JsonKey).map(|f| f.1.as_str()).collect();
        assert_eq!(keys, [r#""a""#, r#""d""#]);
    }

    #[test]
    fn a_member_goes_with_its_comma() {
        let text = br#"{"a": 1, "b": 2 }"#;
        let without = |range| String::from_utf8(applied(text, &remove(text, &range))).unwrap();
        assert_eq!(without(1..7), r#"{ "b": 2 }"#);
        assert_eq!(without(9..15), r#"{"a": 1 }"#);
    }
}
