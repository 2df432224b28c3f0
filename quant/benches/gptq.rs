//! What error feedback costs on one thread: `cargo bench -p moepack-quant --bench gptq`.
//!
//! Shapes are `[rows, cols]`: a small model's expert, Qwen3's, DeepSeek V3's. Items of `sum` and `factor` are floating
//! point operations, those of a codec are weights. `MOEPACK_ISA=avx2` measures that level.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark may stop at a mistake")]

use divan::Bencher;
use divan::counter::ItemsCount;
use moepack_quant::hessian::{Hessian, HessianSum};
use moepack_quant::{Inputs, Isa, Matrix, codec, solver};

fn main() {
    println!("instruction set: {}", Isa::get().name());
    divan::main();
}

const COLS: [usize; 3] = [256, 2048, 7168];
const SHAPES: [(usize, usize); 3] = [(256, 256), (768, 2048), (2048, 7168)];

/// Nearly N(0, 1): sums of four uniform numbers of a linear congruence.
fn numbers(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    };
    (0..n).map(|_| (uniform() + uniform() + uniform() + uniform()) * 1.732).collect()
}

/// Of 512 tokens whose neighbouring columns are alike.
fn hessian(cols: usize) -> Hessian {
    let mut x = numbers(512 * cols);
    (1..x.len()).for_each(|i| x[i] += 0.8 * x[i - 1]);
    let mut sum = HessianSum::new(cols);
    sum.add(Isa::get(), &x, &[1.0; 512]).unwrap();
    sum.finish()
}

#[divan::bench(args = COLS, sample_count = 3)]
fn sum(bencher: Bencher, cols: usize) {
    let (x, mut sum) = (numbers(512 * cols), HessianSum::new(cols));
    bencher
        .counter(ItemsCount::new(512 * cols * cols))
        .bench_local(|| sum.add(Isa::get(), &x, &[1.0; 512]).unwrap());
}

/// One row, so that hardly anything but the factorization takes time.
#[divan::bench(args = COLS, sample_count = 3)]
fn factor(bencher: Bencher, cols: usize) {
    solve(bencher, "int4-g64", (1, cols), cols * cols * cols / 3);
}

#[divan::bench(args = SHAPES, sample_count = 3)]
fn int4(bencher: Bencher, shape: (usize, usize)) {
    solve(bencher, "int4-g64", shape, shape.0 * shape.1);
}

#[divan::bench(args = SHAPES, sample_count = 3)]
fn nvfp4(bencher: Bencher, shape: (usize, usize)) {
    solve(bencher, "nvfp4", shape, shape.0 * shape.1);
}

fn solve(bencher: Bencher, name: &str, (rows, cols): (usize, usize), items: usize) {
    let (codec, data, hessian) = (codec(name).unwrap(), numbers(rows * cols), hessian(cols));
    let w = Matrix { rows, cols, data: &data };
    let inputs = Inputs { stats: None, hessian: Some(&hessian) };
    let gptq = solver("gptq").unwrap();
    bencher
        .counter(ItemsCount::new(items))
        .bench_local(|| gptq.solve(Isa::get(), w, &*codec, inputs).unwrap());
}
