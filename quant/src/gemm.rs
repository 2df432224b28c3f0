//! Matrix product `out = x · wᵀ` in f32, with the same bits on every machine.
//!
//! Each output element is one chain of fused multiply-adds in k order, starting from zero:
//! ```text
//!     s = 0;  for i in 0..k { s = fma(x[t, i], w[n, i], s) };  out[t, n] = s
//! ```
//! Vectors lie along n, so the width of a register, the blocking of t and n and the number of threads do not
//! show in the result. k is split for the cache only: the chain is stored and taken up again exactly.
//!
//! Blocking (sizes in f32):
//! ```text
//!     w is packed once:  [n / 16][k][16]           one panel = 16 outputs, zeros beyond n
//!     per block of 96 rows, 512 outputs, 256 k:    x chunk [96][256] and w chunk [512][256] stay in L2
//!       per 32 outputs, per 12 rows:               a tile, accumulators in registers over the whole chunk
//! ```
//! Functions here use one thread; who has several splits rows, experts or windows among them.

use std::ops::Range;

use crate::isa::Isa;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

/// Outputs of a panel.
const PANEL: usize = 16;
/// k of a chunk, and the row stride of an x chunk.
const CHUNK: usize = 256;
/// Rows of a block.
const BLOCK_ROWS: usize = 96;
/// Panels of a block.
const BLOCK_PANELS: usize = 32;
/// Most rows of a tile at any level.
const TILE_ROWS_MAX: usize = 12;
/// Most panels of a tile at any level.
const TILE_PANELS_MAX: usize = 2;

/// `out[t, n] = x[t, k] · w[n, k]ᵀ`. Packs `w` for this one call; [`PackedWeights`] packs it once for many.
///
/// # Panics
/// If a slice is shorter than its shape; shapes are the caller's own.
pub fn matmul_t(isa: Isa, x: &[f32], w: &[f32], t: usize, k: usize, n: usize, out: &mut [f32]) {
    assert!(x.len() >= t * k && out.len() >= t * n, "x or out is shorter than its shape");
    PackedWeights::pack(w, n, k).matmul(isa, &x[..t * k], &mut out[..t * n]);
}

/// A weight `[n, k]` in panel order, ready for products with any number of row blocks.
#[derive(Clone, Debug, Default)]
pub struct PackedWeights {
    n: usize,
    k: usize,
    /// `[n_panels, k]` of 16 outputs each
    lanes: Vec<Lanes>,
}

/// Sixteen outputs at one k.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Lanes([f32; PANEL]);

const _: () = assert!(size_of::<Lanes>() == 4 * PANEL);

/// Row-major rows inside a larger buffer: row i begins at `i * stride`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The buffer, from the first value of the first row.
    pub data: &'a [f32],
    /// Distance of rows.
    pub stride: usize,
}

impl PackedWeights {
    /// Packs `w`, `[n, k]` row-major.
    ///
    /// # Panics
    /// If `w` is shorter than its shape.
    pub fn pack(w: &[f32], n: usize, k: usize) -> Self {
        let mut packed = PackedWeights::default();
        packed.repack(Rows { data: w, stride: k }, n, k);
        packed
    }

    /// All zeros, for [`PackedWeights::set_rows`] to fill.
    pub fn zeros(n: usize, k: usize) -> Self {
        let mut packed = PackedWeights::default();
        packed.resize(n, k);
        packed
    }

    /// Packs `n` rows of `k` values anew, into the memory that is there.
    pub fn repack(&mut self, w: Rows<'_>, n: usize, k: usize) {
        self.resize(n, k);
        self.set_rows(0, w, n);
    }

