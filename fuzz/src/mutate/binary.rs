//! Files of numbers: where the numbers are, and what to put there.

use super::{Edit, Field, Kind, slice};
use crate::random::Random;

/// Counts, lengths and offsets that arithmetic stumbles over.
pub(super) const INTERESTING: [u64; 24] = [
    0,
    1,
    2,
    3,
    7,
    8,
    31,
    32,
    63,
    64,
    127,
    255,
    256,
    0x7fff,
    0xffff,
    1 << 16,
    0x7fff_ffff,
    1 << 31,
    0xffff_ffff,
    1 << 32,
    1 << 60,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Another number of the same width.
pub(super) fn edit(random: &mut Random, file: &[u8], field: &Field, fields: &[Field]) -> Edit {
    let old = number(file, field);
    let new = match random.below(7) {
        0 => old.wrapping_add(1),
        1 => old.wrapping_sub(1),
        2 => old ^ 1 << random.below(64),
        3 => random.pick(fields).map_or(0, |other| number(file, other)),
        4 => old.wrapping_add(INTERESTING[random.below(INTERESTING.len())]),
        _ => INTERESTING[random.below(INTERESTING.len())],
    };
    let with = new.to_le_bytes().into_iter().take(field.range.len()).collect();
    Edit { range: field.range.clone(), with }
}

fn number(file: &[u8], field: &Field) -> u64 {
    let bytes = slice(file, &field.range).iter().take(8);
    bytes.enumerate().map(|(i, &b)| u64::from(b) << (8 * i)).sum()
}

/// The fixed header of a baseline, and some window lengths behind its meta block.
pub(super) fn baseline(file: &[u8]) -> Vec<Field> {
    let mut walk = Walk::new(file);
    walk.skip(8);
    [4, 4, 4, 4, 8, 8, 8, 8, 8].into_iter().for_each(|width| _ = walk.number(width));
    walk.fields
}

/// Everything in front of the data of a GGUF file.
pub(super) fn gguf(file: &[u8]) -> Vec<Field> {
    let mut walk = Walk::new(file);
    walk.gguf();
    walk.fields
}

/// The counts of a `.dat`, and the first values of each entry.
pub(super) fn dat(file: &[u8]) -> Vec<Field> {
    let mut walk = Walk::new(file);
    walk.dat();
    walk.fields
}

/// Head and lengths of planes, see `targets/codecs.rs`.
pub(super) fn planes(file: &[u8]) -> Vec<Field> {
    let mut walk = Walk::new(file);
    [1, 2, 8, 8, 4, 4].into_iter().for_each(|width| _ = walk.number(width));
    while let Some(n) = walk.number(4) {
        let start = walk.at;
        for at in (0..n as usize).step_by(1 + n as usize / 64) {
            walk.at = start + at;
            walk.number(2);
        }
        walk.at = start;
        walk.skip(n);
    }
    walk.fields
}

struct Walk<'a> {
    file: &'a [u8],
    at: usize,
    fields: Vec<Field>,
}

impl Walk<'_> {
    fn new(file: &[u8]) -> Walk<'_> {
        Walk { file, at: 0, fields: Vec::new() }
    }

    fn number(&mut self, width: usize) -> Option<u64> {
        let field = Field { kind: Kind::Number, range: self.at..self.at.checked_add(width)? };
        self.file.get(field.range.clone())?;
        self.at = field.range.end;
        let value = number(self.file, &field);
        self.fields.push(field);
        Some(value)
    }

    fn skip(&mut self, n: u64) {
        self.at = self.at.saturating_add(usize::try_from(n).unwrap_or(usize::MAX));
    }

    fn string(&mut self) -> Option<()> {
        let n = self.number(8)?;
        self.skip(n);
        Some(())
    }

    fn gguf(&mut self) -> Option<()> {
        self.number(4)?;
        self.number(4)?;
        let (n_tensors, n_keys) = (self.number(8)?, self.number(8)?);
        for _ in 0..n_keys {
            self.string()?;
            let kind = self.number(4)?;
            self.value(kind)?;
        }
        for _ in 0..n_tensors {
            self.string()?;
            for _ in 0..self.number(4)? {
                self.number(8)?;
            }
            self.number(4)?;
            self.number(8)?;
        }
        Some(())
    }

    fn value(&mut self, kind: u64) -> Option<()> {
        const STRING: u64 = 8;
        const ARRAY: u64 = 9;
        match kind {
            STRING => self.string(),
            ARRAY => {
                let (kind, n) = (self.number(4)?, self.number(8)?);
                (0..n).try_for_each(|_| self.value(kind))
            }
            _ => self.number([1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8].get(kind as usize).copied()?).map(drop),
        }
    }

    fn dat(&mut self) -> Option<()> {
        let n_entries = self.number(4)?;
        for _ in 0..n_entries {
            let n = self.number(4)?;
            self.skip(n);
            self.number(4)?;
            let n_values = self.number(4)?;
            let start = self.at;
            (0..n_values.min(4)).try_for_each(|_| self.number(4).map(drop))?;
            self.at = start;
            self.skip(4 * n_values);
        }
        self.number(4)?;
        self.number(4).map(drop)
    }
}
