//! Encodes a matrix in every block type of ggml and writes the blocks, for `benches/peers/ggml_blocks.py`.
//!
//! `ggml_blocks ROWS COLS WEIGHTS IMPORTANCE OUT_DIR`: both inputs are raw f32, little-endian; an empty `IMPORTANCE` is
//! none. Prints a line for each type: name, seconds of one thread (the best of three).
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "an example may stop at a mistake")]

use std::path::Path;
use std::time::Instant;

use moepack_quant::codec::ggml::kinds::KINDS;
use moepack_quant::{Isa, Matrix, codec};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (rows, cols) = (args[0].parse().unwrap(), args[1].parse().unwrap());
    let (data, importance) = (floats(&args[2]), floats(&args[3]));
    let importance = (!importance.is_empty()).then_some(importance.as_slice());
    for kind in KINDS {
        let codec = codec(kind.name).unwrap();
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            let planes = codec.encode(Isa::get(), Matrix { rows, cols, data: &data }, importance).unwrap();
            best = best.min(start.elapsed().as_secs_f64());
            std::fs::write(Path::new(&args[4]).join(kind.name), &planes[0]).unwrap();
        }
        println!("{} {best}", kind.name);
    }
}

fn floats(path: &str) -> Vec<f32> {
    std::fs::read(path).unwrap().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}
