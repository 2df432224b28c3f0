//! Every refusal from a literal header, and what is accepted.

use proptest::prelude::*;

use super::*;

const T: &str = r#""a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#;

/// Bytes of a file with this header and `n_data` bytes of data.
fn bytes(json: &[u8], n_data: usize) -> Vec<u8> {
    let mut out = (json.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(json);
    out.resize(out.len() + n_data, 0);
    out
}

fn read(bytes: &[u8]) -> Result<Header> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    std::fs::write(&path, bytes).unwrap();
    Header::read(&InputFile::open(&path).unwrap())
}

/// The file is refused with `what`, blaming `tensor` and `byte`.
#[track_caller]
fn refused(file: &[u8], what: &str, tensor: Option<&str>, byte: Option<u64>) {
    let e = read(file).unwrap_err();
    assert_eq!((e.what(), e.tensor(), e.byte()), (what, tensor, byte));
    assert_eq!(e.kind(), Kind::BadData);
    assert!(e.file().is_some());
}

/// The header with this JSON and four bytes of data is refused.
#[track_caller]
fn refused_json(json: &str, what: &str, tensor: Option<&str>, byte: u64) {
    refused(&bytes(json.as_bytes(), 4), what, tensor, Some(byte));
}

/// A header of one tensor `a` with these fields is refused.
#[track_caller]
fn refused_entry(fields: &str, what: &str) {
    let e = read(&bytes(format!(r#"{{"a":{{{fields}}}}}"#).as_bytes(), 4)).unwrap_err();
    assert_eq!((e.what(), e.tensor(), e.kind()), (what, Some("a"), Kind::BadData));
    assert!(e.byte().is_some());
}

#[test]
fn a_plain_header_with_spaces_behind_it() {
    let json = format!(
        r#"{{"__metadata__":{{"k":"v"}},"b":{{"dtype":"BF16","shape":[],"data_offsets":[4,6]}},{T}}}   "#
    );
    let h = read(&bytes(json.as_bytes(), 6)).unwrap();
    assert_eq!(h.metadata["k"], "v");
    let offset = 8 + json.len() as u64;
    assert_eq!(h.data_offset, offset);
    let names: Vec<_> =
        h.tensors.iter().map(|t| (t.name.as_str(), t.start - offset, t.end - offset)).collect();
    assert_eq!(names, [("a", 0, 4), ("b", 4, 6)]);
    assert_eq!(h.get("b").unwrap().dtype, Dtype::Bf16);
    assert_eq!(h.get("c"), None);
}

#[test]
fn empty_tensors_take_no_place() {
    let json = r#"{"z":{"dtype":"F32","shape":[0,7],"data_offsets":[4,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"y":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#;
    assert_eq!(read(&bytes(json.as_bytes(), 4)).unwrap().tensors.len(), 3);
}

#[test]
fn lengths() {
    refused(b"", "0 bytes, expected 8 bytes of header length first", None, None);
    refused(b"1234567", "7 bytes, expected 8 bytes of header length first", None, None);
    for n in 0..8u8 {
        let what = format!("header length {n}, expected at least 8");
        refused(
            &[n, 0, 0, 0, 0, 0, 0, 0, b'{', b'}', b' ', b' ', b' ', b' ', b' ', b' '],
            &what,
            None,
            Some(0),
        );
    }
    let short = [9, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'];
    refused(&short, "needs 17 bytes for the header alone, has 10", None, Some(0));
    let what = "header length 100000001, expected at most 100000000";
    refused(&[1, 0xe1, 0xf5, 5, 0, 0, 0, 0], what, None, Some(0));
    let what = "header length 18446744073709551615, expected at most 100000000";
    refused(&[0xff; 16], what, None, Some(0));
}

#[test]
fn text() {
    refused(&bytes(b"{\"\xff\xfe\":1}", 0), "header byte 0xff is not UTF-8", None, Some(10));
    refused_json(&format!(" {{{T}}}"), "header starts with ' ', expected '{'", None, 8);
    refused_json(&format!("\u{feff}{{{T}}}"), "header starts with '\\u{feff}', expected '{'", None, 8);
    refused_json(&"[".repeat(100_000), "header starts with '[', expected '{'", None, 8);
    refused_json(&format!("{{{T}}}\n"), "header ends with '\\n', expected '}' and spaces", None, 61);
    refused_json(&format!("{{{T}}} {{}}"), "header: trailing characters", None, 62);
    refused_json("          ", "header starts with ' ', expected '{'", None, 8);
    refused_json(&format!("{{{T},}}"), "header: trailing comma", None, 61);
}

#[test]
fn nesting_goes_nowhere() {
    let deep = "[".repeat(100_000);
    let what = "header: invalid type: sequence, expected an object with dtype, shape and data_offsets";
    refused_json(&format!(r#"{{"a":{deep}}}"#), what, Some("a"), 12);
    refused_entry(
        &format!(r#""shape":{deep}"#),
        "header: invalid type: sequence, expected a whole number below 2^64",
    );
    refused_entry(&format!(r#""more":{deep}"#), r#"unknown field "more""#);
    let open = r#"{"a":"#.repeat(30_000);
    let e = read(&bytes(format!("{open}}}").as_bytes(), 0)).unwrap_err();
    assert_eq!(e.what(), r#"unknown field "a""#);
}

#[test]
fn names() {
    let b = r#""a":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}"#;
    let e = read(&bytes(format!("{{{T},{b}}}").as_bytes(), 4)).unwrap_err();
    assert_eq!((e.what(), e.tensor()), ("this name is used twice", Some("a")));
    // The same name in two spellings.
    let e =
        read(&bytes(format!(r"{{{T},{}}}", b.replace("\"a\"", r#""\u0061""#)).as_bytes(), 4)).unwrap_err();
    assert_eq!(e.what(), "this name is used twice");
    refused_json(&format!("{{{}}}", T.replace("\"a\"", "\"\"")), "a tensor without a name", None, 10);
    let long = "n".repeat(1025);
    let e = read(&bytes(format!("{{{}}}", T.replace("\"a\"", &format!("\"{long}\""))).as_bytes(), 4))
        .unwrap_err();
    assert_eq!(e.what(), "a tensor name of 1025 bytes, expected at most 1024");
}

#[test]
fn metadata() {
    let with = |m: &str| format!(r#"{{"__metadata__":{m},{T}}}"#);
    let m = Some("__metadata__");
    refused_json(&with(r#"{"k":1}"#), "header: invalid type: integer `1`, expected a string", m, 29);
    refused_json(&with("[]"), "header: invalid type: sequence, expected an object of strings", m, 23);
    refused_json(&with(r#"{"k":"1","k":"2"}"#), r#"key "k" is used twice"#, m, 40);
    refused_json(&with(r#"{},"__metadata__":{}"#), "this key is used twice", m, 40);
}

#[test]
fn entries() {
    let ok = r#""dtype":"U8","shape":[4],"data_offsets":[0,4]"#;
    refused_entry(r#""dtype":"U8","shape":[4]"#, "header: missing field `data_offsets`");
    refused_entry(r#""shape":[4],"data_offsets":[0,4]"#, "header: missing field `dtype`");
    refused_entry(&format!(r#"{ok},"dtype":"U8""#), r#"field "dtype" is given twice"#);
    refused_entry(&format!(r#"{ok},"shape":[4]"#), r#"field "shape" is given twice"#);
    refused_entry(&format!(r#"{ok},"x":0"#), r#"unknown field "x""#);
    let offsets = |o: &str| ok.replace("[0,4]", o);
    refused_entry(&offsets("[0]"), "data_offsets [0], expected two numbers");
    refused_entry(&offsets("[0,4,4]"), "a list of more than 2 numbers");
    refused_entry(&offsets("[4,0]"), "data_offsets [4, 0] are reversed");
    let max = u64::MAX;
    let e =
        read(&bytes(format!("{{{}}}", T.replace("[0,4]", &format!("[0,{max}]"))).as_bytes(), 4)).unwrap_err();
    assert_eq!(
        (e.what(), e.tensor()),
        (format!("data_offsets [0, {max}] go beyond 2^64").as_str(), Some("a"))
    );
}

#[test]
fn shapes() {
    let shape = |s: &str| format!(r#""dtype":"U8","shape":{s},"data_offsets":[0,4]"#);
    let whole = "a whole number below 2^64";
    refused_entry(&shape("[-4]"), &format!("header: invalid type: integer `-4`, expected {whole}"));
    refused_entry(&shape("[4.0]"), &format!("header: invalid type: floating point `4.0`, expected {whole}"));
    let big = format!("header: invalid type: floating point `1.8446744073709552e+19`, expected {whole}");
    refused_entry(&shape("[18446744073709551616]"), &big);
    refused_entry(&shape("[\"4\"]"), &format!("header: invalid type: string \"4\", expected {whole}"));
    refused_entry(&shape("4"), "header: invalid type: integer `4`, expected a list of whole numbers");
    refused_entry(&shape("[1,1,1,1,1,1,1,1,4]"), "a list of more than 8 numbers");
    let two62 = 1u64 << 62;
    let what = format!("shape [{two62}, 8] of U8 has more than 2^64 bits");
    refused_entry(&shape(&format!("[{two62},8]")), &what);
    refused_entry(&shape("[5]"), "4 bytes, but shape [5] of U8 takes 5");
    refused_entry(&shape("[]"), "4 bytes, but shape [] of U8 takes 1");
    let e = read(&bytes(format!("{{{}}}", T.replace("U8", "FP2")).as_bytes(), 4)).unwrap_err();
    assert!(e.what().starts_with(r#"unknown dtype "FP2", known are BOOL U8"#), "{e}");
    assert_eq!(e.tensor(), Some("a"));
    refused_entry(
        &shape("[4]").replace("\"U8\"", "8"),
        "header: invalid type: integer `8`, expected a string",
    );
}

#[test]
fn every_byte_belongs_to_one_tensor() {
    let b = |range: &str| format!(r#"{{{T},"b":{{"dtype":"U8","shape":[4],"data_offsets":{range}}}}}"#);
    let file = |range: &str, n| bytes(b(range).as_bytes(), n);
    let data = 8 + b("[4,8]").len() as u64;
    assert!(read(&file("[4,8]", 8)).is_ok());
    let what = format!("overlaps a, which ends at byte {}", data + 4);
    refused(&file("[2,6]", 6), &what, Some("b"), Some(data + 2));
    refused(
        &file("[6,9]", 9).replace_shape(),
        "a hole of 2 bytes between a and this tensor",
        Some("b"),
        Some(data + 4),
    );
    let what = format!("needs {} bytes, has {}", data + 8, data + 7);
    refused(&file("[4,8]", 7), &what, Some("b"), Some(data + 7));
    refused(&file("[4,8]", 9), "1 bytes behind the last tensor, expected none", None, Some(data + 8));
    let text = read(&file("[4,8]", 7)).unwrap_err().to_string();
    assert!(
        text.ends_with("hint: the download may be cut short; fetch this file again and compare its sha256")
    );
}

/// `[6,9]` holds three bytes, so its shape must be `[3]` for the hole to be the only fault.
trait ReplaceShape {
    fn replace_shape(self) -> Vec<u8>;
}
impl ReplaceShape for Vec<u8> {
    fn replace_shape(mut self) -> Vec<u8> {
        let at = self.windows(3).rposition(|w| w == b"[4]").unwrap();
        self[at + 1] = b'3';
        self
    }
}

#[test]
fn a_git_lfs_pointer_is_missing_weights() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n";
    let e = read(pointer).unwrap_err();
    assert_eq!(
        (e.kind(), e.what()),
        (Kind::Missing, "a Git LFS pointer, expected the weights it stands for")
    );
    assert!(e.to_string().contains("git lfs pull"));
}

#[test]
fn many_tensors_are_read_in_good_time() {
    let n = 150_000u64;
    let entry = |i: u64| {
        let (a, b) = (4 * i, 4 * i + 4);
        format!(
            r#""model.layers.{}.mlp.experts.{i}.gate_proj.weight":{{"dtype":"BF16","shape":[1,2],"data_offsets":[{a},{b}]}}"#,
            i % 61
        )
    };
    let json = format!("{{{}}}", (0..n).map(entry).collect::<Vec<_>>().join(","));
    let start = std::time::Instant::now();
    let data = 8 + json.len() as u64;
    let header = Header::parse(json.as_bytes(), data, data + 4 * n).unwrap();
    assert_eq!(header.tensors.len(), 150_000);
    assert!(header.get("model.layers.1.mlp.experts.149999.gate_proj.weight").is_none());
    assert!(header.get("model.layers.0.mlp.experts.61.gate_proj.weight").is_some());
    // Measured 0.15 s; the bound only catches something quadratic.
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}

/// A header that is right, and a few edits of it: bytes changed, removed, doubled, or replaced by what JSON is made of.
fn nearly_right() -> impl Strategy<Value = (String, u64)> {
    let tensor = (0..4usize, 0..6u64, proptest::sample::select(Dtype::ALL));
    let edit = (any::<proptest::sample::Index>(), 0..5u8, "[0-9\\[\\]{}\",:.eE \\\\-]{1,3}");
    let edits = proptest::collection::vec(edit, 0..3);
    (proptest::collection::vec(tensor, 0..5), edits, 0..3u64).prop_map(|(tensors, edits, extra)| {
        let mut at = 0;
        let entry = |(i, (name, n, dtype)): (usize, (usize, u64, Dtype))| {
            let bytes = dtype.bytes(&[n, 8]).unwrap();
            let entry = format!(
                r#""n{name}{i}":{{"dtype":"{}","shape":[{n},8],"data_offsets":[{at},{}]}}"#,
                dtype.name(),
                at + bytes
            );
            at += bytes;
            entry
        };
        let entries: Vec<_> = tensors.into_iter().enumerate().map(entry).collect();
        let mut text: Vec<char> = format!("{{{}}}", entries.join(",")).chars().collect();
        for (place, kind, insert) in edits {
            let i = place.index(text.len());
            match kind {
                0 => drop(text.remove(i)),
                1 => text.insert(i, text[i]),
                2 => drop(text.splice(i..=i, insert.chars())),
                3 => drop(text.splice(i..i, insert.chars())),
                _ => {
                    let j = (i + 20).min(text.len());
                    let copy = text[i..j].to_vec();
                    drop(text.splice(i..i, copy));
                }
            }
            text.push(' ');
        }
        (text.into_iter().collect(), at + extra / 2)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Never a panic; and what we accept the reference reader accepts, with the same places.
    #[test]
    fn we_accept_no_more_than_the_reference_reader((json, n_data) in nearly_right()) {
        let mut json = json.into_bytes();
        json.resize(json.len().max(8), b' ');
        let file = bytes(&json, n_data as usize);
        let ours = Header::parse(&json, 8 + json.len() as u64, file.len() as u64);
        if let Ok(header) = ours {
            let stock = safetensors::SafeTensors::deserialize(&file);
            prop_assert!(stock.is_ok(), "{:?}", stock.err());
            let stock = stock.unwrap();
            prop_assert_eq!(stock.len(), header.tensors.len());
            for t in &header.tensors {
                let data = stock.tensor(&t.name).unwrap().data();
                prop_assert_eq!(data.len() as u64, t.bytes());
                prop_assert_eq!(data.as_ptr() as u64 - file.as_ptr() as u64, t.start);
            }
        }
    }
}
