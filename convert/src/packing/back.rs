//! From the planes of a codec back to the words of other people's quantizers: the inverse of [`Packing::planes`]. What the
//! way in drops (bits that fill up a last word) comes back as zeros, which is what every packer writes there.

use moepack_format::{Error, Result};
use moepack_quant::bits::{packed_bytes, unpack};
use moepack_quant::{Isa, Planes};

use super::{AWQ_NIBBLES, Packing, Words};
use crate::layout::transpose;

/// The matrix, and what is known of the tensors that are to come out.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Groups of a row.
    pub n: usize,
    /// There are zero points.
    pub asym: bool,
    /// Bytes of all scales together.
    pub scales_bytes: usize,
    /// Bytes of all zero points together.
    pub zeros_bytes: usize,
}

impl Packing {
    /// The raw bytes of numbers and scales, of zero points and group indices where the codec has them.
    ///
    /// # Errors
    /// Planes that are not those of such a matrix.
    pub fn raw(self, planes: &Planes, wanted: Wanted) -> Result<Vec<Vec<u8>>> {
        let Wanted { rows, cols, n, asym, .. } = wanted;
        if self == Packing::AsPlanes {
            return Ok(planes.clone());
        }
        let plane = |at: usize| planes.get(at).ok_or_else(|| Error::bad_data("a plane is missing"));
        let (codes, scales) = (plane(0)?, plane(1)?);
        let zeros = if asym { Some(plane(2)?) } else { None };
        let mut raw = match self {
            Packing::AsPlanes => Vec::new(),
            Packing::Rows { bits, in_bytes } => {
                let zeros = zeros.map(|zeros| match in_bytes {
                    true => Ok(signed(bits, &codes_of(bits, zeros, n)?)),
                    false => transpose(&streams(bits, zeros, [rows, n])?, n, row_words(bits, rows), 4),
                });
                [padded(bits, codes, cols)?, scales.clone()].into_iter().chain(zeros.transpose()?).collect()
            }
            Packing::Bytes { .. } => {
                let cut = |plane: &[u8], bytes: usize| plane.get(..bytes).unwrap_or(plane).to_vec();
                let flipped = |plane: &[u8]| plane.iter().map(|q| q ^ 0x80).collect::<Vec<u8>>();
                let zeros = zeros.map(|zeros| cut(&flipped(zeros), wanted.zeros_bytes));
                [flipped(codes), cut(scales, wanted.scales_bytes)].into_iter().chain(zeros).collect()
            }
            Packing::Columns(bits, words) => {
                let width = scales.len() / (rows * n).max(1);
                let zeros = zeros.map(|zeros| columns_zeros(bits, words, zeros, [rows, n])).transpose()?;
                let numbers = match words {
                    Words::Awq => shuffled(&transpose(&codes_of(bits, codes, cols)?, rows, cols, 1)?, rows),
                    _ => transpose(&padded(bits, codes, cols)?, rows, row_words(bits, cols), 4)?,
                };
                [numbers, transpose(scales, rows, n, width)?].into_iter().chain(zeros).collect()
            }
        };
        raw.extend(planes.iter().skip(if asym { 3 } else { 2 }).cloned());
        Ok(raw)
    }
}

/// Zero points `[rows, n]` as words `[n, …]` along outputs.
fn columns_zeros(bits: u32, words: Words, zeros: &[u8], shape: [usize; 2]) -> Result<Vec<u8>> {
    let [rows, n] = shape;
    let mut codes = codes_of(bits, zeros, n)?;
    if words == Words::Awq {
        return Ok(shuffled(&transpose(&codes, rows, n, 1)?, rows));
    }
    let lowered = words == Words::Gptq;
    let whole = 32u32.is_multiple_of(bits);
    if lowered && !whole {
        codes.iter_mut().for_each(|z| *z = z.wrapping_sub(1) & (0xff >> (8 - bits)));
    }
    let mut streams = streams_of(bits, &codes, shape)?;
    if lowered && whole {
        let ones: u32 = (0..32).step_by(bits as usize).map(|bit| 1u32 << bit).sum();
        for word in streams.as_chunks_mut::<4>().0 {
            *word = u32::from_le_bytes(*word).wrapping_sub(ones).to_le_bytes();
        }
    }
    Ok(streams)
}

/// Packed zero points `[rows, n]` as streams `[n, words]` along outputs.
fn streams(bits: u32, zeros: &[u8], [rows, n]: [usize; 2]) -> Result<Vec<u8>> {
    streams_of(bits, &codes_of(bits, zeros, n)?, [rows, n])
}

fn streams_of(bits: u32, codes: &[u8], [rows, n]: [usize; 2]) -> Result<Vec<u8>> {
    let by_group = transpose(codes, rows, n, 1)?;
    padded(bits, &super::pack_rows(bits, &by_group, rows), rows)
}

