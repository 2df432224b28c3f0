//! AVX-512 tiles: 12 rows × 32 outputs, 24 accumulators in registers.
#![allow(unsafe_code, reason = "raw loads and stores; the bounds are checked once per tile")]

use std::arch::x86_64::{
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

use super::{CHUNK, Kernel, PANEL, Tile};
use crate::isa::Isa;

pub(super) const KERNEL: Kernel = Kernel { rows_max: 12, panels_max: 2, run };

fn run(isa: Isa, rows: usize, panels: usize, tile: Tile<'_>) {
    assert!(isa.has_avx512() && tile.fits(rows, panels), "tile outside of its slices");
    // SAFETY: the level was proven by `isa`, and every access by `fits`.
    unsafe {
        match panels {
            1 => of_rows::<1>(rows, tile),
            _ => of_rows::<2>(rows, tile),
        }
    }
}

/// # Safety
/// The CPU has AVX-512 F, and `tile.fits(rows, P)`.
unsafe fn of_rows<const P: usize>(rows: usize, t: Tile<'_>) {
    // SAFETY: handed on to the caller; the constant is `rows`.
    unsafe {
        match rows {
            1 => compute::<1, P>(t),
            2 => compute::<2, P>(t),
            3 => compute::<3, P>(t),
            4 => compute::<4, P>(t),
            5 => compute::<5, P>(t),
            6 => compute::<6, P>(t),
            7 => compute::<7, P>(t),
            8 => compute::<8, P>(t),
            9 => compute::<9, P>(t),
            10 => compute::<10, P>(t),
            11 => compute::<11, P>(t),
            _ => compute::<12, P>(t),
        }
    }
}

/// # Safety
/// The CPU has AVX-512 F, and `tile.fits(M, P)`.
#[target_feature(enable = "avx512f")]
unsafe fn compute<const M: usize, const P: usize>(t: Tile<'_>) {
    let (x, w, out) = (t.x.as_ptr(), t.lanes.as_ptr().cast::<f32>(), t.out.as_mut_ptr());
    let mut acc = [[_mm512_setzero_ps(); P]; M];
    // SAFETY: see above; x is read at [m, i], w at [p, i, 16] and out at [m, p * 16 .. + 16].
    unsafe {
        if !t.first {
            for (m, acc) in acc.iter_mut().enumerate() {
                for (p, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm512_loadu_ps(out.add(m * t.out_stride + p * PANEL));
                }
            }
        }
        for i in 0..t.depth {
            let mut lanes = [_mm512_setzero_ps(); P];
            for (p, lanes) in lanes.iter_mut().enumerate() {
                *lanes = _mm512_loadu_ps(w.add((p * t.panel_stride + i) * PANEL));
            }
            for (m, acc) in acc.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*x.add(m * CHUNK + i));
                for (acc, &lanes) in acc.iter_mut().zip(&lanes) {
                    *acc = _mm512_fmadd_ps(x, lanes, *acc);
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            for (p, &acc) in acc.iter().enumerate() {
                _mm512_storeu_ps(out.add(m * t.out_stride + p * PANEL), acc);
            }
        }
    }
}
