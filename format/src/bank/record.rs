//! One expert in memory.

use std::sync::Arc;

use super::{PartInfo, PartSpec};
use crate::aligned::AlignedBuf;
use crate::index::RecordEntry;

/// The bytes of one expert, and where its planes lie in them.
#[derive(Debug)]
pub struct Record {
    pub(super) entry: RecordEntry,
    pub(super) parts: Arc<[PartInfo]>,
    pub(super) buf: AlignedBuf,
}

/// One part of a [`Record`].
#[derive(Clone, Debug)]
pub struct PartView<'a> {
    /// Name, codec and shape.
    pub spec: &'a PartSpec,
    /// Names, dtypes and shapes of the planes.
    pub infos: &'a [super::PlaneInfo],
    /// The planes' bytes, in the same order.
    pub planes: Vec<&'a [u8]>,
}

impl Record {
    /// The row of the index.
    pub fn entry(&self) -> &RecordEntry {
        &self.entry
    }

    /// Every part, in order.
    pub fn parts(&self) -> impl Iterator<Item = PartView<'_>> {
        self.parts.iter().map(|part| self.view(part))
    }

    /// The part of this name.
    pub fn part(&self, name: &str) -> Option<PartView<'_>> {
        self.parts.iter().find(|p| p.spec.name == name).map(|part| self.view(part))
    }

    /// The whole record without the padding behind it. Its first byte lies at a page.
    pub fn bytes(&self) -> &[u8] {
        slice(self.buf.bytes(), 0, self.entry.bytes)
    }

    /// Bytes of memory it occupies, near enough.
    pub fn memory_bytes(&self) -> u64 {
        self.buf.capacity() as u64
    }

    /// Gives the memory back, for the next read.
    pub fn into_buf(self) -> AlignedBuf {
        self.buf
    }

    fn view<'a>(&'a self, part: &'a PartInfo) -> PartView<'a> {
        let planes = part.planes.iter().map(|p| slice(self.buf.bytes(), p.offset, p.bytes)).collect();
        PartView { spec: &part.spec, infos: &part.planes, planes }
    }
}

/// `bytes` bytes from `offset`; both were compared with the record when the bank was opened.
fn slice(buf: &[u8], offset: u64, bytes: u64) -> &[u8] {
    let (offset, bytes) = (offset as usize, bytes as usize);
    buf.get(offset..).and_then(|b| b.get(..bytes)).unwrap_or_default()
}
