//! Which type of ggml holds which codec's numbers, and how their bits move there. Nothing here rounds, unless BF16 is asked
//! for of what ggml has no type for.
//!
//! ```text
//!  ggml's own types, bf16, f16, f32     the same bytes
//!  mxfp4                                the same bits, in another order
//!  int4, int5, int8 with f16 scales     q4_0, q5_0, q8_0: level × d with the same levels and d, which a group wider than 32
//!                                       repeats
//!  fp8-block… with powers of two        bf16, whose eight bits hold the four of a number of FP8
//!  fp8-block… with other scales         f32, four bytes a number
//! ```

use moepack_format::{Dtype, Error, Result};
use moepack_quant::Isa;
use moepack_quant::bits;
use moepack_quant::codec::ggml::mxfp4;
use moepack_quant::minifloat::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};

use super::Type;
use crate::coded::CodedPart;
use crate::write::{Int, Scheme};

/// Numbers of a block of the types that integers move to.
const BLOCK: usize = 32;

/// Where a codec's numbers go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fit {
    pub kind: &'static Type,
    pub way: Way,
}

/// How they get there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Same,
    Mxfp4,
    Ints { bits: u32, group: usize },
    Decoded,
}

impl Way {
    /// Whether bits move, not numbers.
    pub fn is_move(self) -> bool {
        self != Way::Decoded
    }
}

/// The type that a codec's numbers are written in: one that holds them, decoded or not, or BF16 of whatever ggml has no type
/// for, if that is asked for. `None` where there is none.
pub(crate) fn fit(codec: &str, bf16: bool) -> Option<Fit> {
    let decoded = |name| Type::of_codec(name).map(|kind| Fit { kind, way: Way::Decoded });
    match holder(codec) {
        None if bf16 => decoded("bf16"),
        None => match Scheme::of(codec)? {
            Scheme::Fp8 { scales: Dtype::F8E8m0, .. } => decoded("bf16"),
            Scheme::Fp8 { .. } => decoded("f32"),
            _ => None,
        },
        held => held,
    }
}

/// The type that bits move to.
fn holder(codec: &str) -> Option<Fit> {
    if codec == "mxfp4" {
        return Type::of_codec(codec).map(|kind| Fit { kind, way: Way::Mxfp4 });
    }
    if let Some(kind) = Type::of_codec(codec) {
        return Some(Fit { kind, way: Way::Same });
    }
    match Scheme::of(codec)? {
        Scheme::Int(Int { bits, group, scales: Dtype::F16, asym: false, indexed: false })
            if group.is_multiple_of(BLOCK as u64) =>
        {
            let name = match bits {
                4 => "q4_0",
                5 => "q5_0",
                8 => "q8_0",
                _ => return None,
            };
            let way = Way::Ints { bits, group: usize::try_from(group).ok()? };
            Type::of_codec(name).map(|kind| Fit { kind, way })
        }
        _ => None,
    }
}

/// The bytes of a matrix as GGUF has them.
///
/// # Errors
/// Planes that are not those of the codec; numbers that are none.
pub(crate) fn bytes(part: &CodedPart, kind: &Type, rounds: bool) -> Result<Vec<u8>> {
    let codec = part.codec.name();
    let way = holder(&codec).map_or(Way::Decoded, |f| f.way);
    // Which also looks at the lengths of all planes.
    let decoded = part.decode(Isa::get())?;
    match (way, &*part.planes) {
        (Way::Same, [plane]) => Ok(plane.clone()),
        (Way::Mxfp4, [blocks, scales]) => Ok(mxfp4::to_ggml(blocks, scales)),
        (Way::Ints { bits, group }, [codes, scales]) => Ok(ints(bits, group, part.cols, codes, scales)),
        (Way::Decoded, _) => numbers(&decoded, kind, rounds),
        (_, planes) => Err(Error::bad_data(format!("{} planes of {codec}", planes.len()))),
    }
}

/// Numbers in a plain type, which holds them unless it may round them.
///
/// # Errors
/// A type that is no plain one, or does not hold a number.
pub(crate) fn numbers(values: &[f32], kind: &Type, rounds: bool) -> Result<Vec<u8>> {
    type Pair = (fn(f32) -> u16, fn(u16) -> f32);
    let (write, read): Pair = match kind.name {
        "f32" => return Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect()),
        "bf16" => (f32_to_bf16, bf16_to_f32),
        "f16" => (f32_to_f16, f16_to_f32),
        other => return Err(Error::bad_data(format!("{other} is no plain type"))),
    };
    match values.iter().find(|v| !rounds && read(write(**v)) != **v) {
        None => Ok(values.iter().flat_map(|v| write(*v).to_le_bytes()).collect()),
        Some(v) => Err(Error::plan(format!("{v:e} is no number of {}", kind.name))
            .hint("--dequantize rounds such numbers to BF16")),
    }
}