    /// Packs `n` rows of `w` as the outputs from `first` on, so that a long matrix need not be in memory twice.
    ///
    /// # Panics
    /// If `first` is no multiple of 16, or the rows lie beyond the outputs or outside of `w`.
    pub fn set_rows(&mut self, first: usize, w: Rows<'_>, n: usize) {
        assert!(first.is_multiple_of(PANEL) && first + n <= self.n, "rows outside of the packed ones");
        let panels = &mut self.lanes[first / PANEL * self.k..];
        for (p, panel) in panels.chunks_exact_mut(self.k.max(1)).take(n.div_ceil(PANEL)).enumerate() {
            let rows = PANEL.min(n - p * PANEL);
            // 64 lanes are 4 KiB: a row's values are read in order, and what is written stays in L1.
            for (c, lanes) in panel.chunks_mut(64).enumerate() {
                for r in 0..rows {
                    let from = (p * PANEL + r) * w.stride + c * 64;
                    let values = &w.data[from..from + lanes.len()];
                    for (lane, &value) in lanes.iter_mut().zip(values) {
                        lane.0[r] = value;
                    }
                }
            }
        }
    }

    /// Sets input `i` of every output: `column`, `[n]`.
    ///
    /// # Panics
    /// If `i` is no input, or `column` has another length than there are outputs.
    pub fn set_input(&mut self, i: usize, column: &[f32]) {
        assert!(i < self.k && column.len() == self.n, "a column outside of the packed ones");
        for (panel, values) in self.lanes.chunks_exact_mut(self.k).zip(column.chunks(PANEL)) {
            panel[i].0[..values.len()].copy_from_slice(values);
        }
    }

    /// Packs the transpose of `k` rows of `n` values: what was a row becomes one step of k.
    pub fn repack_transposed(&mut self, w: Rows<'_>, k: usize, n: usize) {
        self.resize(n, k);
        for (p, panel) in self.lanes.chunks_exact_mut(k.max(1)).enumerate() {
            let cols = PANEL.min(n - p * PANEL);
            for (i, lane) in panel.iter_mut().enumerate() {
                let from = i * w.stride + p * PANEL;
                lane.0[..cols].copy_from_slice(&w.data[from..from + cols]);
            }
        }
    }

    fn resize(&mut self, n: usize, k: usize) {
        (self.n, self.k) = (n, k);
        // Cleared first, so that lanes beyond n are zero whatever was there.
        self.lanes.clear();
        self.lanes.resize(n.div_ceil(PANEL) * k, Lanes([0.0; PANEL]));
    }

    /// Number of outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Number of inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Memory of the packed values, in bytes.
    pub fn bytes(&self) -> usize {
        size_of_val(self.lanes.as_slice())
    }

    /// `out[t, n] = x[t, k] · wᵀ`, with t given by the lengths.
    ///
    /// # Panics
    /// If `x` is no multiple of k, or `out` does not have as many rows.
    pub fn matmul(&self, isa: Isa, x: &[f32], out: &mut [f32]) {
        if self.n == 0 || self.k == 0 {
            out.fill(0.0);
            return;
        }
        let t = x.len() / self.k;
        assert!(x.len() == t * self.k && out.len() == t * self.n, "x or out does not have its shape");
        self.matmul_part(isa, Rows { data: x, stride: self.k }, t, 0..self.n, 0..self.k, out, self.n);
    }

    /// The product of a part: `t` rows of `x` (whose first column belongs to `ks.start`) with outputs `ns` over
    /// inputs `ks`. Row i of the result begins at `out[i * out_stride]`.
    ///
    /// # Panics
    /// If `ns` does not begin at a multiple of 16, or a range or slice is too short for its shape.
    #[allow(clippy::too_many_arguments, reason = "a kernel's operands are its signature")]
    pub fn matmul_part(
        &self,
        isa: Isa,
        x: Rows<'_>,
        t: usize,
        ns: Range<usize>,
        ks: Range<usize>,
        out: &mut [f32],
        out_stride: usize,
    ) {
        if ks.is_empty() {
            out.chunks_mut(out_stride.max(1)).take(t).for_each(|row| row[..ns.len()].fill(0.0));
        }
        self.run_part(isa, x, t, ns, ks, out, out_stride, true);
    }

