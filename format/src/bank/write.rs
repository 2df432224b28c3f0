//! Writing a bank with one expert in memory at a time.
//!
//! The header and the index are known last but lie first. Space for them is reserved from the number of planes,
//! records are appended, and both are written into the space at the end. Should they not fit (long names), the
//! records are moved up, so that the bytes of the file depend on its content only, not on what was guessed.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{INDEX, PartShape, PartSpec, Table, check_word, record_name};
use crate::PlaneSpec;
use crate::atomic::AtomicFile;
use crate::dtype::Dtype;
use crate::error::{Context, Error, Result};
use crate::file::{check_sha256, hex};
use crate::index::{ROW_BYTES, RecordEntry};
use crate::layout::{TENSOR_ALIGN, TensorList, align_up, header_bytes};
use crate::limits::{PARTS_MAX, PLANES_MAX, RECORD_BYTES_MAX, TENSORS_MAX};

/// Header bytes reserved for a plane and the pad behind it; measured up to 230 in models of 61 layers.
pub const PLANE_HEADER_BYTES: u64 = 256;

/// Header bytes reserved for the string table and the index.
pub const TABLE_HEADER_BYTES: u64 = 4096;

/// One part of the expert to be written, with the bytes of its planes.
#[derive(Clone, Debug)]
pub struct PartBytes<'a> {
    /// Name, codec and shape.
    pub spec: PartSpec,
    /// The planes in order.
    pub planes: Vec<(PlaneSpec, &'a [u8])>,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BankSummary {
    /// File name without directory.
    pub file: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// SHA-256 of the file.
    pub sha256: String,
    /// Distance of records if they are all of the same padded size.
    pub stride: Option<u64>,
    /// Padded bytes of the largest record: what a reader's buffer needs.
    pub max_record_bytes: u64,
    /// Bytes of all planes together.
    pub payload_bytes: u64,
    /// Bytes of all pads together; header and index are neither payload nor padding.
    pub padding_bytes: u64,
    /// Number of records.
    pub n_experts: u32,
    /// CRC-32C of header and index, 8 hex digits.
    #[serde(default)]
    pub header_crc32c: String,
}

/// A bank that is being written. Experts come in ascending order, from 0, none left out.
#[derive(Debug)]
pub struct BankWriter {
    file: AtomicFile,
    table: Table,
    /// Bytes in front of the tensor data.
    reserved: u64,
    list: TensorList,
    records: Vec<RecordEntry>,
    payload_bytes: u64,
}

impl BankWriter {
    /// Starts the bank of `layer`. `tensors_hint` is the number of planes of all experts together; a wrong one costs a
    /// copy of the file at the end and changes no byte of it.
    ///
    /// # Errors
    /// An impossible `align` or count, or what the operating system says.
    pub fn create(
        path: &Path,
        layer: u32,
        n_experts: u32,
        align: u64,
        tensors_hint: usize,
    ) -> Result<BankWriter> {
        super::check_align(align)?;
        let file = AtomicFile::create(path)?;
        let table = Table { align, layer, n_experts, codecs: Vec::new(), parts: Vec::new() };
        let (list, records) = (TensorList::default(), Vec::new());
        let reserved = data_offset(tensors_hint.min(TENSORS_MAX), 0, align)?;
        let mut new = BankWriter { file, table, reserved, list, records, payload_bytes: 0 };
        new.list.push(PlaneSpec::new(INDEX, Dtype::U8, &[n_experts.into(), ROW_BYTES as u64]))?;
        new.list.pad_to(align)?;
        new.file.skip(reserved.saturating_add(new.list.end()));
        Ok(new)
    }

