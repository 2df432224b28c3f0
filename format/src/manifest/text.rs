//! The text of a manifest: its hash, its version, and where its JSON goes wrong.

use std::io::{Result as IoResult, Write};

use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use sha2::{Digest, Sha256};

use super::{FEATURES, FORMAT_VERSION, FormatVersion};
use crate::error::{Error, Result};
use crate::file::hex;

/// The hash at the end of the text is that of the text.
///
/// # Errors
/// `BadData` with both hashes.
pub(crate) fn check_hash(text: &[u8]) -> Result<()> {
    let (head, tail) = split_hash(text).ok_or_else(|| Error::bad_data(HASH_PLACE))?;
    let stored = text.get(head.len()..text.len() - tail.len()).unwrap_or_default();
    let mut hash = Sha256::new();
    hash.update(head);
    hash.update("0".repeat(64));
    hash.update(tail);
    let found = hex(&hash.finalize());
    if stored == found.as_bytes() {
        return Ok(());
    }
    let what = format!("sha256 of the manifest is {found}, it says {}", String::from_utf8_lossy(stored));
    Err(Error::bad_data(what).hint("the manifest was damaged or edited; copy the bundle again"))
}

/// The text with the hash of itself in place of the zeros at its end.
pub(super) fn fill_hash(text: &[u8]) -> Result<Vec<u8>> {
    let (head, tail) = split_hash(text).ok_or_else(|| Error::bad_data(HASH_PLACE))?;
    let digits = hex(&Sha256::digest(text));
    Ok([head, digits.as_bytes(), tail].concat())
}

const HASH_PLACE: &str = "the manifest does not end with its sha256";

/// What lies before and behind the 64 digits at the end.
fn split_hash(text: &[u8]) -> Option<(&[u8], &[u8])> {
    const BEFORE: &[u8] = b"\n  \"sha256\": \"";
    const BEHIND: &[u8] = b"\"\n}\n";
    let digits_end = text.len().checked_sub(BEHIND.len())?;
    let (head, tail) = text.split_at_checked(digits_end)?;
    let head = head.get(..head.len().checked_sub(64)?)?;
    (head.ends_with(BEFORE) && tail == BEHIND).then_some((head, tail))
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
        self.depth += 1;
        if self.in_line() { out.write_all(b"[") } else { self.pretty.begin_array(out) }
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> IoResult<()> {
        let in_line = self.in_line();
        self.depth -= 1;
        if in_line { out.write_all(b"]") } else { self.pretty.end_array(out) }
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> IoResult<()> {
        if self.in_line() { Lines::comma(out, first) } else { self.pretty.begin_array_value(out, first) }
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, out: &mut W) -> IoResult<()> {
        if self.in_line() { Ok(()) } else { self.pretty.end_array_value(out) }
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> IoResult<()> {
        self.depth += 1;
        if self.in_line() { out.write_all(b"{") } else { self.pretty.begin_object(out) }
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> IoResult<()> {
        let in_line = self.in_line();
        self.depth -= 1;
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
