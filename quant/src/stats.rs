//! What calibration learnt about the inputs of one matrix: how many there were and how large each column was.

use moepack_format::{Error, Result};

use crate::isa::Isa;
use crate::numbers;
use crate::per_isa;

/// Mean squares of the inputs of a matrix, column by column. Never NaN, never infinite, never negative.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ColumnStats {
    /// Inputs seen.
    pub n_tokens: u64,
    /// Mean of x² of each column, `[cols]`; zeros if there were no inputs.
    pub second_moment: Vec<f32>,
}

/// Sums on the way to [`ColumnStats`]. Each column is one chain of f64 additions in token order, so it does not matter
/// in how many pieces the tokens arrive.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ColumnSums {
    n_tokens: u64,
    /// Sum of weight · x² of each column, `[cols]`.
    squares: Vec<f64>,
}

impl ColumnSums {
    /// Nothing seen yet of `cols` columns.
    pub fn new(cols: usize) -> ColumnSums {
        ColumnSums { n_tokens: 0, squares: vec![0.0; cols] }
    }

    /// Adds inputs `x`, `[tokens, cols]`. Each token counts 1, or as much as `weights` says (`[tokens]`, the squared
    /// routing weight, since by it the expert's error reaches the output).
    ///
    /// # Errors
    /// NaN or infinity, with its place; a length that is no multiple of the columns; negative weights.
    pub fn add(&mut self, isa: Isa, x: &[f32], weights: Option<&[f32]>) -> Result<()> {
        let cols = self.squares.len();
        let tokens = x.len().checked_div(cols).unwrap_or(0);
        if tokens * cols != x.len() || weights.is_some_and(|w| w.len() != tokens) {
            let n_weights = weights.map_or(tokens, <[f32]>::len);
            let what = format!("{} inputs and {n_weights} weights for {cols} columns", x.len());
            return Err(Error::bad_data(what));
        }
        check_finite(isa, x, cols)?;
        if let Some((token, w)) = weights.and_then(|w| w.iter().enumerate().find(|(_, w)| !valid(**w))) {
            return Err(Error::bad_data(format!(
                "weight {w} of token {token}, expected a finite number ≥ 0"
            )));
        }
        add_squares(isa, x, weights, &mut self.squares);
        self.n_tokens += tokens as u64;
        Ok(())
    }

    /// Adds what another has seen after this one.
    ///
    /// # Errors
    /// Another number of columns.
    pub fn merge(&mut self, later: &ColumnSums) -> Result<()> {
        let (found, expected) = (later.squares.len(), self.squares.len());
        if found != expected {
            return Err(Error::bad_data(format!("sums of {found} columns, expected {expected}")));
        }
        self.n_tokens += later.n_tokens;
        for (sum, more) in self.squares.iter_mut().zip(&later.squares) {
            *sum += more;
        }
        Ok(())
    }

    /// The means. Inputs so large that a mean does not fit f32 count as f32's largest number.
    pub fn finish(&self) -> ColumnStats {
        let n = self.n_tokens.max(1) as f64;
        let mean = |&sum: &f64| (sum / n).min(f64::from(f32::MAX)) as f32;
        ColumnStats { n_tokens: self.n_tokens, second_moment: self.squares.iter().map(mean).collect() }
    }
}

impl ColumnStats {
    /// Bytes to store: tokens and columns as u64, then the second moments as f32, all little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        let cols = self.second_moment.len() as u64;
        let head = self.n_tokens.to_le_bytes().into_iter().chain(cols.to_le_bytes());
        head.chain(self.second_moment.iter().flat_map(|m| m.to_le_bytes())).collect()
    }

    /// The inverse of [`ColumnStats::to_bytes`].
    ///
    /// # Errors
    /// Another length than the number of columns asks for; a second moment that is no finite number ≥ 0.
    pub fn from_bytes(bytes: &[u8]) -> Result<ColumnStats> {
        let (words, rest) = bytes.as_chunks::<4>();
        let (&[n0, n1, c0, c1, ref moments @ ..], []) = (words, rest) else {
            return Err(Error::bad_data(format!(
                "{} bytes of column stats, expected 16 and 4 a column",
                bytes.len()
            )));
        };
        let word = |low, high| u64::from(u32::from_le_bytes(low)) | u64::from(u32::from_le_bytes(high)) << 32;
        let (n_tokens, cols) = (word(n0, n1), word(c0, c1));
        if cols != moments.len() as u64 {
            return Err(Error::bad_data(format!("stats of {cols} columns, but there are {}", moments.len())));
        }
        let second_moment: Vec<f32> = moments.iter().map(|m| f32::from_le_bytes(*m)).collect();
        match second_moment.iter().position(|&m| !valid(m)) {
            Some(column) => {
                let m = second_moment.get(column).copied().unwrap_or(f32::NAN);
                Err(Error::bad_data(format!(
                    "second moment {m} of column {column}, expected a finite number ≥ 0"
                )))
            }
            None => Ok(ColumnStats { n_tokens, second_moment }),
        }
    }
}