    /// As [`PackedWeights::matmul_part`], but the chains are taken up from what is in `out`, so that the inputs may come
    /// in pieces of any size.
    ///
    /// # Panics
    /// As `matmul_part`.
    #[allow(clippy::too_many_arguments, reason = "a kernel's operands are its signature")]
    pub fn matmul_part_onto(
        &self,
        isa: Isa,
        x: Rows<'_>,
        t: usize,
        ns: Range<usize>,
        ks: Range<usize>,
        out: &mut [f32],
        out_stride: usize,
    ) {
        self.run_part(isa, x, t, ns, ks, out, out_stride, false);
    }

    #[allow(clippy::too_many_arguments, reason = "a kernel's operands are its signature")]
    fn run_part(
        &self,
        isa: Isa,
        x: Rows<'_>,
        t: usize,
        ns: Range<usize>,
        ks: Range<usize>,
        out: &mut [f32],
        out_stride: usize,
        fresh: bool,
    ) {
        assert!(ns.start.is_multiple_of(PANEL) && ns.end <= self.n && ks.end <= self.k, "part outside of w");
        if t == 0 || ns.is_empty() || ks.is_empty() {
            return;
        }
        let width = ns.len();
        assert!(out_stride >= width && out.len() >= (t - 1) * out_stride + width, "out is too short");
        assert!(x.stride >= ks.len() && x.data.len() >= (t - 1) * x.stride + ks.len(), "x is too short");
        let mut copy = [0.0_f32; BLOCK_ROWS * CHUNK];
        for row in (0..t).step_by(BLOCK_ROWS) {
            let rows = BLOCK_ROWS.min(t - row);
            for n in ns.clone().step_by(BLOCK_PANELS * PANEL) {
                for k in ks.clone().step_by(CHUNK) {
                    let depth = CHUNK.min(ks.end - k);
                    let from = &x.data[row * x.stride + (k - ks.start)..];
                    let block = Block {
                        x: chunk(from, x.stride, rows, depth, &mut copy),
                        rows,
                        depth,
                        lanes: &self.lanes[n / PANEL * self.k + k..],
                        panel_stride: self.k,
                        width: (BLOCK_PANELS * PANEL).min(ns.end - n),
                        out_stride,
                        first: fresh && k == ks.start,
                    };
                    block.run(isa, &mut out[row * out_stride + (n - ns.start)..]);
                }
            }
        }
    }
}

/// `rows` rows of `depth` values at the fixed stride: as they are where they already lie so, else copied.
fn chunk<'a>(x: &'a [f32], stride: usize, rows: usize, depth: usize, copy: &'a mut [f32]) -> &'a [f32] {
    if stride == CHUNK {
        return x;
    }
    for (to, from) in copy.chunks_exact_mut(CHUNK).zip(x.chunks(stride)).take(rows) {
        to[..depth].copy_from_slice(&from[..depth]);
    }
    copy
}

/// One block of the product: at most `BLOCK_ROWS` rows, `BLOCK_PANELS` panels and `CHUNK` of k.
struct Block<'a> {
    /// `[rows, CHUNK]`, of which `depth` columns count
    x: &'a [f32],
    rows: usize,
    depth: usize,
    /// Panel p begins at `p * panel_stride`.
    lanes: &'a [Lanes],
    panel_stride: usize,
    /// Outputs.
    width: usize,
    out_stride: usize,
    /// Chains begin here; otherwise they are taken up from `out`.
    first: bool,
}

/// What one tile works on; each level has a function that computes it.
struct Tile<'a> {
    /// `[rows, CHUNK]`
    x: &'a [f32],
    lanes: &'a [Lanes],
    panel_stride: usize,
    depth: usize,
    /// `[rows, out_stride]`, the panels' outputs side by side
    out: &'a mut [f32],
    out_stride: usize,
    first: bool,
}

