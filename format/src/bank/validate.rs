//! Header, index and file of a bank compared with each other, before any of their numbers is used.

use std::sync::Arc;

use super::{INDEX, PartInfo, PartSpec, PlaneInfo, Table, record_name};
use crate::PlaneSpec;
use crate::dtype::Dtype;
use crate::error::{Context, Error, Result};
use crate::file::InputFile;
use crate::index::{ROW_BYTES, RecordEntry};
use crate::layout::{TENSOR_ALIGN, align_up, is_pad, pad_name};
use crate::limits::{PLANES_MAX, RECORD_BYTES_MAX};
use crate::safetensors::{Header, TensorInfo};

/// What a bank consists of, once nothing contradicts it.
pub(super) struct Validated {
    pub(super) table: Table,
    pub(super) records: Vec<RecordEntry>,
    pub(super) parts: Vec<Arc<[PartInfo]>>,
    pub(super) pads: Vec<(u64, u64)>,
}

/// Equal experts share one description; so many different ones are remembered to be compared with.
const DISTINCT_REMEMBERED: usize = 64;

pub(super) fn validate(file: &InputFile, header: &Header) -> Result<Validated> {
    let table = Table::from_strings(&header.metadata)?;
    let index = check_index(header, &table)?;
    let rows = read_rows(file, index, &table)?;
    check_places(&rows, &table, index.end, file.len()).in_tensor(INDEX)?;
    let mut walk =
        Walk { table: &table, tensors: header.tensors.iter().skip(1).peekable(), pads: Vec::new() };
    let mut parts: Vec<Arc<[PartInfo]>> = Vec::new();
    walk.skip_pads()?;
    for row in &rows {
        let found = walk.expert(row).in_tensor(&record_name(table.layer, row.expert))?;
        let same = parts.iter().rev().take(DISTINCT_REMEMBERED).find(|p| p[..] == found[..]).cloned();
        parts.push(same.unwrap_or_else(|| found.into()));
        walk.skip_pads()?;
    }
    if let Some(t) = walk.tensors.next() {
        return Err(Error::bad_data("a tensor behind the last expert").in_tensor(&t.name).at_byte(t.start));
    }
    let pads = walk.pads;
    Ok(Validated { table, records: rows, parts, pads })
}

/// The index is the first tensor and has a row for each expert.
fn check_index<'a>(header: &'a Header, table: &Table) -> Result<&'a TensorInfo> {
    let first = header.tensors.first().filter(|t| t.name == INDEX);
    let index = first.ok_or_else(|| Error::bad_data(format!("the first tensor is not {INDEX}")))?;
    let shape = [u64::from(table.n_experts), ROW_BYTES as u64];
    if index.dtype != Dtype::U8 || index.shape != shape {
        let (dtype, found) = (index.dtype.name(), &index.shape);
        let what = format!("the index is {dtype} {found:?}, expected U8 {shape:?}");
        return Err(Error::bad_data(what).in_tensor(INDEX).at_byte(index.start));
    }
    check_multiple("the index starts", index.start, table.align).in_tensor(INDEX)?;
    Ok(index)
}

/// The rows, each about the expert whose place it has.
fn read_rows(file: &InputFile, index: &TensorInfo, table: &Table) -> Result<Vec<RecordEntry>> {
    // At most EXPERTS_MAX rows, and `check_index` compared their number with the shape.
    let mut bytes = vec![[0; ROW_BYTES]; table.n_experts as usize];
    file.read_exact_at(index.start, bytes.as_flattened_mut())?;
    let mut rows = Vec::with_capacity(bytes.len());
    for (expert, row) in bytes.iter().enumerate() {
        let at = index.start.saturating_add(expert.saturating_mul(ROW_BYTES) as u64);
        let row = RecordEntry::decode(row).and_then(|row| check_row(row, expert, table));
        rows.push(row.map_err(|e| e.in_tensor(INDEX).at_byte(at))?);
    }
    Ok(rows)
}

fn check_row(row: RecordEntry, expert: usize, table: &Table) -> Result<RecordEntry> {
    let (layer, n_parts) = (table.layer, table.parts.len());
    if row.layer != layer || row.expert as usize != expert {
        let (l, e) = (row.layer, row.expert);
        let what =
            format!("row {expert} is about layer {l} expert {e}, expected layer {layer} expert {expert}");
        return Err(Error::bad_data(what));
    }
    if usize::from(row.n_parts) != n_parts {
        let what = format!("expert {expert} has {} parts, expected {n_parts}", row.n_parts);
        return Err(Error::bad_data(what));
    }
    let n_codecs = table.codecs.len();
    match row.codec_ids.iter().take(n_parts).find(|&&id| usize::from(id) >= n_codecs) {
        Some(id) => Err(Error::bad_data(format!(
            "expert {expert} has codec id {id}, but there are {n_codecs} codecs"
        ))),
        None => Ok(row),
    }
}

