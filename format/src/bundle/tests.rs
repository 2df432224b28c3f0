//! Bundles that open, and those that do not.

use std::os::unix::fs::symlink;

use super::*;
use crate::testing::{LAYERS, N_EXPERTS, SmallBundle, byte};

#[test]
fn experts_trunk_and_side_files_are_found() {
    let small = SmallBundle::new();
    let bundle = Bundle::open(&small.dir).unwrap();
    for layer in LAYERS {
        let bank = bundle.bank(layer).unwrap();
        for expert in 0..N_EXPERTS {
            let record = bank.read(expert, true).unwrap();
            let part = record.part("gate_proj").unwrap();
            assert_eq!((part.planes[0][9], part.planes[1]), (byte(layer, expert, 9), &[1u8, 2, 3, 4, 5][..]));
            assert!(record.part("up_proj").is_none());
        }
    }
    assert_eq!(bundle.bank(2).unwrap_err().what(), "layer 2 has no routed experts");
    let (file, tensor) = bundle.trunk_tensor("tensor.2.b").unwrap().unwrap();
    let mut bytes = [0; 10];
    file.read_exact_at(tensor.start, &mut bytes).unwrap();
    assert_eq!(bytes, [21; 10]);
    assert!(bundle.trunk_tensor("tensor.3.b").unwrap().is_none());
    assert_eq!(bundle.open_file("config.json").unwrap().len(), 24);
    assert_eq!(bundle.open_file("tokenizer.json").unwrap_err().kind(), Kind::Missing);
}

#[test]
fn a_bundle_is_told_from_other_directories() {
    let small = SmallBundle::new();
    assert!(Bundle::is_bundle(&small.dir));
    std::fs::remove_file(small.dir.join(MANIFEST)).unwrap();
    assert!(Bundle::is_bundle(&small.dir), "unfinished, but meant to be one");
    assert_eq!(Bundle::open(&small.dir).unwrap_err().kind(), Kind::Missing);
    assert!(!Bundle::is_bundle(&std::env::temp_dir().join("none")));
    assert!(!Bundle::is_bundle(Path::new(env!("CARGO_MANIFEST_DIR"))));
}

#[test]
fn missing_files_are_named_all_at_once() {
    let small = SmallBundle::new();
    for name in ["config.json", "experts-00004.safetensors"] {
        std::fs::remove_file(small.dir.join(name)).unwrap();
    }
    let e = Bundle::open(&small.dir).unwrap_err();
    assert_eq!(e.kind(), Kind::Missing);
    assert_eq!(e.what(), "2 files are missing: config.json experts-00004.safetensors");
}

#[test]
fn sizes_are_compared_before_anything_is_read() {
    let small = SmallBundle::new();
    let path = small.dir.join("experts-00004.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[1..]).unwrap();
    let e = Bundle::open(&small.dir).unwrap_err();
    assert_eq!(e.what(), format!("needs {} bytes, has {}", bytes.len(), bytes.len() - 1));
    assert_eq!((e.kind(), e.file()), (Kind::BadData, Some(path.as_path())));
}

#[test]
fn links_that_lead_outside_are_refused() {
    let small = SmallBundle::new();
    let (path, outside) = (small.dir.join("config.json"), small.dir.join("../config.json"));
    std::fs::rename(&path, &outside).unwrap();
    symlink("../config.json", &path).unwrap();
    let e = Bundle::open(&small.dir).unwrap_err();
    assert!(e.what().contains("expected a file inside"), "{e}");
    assert_eq!(e.kind(), Kind::BadData);
}

#[test]
fn a_bank_of_another_layer_is_noticed() {
    let small = SmallBundle::new();
    small.rewrite(|m| {
        let [a, b] = &mut m.layers[..] else { panic!() };
        std::mem::swap(&mut a.bank, &mut b.bank);
    });
    let bundle = Bundle::open(&small.dir).unwrap();
    assert_eq!(bundle.bank(1).unwrap_err().what(), "layer is 4, the manifest says 1");
}

#[test]
fn what_the_manifest_says_of_a_bank_is_compared() {
    let refuse = |change: fn(&mut LayerEntry), what: &str| {
        let small = SmallBundle::new();
        small.rewrite(|m| change(&mut m.layers[0]));
        let e = Bundle::open(&small.dir).unwrap().bank(1).map(|_| ()).unwrap_err();
        assert!(e.what().starts_with(what), "{e}");
    };
    let fewer = |l: &mut LayerEntry| {
        (l.n_experts, l.usage) = (4, None);
        l.experts.clear();
    };
    refuse(fewer, "n_experts is 3, the manifest says 4");
    refuse(|l| l.max_record_bytes += 1, "max_record_bytes is 4096, the manifest says 4097");
    refuse(|l| l.payload_bytes += 1, "payload_bytes is 2115, the manifest says 2116");
    refuse(|l| l.record_stride = None, "record_stride is 4096, the manifest says 0");
    refuse(|l| l.padding_bytes += 1, "padding_bytes is ");
}

#[test]
fn a_trunk_tensor_in_two_files_is_refused() {
    let small = SmallBundle::new();
    let copy = small.dir.join("trunk-00002-of-00002.safetensors");
    std::fs::copy(small.dir.join("trunk-00001-of-00002.safetensors"), copy).unwrap();
    let bundle = Bundle::open(&small.dir).unwrap();
    let e = bundle.trunk().unwrap_err();
    assert_eq!((e.what(), e.tensor()), (TRUNK_TWICE, Some("tensor.1.a")));
}
