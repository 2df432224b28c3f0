//! Manifests that go round, and those that are refused.

use std::sync::OnceLock;

use proptest::prelude::*;
use sha2::{Digest, Sha256};

use super::*;
use crate::file::hex;
use crate::testing::SmallBundle;

/// The manifest is refused with a message that starts with `what`.
#[track_caller]
fn refused(change: impl FnOnce(&mut Manifest), what: &str) {
    let mut manifest = SmallBundle::new().manifest;
    change(&mut manifest);
    let e = manifest.to_text().unwrap_err();
    assert!(e.what().starts_with(what), "{e}\nexpected {what}");
    assert_eq!(e.kind(), Kind::BadData);
}

/// A text that replaces another in the file, with the hash made right again or not.
#[track_caller]
fn refused_text(from: &str, to: &str, rehash: bool, what: &str) {
    let small = SmallBundle::new();
    let path = small.dir.join(MANIFEST);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    let mut text = text.replacen(from, to, 1);
    if rehash {
        let at = text.len() - 68;
        let zeros = format!("{}{}\"\n}}\n", &text[..at], "0".repeat(64));
        text = format!("{}{}\"\n}}\n", &text[..at], hex(&Sha256::digest(&zeros)));
    }
    std::fs::write(&path, text).unwrap();
    let e = Manifest::read(&small.dir).unwrap_err();
    assert!(e.what().starts_with(what), "{e}\nexpected {what}");
    assert_eq!((e.kind(), e.file()), (Kind::BadData, Some(path.as_path())));
}

#[test]
fn goes_round_with_its_hash() {
    let small = SmallBundle::new();
    let read = Manifest::read(&small.dir).unwrap();
    assert_eq!(read.sha256.len(), 64);
    let bare = Manifest { crc32c: String::new(), sha256: String::new(), ..read.clone() };
    assert_eq!(bare, small.manifest);
    assert_eq!(read.to_text().unwrap(), std::fs::read_to_string(small.dir.join(MANIFEST)).unwrap());
    assert_eq!(read.layer(4).unwrap().bank, "experts-00004.safetensors");
    assert!(read.layer(2).is_none() && read.file("nothing").is_none());
}

#[test]
fn every_flipped_bit_is_found() {
    let small = SmallBundle::new();
    let path = small.dir.join(MANIFEST);
    let good = std::fs::read(&path).unwrap();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(check_hash(&bad).is_err(), "bit {bit}");
    }
    assert!(check_hash(&good).is_ok());
}

