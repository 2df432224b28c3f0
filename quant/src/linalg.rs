//! The triangular factorization behind error feedback: `H = U D Uᵀ` with `U` unit upper triangular, `D` diagonal.
//!
//! If columns are coded in order and `e = w − ŵ` is the error of one row, then
//!
//! ```text
//!  e H eᵀ = Σ_j D_j (eU)_j²,      (eU)_j = e_j + Σ_{i<j} e_i U_ij
//! ```
//!
//! so coding `t_j = w_j + Σ_{i<j} e_i U_ij` instead of `w_j` leaves the loss `Σ_j D_j (t_j − ŵ_j)²`: every column makes up
//! for all errors before it, and `D_j` is what an error costs when all columns after `j` make up for it. This is GPTQ's
//! update (its factor of `H⁻¹` is `D^(-1/2) U⁻¹`, transposed) without an inverse: LDLQ of QuIP (Chee et al. 2023, §3).
//!
//! The factorization goes from the last column to the first, in panels of 128:
//!
//! ```text
//!       ┌───────────┬─────┐
//!       │           │     │   1  P = U₁ D₁ U₁ᵀ                 the panel's diagonal block, in f64
//!       │     R     │     │   2  V = D₁⁻¹ U₁⁻¹ B               rows of Uᵀ left of it, a product
//!       │           │     │   3  R = R − Vᵀ D₁ V               the rest, a product
//!       ├───────────┼─────┤
//!       │     B     │  P  │   on and below the diagonal only; V takes the place of B
//!       └───────────┴─────┘
//! ```
//!
//! Products are chains over one panel in f32, subtracted panel by panel from what is left, so rounding errors grow with
//! the number of panels and not with that of columns. The level does not show in the bits.

use crate::gemm::{PackedWeights, Rows};
use crate::isa::Isa;
use crate::per_isa;

/// `H = U D Uᵀ`, see the module.
#[derive(Debug)]
pub(crate) struct Factor {
    n: usize,
    /// `[n, n]`; row `j` holds `U_ij` for `i < j`, what follows is of no meaning.
    rows: Vec<f32>,
    /// `D`, `[n]`, all positive.
    pivots: Vec<f32>,
}

/// Columns of a panel.
const PANEL: usize = 128;
/// Rows of the rest that are updated at once.
const ROWS_AT_ONCE: usize = 96;

impl Factor {
    /// Factorizes the symmetric `h`, `[n, n]` row-major, of which only what is on and below the diagonal is read.
    /// `None` if a pivot comes out below `pivot_min` or as NaN: then rounding errors have outgrown the matrix.
    pub fn new(isa: Isa, h: Vec<f32>, n: usize, pivot_min: f32) -> Option<Factor> {
        let mut factor = Factor { n, rows: h, pivots: vec![0.0; n] };
        let mut scratch = Scratch::default();
        for start in (0..n).step_by(PANEL).rev() {
            let end = n.min(start + PANEL);
            let panel = Panel::new(&factor.rows[start * n + start..], n, end - start, pivot_min)?;
            panel.put(&mut factor, start);
            factor.eliminate(isa, &panel, start, &mut scratch);
        }
        Some(factor)
    }

    /// `U_ij` for `i < j`: what an error in column `i` adds to the target of column `j`.
    pub fn feedback(&self, j: usize) -> &[f32] {
        &self.rows[j * self.n..][..j]
    }

