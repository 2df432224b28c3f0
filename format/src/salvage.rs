//! What is left of a bank or trunk file whose header does not hold together any more.
//!
//! A reader refuses such a file; who repairs it wants to know where each record and tensor lies, so that only what is damaged is
//! made anew. The header is looked through for entries in the one spelling that writers of this format use, whatever stands
//! between them:
//!
//! ```text
//! "NAME":{"dtype":"U8","shape":[2,3],"data_offsets":[0,6]}
//! ```
//!
//! Nothing here is believed: a record or tensor is taken only if its checksum is right.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::index::{ROW_BYTES, RecordEntry};
use crate::layout::{TENSOR_ALIGN, align_up};
use crate::limits::{ALIGN_MIN, HEADER_BYTES_MAX, PARTS_MAX, PLANES_MAX, RECORD_BYTES_MAX, TENSORS_MAX};

/// Where a record lies, as far as header and index tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordLeft {
    /// First byte in the file.
    pub offset: u64,
    /// Bytes up to the end of the last plane.
    pub bytes: u64,
    /// The checksum in the index.
    pub crc32c: u32,
    /// Its planes in order.
    pub planes: Vec<PlaneLeft>,
}

/// Where a plane lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaneLeft {
    /// The part that it belongs to.
    pub part: String,
    /// First byte, counted from the start of the record.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
}

impl RecordLeft {
    /// The record's bytes, if they have the checksum.
    ///
    /// # Errors
    /// A disk that fails; a file that ends before is no error.
    pub fn read(&self, file: &InputFile) -> Result<Option<Vec<u8>>> {
        read_if(file, self.offset..self.offset.saturating_add(self.bytes), self.crc32c)
    }
}

/// Bytes of a file, if they have this checksum.
///
/// # Errors
/// A disk that fails; a file that ends before is no error.
pub fn read_if(file: &InputFile, range: Range<u64>, crc32c: u32) -> Result<Option<Vec<u8>>> {
    let bytes = read(file, range.start, range.end.saturating_sub(range.start))?;
    Ok(bytes.filter(|bytes| crc32c::crc32c(bytes) == crc32c))
}

/// The records of a bank, one for each expert; `None` where the header does not say where it lies.
///
/// # Errors
/// A disk that fails.
pub fn bank(file: &InputFile, layer: u32, n_experts: u32) -> Result<Vec<Option<RecordLeft>>> {
    let n = n_experts as usize;
    let mut records = vec![None; n];
    let Some((data_offset, rows)) = find_index(file, layer, n)? else { return Ok(records) };
    let text = read(file, 0, data_offset)?.unwrap_or_default();
    let mut planes: Vec<Vec<(String, Entry)>> = vec![Vec::new(); n];
    for entry in entries(&text) {
        let place = entry.name.split('.').collect::<Vec<_>>();
        if let ["layers", l, "experts", e, part, _] = *place.as_slice()
            && l.parse() == Ok(layer)
            && let Some(planes) = e.parse::<usize>().ok().and_then(|e| planes.get_mut(e))
        {
            planes.push((part.to_owned(), entry));
        }
    }
    for ((record, planes), row) in records.iter_mut().zip(planes).zip(rows.as_chunks::<ROW_BYTES>().0) {
        *record = record_of(planes, crc_of(row), data_offset, file.len());
    }
    Ok(records)
}

/// Start and end of the tensors of a trunk file that are found, by name.
///
/// # Errors
/// A disk that fails.
pub fn trunk(file: &InputFile) -> Result<BTreeMap<String, (u64, u64)>> {
    let most = file.len().min(HEADER_BYTES_MAX);
    let said = header_bytes(file)?.filter(|&n| n <= most);
    let mut text = said.map(|n| read(file, 0, n)).transpose()?.flatten().unwrap_or_default();
    if !text.trim_ascii_end().ends_with(b"}}") {
        text = read(file, 0, most)?.unwrap_or_default();
    }
    let entries = entries(&text);
    // The last entry is followed by the brace that ends the header.
    let json_end = entries.last().map_or(0, |e| e.text_end as u64).saturating_add(1);
    let data_offset = align_up(json_end, TENSOR_ALIGN)?;
    let place = |at: u64| data_offset.saturating_add(at);
    Ok(entries.into_iter().map(|e| (e.name, (place(e.start), place(e.end)))).collect())
}

/// What the first eight bytes say: the length of the header with them.
fn header_bytes(file: &InputFile) -> Result<Option<u64>> {
    let Some(bytes) = read(file, 0, 8)? else { return Ok(None) };
    let n = bytes.first_chunk().map(|n| u64::from_le_bytes(*n));
    Ok(n.and_then(|n| n.checked_add(8)))
}

