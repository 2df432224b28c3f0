//! AVX2 tiles: 6 rows × 16 outputs, 12 accumulators in registers.
#![allow(unsafe_code, reason = "raw loads and stores; the bounds are checked once per tile")]

use std::arch::x86_64::{
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
};

use super::{CHUNK, Kernel, PANEL, Tile};
use crate::isa::Isa;

pub(super) const KERNEL: Kernel = Kernel { rows_max: 6, panels_max: 1, run };

/// f32 of a register.
const WIDTH: usize = 8;
/// Registers of a panel.
const HALVES: usize = PANEL / WIDTH;

fn run(isa: Isa, rows: usize, panels: usize, tile: Tile<'_>) {
    assert!(isa.has_avx2() && tile.fits(rows, panels), "tile outside of its slices");
    // SAFETY: the level was proven by `isa`, every access by `fits`; the constant is `rows`.
    unsafe {
        match rows {
            1 => compute::<1>(tile),
            2 => compute::<2>(tile),
            3 => compute::<3>(tile),
            4 => compute::<4>(tile),
            5 => compute::<5>(tile),
            _ => compute::<6>(tile),
        }
    }
}

/// # Safety
/// The CPU has AVX2 and FMA, and `tile.fits(M, 1)`.
#[target_feature(enable = "avx2,fma")]
unsafe fn compute<const M: usize>(t: Tile<'_>) {
    let (x, w, out) = (t.x.as_ptr(), t.lanes.as_ptr().cast::<f32>(), t.out.as_mut_ptr());
    let mut acc = [[_mm256_setzero_ps(); HALVES]; M];
    // SAFETY: see above; x is read at [m, i], w at [i, 16] and out at [m, 16].
    unsafe {
        if !t.first {
            for (m, acc) in acc.iter_mut().enumerate() {
                for (h, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm256_loadu_ps(out.add(m * t.out_stride + h * WIDTH));
                }
            }
        }
        for i in 0..t.depth {
            let lanes = [_mm256_loadu_ps(w.add(i * PANEL)), _mm256_loadu_ps(w.add(i * PANEL + WIDTH))];
            for (m, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*x.add(m * CHUNK + i));
                for (acc, &lanes) in acc.iter_mut().zip(&lanes) {
                    *acc = _mm256_fmadd_ps(x, lanes, *acc);
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            for (h, &acc) in acc.iter().enumerate() {
                _mm256_storeu_ps(out.add(m * t.out_stride + h * WIDTH), acc);
            }
        }
    }
}