/// Records lie one behind the other, aligned, from the index to the end of the file.
fn check_places(rows: &[RecordEntry], table: &Table, index_end: u64, file_len: u64) -> Result<()> {
    let mut expected = align_up(index_end, table.align)?;
    for row in rows {
        let expert = row.expert;
        let (offset, bytes, padded) = (row.offset, row.bytes, row.padded_bytes);
        check_multiple(&format!("expert {expert} starts"), offset, table.align)?;
        if offset < expected {
            let what =
                format!("expert {expert} starts at byte {offset}, inside what ends at byte {expected}");
            return Err(Error::bad_data(what));
        }
        if offset > expected {
            let what = format!("expert {expert} starts at byte {offset}, expected byte {expected}");
            return Err(Error::bad_data(what));
        }
        if bytes == 0 || bytes > RECORD_BYTES_MAX || padded != align_up(bytes, table.align)? {
            let what = format!("expert {expert} has {bytes} bytes padded to {padded}");
            return Err(Error::bad_data(what));
        }
        expected = offset.checked_add(padded).filter(|&end| end <= file_len).ok_or_else(|| {
            Error::bad_data(format!(
                "expert {expert} has {padded} bytes at byte {offset} of a file of {file_len}"
            ))
        })?;
    }
    if expected != file_len {
        let what = format!("the last expert ends at byte {expected}, the file at byte {file_len}");
        return Err(Error::bad_data(what));
    }
    Ok(())
}

fn check_multiple(what: &str, offset: u64, align: u64) -> Result<()> {
    if offset.is_multiple_of(align) {
        return Ok(());
    }
    Err(Error::bad_data(format!("{what} at byte {offset}, expected a multiple of {align}")))
}

/// The tensors behind the index, taken from front to back.
struct Walk<'a, I: Iterator<Item = &'a TensorInfo>> {
    table: &'a Table,
    tensors: std::iter::Peekable<I>,
    pads: Vec<(u64, u64)>,
}

impl<'a, I: Iterator<Item = &'a TensorInfo>> Walk<'a, I> {
    /// Takes the pads up to the next plane.
    fn skip_pads(&mut self) -> Result<()> {
        while let Some(t) = self.tensors.next_if(|t| is_pad(&t.name)) {
            let expected = pad_name(self.pads.len() as u64);
            if t.name != expected || t.dtype != Dtype::U8 || t.shape != [t.bytes()] {
                let what = format!("a pad of {} {:?}, expected {expected} of U8", t.dtype.name(), t.shape);
                return Err(Error::bad_data(what).in_tensor(&t.name).at_byte(t.start));
            }
            self.pads.push((t.start, t.end));
        }
        Ok(())
    }

    /// Takes the planes of one expert.
    fn expert(&mut self, row: &RecordEntry) -> Result<Vec<PartInfo>> {
        let end = row.offset.saturating_add(row.bytes);
        let mut last_end = row.offset;
        let mut parts = Vec::with_capacity(self.table.parts.len());
        for (shape, &codec_id) in self.table.parts.iter().zip(&row.codec_ids) {
            let codec = self.table.codecs.get(usize::from(codec_id)).cloned().unwrap_or_default();
            let spec = PartSpec { name: shape.name.clone(), codec, rows: shape.rows, cols: shape.cols };
            let prefix = format!("{}.{}.", record_name(row.layer, row.expert), shape.name);
            let mut planes = Vec::new();
            while let Some(t) = self.tensors.next_if(|t| t.name.starts_with(&prefix)) {
                planes.push(plane(t, &prefix, row.offset, end)?);
                last_end = t.end;
                if t.end < end {
                    self.skip_pads()?;
                }
            }
            if planes.is_empty() || planes.len() > PLANES_MAX {
                return Err(self.wrong_planes(&prefix, planes.len()));
            }
            parts.push(PartInfo { spec, planes });
        }
        if last_end != end {
            let what = format!("the last plane ends at byte {last_end}, the record at byte {end}");
            return Err(Error::bad_data(what).at_byte(row.offset));
        }
        Ok(parts)
    }

    fn wrong_planes(&mut self, prefix: &str, n: usize) -> Error {
        if n > 0 {
            return Error::bad_data(format!("{n} planes {prefix}*, expected at most {PLANES_MAX}"));
        }
        match self.tensors.peek() {
            Some(t) => {
                let what = format!("tensor {:?} follows, expected {prefix}*", t.name);
                Error::bad_data(what).at_byte(t.start)
            }
            None => Error::bad_data(format!("no tensor follows, expected {prefix}*")),
        }
    }
}

/// A plane that lies inside its record, from `start` to `end`, and is aligned.
fn plane(t: &TensorInfo, prefix: &str, start: u64, end: u64) -> Result<PlaneInfo> {
    let check = || {
        check_multiple("the plane starts", t.start, TENSOR_ALIGN)?;
        if t.start < start || t.end > end || t.start == t.end {
            let what = format!("bytes {} to {} of a record from {start} to {end}", t.start, t.end);
            return Err(Error::bad_data(what));
        }
        super::check_word(t.name.strip_prefix(prefix).unwrap_or_default())
    };
    check().map_err(|e| e.in_tensor(&t.name).at_byte(t.start))?;
    let name = t.name.strip_prefix(prefix).unwrap_or_default();
    let spec = PlaneSpec::new(name, t.dtype, &t.shape);
    Ok(PlaneInfo { spec, offset: t.start.saturating_sub(start), bytes: t.bytes() })
}