/// Rows of packed codes, each filled up to whole words.
///
/// # Errors
/// Bytes that are no such rows.
pub fn padded(bits: u32, packed: &[u8], cols: usize) -> Result<Vec<u8>> {
    let (row_bytes, word_bytes) = (packed_bytes(bits, cols), row_words(bits, cols) * 4);
    if row_bytes == 0 || !packed.len().is_multiple_of(row_bytes) {
        return Err(Error::bad_data(format!("{} bytes are no rows of {row_bytes}", packed.len())));
    }
    let fill = vec![0; word_bytes.saturating_sub(row_bytes)];
    Ok(packed.chunks_exact(row_bytes).flat_map(|row| row.iter().chain(&fill)).copied().collect())
}

/// Packed rows of `cols` codes, a byte each.
fn codes_of(bits: u32, packed: &[u8], cols: usize) -> Result<Vec<u8>> {
    let row_bytes = packed_bytes(bits, cols);
    if row_bytes == 0 || !packed.len().is_multiple_of(row_bytes) {
        return Err(Error::bad_data(format!("{} bytes are no rows of {row_bytes}", packed.len())));
    }
    let mut codes = vec![0; packed.len() / row_bytes * cols];
    for (row, out) in packed.chunks_exact(row_bytes).zip(codes.chunks_exact_mut(cols)) {
        unpack(Isa::get(), bits, row, out);
    }
    Ok(codes)
}

/// Codes as signed integers around the middle.
fn signed(bits: u32, codes: &[u8]) -> Vec<u8> {
    codes.iter().map(|code| code.wrapping_sub(1 << (bits - 1))).collect()
}

/// Codes `[inputs, rows]` as AWQ's words `[inputs, rows / 8]`.
fn shuffled(codes: &[u8], rows: usize) -> Vec<u8> {
    let words = codes.chunks_exact(rows.max(1)).flat_map(|line| line.chunks(8)).map(|eight| {
        let nibbles = eight.iter().zip(AWQ_NIBBLES);
        nibbles.fold(0u32, |word, (&code, k)| word | u32::from(code & 15) << (4 * k))
    });
    words.flat_map(u32::to_le_bytes).collect()
}

fn row_words(bits: u32, cols: usize) -> usize {
    (cols * bits as usize).div_ceil(32)
}

#[cfg(test)]
mod tests {
    use super::super::Raw;
    use super::*;

    /// Bytes that differ from one to the next.
    fn noise(n: usize, seed: usize) -> Vec<u8> {
        (0..n).map(|i| ((i * 197 + seed * 89) ^ (i >> 3)) as u8).collect()
    }

    #[test]
    fn planes_that_go_out_come_back() {
        let (rows, cols, n) = (16, 96, 3);
        let ways = [
            Packing::Rows { bits: 4, in_bytes: false },
            Packing::Rows { bits: 3, in_bytes: false },
            Packing::Rows { bits: 5, in_bytes: true },
            Packing::Bytes { said: 8 },
            Packing::Columns(4, Words::Gptq),
            Packing::Columns(3, Words::Gptq),
            Packing::Columns(8, Words::GptqV2),
            Packing::Columns(4, Words::Awq),
        ];
        for (packing, seed) in ways.into_iter().zip(0..) {
            let bits = match packing {
                Packing::Rows { bits, .. } | Packing::Columns(bits, _) => bits,
                _ => 8,
            };
            let packed = |cols: usize| {
                let codes: Vec<u8> =
                    noise(rows * cols, seed).iter().map(|c| c & (0xff >> (8 - bits))).collect();
                super::super::pack_rows(bits, &codes, cols)
            };
            let planes = vec![packed(cols), noise(rows * n * 2, seed), packed(n)];
            let scales_bytes = rows * n * 2;
            let wanted = Wanted { rows, cols, n, asym: true, scales_bytes, zeros_bytes: rows * n };
            let raw = packing.raw(&planes, wanted).unwrap();
            // A byte a code has one zero point for each group; the plane here has them packed, which is the same for 8 bits.
            let back = packing.planes(Raw { planes: raw, rows, cols, n, asym: true, scale_bytes: 2 });
            assert_eq!(back.unwrap(), planes, "{packing:?}");
        }
    }

    #[test]
    fn bytes_that_are_no_planes_are_refused() {
        let wanted = Wanted { rows: 4, cols: 32, n: 1, asym: false, scales_bytes: 8, zeros_bytes: 0 };
        let four = Packing::Rows { bits: 4, in_bytes: false };
        assert!(four.raw(&vec![vec![0; 63], vec![0; 8]], wanted).is_err());
        assert!(four.raw(&vec![vec![0; 64]], wanted).is_err());
    }
}
