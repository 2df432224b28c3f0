//! Every flipped bit of a small bundle is found and named.

use super::*;
use crate::bank::Bank;
use crate::testing::SmallBundle;

const FULL: CheckOptions = CheckOptions { level: CheckLevel::Full, threads: 2 };

fn full(dir: &Path) -> Vec<Damage> {
    check(dir, FULL, &|_| ControlFlow::Continue(())).unwrap()
}

fn quick(dir: &Path) -> Vec<Damage> {
    let options = CheckOptions { level: CheckLevel::Quick, threads: 1 };
    check(dir, options, &|_| ControlFlow::Continue(())).unwrap()
}

fn flip(path: &Path, bit: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[bit / 8] ^= 1 << (bit % 8);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_whole_bundle_has_no_damage() {
    let small = SmallBundle::new();
    assert_eq!((full(&small.dir), quick(&small.dir)), (vec![], vec![]));
    let bundle = Bundle::open(&small.dir).unwrap();
    assert_eq!(bundle.check(FULL, &|_| ControlFlow::Continue(())).unwrap(), []);
}

#[test]
fn a_flipped_bit_anywhere_is_found_and_its_file_named() {
    let small = SmallBundle::new();
    let mut names: Vec<_> = small.manifest.files.iter().map(|f| f.path.as_str()).collect();
    names.push(MANIFEST);
    for name in names {
        let path = small.dir.join(name);
        let n_bits = std::fs::metadata(&path).unwrap().len() as usize * 8;
        // A stride that is prime, so that it meets every kind of byte and every bit of a byte.
        for bit in (0..n_bits).step_by(1999).chain([0, n_bits - 1]) {
            flip(&path, bit);
            let damage = full(&small.dir);
            assert!(damage.iter().any(|d| d.file == name), "bit {bit} of {name}: {damage:?}");
            flip(&path, bit);
        }
    }
    assert_eq!(full(&small.dir), []);
}

#[test]
fn damage_in_a_record_names_layer_and_expert() {
    let small = SmallBundle::new();
    let path = small.dir.join("experts-00004.safetensors");
    let bank = Bank::open(&path).unwrap();
    let entry = *bank.record(2).unwrap();
    // First byte, a gap between planes, last byte.
    let gap = bank.pads().iter().find(|(start, _)| *start > entry.offset).unwrap().0;
    for at in [entry.offset, gap, entry.offset + entry.bytes - 1] {
        flip(&path, at as usize * 8);
        let damage = full(&small.dir);
        let named = &damage[0];
        assert_eq!((named.layer, named.expert, named.byte), (Some(4), Some(2), Some(entry.offset)));
        assert_eq!(named.tensor.as_deref(), Some("layers.4.experts.2"));
        assert!(named.what.starts_with("the record's crc32c is "), "{named}");
        assert!(damage.last().unwrap().what.starts_with("sha256 is "));
        assert_eq!(quick(&small.dir), []);
        flip(&path, at as usize * 8);
    }
}

#[test]
fn damage_in_padding_names_the_file() {
    let small = SmallBundle::new();
    let path = small.dir.join("experts-00001.safetensors");
    let n_bits = std::fs::metadata(&path).unwrap().len() as usize * 8;
    flip(&path, n_bits - 1);
    let damage = full(&small.dir);
    assert_eq!((damage.len(), damage[0].expert), (2, None));
    assert!(damage[0].to_string().starts_with("experts-00001.safetensors, layer 1, bytes "), "{}", damage[0]);
    assert!(damage[0].what.starts_with("padding of "));
}

#[test]
fn damage_in_a_trunk_file_names_the_tensor_or_the_header() {
    let small = SmallBundle::new();
    let path = small.dir.join("trunk-00002-of-00002.safetensors");
    let header = crate::trunk::TrunkFile::open(&path).unwrap().header;
    let b = header.get("tensor.2.b").unwrap();
    flip(&path, b.start as usize * 8 + 13);
    let damage = full(&small.dir);
    assert_eq!(
        (damage[0].tensor.as_deref(), damage[0].byte, damage[0].end),
        (Some("tensor.2.b"), Some(b.start), Some(b.end))
    );
    assert!(damage[0].what.starts_with("the tensor's crc32c is "), "{}", damage[0]);
    // In a name, so that everything still holds together.
    let text = std::fs::read(&path).unwrap();
    let name = text.windows(8).position(|w| w == b"tensor.2").unwrap();
    flip(&path, name * 8);
    let damage = full(&small.dir);
    let places: Vec<_> =
        damage.iter().map(|d| d.what.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(places, ["the header's", "the tensor's", "sha256 is"], "{damage:?}");
    assert!(quick(&small.dir)[0].what.starts_with("the header's crc32c"));
}

#[test]
fn a_damaged_header_does_not_hide_damaged_records() {
    let small = SmallBundle::new();
    let path = small.dir.join("experts-00004.safetensors");
    let offset = Bank::open(&path).unwrap().record(1).unwrap().offset;
    flip(&path, 8 * 8 + 7);
    flip(&path, offset as usize * 8);
    let damage = full(&small.dir);
    assert_eq!(damage[0].byte, Some(8), "{damage:?}");
    assert_eq!((damage[1].expert, damage[1].byte), (Some(1), Some(offset)), "{damage:?}");
    assert_eq!(damage.len(), 3, "{damage:?}");
}

#[test]
fn a_sample_finds_what_it_looks_at() {
    let small = SmallBundle::new();
    let path = small.dir.join("experts-00004.safetensors");
    let records: Vec<_> = Bank::open(&path).unwrap().records().to_vec();
    records.iter().for_each(|r| flip(&path, r.offset as usize * 8));
    for seed in 0..4 {
        let sample = Sample { per_million: 340_000, seed };
        let drawn = sample.experts(small.manifest.layer(4).unwrap());
        assert_eq!(drawn.len(), 2);
        let options = CheckOptions { level: CheckLevel::Sample(sample), threads: 2 };
        let damage = check(&small.dir, options, &|_| ControlFlow::Continue(())).unwrap();
        assert_eq!(damage.iter().filter_map(|d| d.expert).collect::<Vec<_>>(), drawn);
        assert_eq!(sample.n_tensors(&small.manifest), 2);
    }
}

#[test]
fn all_damage_is_listed_not_the_first() {
    let small = SmallBundle::new();
    let bank = small.dir.join("experts-00004.safetensors");
    let offsets: Vec<_> = Bank::open(&bank).unwrap().records().iter().map(|r| r.offset as usize).collect();
    for at in offsets {
        flip(&bank, at * 8);
    }
    std::fs::remove_file(small.dir.join("config.json")).unwrap();
    std::fs::write(small.dir.join("stray"), b"").unwrap();
    std::fs::write(small.dir.join(".hidden"), b"").unwrap();
    let trunk = small.dir.join("trunk-00001-of-00002.safetensors");
    std::fs::write(&trunk, &std::fs::read(&trunk).unwrap()[..100]).unwrap();
    let damage = full(&small.dir);
    let places: Vec<_> = damage.iter().map(|d| (d.file.as_str(), d.expert)).collect();
    let bank = "experts-00004.safetensors";
    let expected = [
        ("config.json", None),
        (bank, Some(0)),
        (bank, Some(1)),
        (bank, Some(2)),
        (bank, None),
        ("trunk-00001-of-00002.safetensors", None),
        ("trunk-00001-of-00002.safetensors", None),
        ("trunk-00001-of-00002.safetensors", None),
        ("stray", None),
    ];
    assert_eq!(places, expected, "{damage:#?}");
    assert!(damage[5].what.ends_with("has 100"));
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let small = SmallBundle::new();
    for file in &small.manifest.files {
        flip(&small.dir.join(&file.path), 77);
    }
    let by = |threads| {
        let options = CheckOptions { level: CheckLevel::Full, threads };
        check(&small.dir, options, &|_| ControlFlow::Continue(())).unwrap()
    };
    assert_eq!(by(1), by(7));
    assert_eq!(by(1), by(0));
}

#[test]
fn a_damaged_manifest_does_not_hide_other_damage() {
    let small = SmallBundle::new();
    let path = small.dir.join(MANIFEST);
    let text =
        std::fs::read_to_string(&path).unwrap().replace("\"version\": \"0.1.0\"", "\"version\": \"0.1.1\"");
    std::fs::write(&path, text).unwrap();
    std::fs::remove_file(small.dir.join("config.json")).unwrap();
    let files: Vec<_> = full(&small.dir).into_iter().map(|d| d.file).collect();
    assert_eq!(files, [MANIFEST, "config.json"]);
    std::fs::write(&path, b"{").unwrap();
    let damage = full(&small.dir);
    assert_eq!(damage.len(), 2, "the hash is missing and the text is cut: {damage:?}");
}

#[test]
fn a_version_that_is_not_ours_is_an_error_not_damage() {
    let small = SmallBundle::new();
    let path = small.dir.join(MANIFEST);
    std::fs::remove_file(&path).unwrap();
    let missing = check(&small.dir, FULL, &|_| ControlFlow::Continue(())).unwrap_err();
    assert_eq!(missing.kind(), Kind::Missing);
}

#[test]
fn sums_that_are_wrong_are_damage() {
    let small = SmallBundle::new();
    small.rewrite(|m| m.totals.bpw_total /= 2.0);
    let damage = quick(&small.dir);
    assert_eq!((damage.len(), damage[0].file.as_str()), (1, MANIFEST));
}

#[test]
fn a_check_can_be_watched_and_stopped() {
    let small = SmallBundle::new();
    let seen = AtomicU64::new(0);
    let watch = |p: CheckProgress| {
        assert_eq!(p.bytes_total, small.manifest.totals.bundle_bytes);
        seen.fetch_max(p.bytes_done, Ordering::Relaxed);
        ControlFlow::Continue(())
    };
    check(&small.dir, FULL, &watch).unwrap();
    assert_eq!(seen.into_inner(), small.manifest.totals.bundle_bytes);
    let e = check(&small.dir, FULL, &|_| ControlFlow::Break(())).unwrap_err();
    assert_eq!(e.kind(), Kind::Interrupted);
}

#[test]
fn damage_is_a_json_object() {
    let damage = damage_of(&Error::bad_data("x").at_byte(3), "f", Some(1));
    let json = serde_json::to_string(&damage).unwrap();
    assert_eq!(json, r#"{"file":"f","layer":1,"expert":null,"tensor":null,"byte":3,"end":null,"what":"x"}"#);
}