fn valid(v: f32) -> bool {
    v.is_finite() && v >= 0.0
}

pub(crate) fn check_finite(isa: Isa, x: &[f32], cols: usize) -> Result<()> {
    if numbers::max_magnitude(isa, x).is_some() {
        return Ok(());
    }
    let i = x.iter().position(|v| !v.is_finite()).unwrap_or(0);
    let value = x.get(i).copied().unwrap_or(f32::NAN);
    let (token, column) = (i / cols, i % cols);
    Err(Error::bad_data(format!("input {value} of token {token}, column {column}, expected finite numbers"))
        .hint("the forward pass overflowed before this matrix"))
}

per_isa! {
    fn add_squares(x: &[f32], weights: Option<&[f32]>, sums: &mut [f64]) = add_squares_body;
}

#[inline(always)]
fn add_squares_body(x: &[f32], weights: Option<&[f32]>, sums: &mut [f64]) {
    for (t, row) in x.chunks_exact(sums.len().max(1)).enumerate() {
        let weight = f64::from(weights.map_or(1.0, |w| w[t]));
        for (sum, &v) in sums.iter_mut().zip(row) {
            let v = f64::from(v);
            *sum += v * v * weight;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(n: usize) -> Vec<f32> {
        (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e7 - 0.8).collect()
    }

    #[test]
    fn pieces_and_levels_do_not_change_the_bits() {
        let (cols, tokens) = (37, 50);
        let (x, weights) =
            (inputs(cols * tokens), inputs(tokens).iter().map(|w| w.abs()).collect::<Vec<_>>());
        let mut whole = ColumnSums::new(cols);
        whole.add(Isa::SCALAR, &x, Some(&weights)).unwrap();
        for isa in Isa::available() {
            for piece in [1, 7, 50] {
                let mut sums = ColumnSums::new(cols);
                for (x, w) in x.chunks(cols * piece).zip(weights.chunks(piece)) {
                    sums.add(isa, x, Some(w)).unwrap();
                }
                assert_eq!(sums, whole, "{} in pieces of {piece}", isa.name());
            }
        }
    }

    #[test]
    fn a_mean_is_a_mean() {
        let mut sums = ColumnSums::new(2);
        assert_eq!(sums.finish(), ColumnStats { n_tokens: 0, second_moment: vec![0.0, 0.0] });
        sums.add(Isa::get(), &[1.0, 3.0, -2.0, 1.0], None).unwrap();
        let mut more = ColumnSums::new(2);
        more.add(Isa::get(), &[1.0, 0.0, 2.0, f32::MAX], None).unwrap();
        sums.merge(&more).unwrap();
        assert_eq!(sums.finish(), ColumnStats { n_tokens: 4, second_moment: vec![2.5, f32::MAX] });
        assert!(sums.merge(&ColumnSums::new(3)).is_err());
    }

    #[test]
    fn what_is_no_number_is_refused_with_its_place() {
        let mut sums = ColumnSums::new(2);
        let e = sums.add(Isa::get(), &[0.0, 0.0, 0.0, f32::NAN], None).unwrap_err();
        assert!(e.what().contains("token 1, column 1"), "{e}");
        assert!(sums.add(Isa::get(), &[0.0; 3], None).is_err());
        assert!(sums.add(Isa::get(), &[0.0; 2], Some(&[-1.0])).is_err());
        assert_eq!(sums, ColumnSums::new(2));
    }

    #[test]
    fn bytes_go_there_and_back_and_nonsense_is_refused() {
        let stats = ColumnStats { n_tokens: 7, second_moment: vec![0.5, 0.0, 1e30] };
        let bytes = stats.to_bytes();
        assert_eq!(ColumnStats::from_bytes(&bytes), Ok(stats.clone()));
        for n in 0..bytes.len() {
            assert!(ColumnStats::from_bytes(&bytes[..n]).is_err(), "{n} bytes");
        }
        let nan = ColumnStats { second_moment: vec![f32::NAN, 0.0, 0.0], ..stats };
        assert!(ColumnStats::from_bytes(&nan.to_bytes()).is_err());
    }
}
