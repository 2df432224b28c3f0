//! A bank: the routed experts of one layer in one file, one record each.
//!
//! ```text
//!       +--------+----------------+-----------+-----+----------+-----+----------+-----+
//!       | length | JSON and spaces| __index__ | pad | expert 0 | pad | expert 1 | pad | …
//!       +--------+----------------+-----------+-----+----------+-----+----------+-----+
//!       0        8                multiple          multiple         multiple         multiple
//!                                 of align          of align         of align         of align
//! ```
//!
//! It is a safetensors file that any reader opens, and a paged one: a record, which is one expert's parts with
//! all their planes, is read with one aligned `pread`. Inside a record planes start at multiples of 256. Every
//! gap is a tensor `__pad__.N` of zeros. `SPEC.md` has the tables.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::PlaneSpec;
use crate::error::{Error, Result};
use crate::limits::{ALIGN_MAX, ALIGN_MIN, EXPERTS_MAX, PARTS_MAX};

mod read;
mod record;
mod validate;
mod write;

pub use read::{Bank, ReadOptions};
pub use record::{PartView, Record};
pub use write::{BankSummary, BankWriter, PLANE_HEADER_BYTES, PartBytes, TABLE_HEADER_BYTES};

/// Name of the first tensor of a bank.
pub const INDEX: &str = "__index__";

/// Alignment of records unless something else is asked for: the page of Apple machines, a multiple of all others.
pub const ALIGN_DEFAULT: u64 = 16384;

/// What `format` says in a bank's string table.
pub const BANK_FORMAT: &str = "moepack.bank";

/// Version of banks and trunk files, `major.minor`.
pub const FILE_VERSION: &str = "1.0";

/// One matrix or vector of an expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartSpec {
    /// What it is: `gate_proj`, `up_proj`, `down_proj`, `gate_bias` …
    pub name: String,
    /// How its numbers are encoded, a canonical codec name.
    pub codec: String,
    /// Rows of the decoded matrix.
    pub rows: u64,
    /// Columns of the decoded matrix.
    pub cols: u64,
}

/// One part as it lies in a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartInfo {
    /// Name, codec and shape.
    pub spec: PartSpec,
    /// Its planes in order.
    pub planes: Vec<PlaneInfo>,
}

/// One plane as it lies in a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaneInfo {
    /// Name (`codes`, `scales` …), dtype and shape.
    pub spec: PlaneSpec,
    /// First byte, counted from the start of the record.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
}

/// The file name of a layer's bank.
pub fn bank_name(layer: u32) -> String {
    format!("experts-{layer:05}.safetensors")
}

/// Whether `name` is one that [`bank_name`] makes.
pub fn is_bank_name(name: &str) -> bool {
    let middle = name.strip_prefix("experts-").and_then(|n| n.strip_suffix(".safetensors"));
    middle.and_then(|n| n.parse().ok()).is_some_and(|layer| bank_name(layer) == name)
}

/// Start of the tensor names of one expert, which also names it in messages.
pub(crate) fn record_name(layer: u32, expert: u32) -> String {
    format!("layers.{layer}.experts.{expert}")
}

/// Refuses an alignment that records cannot have.
///
/// # Errors
/// No power of two, or outside the limits.
pub fn check_align(align: u64) -> Result<()> {
    if align.is_power_of_two() && (ALIGN_MIN..=ALIGN_MAX).contains(&align) {
        return Ok(());
    }
    let what = format!("align {align}, expected a power of two from {ALIGN_MIN} to {ALIGN_MAX}");
    Err(Error::bad_data(what))
}

/// A part of every expert of a bank; the codec is each expert's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PartShape {
    pub(crate) name: String,
    pub(crate) rows: u64,
    pub(crate) cols: u64,
}

/// The string table of a bank, typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) align: u64,
    pub(crate) layer: u32,
    pub(crate) n_experts: u32,
    pub(crate) codecs: Vec<String>,
    pub(crate) parts: Vec<PartShape>,
}