    /// Rows `j ..` of `Uᵀ`, of which row `j` counts up to column `j`.
    pub fn feedback_rows(&self, j: usize) -> Rows<'_> {
        Rows { data: &self.rows[j * self.n..], stride: self.n }
    }

    /// `D`, `[n]`: what an error in each column costs while later ones can make up for it.
    pub fn pivots(&self) -> &[f32] {
        &self.pivots
    }

    /// Steps 2 and 3: all rows above `start` lose what the panel explains.
    fn eliminate(&mut self, isa: Isa, panel: &Panel, start: usize, scratch: &mut Scratch) {
        let (n, width) = (self.n, panel.width);
        let (rest, below) = self.rows.split_at_mut(start * n);
        let left = Rows { data: below, stride: n };
        scratch.packed.repack_transposed(left, width, start);
        let solve = Rows { data: &panel.solve, stride: width };
        scratch.packed.matmul_part(isa, solve, width, 0..start, 0..width, below, n);
        scratch.packed.repack_transposed(Rows { data: below, stride: n }, width, start);
        for first in (0..start).step_by(ROWS_AT_ONCE) {
            let rows = ROWS_AT_ONCE.min(start - first);
            scratch.load_scaled(below, n, first, rows, panel);
            scratch.product.resize(rows * (first + rows), 0.0);
            let x = Rows { data: &scratch.scaled, stride: width };
            let (out, stride) = (&mut scratch.product, first + rows);
            scratch.packed.matmul_part(isa, x, rows, 0..first + rows, 0..width, out, stride);
            for (row, product) in rest[first * n..].chunks_mut(n).zip(out.chunks(stride)) {
                subtract(isa, product, &mut row[..stride]);
            }
        }
    }
}

per_isa! {
    fn subtract(b: &[f32], a: &mut [f32]) = subtract_body;
}

#[inline(always)]
fn subtract_body(b: &[f32], a: &mut [f32]) {
    for (a, &b) in a.iter_mut().zip(b) {
        *a -= b;
    }
}

#[derive(Default)]
struct Scratch {
    /// First B, then V: `[start]` outputs of `width` inputs.
    packed: PackedWeights,
    /// `Vᵀ D₁` of some rows, `[rows, width]`.
    scaled: Vec<f32>,
    /// What these rows lose, `[rows, cols up to the last row's diagonal]`.
    product: Vec<f32>,
}

impl Scratch {
    fn load_scaled(&mut self, v: &[f32], n: usize, first: usize, rows: usize, panel: &Panel) {
        self.scaled.resize(ROWS_AT_ONCE * panel.width, 0.0);
        for (k, (v, &d)) in v.chunks(n).zip(&panel.pivots).enumerate() {
            for (row, &v) in self.scaled.chunks_mut(panel.width).zip(&v[first..first + rows]) {
                row[k] = (d * f64::from(v)) as f32;
            }
        }
    }
}

/// A diagonal block, factorized in f64.
struct Panel {
    width: usize,
    /// `[width, width]`; row `j` holds `U_ij` for `i < j`.
    rows: Vec<f64>,
    pivots: Vec<f64>,
    /// `D₁⁻¹ U₁⁻¹`, `[width, width]`.
    solve: Vec<f32>,
}

impl Panel {
    /// Factorizes the block that begins at `data[0]`, whose rows lie `stride` apart.
    fn new(data: &[f32], stride: usize, width: usize, pivot_min: f32) -> Option<Panel> {
        let mut rows = vec![0.0; width * width];
        for (to, from) in rows.chunks_mut(width).zip(data.chunks(stride)) {
            to.iter_mut().zip(from).for_each(|(to, &from)| *to = f64::from(from));
        }
        let mut pivots = vec![0.0; width];
        for j in (0..width).rev() {
            let (above, row) = rows.split_at_mut(j * width);
            let pivot = row[j];
            if !pivot.is_finite() || pivot < f64::from(pivot_min) {
                return None;
            }
            pivots[j] = pivot;
            for (i, above) in above.chunks_mut(width).enumerate() {
                let u = row[i] / pivot;
                above[..=i].iter_mut().zip(&row[..]).for_each(|(a, &v)| *a -= u * v);
            }
            row[..j].iter_mut().for_each(|v| *v /= pivot);
        }
        let solve = solve(&rows, &pivots);
        Some(Panel { width, rows, pivots, solve })
    }

