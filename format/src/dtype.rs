//! Element types a safetensors header can name. Only their width matters here; their meaning is `quant`'s.

use crate::error::{Error, Result};

macro_rules! dtypes {
    ($($variant:ident $name:literal $bits:literal $doc:literal)*) => {
        /// Element type of a stored tensor.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Dtype { $(#[doc = $doc] $variant),* }

        impl Dtype {
            /// Every type, for tests and tables.
            pub const ALL: &[Dtype] = &[$(Dtype::$variant),*];

            /// The name in a safetensors header.
            pub const fn name(self) -> &'static str {
                match self { $(Dtype::$variant => $name),* }
            }

            /// Bits of one element; sub-byte types are packed, so shapes count elements.
            pub const fn bits(self) -> u64 {
                match self { $(Dtype::$variant => $bits),* }
            }
        }
    };
}

dtypes! {
    Bool "BOOL" 8 "One byte, 0 or 1."
    U8 "U8" 8 "Unsigned byte; also the container of packed codes."
    I8 "I8" 8 "Signed byte; DeepSeek V4 keeps FP4 pairs in it."
    F8E5m2 "F8_E5M2" 8 "Float, 5 exponent and 2 mantissa bits."
    F8E4m3 "F8_E4M3" 8 "Float, 4 exponent and 3 mantissa bits, no infinity (`fn`)."
    F8E8m0 "F8_E8M0" 8 "Power of two 2^(byte - 127), 255 is NaN."
    F4 "F4" 4 "Float E2M1, two a byte."
    F6E2m3 "F6_E2M3" 6 "Float E2M3."
    F6E3m2 "F6_E3M2" 6 "Float E3M2."
    I16 "I16" 16 "Signed, 2 bytes."
    U16 "U16" 16 "Unsigned, 2 bytes."
    F16 "F16" 16 "IEEE half."
    Bf16 "BF16" 16 "Upper half of an f32."
    I32 "I32" 32 "Signed, 4 bytes."
    U32 "U32" 32 "Unsigned, 4 bytes."
    F32 "F32" 32 "IEEE single."
    F64 "F64" 64 "IEEE double."
    I64 "I64" 64 "Signed, 8 bytes."
    U64 "U64" 64 "Unsigned, 8 bytes."
    C64 "C64" 64 "Complex of two f32."
}

impl Dtype {
    /// The type a safetensors header calls `name`.
    ///
    /// # Errors
    /// An unknown name, with the list of known ones.
    pub fn from_name(name: &str) -> Result<Dtype> {
        Dtype::ALL.iter().copied().find(|d| d.name() == name).ok_or_else(|| {
            let known: Vec<_> = Dtype::ALL.iter().map(|d| d.name()).collect();
            Error::bad_data(format!("unknown dtype {name:?}, known are {}", known.join(" ")))
        })
    }

    /// Bytes that a tensor of this shape takes.
    ///
    /// # Errors
    /// A product beyond 64 bits, or a sub-byte type that does not fill whole bytes.
    pub fn bytes(self, shape: &[u64]) -> Result<u64> {
        let bits = shape.iter().try_fold(self.bits(), |n, &d| n.checked_mul(d));
        match bits {
            Some(bits) if bits % 8 == 0 => Ok(bits / 8),
            Some(_) => {
                Err(Error::bad_data(format!("shape {shape:?} of {} does not fill whole bytes", self.name())))
            }
            None => {
                Err(Error::bad_data(format!("shape {shape:?} of {} has more than 2^64 bits", self.name())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_back_and_forth() {
        for &d in Dtype::ALL {
            assert_eq!(Dtype::from_name(d.name()), Ok(d));
        }
        assert!(Dtype::from_name("FP2").is_err());
    }

    #[test]
    fn bytes_are_checked() {
        assert_eq!(Dtype::Bf16.bytes(&[128, 4096]), Ok(1 << 20));
        assert_eq!(Dtype::F4.bytes(&[3, 2]), Ok(3));
        assert!(Dtype::F4.bytes(&[3]).is_err());
        assert!(Dtype::F64.bytes(&[1 << 62, 8]).is_err());
        assert_eq!(Dtype::F32.bytes(&[0, 7]), Ok(0));
    }
}
