//! The matrix product, one thread, in floating point operations a second.
//!
//! `cargo bench -p moepack-quant --bench gemm`

use divan::{Bencher, counter::ItemsCount};
use moepack_quant::gemm::PackedWeights;
use moepack_quant::isa::Isa;

fn main() {
    divan::main();
}

/// Rows, inputs, outputs: a small model's expert, a big one's, attention's scores and a head's.
const SHAPES: [(usize, usize, usize); 6] =
    [(256, 256, 256), (64, 256, 512), (256, 64, 256), (64, 2048, 768), (512, 1024, 768), (64, 256, 4096)];

#[divan::bench(args = SHAPES)]
fn avx512(bencher: Bencher<'_, '_>, shape: (usize, usize, usize)) {
    if let Some(isa) = Isa::avx512() {
        product(bencher, isa, shape);
    }
}

#[divan::bench(args = SHAPES)]
fn avx2(bencher: Bencher<'_, '_>, shape: (usize, usize, usize)) {
    if let Some(isa) = Isa::avx2() {
        product(bencher, isa, shape);
    }
}

fn product(bencher: Bencher<'_, '_>, isa: Isa, (t, k, n): (usize, usize, usize)) {
    let x: Vec<f32> = (0..t * k).map(|i| (i % 17) as f32 - 8.0).collect();
    let w: Vec<f32> = (0..n * k).map(|i| (i % 13) as f32 - 6.0).collect();
    let packed = PackedWeights::pack(&w, n, k);
    let mut out = vec![0.0; t * n];
    bencher
        .counter(ItemsCount::new(2 * t * k * n))
        .bench_local(|| packed.matmul(isa, &x, divan::black_box(&mut out)));
}
