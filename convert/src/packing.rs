//! Integer codes in the words of other people's quantizers, and the same codes in the planes of the codec `affine`. Moved,
//! never rounded.
//!
//! A word is a little-endian u32; codes lie in a stream of words least significant bit first and may cross from one
//! into the next. What differs is along which axis a stream runs:
//!
//! ```text
//!  compressed-tensors  weight_packed [out, in·b/32]    along inputs    weight_zero_point [out·b/32, n]  along outputs
//!  int-quantized       weight I8 [out, in]             a byte each     weight_zero_point I8 [out, n]
//!  GPTQ                qweight [in·b/32, out]          along inputs    qzeros [n, out·b/32]             along outputs
//!  AWQ (GEMM)          qweight [in, out/8]             eight outputs a word, in the order 0 2 4 6 1 3 5 7; qzeros too
//! ```
//!
//! GPTQ's and AWQ's scales are `[n, out]`. GPTQ files of version 1 hold zero points less one. Where codes do not cross
//! words, the ones are added to each word as a whole, with the carries that GPTQModel's own conversion makes, which undo
//! the borrows of its subtraction; codes of 3 bits are raised one by one, as there. Sources: compressed-tensors 0.20
//! `compressors/pack_quantized/helpers.py`; GPTQModel `utils/model.py::convert_gptq_v1_to_v2_format_module`; AutoAWQ
//! `awq/utils/packing_utils.py`.

use moepack_format::{Error, Result};
use moepack_quant::bits::{pack, packed_bytes};
use moepack_quant::{Isa, Planes};

use crate::layout::transpose;

mod back;
pub use back::{Wanted, padded};

/// How raw bytes become the planes of a codec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// They are the planes.
    AsPlanes,
    /// Rows of words.
    Rows {
        /// Of a code.
        bits: u32,
        /// Zero points have a byte each, not a stream along outputs.
        in_bytes: bool,
    },
    /// A signed byte a code.
    Bytes {
        /// Bits that config.json says codes have.
        said: u32,
    },
    /// Inputs along the first axis, so many bits a code.
    Columns(u32, Words),
}

/// What the words of [`Packing::Columns`] hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Words {
    /// Inputs; zero points less one.
    Gptq,
    /// Inputs; zero points.
    GptqV2,
    /// Eight outputs, shuffled.
    Awq,
}

/// Nibble of a word that holds each of its eight outputs.
const AWQ_NIBBLES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Raw bytes of numbers and scales, of zero points and group indices where the codec has them, as planes of a matrix
/// `[rows, cols]` with `n` groups a row.
#[derive(Debug)]
pub struct Raw {
    /// In the order of the codec's planes.
    pub planes: Planes,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Groups of a row.
    pub n: usize,
    /// There are zero points.
    pub asym: bool,
    /// Bytes of a scale.
    pub scale_bytes: usize,
}

impl Packing {
    /// The codec's planes.
    ///
    /// # Errors
    /// Bytes that are no such matrix; codes beyond the bits that they should have.
    pub fn planes(self, raw: Raw) -> Result<Planes> {
        let Raw { planes, rows, cols, n, asym, scale_bytes } = raw;
        let mut planes = planes.into_iter();
        let mut next =
            || planes.next().ok_or_else(|| Error::bad_data("numbers, scales or zero points are missing"));
        let (numbers, scales) = (next()?, next()?);
        let zeros = if asym { Some(next()?) } else { None };
        let zeros = zeros.as_deref();
        let mut out = match self {
            Packing::AsPlanes => {
                return Ok([numbers, scales]
                    .into_iter()
                    .chain(zeros.map(<[u8]>::to_vec))
                    .chain(planes)
                    .collect());
            }
            Packing::Rows { bits, in_bytes } => {
                let codes = from_rows(bits, &numbers, [rows, cols])?;
                let zeros = zeros.map(|zeros| match in_bytes {
                    true => zeros_of_bytes(bits, zeros, n),
                    false => zeros_of_rows(bits, zeros, [rows, n]),
                });
                [codes, scales].into_iter().chain(zeros.transpose()?).collect()
            }
            Packing::Bytes { said } => {
                // One scale for all stands for one a row.
                let one_for_all = scales.len() == scale_bytes && n == 1;
                let scales = if one_for_all { scales.repeat(rows) } else { scales };
                from_bytes(said, &numbers, scales, zeros, [rows, cols, n])?
            }
            Packing::Columns(bits, words) => {
                from_columns(bits, words, &numbers, &scales, zeros, [rows, cols, n])?
            }
        };
        out.extend(planes);
        Ok(out)
    }
}

