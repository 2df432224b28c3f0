//! `bf16`, `f16` and `f32`: every number by itself, in a float type of its own. Three rows that differ in the type.
//!
//! ```text
//!  plane `weight`, [rows, cols] of BF16, F16 or F32, little-endian, row after row
//!  bf16  |s eeeeeeee mmmmmmm|            f32 cut to its upper half
//!  f16   |s eeeee mmmmmmmmmm|            IEEE 754 binary16
//!  f32   |s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm|
//! ```
//!
//! Encoding rounds to nearest, ties to even; zero keeps its sign; decoding is exact. NaN and infinity are refused when
//! encoding, and decoded as they are. A number that would round to infinity is refused too: above 65504 for f16, above
//! 3.3895e38 for bf16. Importance changes nothing. 16, 16 and 32 bits per weight.

use std::sync::Arc;

use moepack_format::{Dtype, Error, PlaneSpec, Result};

use super::{Codec, CodecFamily, Matrix, Planes, Reach, check_input, check_planes, check_shape};
use crate::isa::Isa;
use crate::{minifloat, numbers};

/// Row of the table: bf16.
pub const BF16: CodecFamily = CodecFamily {
    pattern: "bf16",
    doc: "16-bit brain float, what most checkpoints are released in",
    examples: &["bf16"],
    parse: |name| (name == "bf16").then(|| Arc::new(Plain::BF16) as _),
};

/// Row of the table: f16.
pub const F16: CodecFamily = CodecFamily {
    pattern: "f16",
    doc: "IEEE half",
    examples: &["f16"],
    parse: |name| (name == "f16").then(|| Arc::new(Plain::F16) as _),
};

/// Row of the table: f32.
pub const F32: CodecFamily = CodecFamily {
    pattern: "f32",
    doc: "IEEE single, exact",
    examples: &["f32"],
    parse: |name| (name == "f32").then(|| Arc::new(Plain::F32) as _),
};

/// A float type as codec: what of it differs from the others.
#[derive(Debug)]
pub struct Plain {
    name: &'static str,
    dtype: Dtype,
    /// Largest number that does not round to infinity.
    reach: f32,
    encode: fn(Isa, &[f32], &mut [u8]),
    decode: fn(Isa, &[u8], &mut [f32]),
}

impl Plain {
    /// `bf16`.
    pub const BF16: Plain = Plain {
        name: "bf16",
        dtype: Dtype::Bf16,
        reach: f32::from_bits(0x7f7f_0000),
        encode: numbers::f32_to_bf16,
        decode: numbers::bf16_to_f32,
    };
    /// `f16`.
    pub const F16: Plain = Plain {
        name: "f16",
        dtype: Dtype::F16,
        reach: minifloat::F16_MAX,
        encode: numbers::f32_to_f16,
        decode: numbers::f16_to_f32,
    };
    /// `f32`.
    pub const F32: Plain = Plain {
        name: "f32",
        dtype: Dtype::F32,
        reach: f32::MAX,
        encode: numbers::f32_to_bytes,
        decode: numbers::f32_from_bytes,
    };

    fn bytes_each(&self) -> usize {
        self.dtype.bits() as usize / 8
    }
}

impl Codec for Plain {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn planes(&self, rows: usize, cols: usize) -> Result<Vec<PlaneSpec>> {
        check_shape(rows, cols)?;
        Ok(vec![PlaneSpec::new("weight", self.dtype, &[rows as u64, cols as u64])])
    }

    fn encode(&self, isa: Isa, w: Matrix<'_>, importance: Option<&[f32]>) -> Result<Planes> {
        check_input(isa, w, importance, Reach { codec: self.name(), largest: self.reach })?;
        let mut bytes = vec![0; w.data.len() * self.bytes_each()];
        (self.encode)(isa, w.data, &mut bytes);
        Ok(vec![bytes])
    }

    fn decode(
        &self,
        isa: Isa,
        planes: &[&[u8]],
        rows: usize,
        cols: usize,
        first_row: usize,
        out: &mut [f32],
    ) -> Result<()> {
        check_planes(&self.planes(rows, cols)?, planes, rows, cols, first_row, out)?;
        let start = first_row * cols * self.bytes_each();
        let bytes = planes.first().and_then(|p| p.get(start..start + out.len() * self.bytes_each()));
        (self.decode)(isa, bytes.ok_or_else(|| Error::bad_data("rows beyond the plane"))?, out);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_round_to_infinity_is_refused() {
        let encode = |codec: &Plain, value| {
            codec.encode(Isa::get(), Matrix { rows: 1, cols: 1, data: &[value] }, None)
        };
        assert!(encode(&Plain::F16, 65504.0).is_ok());
        assert!(encode(&Plain::F16, -65519.0).unwrap_err().to_string().contains("bf16"));
        assert!(encode(&Plain::BF16, f32::MAX).is_err());
        assert_eq!(encode(&Plain::F32, f32::MAX), Ok(vec![f32::MAX.to_le_bytes().to_vec()]));
    }
}