impl Table {
    /// As strings, the way a header keeps it.
    pub(crate) fn to_strings(&self) -> Result<BTreeMap<String, String>> {
        let json = |e: serde_json::Error| Error::bad_data(format!("cannot write JSON: {e}"));
        let entries = [
            ("align", self.align.to_string()),
            ("codecs", serde_json::to_string(&self.codecs).map_err(json)?),
            ("format", BANK_FORMAT.to_owned()),
            ("format_version", FILE_VERSION.to_owned()),
            ("layer", self.layer.to_string()),
            ("n_experts", self.n_experts.to_string()),
            ("parts", serde_json::to_string(&self.parts).map_err(json)?),
        ];
        Ok(entries.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
    }

    /// From the strings of a header. Unknown keys are a newer minor version's and ignored.
    pub(crate) fn from_strings(strings: &BTreeMap<String, String>) -> Result<Table> {
        check_file_version(strings, BANK_FORMAT)?;
        let table = Table {
            align: number(strings, "align")?,
            layer: number(strings, "layer")?,
            n_experts: number(strings, "n_experts")?,
            codecs: json(strings, "codecs")?,
            parts: json(strings, "parts")?,
        };
        table.check()?;
        Ok(table)
    }

    /// What must hold in a table that is read or written.
    pub(crate) fn check(&self) -> Result<()> {
        check_align(self.align)?;
        if self.n_experts == 0 || self.n_experts > EXPERTS_MAX {
            let what = format!("{} experts, expected 1 to {EXPERTS_MAX}", self.n_experts);
            return Err(Error::bad_data(what));
        }
        if self.parts.is_empty() || self.parts.len() > PARTS_MAX {
            let what = format!("{} parts of an expert, expected 1 to {PARTS_MAX}", self.parts.len());
            return Err(Error::bad_data(what));
        }
        for (i, part) in self.parts.iter().enumerate() {
            check_word(&part.name)?;
            if self.parts.iter().skip(i.saturating_add(1)).any(|other| other.name == part.name) {
                return Err(Error::bad_data(format!("part {:?} is listed twice", part.name)));
            }
        }
        let n_codecs = self.codecs.len();
        if n_codecs > usize::from(u16::MAX) {
            return Err(Error::bad_data(format!("{n_codecs} codecs, expected at most {}", u16::MAX)));
        }
        if self.codecs.iter().any(String::is_empty) {
            return Err(Error::bad_data("a codec without a name"));
        }
        Ok(())
    }
}

/// Refuses a file of another kind or of a version that is not ours to read.
pub(crate) fn check_file_version(strings: &BTreeMap<String, String>, format: &str) -> Result<()> {
    let found = string(strings, "format")?;
    if found != format {
        return Err(Error::bad_data(format!("format {found:?}, expected {format:?}")));
    }
    let found = string(strings, "format_version")?;
    let major = |v: &str| v.split_once('.').and_then(|(major, _)| major.parse::<u32>().ok());
    if major(found) != major(FILE_VERSION) {
        let what = format!("format version {found:?}, this moepack reads {FILE_VERSION:?}");
        return Err(Error::bad_data(what).hint("use a moepack that knows this version"));
    }
    Ok(())
}

/// Part and plane names become parts of tensor names, so they have no dots.
pub(crate) fn check_word(name: &str) -> Result<()> {
    let fine = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    if !name.is_empty() && name.len() <= 64 && name.bytes().all(fine) {
        return Ok(());
    }
    Err(Error::bad_data(format!("name {name:?}, expected 1 to 64 letters, digits, '_' or '-'")))
}

fn string<'a>(strings: &'a BTreeMap<String, String>, key: &str) -> Result<&'a str> {
    let found = strings.get(key).map(String::as_str);
    found.ok_or_else(|| Error::bad_data(format!("the header's string table has no {key:?}")))
}

fn number<T: std::str::FromStr + ToString>(strings: &BTreeMap<String, String>, key: &str) -> Result<T> {
    let text = string(strings, key)?;
    // Only the spelling we write: `+1` or `01` would be a second name for the same bank.
    let number = text.parse::<T>().ok().filter(|n| n.to_string() == text);
    number.ok_or_else(|| Error::bad_data(format!("{key} is {text:?}, expected a whole number")))
}

fn json<T: serde::de::DeserializeOwned>(strings: &BTreeMap<String, String>, key: &str) -> Result<T> {
    serde_json::from_str(string(strings, key)?).map_err(|e| Error::bad_data(format!("{key}: {e}")))
}

#[cfg(test)]
mod tests;