/// compressed-tensors: rows are streams already, only longer.
fn from_rows(bits: u32, numbers: &[u8], [rows, cols]: [usize; 2]) -> Result<Vec<u8>> {
    let row_bytes = (cols * bits as usize).div_ceil(32) * 4;
    sized(numbers, rows * row_bytes)?;
    let rows_of = numbers.chunks_exact(row_bytes.max(1));
    Ok(rows_of.flat_map(|row| row.iter().take(packed_bytes(bits, cols))).copied().collect())
}

/// Zero points `[words, n]`, streams along outputs, as rows of packed ones.
fn zeros_of_rows(bits: u32, zeros: &[u8], [rows, n]: [usize; 2]) -> Result<Vec<u8>> {
    let n_words = (rows * bits as usize).div_ceil(32);
    let streams = words(&transpose(zeros, n_words, n, 4)?);
    zero_plane(bits, &streams, n_words, [rows, n], 0)
}

/// Zero points `[rows, n]` of a signed byte each.
fn zeros_of_bytes(bits: u32, zeros: &[u8], n: usize) -> Result<Vec<u8>> {
    within(bits, zeros, n, "zero point")?;
    let middle = 1u8 << (bits - 1);
    let codes: Vec<u8> = zeros.iter().map(|z| z.wrapping_add(middle)).collect();
    Ok(pack_rows(bits, &codes, n))
}

/// A byte a code; q + 128 is stored here.
fn from_bytes(
    said: u32,
    numbers: &[u8],
    scales: Vec<u8>,
    zeros: Option<&[u8]>,
    [rows, cols, n]: [usize; 3],
) -> Result<Planes> {
    sized(numbers, rows * cols)?;
    within(said, numbers, cols, "code")?;
    let mut planes = vec![numbers.iter().map(|q| q ^ 0x80).collect(), scales];
    if let Some(zeros) = zeros {
        within(said, zeros, n, "zero point")?;
        let all = zeros.iter().cycle().take(if zeros.is_empty() { 0 } else { rows * n });
        planes.push(all.map(|z| z ^ 0x80).collect());
    }
    Ok(planes)
}

/// Refuses integers that have more bits than config.json says.
fn within(said: u32, integers: &[u8], cols: usize, what: &str) -> Result<()> {
    let half = 1i16 << (said - 1);
    let beyond = |q: &u8| !(-half..half).contains(&i16::from(q.cast_signed()));
    let Some(at) = integers.iter().position(beyond) else { return Ok(()) };
    let (row, col) = (at / cols.max(1), at % cols.max(1));
    let found = integers.get(at).map_or(0, |q| q.cast_signed());
    Err(Error::bad_data(format!(
        "{what} {found} at row {row}, column {col}, expected {} to {}",
        -half,
        half - 1
    ))
    .hint("config.json says how many bits integers have; the file may be damaged or belong to another model"))
}