/// Where the index lies, and its rows: where most of what should be rows names layer and expert.
fn find_index(file: &InputFile, layer: u32, n: usize) -> Result<Option<(u64, Vec<u8>)>> {
    let last = file.len().min(HEADER_BYTES_MAX);
    let said = header_bytes(file)?.filter(|&n| n <= last && n.is_multiple_of(ALIGN_MIN));
    let others = (1..=last / ALIGN_MIN).map(|i| i.saturating_mul(ALIGN_MIN));
    for at in said.into_iter().chain(others) {
        let first = read(file, at, n.min(16).saturating_mul(ROW_BYTES) as u64)?.unwrap_or_default();
        if !names_experts(&first, layer) {
            continue;
        }
        let rows = read(file, at, n.saturating_mul(ROW_BYTES) as u64)?;
        if let Some(rows) = rows.filter(|rows| names_experts(rows, layer)) {
            return Ok(Some((at, rows)));
        }
    }
    Ok(None)
}

fn names_experts(rows: &[u8], layer: u32) -> bool {
    let rows = rows.as_chunks::<ROW_BYTES>().0;
    let names = |(e, row): &(usize, &[u8; ROW_BYTES])| {
        RecordEntry::decode(row).is_ok_and(|r| r.layer == layer && r.expert as usize == *e)
    };
    rows.iter().enumerate().filter(names).count() > rows.len() / 2
}

/// The checksum in a row, whatever else is wrong with it.
fn crc_of(row: &[u8; ROW_BYTES]) -> u32 {
    row.get(24..).and_then(|r| r.first_chunk()).map_or(0, |crc| u32::from_le_bytes(*crc))
}

/// The record that these planes make, if they follow each other as they should.
fn record_of(
    planes: Vec<(String, Entry)>,
    crc32c: u32,
    data_offset: u64,
    file_len: u64,
) -> Option<RecordLeft> {
    if planes.len() > PARTS_MAX * PLANES_MAX {
        return None;
    }
    let first = planes.first()?.1.start;
    let mut left = Vec::with_capacity(planes.len());
    let mut at = first;
    for (part, Entry { start, end, .. }) in planes {
        if align_up(at, TENSOR_ALIGN).ok()? != start {
            return None;
        }
        left.push(PlaneLeft { part, offset: start.checked_sub(first)?, bytes: end.checked_sub(start)? });
        at = end;
    }
    let (offset, bytes) = (data_offset.checked_add(first)?, at.checked_sub(first)?);
    let fits = bytes <= RECORD_BYTES_MAX && offset.checked_add(bytes)? <= file_len;
    fits.then_some(RecordLeft { offset, bytes, crc32c, planes: left })
}

/// An entry of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    name: String,
    /// Offsets as the header has them, start not behind end.
    start: u64,
    end: u64,
    /// First byte of the text behind it.
    text_end: usize,
}

/// The entries that are whole, in the order of the text.
fn entries(text: &[u8]) -> Vec<Entry> {
    const BEHIND_NAME: &[u8] = b"\":{\"dtype\":\"";
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(at) = find(text, BEHIND_NAME, from).filter(|_| found.len() < TENSORS_MAX) {
        let fields = at.saturating_add(BEHIND_NAME.len());
        found.extend(entry(text, from, at, fields));
        from = fields;
    }
    found
}

/// The entry whose name ends at `name_end` and whose dtype starts at `fields`.
fn entry(text: &[u8], from: usize, name_end: usize, fields: usize) -> Option<Entry> {
    let named = text.get(from..=name_end)?;
    let (_, before) = named.split_last()?;
    let opening = before.windows(2).rposition(|w| matches!(w, [b',' | b'{', b'"']))?;
    let name = named.get(opening.checked_add(1)?..)?;
    let name: String = serde_json::from_slice(name).ok()?;
    let mut rest = Rest { text, at: fields };
    let dtype = Dtype::from_name(std::str::from_utf8(rest.until(b"\",\"shape\":[")?).ok()?).ok()?;
    let shape = numbers(rest.until(b"],\"data_offsets\":[")?)?;
    let [start, end] = *numbers(rest.until(b"]}")?)?.as_slice() else { return None };
    let fits = dtype.bytes(&shape).is_ok_and(|n| end.checked_sub(start) == Some(n));
    fits.then_some(Entry { name, start, end, text_end: rest.at })
}

/// A text of which the first bytes are read.
struct Rest<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Rest<'a> {
    /// What comes before `stop`, which is read too.
    fn until(&mut self, stop: &[u8]) -> Option<&'a [u8]> {
        /// No field is longer.
        const FIELD_BYTES_MAX: usize = 256;
        let end = self.text.len().min(self.at.saturating_add(FIELD_BYTES_MAX));
        let found = find(self.text.get(..end)?, stop, self.at)?;
        let field = self.text.get(self.at..found)?;
        self.at = found.saturating_add(stop.len());
        Some(field)
    }
}

