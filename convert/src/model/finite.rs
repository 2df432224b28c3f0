//! NaN and infinity in bytes that are only copied: what is kept as it is must still be numbers.

use moepack_format::{Dtype, Error, Result};

/// Looks at the numbers of one tensor as its bytes pass, in order, in chunks of whole numbers.
#[derive(Debug)]
pub struct FiniteCheck {
    dtype: Dtype,
    n_seen: usize,
    n_odd: usize,
    first: Option<usize>,
}

impl FiniteCheck {
    /// For a tensor of this type; integers and types without NaN are always fine.
    pub fn new(dtype: Dtype) -> FiniteCheck {
        FiniteCheck { dtype, n_seen: 0, n_odd: 0, first: None }
    }

    /// Takes the next bytes.
    pub fn look(&mut self, bytes: &[u8]) {
        match self.dtype {
            Dtype::Bf16 => self.count(bytes, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
            Dtype::F16 => self.count(bytes, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
            Dtype::F32 => self.count(bytes, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
            Dtype::F64 => self.count(bytes, |b| !f64::from_le_bytes(b).is_finite()),
            Dtype::F8E4m3 => self.count(bytes, |[b]: [u8; 1]| b & 0x7f == 0x7f),
            Dtype::F8E5m2 => self.count(bytes, |[b]: [u8; 1]| b & 0x7c == 0x7c),
            _ => {}
        }
    }

    fn count<const N: usize>(&mut self, bytes: &[u8], odd: impl Fn([u8; N]) -> bool) {
        let numbers = bytes.as_chunks().0;
        let n_odd = numbers.iter().filter(|&&b| odd(b)).count();
        if n_odd > 0 && self.first.is_none() {
            self.first = numbers.iter().position(|&b| odd(b)).map(|at| self.n_seen + at);
        }
        self.n_odd += n_odd;
        self.n_seen += numbers.len();
    }

    /// Refuses the tensor if a NaN or an infinity passed.
    ///
    /// # Errors
    /// How many, and the index of the first.
    pub fn finish(&self) -> Result<()> {
        let Some(first) = self.first else { return Ok(()) };
        let what = format!(
            "{} of {} numbers are NaN or infinite, the first is number {first}",
            self.n_odd, self.n_seen
        );
        Err(Error::bad_data(what)
            .hint(
            "the file is damaged or was trained so: compare its sha256 with the release; --nan-policy zero reads them as 0",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(dtype: Dtype, chunks: &[&[u8]]) -> Option<String> {
        let mut check = FiniteCheck::new(dtype);
        chunks.iter().for_each(|c| check.look(c));
        check.finish().err().map(|e| e.what().to_owned())
    }

    #[test]
    fn nan_and_infinity_are_counted_over_chunks() {
        let said = outcome(Dtype::Bf16, &[&[0, 0, 0x7f, 0x7f], &[0x80, 0x7f, 0xc0, 0xff]]).unwrap();
        assert_eq!(said, "2 of 4 numbers are NaN or infinite, the first is number 2");
    }

    #[test]
    fn each_type_has_its_own_nan() {
        for (dtype, odd, even) in [
            (Dtype::F16, &[0u8, 0x7c][..], &[0xffu8, 0x7b][..]),
            (Dtype::F32, &[0, 0, 0x80, 0xff], &[0xff, 0xff, 0x7f, 0x7f]),
            (Dtype::F64, &[0, 0, 0, 0, 0, 0, 0xf0, 0x7f], &[0, 0, 0, 0, 0, 0, 0xe0, 0x7f]),
            (Dtype::F8E4m3, &[0xff], &[0x7e]),
            (Dtype::F8E5m2, &[0x7c], &[0x7b]),
        ] {
            assert!(outcome(dtype, &[odd]).is_some() && outcome(dtype, &[even]).is_none(), "{dtype:?}");
        }
        assert_eq!(outcome(Dtype::U8, &[&[0xff]]), None);
    }
}