/// GPTQ and AWQ: everything the other way round.
fn from_columns(
    bits: u32,
    words_of: Words,
    numbers: &[u8],
    scales: &[u8],
    zeros: Option<&[u8]>,
    [rows, cols, n]: [usize; 3],
) -> Result<Planes> {
    let width = scales.len() / (rows * n).max(1);
    let codes = match words_of {
        Words::Awq => {
            let by_input = outputs_of_words(numbers, rows, cols)?;
            pack_rows(bits, &transpose(&by_input, cols, rows, 1)?, cols)
        }
        Words::Gptq | Words::GptqV2 => {
            let n_words = (cols * bits as usize).div_ceil(32);
            // [words, rows] to streams [rows, words], whose bytes are those of the plane.
            let streams = transpose(numbers, n_words, rows, 4)?;
            let rows_of = streams.chunks_exact((n_words * 4).max(1));
            rows_of.flat_map(|row| row.iter().take(packed_bytes(bits, cols))).copied().collect()
        }
    };
    let mut planes = vec![codes, transpose(scales, n, rows, width)?];
    if let Some(zeros) = zeros {
        planes.push(match words_of {
            Words::Awq => pack_rows(bits, &transpose(&outputs_of_words(zeros, rows, n)?, n, rows, 1)?, n),
            Words::Gptq | Words::GptqV2 => {
                let n_words = (rows * bits as usize).div_ceil(32);
                let mut streams = words(zeros);
                let raised = words_of == Words::Gptq;
                if raised && 32u32.is_multiple_of(bits) {
                    let ones = (0..32).step_by(bits as usize).map(|bit| 1u32 << bit).sum();
                    streams.iter_mut().for_each(|z| *z = z.wrapping_add(ones));
                    zero_plane(bits, &streams, n_words, [rows, n], 0)?
                } else {
                    zero_plane(bits, &streams, n_words, [rows, n], raised.into())?
                }
            }
        });
    }
    Ok(planes)
}

/// Zero points of streams `[n, n_words]` over rows, each `raised` by so much, as rows of `n` packed ones.
fn zero_plane(
    bits: u32,
    streams: &[u32],
    n_words: usize,
    [rows, n]: [usize; 2],
    raised: u8,
) -> Result<Vec<u8>> {
    if streams.len() != n * n_words {
        return Err(Error::bad_data(format!(
            "{} words of zero points, expected {n} × {n_words}",
            streams.len()
        )));
    }
    let mut by_group = Vec::with_capacity(n * rows);
    for stream in streams.chunks_exact(n_words.max(1)) {
        by_group.extend((0..rows).map(|r| (code_at(stream, r, bits) + raised) & (0xff >> (8 - bits))));
    }
    Ok(pack_rows(bits, &transpose(&by_group, n, rows, 1)?, n))
}

/// Code `at` of a stream.
fn code_at(stream: &[u32], at: usize, bits: u32) -> u8 {
    let bit = at * bits as usize;
    let word = |w: usize| u64::from(stream.get(w).copied().unwrap_or(0));
    let pair = word(bit / 32) | word(bit / 32 + 1) << 32;
    (pair >> (bit % 32)) as u8 & (0xff >> (8 - bits))
}

/// AWQ's words `[inputs, rows / 8]` as codes `[inputs, rows]`.
fn outputs_of_words(numbers: &[u8], rows: usize, inputs: usize) -> Result<Vec<u8>> {
    sized(numbers, inputs * rows.div_ceil(8) * 4)?;
    let mut codes = Vec::with_capacity(inputs * rows);
    for line in words(numbers).chunks_exact(rows.div_ceil(8).max(1)) {
        let outputs = line.iter().flat_map(|word| AWQ_NIBBLES.map(|k| (word >> (4 * k)) as u8 & 15));
        codes.extend(outputs.take(rows));
    }
    Ok(codes)
}

