//! Encode and decode of every codec on one core: `cargo bench -p moepack-quant --bench codecs`.
//!
//! Items are weights. The matrix is 256 × 2048 of N(0, 1), so that it stays in the second-level cache or near it, as an
//! expert's rows do in the engine. `MOEPACK_ISA=avx2` measures that level.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark may stop at a mistake")]

use divan::Bencher;
use divan::counter::ItemsCount;
use moepack_quant::codec::CODECS;
use moepack_quant::{Isa, Matrix, codec};

const ROWS: usize = 256;
const COLS: usize = 2048;

fn main() {
    println!("instruction set: {}", Isa::get().name());
    divan::main();
}

fn names() -> Vec<&'static str> {
    CODECS.iter().flat_map(|family| family.examples).copied().collect()
}

/// Nearly N(0, 1), without a generator's dependency: the sum of four uniform numbers of a linear congruence.
fn weights() -> Vec<f32> {
    normal(ROWS * COLS)
}

fn normal(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    };
    (0..n).map(|_| (uniform() + uniform() + uniform() + uniform()) * 1.732).collect()
}

#[divan::bench(args = names())]
fn encode(bencher: Bencher, name: &str) {
    let (codec, data) = (codec(name).unwrap(), weights());
    let w = Matrix { rows: ROWS, cols: COLS, data: &data };
    bencher.counter(ItemsCount::new(data.len())).bench_local(|| codec.encode(Isa::get(), w, None).unwrap());
}

#[divan::bench(args = ["int4-g64", "mxfp4", "nvfp4", "fp8-block"])]
fn encode_by_importance(bencher: Bencher, name: &str) {
    let (codec, data) = (codec(name).unwrap(), weights());
    let w = Matrix { rows: ROWS, cols: COLS, data: &data };
    let importance: Vec<f32> = data[..COLS].iter().map(|v| v * v).collect();
    bencher
        .counter(ItemsCount::new(data.len()))
        .bench_local(|| codec.encode(Isa::get(), w, Some(&importance)).unwrap());
}

#[divan::bench(args = names())]
fn decode(bencher: Bencher, name: &str) {
    let (codec, data) = (codec(name).unwrap(), weights());
    let w = Matrix { rows: ROWS, cols: COLS, data: &data };
    let planes = codec.encode(Isa::get(), w, None).unwrap();
    let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
    let mut out = vec![0.0; data.len()];
    bencher
        .counter(ItemsCount::new(data.len()))
        .bench_local(|| codec.decode(Isa::get(), &planes, ROWS, COLS, 0, &mut out).unwrap());
}

/// What whole matrices of experts take: a wide one, and a small one where ends weigh more.
const SHAPES: &[(&str, usize, usize)] = &[
    ("tcq8", 2048, 2048),
    ("tcq8", 256, 256),
    ("tcq64", 2048, 2048),
    ("tcq256", 2048, 2048),
    ("tcq256", 256, 256),
];

#[divan::bench(args = SHAPES)]
fn encode_matrix(bencher: Bencher, &(name, rows, cols): &(&str, usize, usize)) {
    let (codec, data) = (codec(name).unwrap(), normal(rows * cols));
    let w = Matrix { rows, cols, data: &data };
    bencher.counter(ItemsCount::new(data.len())).bench_local(|| codec.encode(Isa::get(), w, None).unwrap());
}

#[divan::bench(args = SHAPES)]
fn decode_matrix(bencher: Bencher, &(name, rows, cols): &(&str, usize, usize)) {
    let (codec, data) = (codec(name).unwrap(), normal(rows * cols));
    let planes = codec.encode(Isa::get(), Matrix { rows, cols, data: &data }, None).unwrap();
    let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
    let mut out = vec![0.0; data.len()];
    bencher
        .counter(ItemsCount::new(data.len()))
        .bench_local(|| codec.decode(Isa::get(), &planes, rows, cols, 0, &mut out).unwrap());
}

/// The limit that decoding is measured against: a copy of as many floats.
#[divan::bench(args = [2048 * 2048, 256 * 256])]
fn copy(bencher: Bencher, n: usize) {
    let (data, mut out) = (normal(n), vec![0.0; n]);
    bencher
        .counter(ItemsCount::new(n))
        .bench_local(|| divan::black_box(&mut out).copy_from_slice(divan::black_box(&data)));
}
