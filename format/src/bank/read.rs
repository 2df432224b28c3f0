//! Reading a bank: everything is checked when it is opened, then an expert is one `pread`.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustix::fs::OFlags;

use super::validate::{Validated, validate};
use super::{PartInfo, Record, Table, record_name};
use crate::aligned::AlignedBuf;
use crate::error::{Context, Error, Result};
use crate::file::{InputFile, read_at_most};
use crate::handles::Handle;
use crate::index::RecordEntry;
use crate::safetensors::Header;

/// A bank whose header and index agree with each other and with the file.
#[derive(Debug)]
pub struct Bank {
    file: InputFile,
    /// A second descriptor with O_DIRECT, or the knowledge that there is none.
    direct: OnceLock<Option<Arc<Handle>>>,
    table: Table,
    records: Vec<RecordEntry>,
    /// One for each record; equal ones share memory.
    parts: Vec<Arc<[PartInfo]>>,
    /// Where the index lies.
    index_offset: u64,
    /// Places of all pads in the file: start and end.
    pads: Vec<(u64, u64)>,
}

/// How a record is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadOptions {
    /// Compare the checksum.
    pub verify: bool,
    /// Go past the page cache where the file system can.
    pub direct: bool,
}

impl Bank {
    /// Opens and checks a bank; no record is read.
    ///
    /// # Errors
    /// `BadData` with tensor and byte if header, index and file do not agree.
    pub fn open(path: &Path) -> Result<Bank> {
        let file = InputFile::open(path)?;
        let header = Header::read(&file)?;
        let Validated { table, records, parts, pads } = validate(&file, &header).in_file(path)?;
        let (direct, index_offset) = (OnceLock::new(), header.data_offset);
        Ok(Bank { file, direct, table, records, parts, index_offset, pads })
    }

    /// The path it was opened with.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The file it is read from.
    pub fn file(&self) -> &InputFile {
        &self.file
    }

    /// The layer whose experts these are.
    pub fn layer(&self) -> u32 {
        self.table.layer
    }

    /// Number of experts.
    pub fn n_experts(&self) -> u32 {
        self.table.n_experts
    }

    /// What starts and lengths of records are multiples of.
    pub fn align(&self) -> u64 {
        self.table.align
    }

    /// The codecs that occur, in the order of their ids.
    pub fn codecs(&self) -> &[String] {
        &self.table.codecs
    }

    /// All rows of the index, in the order of experts.
    pub fn records(&self) -> &[RecordEntry] {
        &self.records
    }

    /// Padded bytes of the largest record.
    pub fn max_record_bytes(&self) -> u64 {
        self.records.iter().map(|r| r.padded_bytes).max().unwrap_or_default()
    }

    /// Distance of records if they are all of the same padded size.
    pub fn stride(&self) -> Option<u64> {
        let stride = self.max_record_bytes();
        self.records.iter().all(|r| r.padded_bytes == stride).then_some(stride)
    }

    /// Bytes of all planes of all experts.
    pub fn payload_bytes(&self) -> u64 {
        self.parts.iter().flat_map(|e| e.iter()).flat_map(|p| &p.planes).map(|p| p.bytes).sum()
    }

    /// Where the index lies, which is right behind the header.
    pub fn index_offset(&self) -> u64 {
        self.index_offset
    }

    /// Start and end of every pad of the file.
    pub fn pads(&self) -> &[(u64, u64)] {
        &self.pads
    }

    /// What an expert consists of.
    ///
    /// # Errors
    /// An expert that is not there.
    pub fn parts(&self, expert: u32) -> Result<&[PartInfo]> {
        self.parts.get(expert as usize).map(|p| &**p).ok_or_else(|| self.no_such(expert))
    }

    /// Where an expert lies.
    ///
    /// # Errors
    /// An expert that is not there.
    pub fn record(&self, expert: u32) -> Result<&RecordEntry> {
        self.records.get(expert as usize).ok_or_else(|| self.no_such(expert))
    }

    /// Reads an expert, past the page cache where possible; with `verify` its checksum is compared.
    ///
    /// # Errors
    /// An expert that is not there, a failed read, or a wrong checksum (layer, expert, file and offset named).
    pub fn read(&self, expert: u32, verify: bool) -> Result<Record> {
        self.read_into(expert, ReadOptions { verify, direct: true }, AlignedBuf::default())
    }

    /// As [`Bank::read`], into memory that an earlier record left.
    ///
    /// # Errors
    /// As [`Bank::read`].
    pub fn read_into(&self, expert: u32, options: ReadOptions, buf: AlignedBuf) -> Result<Record> {
        let entry = *self.record(expert)?;
        let parts = self.parts.get(expert as usize).ok_or_else(|| self.no_such(expert))?.clone();
        let len = usize::try_from(entry.padded_bytes).map_err(|_| Error::bad_data("record too large"))?;
        let mut buf = buf.resized(len);
        if !(options.direct && self.read_direct(entry.offset, buf.bytes_mut())) {
            let name = || record_name(entry.layer, expert);
            self.file.read_exact_at(entry.offset, buf.bytes_mut()).map_err(|e| e.in_tensor(name()))?;
        }
        let record = Record { entry, parts, buf };
        if options.verify {
            self.verify(&record)?;
        }
        Ok(record)
    }

    /// Whether records can be read past the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct_handle().is_some()
    }

    /// Fills `buf` with O_DIRECT; `false` if that did not work for whatever reason, so that the plain way is
    /// tried and gives the error, if it is one.
    fn read_direct(&self, offset: u64, buf: &mut [u8]) -> bool {
        let file = self.direct_handle().and_then(|handle| handle.file().ok());
        file.is_some_and(|file| read_at_most(&file, offset, buf).is_ok_and(|n| n == buf.len()))
    }

    /// Opens a second descriptor with O_DIRECT, once, and tries it on the start of the file: some file systems
    /// refuse the flag, others accept it and refuse the read.
    fn direct_handle(&self) -> Option<&Arc<Handle>> {
        let probe = || {
            let (handle, _) = Handle::open(self.path(), direct_flag()?).ok()?;
            let mut start = AlignedBuf::new(usize::try_from(self.table.align).ok()?);
            let n = read_at_most(&*handle.file().ok()?, 0, start.bytes_mut()).ok()?;
            (n == start.bytes().len()).then_some(handle)
        };
        self.direct.get_or_init(probe).as_ref()
    }

    fn verify(&self, record: &Record) -> Result<()> {
        let (entry, found) = (&record.entry, crc32c::crc32c(record.bytes()));
        if found == entry.crc32c {
            return Ok(());
        }
        let (layer, expert, expected) = (entry.layer, entry.expert, entry.crc32c);
        let what = format!("layer {layer} expert {expert}: crc32c is {found:08x}, expected {expected:08x}");
        let error = Error::bad_data(what).in_file(self.path()).in_tensor(record_name(layer, expert));
        Err(error.at_byte(entry.offset).hint("the file is damaged; `moepack check` lists all damage"))
    }

    fn no_such(&self, expert: u32) -> Error {
        let what = format!("layer {} has {} experts, no expert {expert}", self.layer(), self.n_experts());
        Error::bad_data(what).in_file(self.path())
    }
}

/// The flag of `open` that goes past the page cache, where there is one.
fn direct_flag() -> Option<OFlags> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    return Some(OFlags::DIRECT);
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    return None;
}