/// Levels and scales as blocks: the scale, and of `q5_0` the fifth bits, then levels `i` and `i + 16` a byte, or a byte each.
fn ints(bits: u32, group: usize, cols: usize, codes: &[u8], scales: &[u8]) -> Vec<u8> {
    let (row_bytes, per_row) = (bits::packed_bytes(bits, cols), cols.div_ceil(group));
    let mut levels = vec![0; cols];
    let mut out = Vec::with_capacity(codes.len() + codes.len() / 8);
    let rows = codes.chunks_exact(row_bytes.max(1)).zip(scales.chunks_exact((2 * per_row).max(1)));
    for (codes, scales) in rows {
        bits::unpack(Isa::get(), bits, codes, &mut levels);
        for (b, block) in levels.as_chunks::<BLOCK>().0.iter().enumerate() {
            let at = 2 * (b * BLOCK / group);
            out.extend(scales.get(at..at + 2).unwrap_or_default());
            match bits {
                8 => out.extend(block.iter().map(|u| u.wrapping_sub(128))),
                _ => {
                    if bits == 5 {
                        let high = (0..BLOCK).fold(0u32, |high, i| high | u32::from(block[i] >> 4) << i);
                        out.extend(high.to_le_bytes());
                    }
                    out.extend((0..BLOCK / 2).map(|i| block[i] & 15 | block[i + 16] << 4));
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coded::Origin;
    use crate::spec::Part;
    use moepack_quant::{Matrix, codec};

    fn part(name: &str) -> CodedPart {
        let (rows, cols) = (3, 256);
        let data: Vec<f32> =
            (0..rows * cols).map(|i| (i as f32 * 0.7).sin() * (1.0 + (i % 7) as f32)).collect();
        let codec = codec(name).unwrap();
        let planes = codec.encode(Isa::get(), Matrix { rows, cols, data: &data }, None).unwrap();
        CodedPart { part: Part::Up, codec, rows, cols, planes, source: Origin::default() }
    }

    #[test]
    fn integers_are_the_same_numbers_in_their_new_type() {
        for (name, kind) in [
            ("int4-g32", "q4_0"),
            ("int4-g64", "q4_0"),
            ("int4-g128", "q4_0"),
            ("int5-g64", "q5_0"),
            ("int8-g32", "q8_0"),
            ("int8-g128", "q8_0"),
        ] {
            let part = part(name);
            let found = fit(name, false).unwrap();
            assert_eq!(found.kind.name, kind, "{name}");
            let plane = bytes(&part, found.kind, false).unwrap();
            let mut moved = vec![0.0; part.rows * part.cols];
            let like = codec(kind).unwrap();
            like.decode(Isa::get(), &[&plane], part.rows, part.cols, 0, &mut moved).unwrap();
            let before = part.decode(Isa::get()).unwrap();
            // Zero may have another sign.
            assert!(before.iter().zip(&moved).all(|(a, b)| a == b), "{name}");
        }
    }

    #[test]
    fn what_ggml_cannot_hold_is_not_held() {
        for name in ["int4-g64-asym", "int3-g64", "int6-g64", "affine4-g64-bf16", "nvfp4", "tcq64"] {
            assert_eq!(fit(name, false), None, "{name}");
            assert_eq!(fit(name, true).unwrap().kind.name, "bf16", "{name}");
        }
        assert_eq!(fit("fp8-block", false).unwrap().kind.name, "f32");
        let powers = fit("fp8-block-e8m0", false).unwrap().kind;
        assert_eq!(powers.name, "bf16");
        let part = part("fp8-block-e8m0");
        let plane = bytes(&part, powers, false).unwrap();
        let moved = plane.as_chunks().0.iter().map(|b| bf16_to_f32(u16::from_le_bytes(*b)));
        assert!(moved.eq(part.decode(Isa::get()).unwrap()));
        assert!(
            numbers(&[1.0 + 1e-6], powers, false).is_err() && numbers(&[1.0 + 1e-6], powers, true).is_ok()
        );
        assert_eq!(fit("q4_k", true).unwrap().way, Way::Same);
    }
}
