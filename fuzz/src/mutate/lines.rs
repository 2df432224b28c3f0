//! TOML as lines: a value, or a whole line.

use super::text::{hostile, near};
use super::{Edit, Field, Kind, slice};
use crate::random::Random;

/// All lines, and the values behind `=`.
pub(super) fn fields(file: &[u8]) -> Vec<Field> {
    let mut fields = Vec::new();
    let mut start = 0;
    for line in file.split_inclusive(|&b| b == b'\n') {
        let end = start + line.len();
        fields.push(Field { kind: Kind::TomlLine, range: start..end });
        if let Some(at) = line.iter().position(|&b| b == b'=') {
            let from = start + at + 1;
            let blank = slice(file, &(from..end)).iter().take_while(|&&b| b == b' ').count();
            fields.push(Field { kind: Kind::TomlValue, range: from + blank..end.saturating_sub(1) });
        }
        start = end;
    }
    fields
}

/// A change of one field.
pub(super) fn edit(random: &mut Random, file: &[u8], field: &Field, fields: &[Field]) -> Edit {
    let old = slice(file, &field.range);
    let other = random.pick(fields).map(|f| slice(file, &f.range).to_vec()).unwrap_or_default();
    let text = std::str::from_utf8(old).unwrap_or_default();
    let with = match (field.kind, random.below(5)) {
        (Kind::TomlLine, 0) => Vec::new(),
        (Kind::TomlLine, 1) => old.repeat(2),
        (Kind::TomlLine, 2) => old.repeat([3, 50, 5000].get(random.below(3)).copied().unwrap_or(3)),
        (Kind::TomlLine, _) => [old, &other].concat(),
        (_, 0) if text.starts_with(|c: char| c.is_ascii_digit()) => near(random, text),
        (_, 1) => other,
        _ => hostile(random),
    };
    Edit { range: field.range.clone(), with }
}
