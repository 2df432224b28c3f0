//! The `.dat` form.

use std::collections::BTreeMap;

use moepack_format::error::Context;
use moepack_format::{Error, InputFile, Result};

use super::{About, COUNT_MAX, Counts, ENTRIES_MAX, NAME_BYTES_MAX, Place};

/// Bytes of the name of a dataset.
const DATASET_BYTES_MAX: u64 = 1 << 16;

/// Whether a file begins as one of these: a count of entries, and a name that can be printed.
pub(super) fn looks_like(file: &InputFile) -> bool {
    let mut reader = Reader { file, position: 0 };
    let mut name = || {
        reader.count("entries", 1, ENTRIES_MAX)?;
        reader.text(1, NAME_BYTES_MAX)
    };
    name().is_ok_and(|name| name.bytes().all(|b| b.is_ascii_graphic()))
}

/// Where everything lies.
///
/// # Errors
/// Counts that cannot be or go beyond the file, names said twice, bytes behind the end.
pub(super) fn entries(file: &InputFile) -> Result<(About, BTreeMap<String, Place>)> {
    let mut reader = Reader { file, position: 0 };
    let n_entries = reader.count("entries", 1, ENTRIES_MAX)?;
    let mut entries = BTreeMap::new();
    for _ in 0..n_entries {
        let at = reader.position;
        let name = reader.text(1, NAME_BYTES_MAX)?;
        let place = reader.place().in_tensor(&name)?;
        if entries.insert(name.clone(), place).is_some() {
            return Err(Error::bad_data("a second entry of that name").in_tensor(name).at_byte(at));
        }
    }
    let mut about = About::default();
    // The first versions ended here.
    if reader.left() > 0 {
        about.n_chunks = reader.count("chunks", 0, COUNT_MAX)?;
    }
    if reader.left() > 0 {
        about.datasets = vec![reader.text(0, DATASET_BYTES_MAX)?];
    }
    match reader.left() {
        0 => Ok((about, entries)),
        left => Err(Error::bad_data(format!("{left} bytes behind the end")).at_byte(reader.position)),
    }
}

struct Reader<'a> {
    file: &'a InputFile,
    position: u64,
}

impl Reader<'_> {
    fn place(&mut self) -> Result<Place> {
        let calls = self.count("calls", 1, COUNT_MAX)?;
        let n_values = self.count("values", 1, COUNT_MAX)?;
        let values_offset = self.position;
        self.skip(n_values.saturating_mul(4))?;
        Ok(Place { values_offset, n_values, counts: Counts::Calls(calls) })
    }

    fn text(&mut self, min: u64, max: u64) -> Result<String> {
        let n = self.count("bytes of a name", min, max)?;
        let at = self.position;
        self.skip(n)?;
        let mut bytes = vec![0; n as usize];
        self.file.read_exact_at(at, &mut bytes)?;
        String::from_utf8(bytes).map_err(|_| Error::bad_data("a name that is not UTF-8").at_byte(at))
    }

    fn count(&mut self, what: &str, min: u64, max: u64) -> Result<u64> {
        let at = self.position;
        self.skip(4)?;
        let mut bytes = [0; 4];
        self.file.read_exact_at(at, &mut bytes)?;
        let found = i32::from_le_bytes(bytes);
        u64::try_from(found)
            .ok()
            .filter(|n| (min..=max).contains(n))
            .ok_or_else(|| Error::bad_data(format!("{found} {what}, expected {min} to {max}")).at_byte(at))
    }

    fn left(&self) -> u64 {
        self.file.len().saturating_sub(self.position)
    }

    fn skip(&mut self, bytes: u64) -> Result<()> {
        if bytes > self.left() {
            let what = format!("{bytes} bytes are expected, but {} are left of the file", self.left());
            return Err(Error::bad_data(what).at_byte(self.position));
        }
        self.position = self.position.saturating_add(bytes);
        Ok(())
    }
}
