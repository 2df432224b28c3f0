//! What is written is read back, and each fault is refused for what it is.

use moepack_format::Kind;

use super::*;
use crate::gguf::write;

/// A file with keys of every kind and two tensors, or two of them.
fn sample(dir: &Path, split: Option<u64>) -> Vec<PathBuf> {
    let q8 = Type::of_codec("q8_0").unwrap();
    let info = |name: &str, dims: &[u64]| TensorInfo { name: name.to_owned(), dims: dims.to_vec(), kind: q8 };
    let tensors = [info("a", &[32, 1]), info("b", &[64, 2, 3])];
    let files = write::split(&tensors, split.unwrap_or(u64::MAX)).unwrap();
    let written = |(n, range): (usize, &std::ops::Range<usize>)| {
        let keys = write::keys_of(&metadata(), n, files.len(), tensors.len()).unwrap();
        let laid = write::layout(&keys, &tensors[range.clone()]).unwrap();
        let mut bytes = laid.header;
        bytes.resize(laid.bytes as usize, 0);
        for (i, at) in range.clone().zip(laid.offsets) {
            let len = tensors[i].bytes().unwrap() as usize;
            bytes[at as usize..at as usize + len].fill(i as u8);
        }
        let path = dir.join(write::file_name("model", n + 1, files.len()));
        std::fs::write(&path, bytes).unwrap();
        path
    };
    files.iter().enumerate().map(written).collect()
}

fn metadata() -> Vec<(String, Value)> {
    let values = [
        Value::U8(1),
        Value::I8(-1),
        Value::U16(2),
        Value::I16(-2),
        Value::U32(3),
        Value::I32(-3),
        Value::F32(0.5),
        Value::Bool(true),
        Value::String("ä".to_owned()),
        Value::strings(["x".to_owned(), String::new()]),
        Value::Array(value::F32, vec![Value::F32(1.0)]),
        Value::U64(4),
        Value::I64(-4),
        Value::F64(0.25),
    ];
    values.into_iter().enumerate().map(|(i, v)| (format!("key.{i:02}"), v)).collect()
}

#[test]
fn what_is_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let paths = sample(dir.path(), None);
    let gguf = Gguf::open(&paths[0]).unwrap();
    assert_eq!(gguf.metadata, metadata().into_iter().collect());
    let found: Vec<_> = gguf.tensors.iter().map(|(t, at)| (t.name.as_str(), at % 32)).collect();
    assert_eq!(found, [("a", 0), ("b", 0)]);
    let bytes = std::fs::read(&paths[0]).unwrap();
    let at = gguf.tensors[1].1 as usize;
    assert!(bytes[at..at + 408].iter().all(|&b| b == 1) && bytes.len() == (at + 408).next_multiple_of(32));
}

#[test]
fn a_split_model_says_so_in_each_file() {
    let dir = tempfile::tempdir().unwrap();
    let paths = sample(dir.path(), Some(100));
    let names: Vec<_> = paths.iter().map(|p| p.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]);
    for (n, path) in paths.iter().enumerate() {
        let gguf = Gguf::open(path).unwrap();
        assert_eq!(gguf.metadata["split.no"], Value::U16(n as u16));
        assert_eq!(gguf.metadata["split.tensors.count"], Value::I32(2));
        assert_eq!(gguf.tensors.len(), 1);
    }
}

/// A header by hand: keys, tensor infos, and how many of each are claimed.
fn header(version: u32, counts: [u64; 2], rest: &[&[u8]]) -> Vec<u8> {
    let counts = counts.map(u64::to_le_bytes).concat();
    [&b"GGUF"[..], &version.to_le_bytes(), &counts, &rest.concat(), &[0; 256]].concat()
}

fn text(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    value::write_string(text, &mut out);
    out
}

fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(name)[..], &kind.to_le_bytes(), value].concat()
}

fn tensor(name: &str, dims: &[u64], id: u32, offset: u64) -> Vec<u8> {
    let sizes: Vec<u8> = dims.iter().flat_map(|d| d.to_le_bytes()).collect();
    [&text(name)[..], &(dims.len() as u32).to_le_bytes(), &sizes, &id.to_le_bytes(), &offset.to_le_bytes()]
        .concat()
}

