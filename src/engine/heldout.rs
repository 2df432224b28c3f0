//! What a coded matrix loses: in its weights, and in its output over inputs that were held out.

use std::borrow::Cow;

use moepack_format::Result;
use moepack_quant::hessian::output_error;
use moepack_quant::{Codec, Isa, Matrix};
use moepack_verify::drift::SquareSums;

/// Values decoded at a time: they stay in the cache, and make enough outputs for a fast product.
const BLOCK_VALUES: usize = 1 << 17;

/// Inputs that no solver has seen.
#[derive(Clone, Debug)]
pub struct HeldOut<'a> {
    /// `[tokens, cols]`
    x: Cow<'a, [f32]>,
    /// Routing weight of each, `[tokens]`.
    weights: Vec<f32>,
}

impl<'a> HeldOut<'a> {
    /// Inputs `[tokens, cols]` with routing weights `[tokens]`.
    pub fn new(x: Cow<'a, [f32]>, weights: Vec<f32>) -> HeldOut<'a> {
        HeldOut { x, weights }
    }

    /// Inputs `[tokens, cols]` that count alike.
    pub fn alike(x: Cow<'a, [f32]>, cols: usize) -> HeldOut<'a> {
        let weights = vec![1.0; x.len() / cols.max(1)];
        HeldOut { x, weights }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty()
    }

    /// Σ g² ‖W x‖² over the inputs, for a matrix.
    pub fn output_squares(&self, isa: Isa, w: Matrix<'_>) -> f64 {
        let rows = block_rows(w.cols, 1);
        let block = |data: &[f32]| self.block_squares(isa, data, w.cols);
        w.data.chunks(rows * w.cols.max(1)).map(block).sum()
    }

    /// Σ g² ‖x‖² over the inputs.
    pub fn input_squares(&self) -> f64 {
        let cols = self.x.len() / self.weights.len().max(1);
        let square = |v: &f32| f64::from(*v) * f64::from(*v);
        let of_token = |(x, &g): (&[f32], &f32)| square(&g) * x.iter().map(square).sum::<f64>();
        self.x.chunks_exact(cols.max(1)).zip(&self.weights).map(of_token).sum()
    }

    /// The output's squares for a few rows, `[rows, cols]`.
    fn block_squares(&self, isa: Isa, data: &[f32], cols: usize) -> f64 {
        let w = Matrix { rows: data.len() / cols.max(1), cols, data };
        output_error(isa, w, &self.x, &self.weights)
    }
}

/// What coding lost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Loss {
    /// Squares of error and weights.
    pub weights: SquareSums,
    /// Σ g² ‖(Ŵ − W) x‖² over the held-out inputs; 0 without any.
    pub output: f64,
}

/// What `planes` lose of `w`, a few rows at a time, so that no second matrix is held.
///
/// # Errors
/// Planes that the codec cannot decode.
pub fn loss(
    isa: Isa,
    codec: &dyn Codec,
    planes: &[Vec<u8>],
    w: Matrix<'_>,
    held_out: Option<&HeldOut<'_>>,
) -> Result<Loss> {
    let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
    let rows = block_rows(w.cols, codec.rows_at_once(w.rows));
    let mut decoded = vec![0.0; rows.min(w.rows) * w.cols];
    let mut loss = Loss::default();
    for (i, block) in w.data.chunks(rows * w.cols.max(1)).enumerate() {
        let out = decoded.get_mut(..block.len()).unwrap_or_default();
        codec.decode(isa, &planes, w.rows, w.cols, i * rows, out)?;
        loss.weights.add(&SquareSums::of(isa, block, out));
        if let Some(held_out) = held_out {
            out.iter_mut().zip(block).for_each(|(decoded, w)| *decoded -= w);
            loss.output += held_out.block_squares(isa, out, w.cols);
        }
    }
    Ok(loss)
}

/// Rows of a block: whole groups of those that the codec decodes together.
fn block_rows(cols: usize, rows_at_once: usize) -> usize {
    (BLOCK_VALUES / cols.max(1)).max(1).next_multiple_of(rows_at_once.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use moepack_quant::codec;

    #[test]
    fn losses_are_what_three_lines_say_and_levels_agree() {
        let (rows, cols, n) = (150, 1024, 5);
        let number = |i: usize| (i * 7919 % 1000) as f32 / 500.0 - 1.0;
        let w: Vec<f32> = (0..rows * cols).map(number).collect();
        let x: Vec<f32> = (0..n * cols).map(|i| number(i * 31 + 7)).collect();
        let g: Vec<f32> = vec![0.5, 1.0, 0.0, 2.0, 1.5];
        let (codec, matrix) = (codec("int3-g64").unwrap(), Matrix { rows, cols, data: &w });
        let planes = codec.encode(Isa::get(), matrix, None).unwrap();
        let slices: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
        let mut decoded = vec![0.0; w.len()];
        codec.decode(Isa::get(), &slices, rows, cols, 0, &mut decoded).unwrap();
        let squares = |w: &dyn Fn(usize) -> f64| -> f64 {
            let dot = |t: usize, r: usize| -> f64 {
                (0..cols).map(|c| w(r * cols + c) * f64::from(x[t * cols + c])).sum()
            };
            (0..n)
                .map(|t| f64::from(g[t]).powi(2) * (0..rows).map(|r| dot(t, r) * dot(t, r)).sum::<f64>())
                .sum()
        };
        let held_out = HeldOut::new(Cow::Borrowed(&x), g.clone());
        let near = |a: f64, b: f64| (a - b).abs() < 1e-4 * b;
        let found = loss(Isa::get(), &*codec, &planes, matrix, Some(&held_out)).unwrap();
        assert!(near(found.output, squares(&|i| f64::from(decoded[i]) - f64::from(w[i]))));
        assert!(near(held_out.output_squares(Isa::get(), matrix), squares(&|i| f64::from(w[i]))));
        let whole = SquareSums::of(Isa::get(), &w, &decoded).relative();
        assert!(near(found.weights.relative(), whole), "{found:?} {whole}");
        for isa in Isa::available() {
            let again = loss(isa, &*codec, &planes, matrix, Some(&held_out)).unwrap();
            assert_eq!(again.output.to_bits(), found.output.to_bits(), "{}", isa.name());
        }
    }
}
