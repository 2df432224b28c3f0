//! What each codec costs and loses on N(0, 1): the table of README.md.
//!
//! `cargo run --release -p moepack-quant --example gaussian [ROWS COLS]`
//!
//! `tcq256@2` is codec `tcq256` at 2 bits a weight.
//!
//! Relative MSE is the squared error over the squared weights, in f64. No code of R bits can reach less than 2^(−2R)
//! on this source (the rate–distortion bound), so `gap` says how many bits a weight lie between a codec and that
//! bound: bpw + ½ log2(relative MSE).
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "an example may stop at a mistake")]

use moepack_quant::{Isa, Matrix, codec};

const ROWS: usize = 512;
const COLS: usize = 4096;
const NAMES: &[&str] = &[
    "tcq8@1.5",
    "tcq8@2",
    "tcq8@3",
    "tcq8@4",
    "tcq64@2",
    "tcq64@3",
    "tcq256@1.5",
    "tcq256@2",
    "tcq256@3",
    "tcq256@4",
    "int2-g32",
    "int2-g64",
    "int2-g128",
    "int2-g64-asym",
    "int3-g32",
    "int3-g64",
    "int3-g128",
    "int3-g64-asym",
    "int4-g32",
    "int4-g64",
    "int4-g128",
    "int4-g64-asym",
    "mxfp4",
    "nvfp4",
    "int5-g64",
    "int5-g64-asym",
    "int6-g64",
    "int6-g64-asym",
    "int8-g64",
    "int8-g64-asym",
    "fp8-block",
    "fp8-block-1x32-e8m0",
    "q2_k",
    "q3_k",
    "iq4_xs",
    "q4_k",
    "iq4_nl",
    "q4_0",
    "q4_1",
    "q5_k",
    "q5_0",
    "q5_1",
    "q6_k",
    "q8_0",
    "bf16",
    "f16",
];

fn main() {
    let mut sizes = std::env::args().skip(1).map(|n| n.parse().unwrap());
    let (rows, cols) = (sizes.next().unwrap_or(ROWS), sizes.next().unwrap_or(COLS));
    println!("| codec | bpw | relative MSE | gap to R(D), bit |\n|---|---|---|---|");
    for row in table_of(rows, cols) {
        let gap = row.bpw + 0.5 * row.mse.log2();
        println!("| `{}` | {:.3} | {:.2e} | {gap:.3} |", row.name, row.bpw, row.mse);
    }
}

/// A line of the table.
pub struct Row {
    /// Canonical name.
    pub name: &'static str,
    /// Bits per weight of this matrix, scales and all.
    pub bpw: f64,
    /// Squared error over squared weights.
    pub mse: f64,
}

/// Encodes and decodes the same matrix with each codec.
pub fn table() -> Vec<Row> {
    table_of(ROWS, COLS)
}

fn table_of(rows: usize, cols: usize) -> Vec<Row> {
    let data = normal(rows * cols);
    NAMES.iter().map(|name| measure(name, Matrix { rows, cols, data: &data })).collect()
}

fn measure(name: &'static str, w: Matrix<'_>) -> Row {
    let codec = match name.split_once('@') {
        Some((name, bits)) => codec(name).unwrap().at_rate(bits.parse().unwrap()).unwrap(),
        None => codec(name).unwrap(),
    };
    let planes = codec.encode(Isa::get(), w, None).unwrap();
    let bytes: usize = planes.iter().map(Vec::len).sum();
    let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
    let mut decoded = vec![0.0; w.data.len()];
    codec.decode(Isa::get(), &planes, w.rows, w.cols, 0, &mut decoded).unwrap();
    Row { name, bpw: bytes as f64 * 8.0 / w.data.len() as f64, mse: relative_mse(w.data, &decoded) }
}

fn relative_mse(x: &[f32], y: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    let error: f64 = x.iter().zip(y).map(|(&x, &y)| square(f64::from(x) - f64::from(y))).sum();
    error / x.iter().map(|&x| square(f64::from(x))).sum::<f64>()
}

/// N(0, 1) by Box and Muller from splitmix64, seed 1.
fn normal(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ z >> 31) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    (0..n)
        .map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32)
        .collect()
}
