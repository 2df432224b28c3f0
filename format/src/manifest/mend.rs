//! Flipped bits in a manifest, found and turned back.
//!
//! The field `crc32c` has a checksum for each 1024 bytes of the text in front of it. CRC-32C is linear, so the difference
//! between the checksum that is stored and the one that is found tells which bit of the block was flipped: each of its 8192
//! bits changes the checksum in another way, and so do nearly all pairs of them. Whether what comes out is right is decided by the SHA-256 at the end.
//! Where the fields lie follows from the length of the text alone, so a flipped bit in the fields themselves does no harm:
//!
//! ```text
//! { … },          as many lines as there are          blocks of 1024 bytes, the last one shorter
//!   "crc32c": "…",                                     8 hex digits a block
//!   "sha256": "…"                                      64 hex digits
//! }
//! ```

use std::ops::Range;

use super::text::{BEFORE_CRC, BEFORE_SHA, BEHIND_SHA, SHA_DIGITS, hash_of};
use crate::file::hex;

/// Bytes that share a checksum.
pub const BLOCK_BYTES: usize = 1024;

/// Hex digits of a checksum.
pub(super) const CRC_DIGITS: usize = 8;

/// Bits of a stored checksum or hash that may be wrong: more is no flipped bit.
const WRONG_BITS_MAX: u32 = 2;

/// A manifest's text as it was, and the bytes that had changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mended {
    /// The text.
    pub text: Vec<u8>,
    /// Places of the bytes that were wrong, ascending.
    pub places: Vec<usize>,
}

/// Turns flipped bits back; `None` if there are too many of them, or none were looked for when it was written.
pub fn mend(text: &[u8]) -> Option<Mended> {
    let parts = Parts::of(text.len())?;
    let mut mended = text.to_vec();
    for (at, expected) in
        [(parts.head, BEFORE_CRC), (parts.digits_end, BEFORE_SHA), (parts.sha().end, BEHIND_SHA)]
    {
        mended.get_mut(at..)?.get_mut(..expected.len())?.copy_from_slice(expected);
    }
    let crc_start = parts.head.checked_add(BEFORE_CRC.len())?;
    let (head, fields) = mended.split_at_mut_checked(parts.head)?;
    let digits = fields.get_mut(crc_start.checked_sub(parts.head)?..)?;
    for (block, digits) in head.chunks_mut(BLOCK_BYTES).zip(digits.as_chunks_mut::<CRC_DIGITS>().0) {
        mend_block(block, digits)?;
    }
    let sha = hash_of(&mended, &parts.sha())?;
    replace(mended.get_mut(parts.sha())?, sha.as_bytes())?;
    let places = (0..text.len()).filter(|&i| text.get(i) != mended.get(i)).collect();
    Some(Mended { text: mended, places })
}

/// The checksums of a text, as the field has them.
pub(super) fn checksums(head: &[u8]) -> String {
    head.chunks(BLOCK_BYTES).map(|block| hex(&crc32c::crc32c(block).to_be_bytes())).collect()
}

/// Where the fields at the end lie.
struct Parts {
    /// Bytes in front of them.
    head: usize,
    /// First byte behind the digits of the checksums.
    digits_end: usize,
}

impl Parts {
    /// From the length of the text.
    fn of(len: usize) -> Option<Parts> {
        let behind = [BEFORE_SHA.len(), SHA_DIGITS, BEHIND_SHA.len()];
        let digits_end = behind.into_iter().try_fold(len, usize::checked_sub)?;
        let rest = digits_end.checked_sub(BEFORE_CRC.len())?;
        let n_blocks = rest.div_ceil(BLOCK_BYTES + CRC_DIGITS);
        let head = rest.checked_sub(n_blocks.checked_mul(CRC_DIGITS)?)?;
        (head.div_ceil(BLOCK_BYTES) == n_blocks).then_some(Parts { head, digits_end })
    }

    fn sha(&self) -> Range<usize> {
        let start = self.digits_end.saturating_add(BEFORE_SHA.len());
        start..start.saturating_add(SHA_DIGITS)
    }
}

/// Makes a block and its checksum agree.
fn mend_block(block: &mut [u8], digits: &mut [u8; CRC_DIGITS]) -> Option<()> {
    let found = crc32c::crc32c(block);
    let stored = std::str::from_utf8(digits).ok().and_then(|d| u32::from_str_radix(d, 16).ok());
    let syndrome = stored.map(|stored| stored ^ found).filter(|&s| s != 0);
    let changes = syndrome.map(|_| Changes::of(block.len()));
    if let Some(bit) = syndrome.zip(changes.as_ref()).and_then(|(s, changes)| changes.bit(s)) {
        return flip(block, bit);
    }
    // The digits themselves, which are hexadecimal no more or nearly what they should be.
    if replace(digits, hex_of(found).as_bytes()).is_some() {
        return Some(());
    }
    let [a, b] = syndrome.zip(changes).and_then(|(s, changes)| changes.pair(s))?;
    flip(block, a)?;
    flip(block, b)
}