    /// Appends the record of `expert`. The offset in the entry is final once `finish` returned, unless
    /// `tensors_hint` was wrong.
    ///
    /// # Errors
    /// Experts out of order, parts that differ from the first expert's in name or shape, planes whose bytes do not
    /// fit their shape, or a failed write.
    pub fn write_expert(&mut self, expert: u32, parts: &[PartBytes<'_>]) -> Result<RecordEntry> {
        let name = record_name(self.table.layer, expert);
        self.write_record(expert, parts).in_tensor(&name).in_file(self.file.path())
    }

    /// Writes header and index, and gives the file its name.
    ///
    /// # Errors
    /// Experts that were not written, or a failed write.
    pub fn finish(self) -> Result<BankSummary> {
        self.finish_as(None)
    }

    /// The same; with the SHA-256 that the file is known to have, it appears only if it has that.
    ///
    /// # Errors
    /// As [`BankWriter::finish`]; another hash.
    pub fn finish_as(mut self, sha256: Option<&str>) -> Result<BankSummary> {
        let (written, expected) = (self.records.len(), self.table.n_experts);
        if written != expected as usize {
            let what = format!("{written} experts were written, expected {expected}");
            return Err(Error::bad_data(what).in_file(self.file.path()));
        }
        let json = self.list.json(&self.table.to_strings()?)?;
        self.place_records(data_offset(self.n_planes(), json.len() as u64, self.table.align)?)?;
        let header = header_bytes(&json, self.reserved)?;
        self.file.write_at(0, &header)?;
        let rows: Vec<u8> = self.records.iter().flat_map(RecordEntry::encode).collect();
        self.file.write_at(self.reserved, &rows)?;
        let summary = self.summary(crc32c::crc32c_append(crc32c::crc32c(&header), &rows))?;
        check_sha256(&summary.sha256, sha256).in_file(self.file.path())?;
        self.file.commit()?;
        Ok(summary)
    }

    fn write_record(&mut self, expert: u32, parts: &[PartBytes<'_>]) -> Result<RecordEntry> {
        let next = self.records.len();
        if expert as usize != next || expert >= self.table.n_experts {
            let what = format!("expert {expert} is written, expected {next} of {}", self.table.n_experts);
            return Err(Error::bad_data(what));
        }
        self.check_parts(parts)?;
        let mut entry = RecordEntry {
            offset: self.file.position(),
            layer: self.table.layer,
            expert,
            n_parts: parts.len() as u16,
            codec_ids: self.codec_ids(parts)?,
            ..RecordEntry::default()
        };
        for part in parts {
            for (plane, bytes) in &part.planes {
                self.pad_to(TENSOR_ALIGN, Some(&mut entry.crc32c))?;
                let name = format!("{}.{}.{}", record_name(entry.layer, expert), part.spec.name, plane.name);
                self.list.push(PlaneSpec { name, ..plane.clone() })?;
                self.file.append(bytes)?;
                entry.crc32c = crc32c::crc32c_append(entry.crc32c, bytes);
                self.payload_bytes = self.payload_bytes.saturating_add(bytes.len() as u64);
            }
        }
        entry.bytes = self.file.position().saturating_sub(entry.offset);
        self.pad_to(self.table.align, None)?;
        entry.padded_bytes = self.file.position().saturating_sub(entry.offset);
        if entry.padded_bytes > RECORD_BYTES_MAX {
            let what =
                format!("a record of {} bytes, expected at most {RECORD_BYTES_MAX}", entry.padded_bytes);
            return Err(Error::bad_data(what));
        }
        self.records.push(entry);
        Ok(entry)
    }

    /// Appends zeros up to a multiple of `align`. Inside a record, where that is `TENSOR_ALIGN`, the checksum
    /// counts them.
    fn pad_to(&mut self, align: u64, crc: Option<&mut u32>) -> Result<()> {
        const ZEROS: [u8; TENSOR_ALIGN as usize] = [0; TENSOR_ALIGN as usize];
        let gap = self.list.pad_to(align)?;
        if let Some(crc) = crc {
            *crc = crc32c::crc32c_append(*crc, ZEROS.get(..gap as usize).unwrap_or(&ZEROS));
        }
        self.file.append_zeros(gap)
    }

    /// The first expert fixes the parts; every other has the same.
    fn check_parts(&mut self, parts: &[PartBytes<'_>]) -> Result<()> {
        let shape =
            |p: &PartBytes<'_>| PartShape { name: p.spec.name.clone(), rows: p.spec.rows, cols: p.spec.cols };
        let shapes: Vec<_> = parts.iter().map(shape).collect();
        if self.records.is_empty() {
            self.table.parts = shapes;
            self.table.check()?;
        } else if shapes != self.table.parts {
            let what = format!("parts {shapes:?}, but expert 0 has {:?}", self.table.parts);
            return Err(Error::bad_data(what));
        }
        parts.iter().try_for_each(check_planes)
    }

    /// The places of the parts' codecs in the list, which grows in the order in which codecs are met.
    fn codec_ids(&mut self, parts: &[PartBytes<'_>]) -> Result<[u16; PARTS_MAX]> {
        let mut ids = [0; PARTS_MAX];
        for (id, part) in ids.iter_mut().zip(parts) {
            let codec = &part.spec.codec;
            let known = self.table.codecs.iter().position(|c| c == codec);
            let place = known.unwrap_or(self.table.codecs.len());
            if known.is_none() {
                self.table.codecs.push(codec.clone());
                self.table.check()?;
            }
            *id = u16::try_from(place).map_err(|_| Error::bad_data("too many codecs"))?;
        }
        Ok(ids)
    }

    /// Makes the data start at `data_offset`, moving them if the guess was wrong.
    fn place_records(&mut self, data_offset: u64) -> Result<()> {
        if data_offset == self.reserved {
            return Ok(());
        }
        let mut moved = AtomicFile::create(self.file.path())?;
        moved.skip(data_offset);
        self.file.read_back(self.reserved, |chunk| moved.append(chunk))?;
        for record in &mut self.records {
            record.offset = record.offset.saturating_sub(self.reserved).saturating_add(data_offset);
        }
        self.file = moved;
        self.reserved = data_offset;
        Ok(())
    }

    fn n_planes(&self) -> usize {
        self.list
            .tensors()
            .iter()
            .filter(|(t, ..)| t.name != INDEX && !crate::layout::is_pad(&t.name))
            .count()
    }

    fn summary(&self, header_crc32c: u32) -> Result<BankSummary> {
        let sizes = || self.records.iter().map(|r| r.padded_bytes);
        let first = sizes().next().unwrap_or_default();
        let file = self.file.path().file_name().map(|n| n.to_string_lossy().into_owned());
        Ok(BankSummary {
            file: file.unwrap_or_default(),
            bytes: self.reserved.saturating_add(self.list.end()),
            sha256: self.file.sha256()?,
            stride: sizes().all(|n| n == first).then_some(first),
            max_record_bytes: sizes().max().unwrap_or_default(),
            payload_bytes: self.payload_bytes,
            padding_bytes: self.list.padding_bytes(),
            n_experts: self.table.n_experts,
            header_crc32c: hex(&header_crc32c.to_be_bytes()),
        })
    }
}

/// Where data start: behind a header with this many planes and this many bytes of JSON.
fn data_offset(n_planes: usize, json_bytes: u64, align: u64) -> Result<u64> {
    let usual = TABLE_HEADER_BYTES.saturating_add((n_planes as u64).saturating_mul(PLANE_HEADER_BYTES));
    align_up(usual.max(json_bytes).saturating_add(8), align)
}

fn check_planes(part: &PartBytes<'_>) -> Result<()> {
    let (name, n) = (&part.spec.name, part.planes.len());
    if n == 0 || n > PLANES_MAX {
        return Err(Error::bad_data(format!("{n} planes of {name}, expected 1 to {PLANES_MAX}")));
    }
    for (plane, bytes) in &part.planes {
        check_word(&plane.name)?;
        let (found, expected) = (bytes.len() as u64, plane.bytes()?);
        if found != expected || found == 0 {
            let (shape, dtype) = (&plane.shape, plane.dtype.name());
            let what = format!(
                "{found} bytes of {name}.{}, but shape {shape:?} of {dtype} takes {expected}",
                plane.name
            );
            return Err(Error::bad_data(what));
        }
    }
    Ok(())
}