    /// Puts `U₁` and `D₁` where they belong.
    fn put(&self, factor: &mut Factor, start: usize) {
        let n = factor.n;
        for (j, row) in self.rows.chunks(self.width).enumerate() {
            let to = &mut factor.rows[(start + j) * n + start..][..j];
            to.iter_mut().zip(row).for_each(|(to, &v)| *to = v as f32);
            factor.pivots[start + j] = self.pivots[j] as f32;
        }
    }
}

/// `D⁻¹ U⁻¹` by back substitution: row `i` of `U⁻¹` is `e_i − Σ_{k>i} U_ik · row k`.
fn solve(rows: &[f64], pivots: &[f64]) -> Vec<f32> {
    let width = pivots.len();
    let mut inverse = vec![0.0; width * width];
    for i in (0..width).rev() {
        let (head, below) = inverse.split_at_mut((i + 1) * width);
        let row = &mut head[i * width..];
        row[i] = 1.0;
        for (k, below) in (i + 1..).zip(below.chunks(width)) {
            let u = rows[k * width + i];
            row[k..].iter_mut().zip(&below[k..]).for_each(|(a, &v)| *a -= u * v);
        }
    }
    let scaled = inverse.chunks(width.max(1)).zip(pivots).flat_map(|(row, d)| row.iter().map(move |v| v / d));
    scaled.map(|v| v as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `A Aᵀ / k + λ`, columns over orders of magnitude.
    fn spd(n: usize, k: usize, damping: f32) -> Vec<f32> {
        let mut state = 1u32;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        let a: Vec<f32> = (0..n * k).map(|i| uniform() * 2f32.powi((i / k) as i32 % 7 - 3)).collect();
        let mut h = vec![0.0; n * n];
        crate::gemm::matmul_t(Isa::get(), &a, &a, n, k, n, &mut h);
        h.iter_mut().for_each(|v| *v /= k as f32);
        (0..n).for_each(|i| h[i * n + i] += damping);
        h
    }

    /// Largest difference of `U D Uᵀ` from `h`, relative to the square root of its diagonals.
    fn worst(factor: &Factor, h: &[f32]) -> f64 {
        let n = factor.n;
        let u = |i: usize, j: usize| if i == j { 1.0 } else { f64::from(factor.feedback(j)[i]) };
        let mut worst = 0.0f64;
        for (a, b) in (0..n).flat_map(|a| (0..=a).map(move |b| (a, b))) {
            let term = |j: usize| u(a, j) * f64::from(factor.pivots[j]) * u(b, j);
            let scale = f64::from(h[a * n + a]) * f64::from(h[b * n + b]);
            worst = worst.max(((a..n).map(term).sum::<f64>() - f64::from(h[a * n + b])).abs() / scale.sqrt());
        }
        worst
    }

    #[test]
    fn the_product_of_the_factors_is_the_matrix() {
        for (n, k) in [(1, 1), (2, 5), (127, 200), (128, 3), (129, 129), (400, 50)] {
            let h = spd(n, k, 0.01);
            let factor = Factor::new(Isa::get(), h.clone(), n, 0.005).unwrap();
            let worst = worst(&factor, &h);
            println!("{n}: {worst:.2e}");
            assert!(worst < 2e-6, "{n}, rank {k}: {worst:e}");
            for isa in Isa::available() {
                let other = Factor::new(isa, h.clone(), n, 0.005).unwrap();
                assert!(other.pivots == factor.pivots, "{}", isa.name());
                assert!((0..n).all(|j| other.feedback(j) == factor.feedback(j)), "{}", isa.name());
            }
        }
    }

    #[test]
    fn what_is_not_positive_enough_is_no_factor() {
        let h = spd(150, 20, 0.0);
        assert!(Factor::new(Isa::get(), h, 150, 1e-3).is_none());
        for bad in [f32::NAN, f32::INFINITY, -1.0, 0.0] {
            let mut h = spd(150, 150, 0.1);
            h[40 * 150 + 40] = bad;
            assert!(Factor::new(Isa::get(), h, 150, 1e-3).is_none(), "{bad}");
        }
        assert!(Factor::new(Isa::get(), Vec::new(), 0, 1e-3).is_some());
    }
}
