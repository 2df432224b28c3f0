//! MXFP4 as GGUF holds it: the numbers of [`crate::codec::mxfp4`], scale and levels of a group side by side.
//!
//! ```text
//!  ours   blocks U8 [rows, cols/2]    byte i of a group: low nibble column 2 i, high nibble column 2 i + 1
//!         scales U8 [rows, cols/32]
//!
//!  ggml   17 bytes a group            byte 0: the scale
//!                                     byte 1 + i: low nibble column i, high nibble column i + 16
//! ```
//!
//! Moving never rounds. ggml's levels are doubled and its scales halved, which comes to the same numbers; but it takes
//! scale 255 for 2^128, where the standard says NaN.

/// Number of the type in a GGUF file.
pub const TYPE_ID: u32 = 39;
/// Numbers a block.
pub const BLOCK: usize = 32;
/// Bytes a block.
pub const BLOCK_BYTES: usize = 17;

/// Our planes `blocks` and `scales` as ggml's blocks.
pub fn to_ggml(blocks: &[u8], scales: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(scales.len() * BLOCK_BYTES);
    for (pairs, &scale) in blocks.as_chunks::<16>().0.iter().zip(scales) {
        out.push(scale);
        out.extend((0..16).map(|i| level(pairs, i) | level(pairs, i + 16) << 4));
    }
    out
}

/// ggml's blocks as our planes `blocks` and `scales`.
pub fn from_ggml(bytes: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let groups = bytes.as_chunks::<BLOCK_BYTES>().0;
    let mut blocks = Vec::with_capacity(groups.len() * 16);
    for [_, halves @ ..] in groups {
        let column = |i: usize| halves[i % 16] >> (4 * (i / 16)) & 15;
        blocks.extend((0..16).map(|i| column(2 * i) | column(2 * i + 1) << 4));
    }
    (blocks, groups.iter().map(|group| group[0]).collect())
}

/// Level of a column of a group of ours.
fn level(pairs: &[u8; 16], column: usize) -> u8 {
    pairs[column / 2] >> (4 * (column % 2)) & 15
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back_is_the_same() {
        let blocks: Vec<u8> = (0..16 * 5).map(|i: u8| i.wrapping_mul(37) ^ i >> 1).collect();
        let scales = [0, 1, 127, 254, 255];
        let moved = to_ggml(&blocks, &scales);
        assert_eq!(moved.len(), 5 * BLOCK_BYTES);
        assert_eq!(from_ggml(&moved), (blocks, scales.to_vec()));
    }
}
