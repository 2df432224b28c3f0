//! FP8 experts that share one tensor, stored `[in, out]`, as releases of Qwen3-VL and Llama 4 have them: the same as their
//! decoded numbers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;
use std::path::Path;

use moepack_convert::{Model, OpenOptions, Part};
use moepack_quant::minifloat::e4m3_to_f32;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

/// Rows and columns of a block.
const BLOCK: [usize; 2] = [8, 4];

#[test]
fn fused_fp8_experts_decode_as_their_numbers_do() {
    let work = tempfile::tempdir().unwrap();
    let (coded, plain) = (work.path().join("coded"), work.path().join("plain"));
    write(&coded, true, BLOCK);
    write(&plain, false, BLOCK);
    let (coded, plain) = (open(&coded).unwrap(), open(&plain).unwrap());
    for layer in [1, 3] {
        for e in 0..4 {
            let (a, b) = (coded.expert(layer, e).unwrap(), plain.expert(layer, e).unwrap());
            for part in [Part::Gate, Part::Up, Part::Down] {
                let (a, b) = (a.part(part).unwrap(), b.part(part).unwrap());
                assert_eq!((a.codec.name(), b.codec.name()), ("fp8-block-4x8".to_owned(), "f32".to_owned()));
                let isa = moepack_quant::Isa::get();
                assert_eq!(a.decode(isa).unwrap(), b.decode(isa).unwrap(), "{layer} {e} {}", part.name());
            }
        }
    }
}

#[test]
fn a_block_of_scales_that_two_matrices_share_is_refused() {
    let work = tempfile::tempdir().unwrap();
    // 24 rows of gate and 24 of up in blocks of 16 columns of the stored matrix.
    write(work.path(), true, [8, 16]);
    let model = open(work.path()).unwrap();
    let e = model.expert(1, 0).unwrap_err();
    assert_eq!(e.what(), "scales of 16 rows each, which two matrices of 24 rows share");
    assert_eq!(e.kind().exit_code(), 65);
}

fn open(dir: &Path) -> moepack_format::Result<Model> {
    Model::open(dir, &OpenOptions::default())
}

/// Llama 4 with drawn FP8 codes in its experts, or with the numbers that they stand for.
fn write(dir: &Path, is_coded: bool, block: [usize; 2]) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/random/llama4");
    std::fs::create_dir_all(dir).unwrap();
    let config = std::fs::read_to_string(source.join("config.json")).unwrap();
    let sides = format!("{{ \"quantization_config\": {{ \"weight_block_size\": {block:?} }},");
    std::fs::write(dir.join("config.json"), config.replacen('{', &sides, 1)).unwrap();
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let mut tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for (name, t) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        match (name.contains(".experts."), t.shape()) {
            (true, &[n, rows, cols]) => drawn(&mut tensors, &name, [n, rows, cols], block, is_coded),
            (_, shape) => drop(tensors.insert(name, (t.dtype(), shape.to_vec(), t.data().to_vec()))),
        }
    }
    let views = tensors.iter().map(|(n, (d, s, b))| (n, TensorView::new(*d, s.clone(), b).unwrap()));
    std::fs::write(dir.join("model.safetensors"), serialize(views, None).unwrap()).unwrap();
}

/// Codes and scales, or their products.
fn drawn(
    tensors: &mut BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
    name: &str,
    [n, rows, cols]: [usize; 3],
    block: [usize; 2],
    is_coded: bool,
) {
    let grid = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
    let scale = |i: usize| (i % 13 + 1) as f32 / 64.0;
    let code = |i: usize| (i * 37 % 0x7f) as u8;
    if is_coded {
        let scales = (0..n * grid[0] * grid[1]).flat_map(|i| scale(i).to_le_bytes()).collect();
        tensors.insert(format!("{name}_scale_inv"), (Dtype::F32, vec![n, grid[0], grid[1]], scales));
        let codes = (0..n * rows * cols).map(code).collect();
        tensors.insert(name.to_owned(), (Dtype::F8_E4M3, vec![n, rows, cols], codes));
        return;
    }
    let value = |i: usize| {
        let (e, r, c) = (i / (rows * cols), i / cols % rows, i % cols);
        let at = (e * grid[0] + r / block[0]) * grid[1] + c / block[1];
        e4m3_to_f32(code(i)) * scale(at)
    };
    let values = (0..n * rows * cols).flat_map(|i| value(i).to_le_bytes()).collect();
    tensors.insert(name.to_owned(), (Dtype::F32, vec![n, rows, cols], values));
}