/// How a level computes tiles.
struct Kernel {
    rows_max: usize,
    panels_max: usize,
    /// Computes a tile of so many rows and panels.
    run: fn(Isa, rows: usize, panels: usize, Tile<'_>),
}

const SCALAR: Kernel = Kernel { rows_max: 1, panels_max: 1, run: scalar_tile };

impl Kernel {
    fn of(isa: Isa) -> &'static Kernel {
        #[cfg(target_arch = "x86_64")]
        if isa.has_avx512() {
            return &avx512::KERNEL;
        } else if isa.has_avx2() {
            return &avx2::KERNEL;
        }
        let _ = isa;
        &SCALAR
    }
}

impl Block<'_> {
    fn run(&self, isa: Isa, out: &mut [f32]) {
        let kernel = Kernel::of(isa);
        let n_panels = self.width.div_ceil(PANEL);
        // Rows are spread evenly over the tiles, so that no tile is much smaller than the others.
        let n_tiles = self.rows.div_ceil(kernel.rows_max);
        for p in (0..n_panels).step_by(kernel.panels_max) {
            let panels = kernel.panels_max.min(n_panels - p);
            for tile in 0..n_tiles {
                let (row, end) = (tile * self.rows / n_tiles, (tile + 1) * self.rows / n_tiles);
                self.tile(isa, kernel, row, end - row, p, panels, out);
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "a kernel's operands are its signature")]
    fn tile(
        &self,
        isa: Isa,
        kernel: &Kernel,
        row: usize,
        rows: usize,
        p: usize,
        panels: usize,
        out: &mut [f32],
    ) {
        let (x, lanes) = (&self.x[row * CHUNK..], &self.lanes[p * self.panel_stride..]);
        let out = &mut out[row * self.out_stride + p * PANEL..];
        let (depth, first, panel_stride) = (self.depth, self.first, self.panel_stride);
        let width = (panels * PANEL).min(self.width - p * PANEL);
        if width == panels * PANEL {
            let tile = Tile { x, lanes, panel_stride, depth, out, out_stride: self.out_stride, first };
            return (kernel.run)(isa, rows, panels, tile);
        }
        // The last panel is not full: go through a buffer that has room for all of its lanes.
        let mut whole = [0.0_f32; TILE_ROWS_MAX * TILE_PANELS_MAX * PANEL];
        let stride = panels * PANEL;
        for (to, from) in whole.chunks_exact_mut(stride).zip(out.chunks(self.out_stride)).take(rows) {
            to[..width].copy_from_slice(&from[..width]);
        }
        let tile = Tile { x, lanes, panel_stride, depth, out: &mut whole, out_stride: stride, first };
        (kernel.run)(isa, rows, panels, tile);
        for (to, from) in out.chunks_mut(self.out_stride).zip(whole.chunks_exact(stride)).take(rows) {
            to[..width].copy_from_slice(&from[..width]);
        }
    }
}

/// The definition: what every other level must equal to the bit.
fn scalar_tile(_: Isa, _rows: usize, _panels: usize, tile: Tile<'_>) {
    let out = &mut tile.out[..PANEL];
    let mut acc = [0.0_f32; PANEL];
    if !tile.first {
        acc.copy_from_slice(out);
    }
    for (&x, lanes) in tile.x.iter().zip(tile.lanes).take(tile.depth) {
        for (acc, &w) in acc.iter_mut().zip(&lanes.0) {
            *acc = x.mul_add(w, *acc);
        }
    }
    out.copy_from_slice(&acc);
}

impl Tile<'_> {
    /// Whether every value that a kernel touches lies inside the slices: what its raw pointers rest on.
    #[cfg(target_arch = "x86_64")]
    fn fits(&self, rows: usize, panels: usize) -> bool {
        self.depth <= CHUNK
            && self.x.len() >= (rows - 1) * CHUNK + self.depth
            && self.lanes.len() >= (panels - 1) * self.panel_stride + self.depth
            && self.out.len() >= (rows - 1) * self.out_stride + panels * PANEL
    }
}

#[cfg(test)]
mod tests;
