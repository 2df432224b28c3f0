//! The text of a manifest: its hash, its version, and where its JSON goes wrong.

use std::io::{Result as IoResult, Write};
use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use sha2::{Digest, Sha256};

use super::mend::checksums;
use super::{FEATURES, FORMAT_VERSION, FormatVersion};
use crate::error::{Error, Result};
use crate::file::hex;

/// The hash at the end of the text is that of the text.
///
/// # Errors
/// `BadData` with both hashes.
pub(crate) fn check_hash(text: &[u8]) -> Result<()> {
    let place = hash_place(text).ok_or_else(|| Error::bad_data(HASH_PLACE))?;
    let stored = text.get(place.clone()).unwrap_or_default();
    let found = hash_of(text, &place).unwrap_or_default();
    if stored == found.as_bytes() {
        return Ok(());
    }
    let what = format!("sha256 of the manifest is {found}, it says {}", String::from_utf8_lossy(stored));
    Err(Error::bad_data(what).hint("the manifest was damaged or edited; `moepack check` says more"))
}

/// The text with its checksums and the hash of itself at its end, where there is nothing and zeros.
pub(super) fn fill_checks(text: &[u8]) -> Result<Vec<u8>> {
    let none = || Error::bad_data(HASH_PLACE);
    let place = hash_place(text).ok_or_else(none)?;
    let behind_crc = place.start.checked_sub(BEFORE_SHA.len()).ok_or_else(none)?;
    let (front, back) = text.split_at_checked(behind_crc).ok_or_else(none)?;
    let head = front.strip_suffix(BEFORE_CRC).ok_or_else(none)?;
    let mut filled = [front, checksums(head).as_bytes(), back].concat();
    let place = hash_place(&filled).ok_or_else(none)?;
    let sha256 = hash_of(&filled, &place).ok_or_else(none)?;
    filled.get_mut(place).ok_or_else(none)?.copy_from_slice(sha256.as_bytes());
    Ok(filled)
}

const HASH_PLACE: &str = "the manifest does not end with its sha256";

/// What stands in front of the checksums, between them and the hash, and at the end.
pub(super) const BEFORE_CRC: &[u8] = b"  \"crc32c\": \"";
pub(super) const BEFORE_SHA: &[u8] = b"\",\n  \"sha256\": \"";
pub(super) const BEHIND_SHA: &[u8] = b"\"\n}\n";
pub(super) const SHA_DIGITS: usize = 64;

/// Where the digits at the end are; the line before may be another field's.
fn hash_place(text: &[u8]) -> Option<Range<usize>> {
    const BEFORE: &[u8] = b"\n  \"sha256\": \"";
    let end = text.len().checked_sub(BEHIND_SHA.len())?;
    let start = end.checked_sub(SHA_DIGITS)?;
    let is_it = text.get(..start)?.ends_with(BEFORE) && text.get(end..)? == BEHIND_SHA;
    is_it.then_some(start..end)
}

/// The hash of a text with zeros in place of the digits.
pub(super) fn hash_of(text: &[u8], digits: &Range<usize>) -> Option<String> {
    let mut hash = Sha256::new();
    hash.update(text.get(..digits.start)?);
    hash.update([b'0'; SHA_DIGITS]);
    hash.update(text.get(digits.end..)?);
    Some(hex(&hash.finalize()))
}

/// Only what every version of the format has.
#[derive(Deserialize)]
struct Versioned {
    format_version: FormatVersion,
    #[serde(default)]
    features_required: Vec<String>,
}

/// Refuses a major version or a required feature that this code does not know.
pub(super) fn check_version(text: &[u8]) -> Result<()> {
    let found: Versioned = serde_json::from_slice(text).map_err(|e| json_error(&e, text))?;
    let FormatVersion { major, minor } = found.format_version;
    if major != FORMAT_VERSION.major {
        let FormatVersion { major: ours, .. } = FORMAT_VERSION;
        let what = format!("format version {major}.{minor}, this moepack reads version {ours}");
        return Err(Error::bad_data(what).hint(format!("use a moepack that reads version {major}")));
    }
    match found.features_required.iter().find(|f| !FEATURES.contains(&f.as_str())) {
        Some(feature) => {
            let what = format!("required feature {feature:?} is unknown, known are {FEATURES:?}");
            Err(Error::bad_data(what).hint("use a newer moepack"))
        }
        None => Ok(()),
    }
}

/// JSON with a line for each file and for each field of a layer: what lies deeper, such as a number for each expert, stands
/// in one line.
pub(super) fn to_json(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let lines = Lines { pretty: PrettyFormatter::new(), depth: 0 };
    let written = value.serialize(&mut Serializer::with_formatter(&mut text, lines));
    written.map_err(|e| Error::bad_data(format!("cannot write JSON: {e}")))?;
    Ok(text)
}

/// Lists and objects down to here have a line for each of their values.
const LINES_DEPTH: usize = 3;

struct Lines {
    pretty: PrettyFormatter<'static>,
    /// Of the list or object that is open.
    depth: usize,
}

impl Lines {
    fn in_line(&self) -> bool {
        self.depth > LINES_DEPTH
    }

    /// What comes between two values in one line.
    fn comma<W: ?Sized + Write>(out: &mut W, first: bool) -> IoResult<()> {
        out.write_all(if first { b"" } else { b"," })
    }
}

impl Formatter for Lines {
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> IoResult<()> {
        self.depth = self.depth.saturating_add(1);
        if self.in_line() { out.write_all(b"[") } else { self.pretty.begin_array(out) }
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> IoResult<()> {
        let in_line = self.in_line();
        self.depth = self.depth.saturating_sub(1);
        if in_line { out.write_all(b"]") } else { self.pretty.end_array(out) }
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> IoResult<()> {
        if self.in_line() { Lines::comma(out, first) } else { self.pretty.begin_array_value(out, first) }
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, out: &mut W) -> IoResult<()> {
        if self.in_line() { Ok(()) } else { self.pretty.end_array_value(out) }
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> IoResult<()> {
        self.depth = self.depth.saturating_add(1);
        if self.in_line() { out.write_all(b"{") } else { self.pretty.begin_object(out) }
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> IoResult<()> {
        let in_line = self.in_line();
        self.depth = self.depth.saturating_sub(1);
        if in_line { out.write_all(b"}") } else { self.pretty.end_object(out) }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> IoResult<()> {
        if self.in_line() { Lines::comma(out, first) } else { self.pretty.begin_object_key(out, first) }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> IoResult<()> {
        if self.in_line() { out.write_all(b":") } else { self.pretty.begin_object_value(out) }
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> IoResult<()> {
        if self.in_line() { Ok(()) } else { self.pretty.end_object_value(out) }
    }
}

/// An error of serde_json with the byte where it came.
pub(super) fn json_error(error: &serde_json::Error, text: &[u8]) -> Error {
    let lines_before = text.split_inclusive(|&b| b == b'\n').take(error.line().saturating_sub(1));
    let start: usize = lines_before.map(<[u8]>::len).sum();
    let message = error.to_string();
    let what = message.rsplit_once(" at line ").map_or(message.as_str(), |(what, _)| what);
    Error::bad_data(what).at_byte(start.saturating_add(error.column().saturating_sub(1)) as u64)
}