#[test]
fn newer_versions_and_features() {
    refused_text(r#""major": 1"#, r#""major": 2"#, true, "format version 2.0, this moepack reads version 1");
    let what = r#"required feature "holograms" is unknown, known are []"#;
    refused_text(r#""features_required": []"#, r#""features_required": ["holograms"]"#, true, what);
    let small = SmallBundle::new();
    small.rewrite(|m| {
        m.format_version.minor = 7;
        m.features_optional.push("holograms".to_owned());
    });
    assert_eq!(Manifest::read(&small.dir).unwrap().features_optional, ["holograms"]);
}

#[test]
fn fields_of_a_newer_minor_version_are_ignored() {
    let text = SmallBundle::new().manifest.to_text().unwrap();
    let text = text.replacen("\"family\"", "\"colour\": [1, {}],\n  \"family\"", 1);
    assert!(Manifest::parse(text.as_bytes()).is_ok());
}

#[test]
fn edits_are_noticed() {
    refused_text(r#""small""#, r#""large""#, false, "sha256 of the manifest is ");
    refused_text("}\n", "}", false, "sha256 of the manifest is ");
    refused_text("}\n", "} \n", false, "sha256 of the manifest is ");
}

#[test]
fn no_manifest_is_an_unfinished_bundle() {
    let dir = tempfile::tempdir().unwrap();
    let e = Manifest::read(dir.path()).unwrap_err();
    assert_eq!(e.kind(), Kind::Missing);
    assert_eq!(e.what(), "no manifest.json: this is an unfinished bundle, or none");
    assert!(e.to_string().contains("--resume"));
    assert_eq!(Manifest::read(&dir.path().join("none")).unwrap_err().kind(), Kind::Missing);
}

#[test]
fn text_that_is_no_manifest() {
    let refuse = |text: &str, what: &str| {
        let e = Manifest::parse(text.as_bytes()).unwrap_err();
        assert!(e.what().starts_with(what), "{e}");
        assert_eq!(e.kind(), Kind::BadData);
    };
    refuse("", "EOF while parsing a value");
    refuse("[]", "invalid length 0, expected struct Versioned");
    refuse("{}", "missing field `format_version`");
    refuse(r#"{"format_version":{"major":1,"minor":-1}}"#, "invalid value: integer `-1`, expected u32");
    refuse(r#"{"format_version":{"major":1,"minor":0}}"#, "missing field `format`");
    refuse(&format!(r#"{{"recipe":{}"#, "[".repeat(100_000)), "EOF while parsing a list");
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let good = SmallBundle::new().manifest.to_text().unwrap();
    refuse(&good.replacen("\"bf16\"", &deep, 1), "recursion limit exceeded");
}

#[test]
fn names_stay_inside() {
    for name in ["../x", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\b", "c:x", "a\0b", "a\nb"] {
        let what = format!("file name {name:?}, expected a plain name");
        assert!(check_file_name(name).unwrap_err().what().starts_with(&what));
        refused(|m| m.files[0].path = name.to_owned(), &what);
    }
    assert!(check_file_name(&"n".repeat(256)).is_err());
    assert!(check_file_name("chat template (1).jinja").is_ok());
}

#[test]
fn contradictions() {
    refused(|m| m.format = "x".to_owned(), r#"format "x", expected "moepack.bundle""#);
    refused(|m| m.align = 100, "align 100, expected a power of two");
    refused(|m| m.files[0].path = MANIFEST.to_owned(), "the manifest lists itself");
    refused(|m| m.files[0].sha256.push('0'), "sha256 \"");
    refused(|m| m.files[0].sha256.replace_range(..1, "G"), "sha256 \"G");
    refused(|m| m.files.swap(0, 1), "files: ");
    refused(|m| m.files[1] = m.files[0].clone(), "files: \"config.json\" behind Some(\"config.json\")");
    refused(|m| m.layers.swap(0, 1), "layers: 1 behind Some(4), expected ascending order");
    refused(|m| m.layers[0].n_experts = 0, "layer 1 has 0 experts, expected 1 to 65536");
    refused(|m| m.layers[0].usage = Some(vec![1]), "layer 1 has 1 usage counts, but 3 experts");
    let each = PartCodecs::Each(vec!["a".to_owned()]);
    refused(
        |m| drop(m.layers[0].codecs.insert("up_proj".to_owned(), each)),
        "layer 1 has 1 codecs of up_proj",
    );
    let one = PerExpert::Each(vec![Some(0.5)]);
    refused(
        |m| m.layers[0].experts.get_mut("gate_proj").unwrap().heldout_error = one,
        "layer 1 has 1 values of gate_proj",
    );
    refused(|m| m.layers[0].bank = "x".to_owned(), r#""x" is used twice or not among the files"#);
    refused(|m| m.trunk[1] = m.trunk[0].clone(), r#""trunk-00001-of-00002.safetensors" is used twice"#);
}

#[test]
fn what_each_expert_has_is_one_line_and_folded_where_all_are_alike() {
    let text = SmallBundle::new().manifest.to_text().unwrap();
    for line in [
        r#"      "usage": [5,6,7],"#,
        r#"      "experts": {"gate_proj":{"bits":4.25,"hessian_source":["own",null,"pooled"],"heldout_error":"#,
    ] {
        assert!(text.contains(line), "{text}");
    }
    assert_eq!(PerExpert::folded(vec![1, 1]), PerExpert::Same(1));
    assert_eq!(PerExpert::folded(vec![1, 2]), PerExpert::Each(vec![1, 2]));
    assert_eq!([1.234_56e-9, 0.0, 12_345.6].map(four_digits), [1.235e-9, 0.0, 12_350.0]);
}

#[test]
fn totals_are_sums() {
    let m = SmallBundle::new().manifest;
    let payload: u64 = m.layers.iter().map(|l| l.payload_bytes).sum();
    assert_eq!(m.totals.expert_payload_bytes, payload);
    assert_eq!(m.totals.bpw_experts, payload as f64 * 8.0 / 1000.0);
    assert_eq!(m.totals.bundle_bytes, m.files.iter().map(|f| f.bytes).sum::<u64>());
    assert_eq!(Totals::sum(&[], &[], &[], 0, 0), Totals::default());
}

proptest! {
    #[test]
    fn no_edit_makes_the_parser_panic(
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<proptest::sample::Index>(),
    ) {
        static WHOLE: OnceLock<String> = OnceLock::new();
        let whole = WHOLE.get_or_init(|| SmallBundle::new().manifest.to_text().unwrap());
        let mut text = whole.clone().into_bytes();
        for (place, value) in edits {
            let i = place.index(text.len());
            text[i] = value;
        }
        let _ = Manifest::parse(&text);
        let cut = cut.index(text.len());
        prop_assert!(Manifest::parse(&text[..cut]).is_err() || text[cut..] == *b"\n");
        prop_assert!(check_hash(&text[..cut]).is_err());
    }
}
