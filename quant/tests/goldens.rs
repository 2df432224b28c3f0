//! Codecs agree with other people's libraries: `fixtures/goldens/codecs.py` tells which, and makes the files again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::path::Path;

use moepack_quant::codec::{ggml, int};
use moepack_quant::minifloat::NAN_BITS;
use moepack_quant::{Isa, Matrix, bits, codec, numbers};
use safetensors::SafeTensors;

/// A file of goldens.
struct Golden(Vec<u8>);

impl Golden {
    fn open(name: &str) -> Golden {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/goldens/codecs").join(name);
        Golden(std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    fn bytes(&self, tensor: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(tensor).unwrap().data().to_vec()
    }

    fn shape(&self, tensor: &str) -> (usize, usize) {
        match SafeTensors::deserialize(&self.0).unwrap().tensor(tensor).unwrap().shape() {
            &[rows, cols] => (rows, cols),
            other => panic!("{tensor} is no matrix but {other:?}"),
        }
    }

    fn f32s(&self, tensor: &str) -> Vec<f32> {
        self.bytes(tensor).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

/// Decodes planes that somebody else wrote and compares bit by bit.
fn check_decode(name: &str, planes: &[&[u8]], (rows, cols): (usize, usize), expected: &[f32], ulps: u32) {
    let codec = codec(name).unwrap();
    for isa in Isa::available() {
        let mut found = vec![f32::NAN; rows * cols];
        codec.decode(isa, planes, rows, cols, 0, &mut found).unwrap();
        assert_eq!(found.len(), expected.len(), "{name}");
        for (i, (f, e)) in found.iter().zip(expected).enumerate() {
            let near = f.to_bits().abs_diff(e.to_bits()) <= ulps;
            assert!(near, "{name}, {}: [{}, {}] is {f:e}, expected {e:e}", isa.name(), i / cols, i % cols);
        }
    }
}

#[test]
fn numbers_round_as_in_torch() {
    let golden = Golden::open("numbers.safetensors");
    let values = golden.f32s("values");
    assert!(values.len() > 2000);
    for isa in Isa::available() {
        let mut pairs = vec![0; values.len() * 2];
        numbers::f32_to_f16(isa, &values, &mut pairs);
        assert_eq!(pairs, golden.bytes("as_f16"), "f16, {}", isa.name());
        numbers::f32_to_bf16(isa, &values, &mut pairs);
        assert_eq!(pairs, golden.bytes("as_bf16"), "bf16, {}", isa.name());
        let values = golden.f32s("e4m3_values");
        let mut bytes = vec![0; values.len()];
        numbers::f32_to_e4m3(isa, &values, &mut bytes);
        assert_eq!(bytes, golden.bytes("as_e4m3"), "E4M3, {}", isa.name());
    }
}

#[test]
fn every_e4m3_and_e8m0_code_means_what_it_does_in_torch() {
    let golden = Golden::open("numbers.safetensors");
    let codes: Vec<u8> = (0..=255).collect();
    let mut found = vec![0.0; 256];
    numbers::e4m3_to_f32(Isa::get(), &codes, &mut found);
    let e8m0: Vec<f32> = codes.iter().map(|&c| moepack_quant::minifloat::e8m0_to_f32(c)).collect();
    for (what, found) in [("e4m3_decoded", found), ("e8m0_decoded", e8m0)] {
        for (code, (f, e)) in found.iter().zip(golden.f32s(what)).enumerate() {
            assert!(
                f.to_bits() == e.to_bits() || f.is_nan() && e.is_nan(),
                "{what} of {code:#04x}: {f:e}, not {e:e}"
            );
        }
    }
}

#[test]
fn mxfp4_decodes_as_in_transformers() {
    let golden = Golden::open("mxfp4.safetensors");
    let (blocks, scales) = (golden.bytes("blocks"), golden.bytes("scales"));
    check_decode("mxfp4", &[&blocks, &scales], golden.shape("decoded"), &golden.f32s("decoded"), 0);
}

#[test]
fn mxfp4_keeps_what_others_encoded() {
    let golden = Golden::open("mxfp4.safetensors");
    let ((rows, cols), data) = (golden.shape("decoded"), golden.f32s("decoded"));
    let codec = codec("mxfp4").unwrap();
    let planes = codec.encode(Isa::get(), Matrix { rows, cols, data: &data }, None).unwrap();
    check_decode("mxfp4", &[&planes[0], &planes[1]], (rows, cols), &data, 0);
}

/// The global scale there divides: exact where it is a power of two, else its reciprocal is rounded once more.
#[test]
fn nvfp4_decodes_as_in_compressed_tensors() {
    let golden = Golden::open("nvfp4.safetensors");
    let (packed, scales) = (golden.bytes("weight_packed"), golden.bytes("weight_scale"));
    for (which, ulps) in [("power", 0), ("any", 2)] {
        let divisor = golden.f32s(&format!("weight_global_scale_{which}"))[0];
        let global = (1.0 / divisor).to_le_bytes();
        let decoded = format!("decoded_{which}");
        let (shape, expected) = (golden.shape(&decoded), golden.f32s(&decoded));
        check_decode("nvfp4", &[&packed, &scales, &global], shape, &expected, ulps);
        check_decode("nvfp4-div", &[&packed, &scales, &divisor.to_le_bytes()], shape, &expected, 0);
    }
}

#[test]
fn integers_decode_as_in_compressed_tensors() {
    let golden = Golden::open("int.safetensors");
    for width in int::WIDTHS {
        for asym in ["", "-asym"] {
            let name = format!("int{width}-g32{asym}");
            let (packed, scale) =
                (golden.bytes(&format!("{name}.packed")), golden.bytes(&format!("{name}.scale")));
            let (shape, expected) =
                (golden.shape(&format!("{name}.decoded")), golden.f32s(&format!("{name}.decoded")));
            let mut planes = vec![packed.as_slice(), &scale];
            let zeros = if asym.is_empty() { vec![] } else { packed_zero_points(&golden, &name, width) };
            if !asym.is_empty() {
                planes.push(&zeros);
            }
            check_decode(&name, &planes, shape, &expected, 0);
        }
    }
}

/// Ours are packed along rows; theirs are one signed byte each here (and packed along columns in files).
fn packed_zero_points(golden: &Golden, name: &str, width: u32) -> Vec<u8> {
    let tensor = format!("{name}.zero_point");
    let (_, groups) = golden.shape(&tensor);
    let unsigned: Vec<u8> = golden.bytes(&tensor).iter().map(|z| z.wrapping_add(1 << (width - 1))).collect();
    let pack = |row: &[u8]| {
        let mut out = vec![0; bits::packed_bytes(width, groups)];
        bits::pack(Isa::get(), width, row, &mut out);
        out
    };
    unsigned.chunks(groups).flat_map(pack).collect()
}

/// Where a row does not fill 32-bit words theirs is longer, but starts with the same bytes.
#[test]
fn ragged_rows_are_packed_as_in_compressed_tensors() {
    let golden = Golden::open("int.safetensors");
    for width in int::WIDTHS {
        let (_, cols) = golden.shape(&format!("int{width}.ragged_q"));
        let q = golden.bytes(&format!("int{width}.ragged_q"));
        let packed = golden.bytes(&format!("int{width}.ragged_packed"));
        let row_bytes = (cols * width as usize).div_ceil(32) * 4;
        for (q, packed) in q.chunks(cols).zip(packed.chunks(row_bytes)) {
            let codes: Vec<u8> = q.iter().map(|q| q.wrapping_add(1 << (width - 1))).collect();
            let mut ours = vec![0; bits::packed_bytes(width, cols)];
            bits::pack(Isa::get(), width, &codes, &mut ours);
            assert_eq!(ours, packed[..ours.len()], "{width} bits");
            assert!(packed[ours.len()..].iter().all(|&b| b == 0), "{width} bits");
        }
    }
}

#[test]
fn fp8_blocks_decode_as_in_compressed_tensors() {
    let golden = Golden::open("fp8_block.safetensors");
    let (weight, scale) = (golden.bytes("weight"), golden.bytes("scale_inv"));
    let shape = golden.shape("decoded");
    check_decode("fp8-block-8x50", &[&weight, &scale], shape, &golden.f32s("decoded"), 0);
}

/// Every type of ours is in the file, and what is no number there is none here.
#[test]
fn ggml_blocks_decode_as_in_gguf_py() {
    let golden = Golden::open("ggml.safetensors");
    for kind in ggml::kinds::KINDS {
        let blocks = golden.bytes(&format!("{}.blocks", kind.name));
        let expected = golden.f32s(&format!("{}.decoded", kind.name));
        let shape = golden.shape(&format!("{}.decoded", kind.name));
        let number = |v: &f32| if v.is_nan() { f32::from_bits(NAN_BITS) } else { *v };
        let expected: Vec<f32> = expected.iter().map(number).collect();
        check_decode(kind.name, &[&blocks], shape, &expected, 0);
    }
}

/// But for minus zero, which ggml reads as zero.
#[test]
fn mxfp4_as_ggml_lays_it_out_is_mxfp4() {
    let golden = Golden::open("ggml.safetensors");
    let (blocks, scales) = ggml::mxfp4::from_ggml(&golden.bytes("mxfp4.blocks"));
    let (rows, cols) = golden.shape("mxfp4.decoded");
    let mut found = vec![f32::NAN; rows * cols];
    codec("mxfp4").unwrap().decode(Isa::get(), &[&blocks, &scales], rows, cols, 0, &mut found).unwrap();
    assert_eq!(found, golden.f32s("mxfp4.decoded"));
    assert_eq!(ggml::mxfp4::to_ggml(&blocks, &scales), golden.bytes("mxfp4.blocks"));
}