#[test]
fn each_fault_is_refused_for_what_it_is() {
    let alignment = |n: u32| header(3, [0, 1], &[&key(ALIGNMENT_KEY, 4, &n.to_le_bytes())]);
    let arrays = [&value::ARRAY.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    let many = [&4u32.to_le_bytes()[..], &(1u64 << 60).to_le_bytes()].concat();
    let one = |t: Vec<u8>| header(3, [1, 0], &[&t]);
    let cases = [
        (b"GGML".repeat(8), "not with \"GGUF\""),
        (b"GG".to_vec(), "the file ends"),
        (header(1, [0, 0], &[]), "version 1, expected 3"),
        (header(4, [0, 0], &[]), "version 4, expected 3"),
        (header(3u32.swap_bytes(), [0, 0], &[]), "big-endian"),
        (header(3, [1 << 60, 0], &[]), "tensors, but"),
        (header(3, [0, 1 << 60], &[]), "keys, but"),
        (header(3, [0, 1], &[&(1u64 << 63).to_le_bytes()]), "bytes of a string, but"),
        (header(3, [0, 1], &[&key("k", 13, &[])]), "unknown kind 13"),
        (header(3, [0, 1], &[&key("k", 7, &[2])]), "a bool of 2"),
        (header(3, [0, 1], &[&key("k", value::ARRAY, &arrays)]), "an array of arrays"),
        (header(3, [0, 1], &[&key("k", value::ARRAY, &many)]), "elements, but"),
        (header(3, [0, 2], &[&key("k", 0, &[1]), &key("k", 0, &[1])]), "is said twice"),
        (header(3, [0, 1], &[&key("k", 8, &[2, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe])]), "not UTF-8"),
        (alignment(0), "expected a power of two"),
        (alignment(3), "expected a power of two"),
        (alignment(1 << 31), "expected a power of two"),
        (one(tensor("t", &[], 0, 0)), "0 dimensions"),
        (one(tensor("t", &[1; 5], 0, 0)), "5 dimensions"),
        (one(tensor("t", &[1], u32::MAX, 0)), "unknown type 4294967295"),
        (one(tensor("t", &[1], 999, 0)), "unknown type 999"),
        (one(tensor("t", &[33], 8, 0)), "rows of 33 numbers"),
        (one(tensor("t", &[0], 0, 0)), "nothing or more than can be"),
        (one(tensor("t", &[1 << 40, 1 << 40], 0, 0)), "nothing or more than can be"),
        (one(tensor("t", &[1 << 20], 0, 0)), "beyond the file"),
        (one(tensor("t", &[1], 0, u64::MAX - 31)), "beyond the file"),
        (one(tensor("t", &[1], 0, 4)), "multiple of 32"),
        (header(3, [2, 0], &[&tensor("t", &[1], 0, 0), &tensor("t", &[1], 0, 32)]), "second tensor"),
        (header(3, [2, 0], &[&tensor("t", &[9], 0, 0), &tensor("u", &[1], 0, 32)]), "inside of another"),
        (one(tensor(&"t".repeat(64), &[1], 0, 0)), "bytes of a string"),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (i, (bytes, expected)) in cases.iter().enumerate() {
        let path = dir.path().join(i.to_string());
        std::fs::write(&path, bytes).unwrap();
        let e = Gguf::open(&path).unwrap_err();
        assert_eq!((e.kind(), e.file()), (Kind::BadData, Some(path.as_path())), "{expected}: {e}");
        assert!(e.what().contains(expected), "expected {expected}: {e}");
    }
}

/// Any prefix of a good file, and any one byte of its header changed, is read or refused, never more.
#[test]
fn damage_is_read_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let good = std::fs::read(&sample(dir.path(), None)[0]).unwrap();
    let path = dir.path().join("damaged");
    for at in 0..good.len() {
        std::fs::write(&path, &good[..at]).unwrap();
        // What fills the last tensor up is nobody's.
        assert!(Gguf::open(&path).is_err() || at + 32 > good.len(), "cut at {at}");
        let mut bad = good.clone();
        bad[at] ^= 0x81;
        std::fs::write(&path, &bad).unwrap();
        let _ = Gguf::open(&path);
    }
}
