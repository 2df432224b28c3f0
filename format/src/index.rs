//! The index of a bank: one row of 64 bytes for each expert, little-endian.
//!
//! ```text
//! byte  0        8        16       24   28   32   36  38                54        64
//!       +--------+--------+--------+----+----+----+---+-----------------+---------+
//!       | offset | bytes  | padded | crc|layr|expt| n | 8 codec ids     | zeros   |
//!       +--------+--------+--------+----+----+----+---+-----------------+---------+
//!         u64      u64      u64     u32  u32  u32  u16  u16 each
//! ```

use crate::error::{Error, Result};
use crate::limits::PARTS_MAX;

/// Bytes of a row.
pub const ROW_BYTES: usize = 64;

const CODECS_AT: usize = 38;
const ZEROS_AT: usize = CODECS_AT + 2 * PARTS_MAX;
const _: () = assert!(ZEROS_AT + 10 == ROW_BYTES, "a row is 64 bytes");

/// Where the record of one expert lies, and what is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecordEntry {
    /// First byte in the file; a multiple of the bank's `align`.
    pub offset: u64,
    /// Bytes from `offset` to the end of the last plane.
    pub bytes: u64,
    /// Bytes from `offset` to the next record; a multiple of `align`.
    pub padded_bytes: u64,
    /// CRC-32C of the `bytes`.
    pub crc32c: u32,
    /// The layer, as in the file's name.
    pub layer: u32,
    /// The expert in the layer.
    pub expert: u32,
    /// Number of parts.
    pub n_parts: u16,
    /// For each part, the place of its codec in the bank's list; zeros behind.
    pub codec_ids: [u16; PARTS_MAX],
}

impl RecordEntry {
    /// The row.
    pub fn encode(&self) -> [u8; ROW_BYTES] {
        let mut row = [0; ROW_BYTES];
        let fields: [&[u8]; 7] = [
            &self.offset.to_le_bytes(),
            &self.bytes.to_le_bytes(),
            &self.padded_bytes.to_le_bytes(),
            &self.crc32c.to_le_bytes(),
            &self.layer.to_le_bytes(),
            &self.expert.to_le_bytes(),
            &self.n_parts.to_le_bytes(),
        ];
        let ids = self.codec_ids.map(u16::to_le_bytes);
        for (to, from) in row.iter_mut().zip(fields.concat().iter().chain(ids.as_flattened())) {
            *to = *from;
        }
        row
    }

    /// Reads a row.
    ///
    /// # Errors
    /// Bytes that must be zero and are not.
    pub fn decode(row: &[u8; ROW_BYTES]) -> Result<RecordEntry> {
        let n_parts = u16::from_le_bytes(field(row, 36));
        let mut codec_ids = [0; PARTS_MAX];
        for (i, id) in codec_ids.iter_mut().enumerate() {
            *id = u16::from_le_bytes(field(row, i.saturating_mul(2).saturating_add(CODECS_AT)));
        }
        let unused = codec_ids.iter().skip(usize::from(n_parts)).any(|&id| id != 0);
        let zeros = row.get(ZEROS_AT..).unwrap_or_default();
        if unused || zeros.iter().any(|&b| b != 0) {
            return Err(Error::bad_data("reserved bytes of an index row are not zero"));
        }
        Ok(RecordEntry {
            offset: u64::from_le_bytes(field(row, 0)),
            bytes: u64::from_le_bytes(field(row, 8)),
            padded_bytes: u64::from_le_bytes(field(row, 16)),
            crc32c: u32::from_le_bytes(field(row, 24)),
            layer: u32::from_le_bytes(field(row, 28)),
            expert: u32::from_le_bytes(field(row, 32)),
            n_parts,
            codec_ids,
        })
    }
}

/// `N` bytes of the row at a place the table above names.
fn field<const N: usize>(row: &[u8; ROW_BYTES], at: usize) -> [u8; N] {
    row.get(at..).and_then(|b| b.first_chunk()).copied().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_lie_where_the_table_says() {
        let entry = RecordEntry {
            offset: 0x0102_0304_0506_0708,
            bytes: 0x11,
            padded_bytes: 0x22,
            crc32c: 0x3333_3344,
            layer: 0x55,
            expert: 0x66,
            n_parts: 3,
            codec_ids: [1, 2, 0x0304, 0, 0, 0, 0, 0],
        };
        let row = entry.encode();
        assert_eq!(row[..9], [8, 7, 6, 5, 4, 3, 2, 1, 0x11]);
        assert_eq!((row[16], row[24], row[28], row[32], row[36]), (0x22, 0x44, 0x55, 0x66, 3));
        assert_eq!(row[38..44], [1, 0, 2, 0, 4, 3]);
        assert_eq!(row[44..], [0; 20]);
    }

    #[test]
    fn what_must_be_zero_is_looked_at() {
        let what = "reserved bytes of an index row are not zero";
        for at in [40, 53, 54, 63] {
            let mut row = RecordEntry { n_parts: 1, ..RecordEntry::default() }.encode();
            row[at] = 1;
            assert_eq!(RecordEntry::decode(&row).unwrap_err().what(), what, "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn rows_go_back_and_forth(a: (u64, u64, u64), b: (u32, u32, u32), n in 0..=8u16, ids: [u16; 8]) {
            let mut codec_ids = ids;
            codec_ids.iter_mut().skip(usize::from(n)).for_each(|id| *id = 0);
            let entry = RecordEntry {
                offset: a.0, bytes: a.1, padded_bytes: a.2, crc32c: b.0, layer: b.1, expert: b.2, n_parts: n, codec_ids,
            };
            prop_assert_eq!(RecordEntry::decode(&entry.encode()), Ok(entry));
        }
    }
}
