//! How tensors of a GGUF file are stored: the numbers of the types, their blocks, and the codecs of ours that they are.

use moepack_format::{Error, Result};
use moepack_quant::codec::ggml::kinds::KINDS;

/// A storage type of ggml.
#[derive(Debug, PartialEq, Eq)]
pub struct Type {
    /// Number in files.
    pub id: u32,
    /// ggml's name in lower case; the codec's name where we have one.
    pub name: &'static str,
    /// Numbers a block.
    pub block: u64,
    /// Bytes a block.
    pub block_bytes: u64,
}

const fn of(id: u32, name: &'static str, block: u64, block_bytes: u64) -> Type {
    Type { id, name, block, block_bytes }
}

/// Every type of ggml that files have; `ggml.c`, `type_traits`.
pub const TYPES: &[Type] = &[
    of(0, "f32", 1, 4),
    of(1, "f16", 1, 2),
    of(2, "q4_0", 32, 18),
    of(3, "q4_1", 32, 20),
    of(6, "q5_0", 32, 22),
    of(7, "q5_1", 32, 24),
    of(8, "q8_0", 32, 34),
    of(9, "q8_1", 32, 36),
    of(10, "q2_k", 256, 84),
    of(11, "q3_k", 256, 110),
    of(12, "q4_k", 256, 144),
    of(13, "q5_k", 256, 176),
    of(14, "q6_k", 256, 210),
    of(15, "q8_k", 256, 292),
    of(16, "iq2_xxs", 256, 66),
    of(17, "iq2_xs", 256, 74),
    of(18, "iq3_xxs", 256, 98),
    of(19, "iq1_s", 256, 50),
    of(20, "iq4_nl", 32, 18),
    of(21, "iq3_s", 256, 110),
    of(22, "iq2_s", 256, 82),
    of(23, "iq4_xs", 256, 136),
    of(24, "i8", 1, 1),
    of(25, "i16", 1, 2),
    of(26, "i32", 1, 4),
    of(27, "i64", 1, 8),
    of(28, "f64", 1, 8),
    of(29, "iq1_m", 256, 56),
    of(30, "bf16", 1, 2),
    of(34, "tq1_0", 256, 54),
    of(35, "tq2_0", 256, 66),
    of(39, "mxfp4", 32, 17),
];

impl Type {
    /// The type with that number.
    pub fn with_id(id: u32) -> Option<&'static Type> {
        TYPES.iter().find(|t| t.id == id)
    }

    /// The type that holds a codec's numbers; `None` where GGUF has none.
    pub fn of_codec(name: &str) -> Option<&'static Type> {
        let ours = ["f32", "f16", "bf16", "mxfp4"].contains(&name) || KINDS.iter().any(|k| k.name == name);
        TYPES.iter().find(|t| ours && t.name == name)
    }

    /// Bytes of a tensor.
    ///
    /// # Errors
    /// Rows that are no whole blocks, a dimension of 0, more than 64 bits can count.
    pub fn bytes(&self, dims: &[u64]) -> Result<u64> {
        let row = dims.first().copied().unwrap_or(1);
        if !row.is_multiple_of(self.block) {
            return Err(Error::bad_data(format!(
                "rows of {row} numbers, but blocks of {} have {}",
                self.name, self.block
            )));
        }
        let numbers = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d).filter(|&n| n > 0));
        let bytes = numbers.and_then(|n| (n / self.block).checked_mul(self.block_bytes));
        bytes.filter(|&b| b <= i64::MAX as u64).ok_or_else(|| {
            Error::bad_data(format!(
                "dimensions {dims:?} of {}, which is nothing or more than can be",
                self.name
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codecs_and_types_agree() {
        for kind in KINDS {
            let found = Type::of_codec(kind.name).unwrap();
            let expected = (kind.type_id, kind.block as u64, kind.block_bytes as u64);
            assert_eq!((found.id, found.block, found.block_bytes), expected, "{}", kind.name);
        }
        assert_eq!(Type::of_codec("mxfp4").unwrap().id, moepack_quant::codec::ggml::mxfp4::TYPE_ID);
        assert!(Type::of_codec("int4-g64").is_none() && Type::of_codec("q8_1").is_none());
    }

    #[test]
    fn sizes_are_checked() {
        let q4 = Type::of_codec("q4_k").unwrap();
        assert_eq!(q4.bytes(&[512, 3]).unwrap(), 864);
        for dims in [&[255, 3][..], &[256, 0], &[256, u64::MAX], &[1 << 63, 4]] {
            assert!(q4.bytes(dims).is_err(), "{dims:?}");
        }
    }
}