/// Numbers with commas between; none where there is nothing.
fn numbers(text: &[u8]) -> Option<Vec<u64>> {
    let text = std::str::from_utf8(text).ok()?;
    if text.is_empty() {
        return Some(Vec::new());
    }
    text.split(',').map(|n| n.parse().ok()).collect()
}

fn find(text: &[u8], what: &[u8], from: usize) -> Option<usize> {
    let found = text.get(from..)?.windows(what.len()).position(|w| w == what)?;
    from.checked_add(found)
}

/// Bytes of a file; `None` where it ends before.
fn read(file: &InputFile, offset: u64, bytes: u64) -> Result<Option<Vec<u8>>> {
    if offset.checked_add(bytes).is_none_or(|end| end > file.len()) {
        return Ok(None);
    }
    let too_long = |_| Error::bad_data(format!("{bytes} bytes do not fit memory"));
    let mut buf = vec![0; usize::try_from(bytes).map_err(too_long)?];
    file.read_exact_at(offset, &mut buf)?;
    Ok(Some(buf))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bank::{Bank, bank_name};
    use crate::testing::{N_EXPERTS, SmallBundle};
    use crate::trunk::{TrunkFile, trunk_name};

    /// The records that are left after a change to the bank of layer 4.
    fn left(change: impl FnOnce(&mut Vec<u8>)) -> Vec<bool> {
        let small = SmallBundle::new();
        let path = small.dir.join(bank_name(4));
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        let file = InputFile::open(&path).unwrap();
        let records = bank(&file, 4, N_EXPERTS).unwrap();
        let whole = |r: &Option<RecordLeft>| r.as_ref().is_some_and(|r| r.read(&file).unwrap().is_some());
        records.iter().map(whole).collect()
    }

    #[test]
    fn a_sound_bank_is_found_as_it_is() {
        let small = SmallBundle::new();
        let bank_4 = Bank::open(&small.dir.join(bank_name(4))).unwrap();
        let records = bank(bank_4.file(), 4, N_EXPERTS).unwrap();
        for (found, row) in records.iter().zip(bank_4.records()) {
            let found = found.as_ref().unwrap();
            assert_eq!((found.offset, found.bytes, found.crc32c), (row.offset, row.bytes, row.crc32c));
            let planes = bank_4.parts(row.expert).unwrap()[0].planes.iter();
            let expected: Vec<_> = planes.map(|p| (p.offset, p.bytes)).collect();
            assert_eq!(found.planes.iter().map(|p| (p.offset, p.bytes)).collect::<Vec<_>>(), expected);
            assert!(found.planes.iter().all(|p| p.part == "gate_proj"));
        }
    }

    #[test]
    fn a_damaged_header_costs_no_more_than_the_record_it_is_about() {
        assert_eq!(left(|_| ()), [true; 3]);
        for bit in 0..64 {
            assert_eq!(left(|b| b[bit / 8] ^= 1 << (bit % 8)), [true; 3], "bit {bit} of the length");
        }
        assert_eq!(left(|b| b[8] = 0xff), [true; 3], "the brace");
        let at = |bytes: &[u8], what: &str| find(bytes, what.as_bytes(), 0).unwrap();
        let name = |b: &mut Vec<u8>| {
            let i = at(b, "experts.1.gate_proj");
            b[i] ^= 1;
        };
        assert_eq!(left(name), [true, false, true]);
        let dtype = |b: &mut Vec<u8>| {
            let i = at(b, "\":{\"dtype\":\"U8\",\"shape\":[5000]");
            b[i + 12] ^= 4;
        };
        assert_eq!(left(dtype), [true, false, true]);
    }

    #[test]
    fn what_was_cut_off_is_gone_and_the_rest_is_not() {
        assert_eq!(left(|b| b.truncate(b.len() - 4096)), [true, true, false]);
        assert_eq!(left(|b| b.truncate(100)), [false; 3]);
        assert_eq!(left(Vec::clear), [false; 3]);
    }

    #[test]
    fn tensors_of_a_trunk_file_whatever_its_length_says() {
        let small = SmallBundle::new();
        let path = small.dir.join(trunk_name(1, 2));
        let sound = TrunkFile::open(&path).unwrap();
        let a = sound.header.get("tensor.1.a").unwrap();
        let good = std::fs::read(&path).unwrap();
        for bit in (0..64).chain([64]) {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, bytes).unwrap();
            let found = trunk(&InputFile::open(&path).unwrap()).unwrap();
            assert_eq!(found.get("tensor.1.a"), Some(&(a.start, a.end)), "bit {bit}");
        }
    }
}