fn flip(block: &mut [u8], bit: usize) -> Option<()> {
    *block.get_mut(bit / 8)? ^= 1 << (bit % 8);
    Some(())
}

fn hex_of(crc: u32) -> String {
    hex(&crc.to_be_bytes())
}

/// Puts `right` in place of `found`, if that is nearly what is there.
fn replace(found: &mut [u8], right: &[u8]) -> Option<()> {
    let wrong: u32 = found.iter().zip(right).map(|(a, b)| (a ^ b).count_ones()).sum();
    if wrong > WRONG_BITS_MAX || found.len() != right.len() {
        return None;
    }
    found.copy_from_slice(right);
    Some(())
}

/// How each bit of a block changes its checksum, sorted by that.
struct Changes(Vec<(u32, usize)>);

impl Changes {
    fn of(block_bytes: usize) -> Changes {
        let mut changes = Vec::with_capacity(block_bytes.saturating_mul(8));
        // What flipping each bit of the last byte does; the byte before does the same, with a zero byte behind it.
        let alone = |bit: u32| crc32c::crc32c(&[1 << bit]) ^ crc32c::crc32c(&[0]);
        let mut last = [0, 1, 2, 3, 4, 5, 6, 7].map(alone);
        for byte in (0..block_bytes).rev() {
            changes.extend(last.iter().zip(byte.saturating_mul(8)..).map(|(&change, bit)| (change, bit)));
            last = last.map(behind_zero);
        }
        changes.sort_unstable();
        Changes(changes)
    }

    /// The bit that makes this change.
    fn bit(&self, change: u32) -> Option<usize> {
        let at = self.0.binary_search_by_key(&change, |&(c, _)| c).ok()?;
        self.0.get(at).map(|&(_, bit)| bit)
    }

    /// Two bits that do.
    fn pair(&self, change: u32) -> Option<[usize; 2]> {
        self.0.iter().find_map(|&(first, bit)| Some([bit, self.bit(first ^ change)?]))
    }
}

/// A change of the checksum after one more byte; the checksum is kept inverted, hence the negations.
fn behind_zero(change: u32) -> u32 {
    !crc32c::crc32c_append(!change, &[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::SmallBundle;

    #[test]
    fn every_flipped_bit_is_turned_back() {
        let good = SmallBundle::new().manifest.to_text().unwrap().into_bytes();
        assert_eq!(mend(&good), Some(Mended { text: good.clone(), places: vec![] }));
        for bit in (0..good.len() * 8).step_by(5) {
            let mut bad = good.clone();
            flip(&mut bad, bit).unwrap();
            let mended = mend(&bad).unwrap_or_else(|| panic!("bit {bit} of {}", good.len() * 8));
            assert!(mended.text == good, "bit {bit}");
            assert_eq!(mended.places, [bit / 8]);
        }
    }

    #[test]
    fn so_are_two_in_a_block_and_one_in_each_other() {
        let good = SmallBundle::new().manifest.to_text().unwrap().into_bytes();
        assert!(good.len() > 2 * BLOCK_BYTES);
        for seed in 0..50_usize {
            let mut bad = good.clone();
            let end = good.len() * 8;
            for bit in [seed * 131, 7000 + seed * 19, 8 * 1100 + seed * 99, end - 300 - seed, end - 3] {
                flip(&mut bad, bit).unwrap();
            }
            assert!(mend(&bad).is_some_and(|m| m.text == good && m.places.len() == 5), "seed {seed}");
        }
    }

    #[test]
    fn more_is_not_guessed() {
        let good = SmallBundle::new().manifest.to_text().unwrap().into_bytes();
        let mut zeroed = good.clone();
        zeroed[200..300].fill(0);
        assert_eq!(mend(&zeroed), None);
        assert_eq!(mend(&good[1..]), None);
        assert_eq!(mend(b""), None);
        assert_eq!(mend(&[b'x'; 5000]), None);
    }

    #[test]
    fn a_check_value_that_others_know() {
        // RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(hex_of(crc32c::crc32c(&[0; 32])), "8a9136aa");
        assert_eq!(checksums(&[0; 32]), "8a9136aa");
    }
}