/// Codes `[.., cols]` as rows of packed ones.
fn pack_rows(bits: u32, codes: &[u8], cols: usize) -> Vec<u8> {
    let row_bytes = packed_bytes(bits, cols);
    let mut out = vec![0; codes.len() / cols.max(1) * row_bytes];
    for (row, out) in codes.chunks_exact(cols.max(1)).zip(out.chunks_exact_mut(row_bytes.max(1))) {
        pack(Isa::get(), bits, row, out);
    }
    out
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

fn sized(bytes: &[u8], expected: usize) -> Result<()> {
    if bytes.len() == expected {
        return Ok(());
    }
    Err(Error::bad_data(format!("{} bytes of packed numbers, expected {expected}", bytes.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    fn planes(packing: Packing, raw: [Vec<u8>; 3], [rows, cols, n]: [usize; 3]) -> Result<Planes> {
        packing.planes(Raw { planes: raw.to_vec(), rows, cols, n, asym: true, scale_bytes: 2 })
    }

    #[test]
    fn gptq_undoes_the_borrow_of_a_zero_point_of_zero() {
        // Zero points 0 and 8 of two outputs: 0x80 less 0x11 is 0x6f, whose low nibble alone would say 16.
        let numbers = bytes(&[0x7654_3210, 0xfedc_ba98]);
        let scales = vec![1, 0, 2, 0];
        let word = 0x0000_0080u32.wrapping_sub(0x1111_1111);
        let found = planes(
            Packing::Columns(4, Words::Gptq),
            [numbers.clone(), scales.clone(), bytes(&[word])],
            [2, 8, 1],
        );
        let found = found.unwrap();
        assert_eq!(found[0], numbers, "eight inputs of one output are a word and a row");
        assert_eq!((&found[1], &found[2]), (&scales, &vec![0, 8]));
        let v2 =
            planes(Packing::Columns(4, Words::GptqV2), [numbers, scales, bytes(&[0x80])], [2, 8, 1]).unwrap();
        assert_eq!(v2, found);
    }

    #[test]
    fn awq_shuffles_eight_outputs() {
        // Output o of input 0 has code o, of input 1 code 15 − o.
        let (one, two) = (0x7531_6420, 0x8ace_9bdf);
        let scales: Vec<u8> = (0..16).collect();
        let found =
            planes(Packing::Columns(4, Words::Awq), [bytes(&[one, two]), scales, bytes(&[one])], [8, 2, 1]);
        let found = found.unwrap();
        assert_eq!(found[0], [0xf0, 0xe1, 0xd2, 0xc3, 0xb4, 0xa5, 0x96, 0x87]);
        assert_eq!(found[2], [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn bytes_that_are_no_such_matrix_are_refused() {
        let short = [vec![0; 4], vec![0; 4], vec![0; 4]];
        for packing in [
            Packing::Rows { bits: 4, in_bytes: false },
            Packing::Bytes { said: 8 },
            Packing::Columns(4, Words::Gptq),
            Packing::Columns(4, Words::Awq),
        ] {
            assert!(planes(packing, short.clone(), [16, 64, 2]).is_err(), "{packing:?}");
            let none = Raw { planes: vec![vec![0; 4]], rows: 1, cols: 8, n: 1, asym: false, scale_bytes: 2 };
            assert!(packing.planes(none).is_err(), "{packing:?}");
        }
    }

    #[test]
    fn zero_points_of_a_byte_each_are_packed_and_kept_within_their_bits() {
        let raw = |zero: i8| [bytes(&[0x7654_3210]), vec![0; 4], vec![zero as u8, 7]];
        let four = Packing::Rows { bits: 4, in_bytes: true };
        assert_eq!(planes(four, raw(-8), [1, 8, 2]).unwrap()[2], [0xf0]);
        let e = planes(four, raw(8), [1, 8, 2]).unwrap_err();
        assert_eq!(e.what(), "zero point 8 at row 0, column 0, expected -8 to 7");
    }

    #[test]
    fn integers_beyond_the_bits_that_config_json_says_are_refused() {
        let raw = |codes: [u8; 2], zero: u8| [codes.to_vec(), vec![0; 2], vec![zero]];
        let four = Packing::Bytes { said: 4 };
        assert_eq!(planes(four, raw([0xf8, 7], 1), [1, 2, 1]).unwrap()[0], [0x78, 0x87]);
        let e = planes(four, raw([0xf8, 8], 1), [1, 2, 1]).unwrap_err();
        assert_eq!(e.what(), "code 8 at row 0, column 1, expected -8 to 7");
        let e = planes(four, raw([0, 0], 0x80), [1, 2, 1]).unwrap_err();
        assert_eq!(e.what(), "zero point -128 at row 0, column 0, expected -8 to 7");
    }
}
