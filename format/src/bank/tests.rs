//! Banks that go round, banks that stock readers open, and banks that contradict themselves.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use proptest::prelude::*;

use super::*;
use crate::InputFile;
use crate::aligned::AlignedBuf;
use crate::dtype::Dtype;
use crate::error::Kind;
use crate::index::{ROW_BYTES, RecordEntry};
use crate::layout::TENSOR_ALIGN;
use crate::safetensors::Header;

/// The planes of one part: name and bytes.
type Planes = Vec<(String, Vec<u8>)>;

/// An expert as a test states it: codec and planes of each part.
type Expert = Vec<(String, Planes)>;

const PARTS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

fn write(path: &Path, align: u64, experts: &[Expert], hint: usize) -> BankSummary {
    let mut w = BankWriter::create(path, 7, experts.len() as u32, align, hint).unwrap();
    for (e, expert) in experts.iter().enumerate() {
        let part = |(i, (codec, planes)): (usize, &'_ (String, Planes))| {
            let spec = PartSpec { name: PARTS[i].to_owned(), codec: codec.clone(), rows: 4, cols: 8 };
            let plane =
                |(name, bytes): &(String, Vec<u8>)| PlaneSpec::new(name, Dtype::U8, &[bytes.len() as u64]);
            (spec, planes.iter().map(|p| (plane(p), p.1.clone())).collect::<Vec<_>>())
        };
        let owned: Vec<_> = expert.iter().enumerate().map(part).collect();
        let parts: Vec<_> = owned
            .iter()
            .map(|(spec, planes)| PartBytes {
                spec: spec.clone(),
                planes: planes.iter().map(|(s, b)| (s.clone(), b.as_slice())).collect(),
            })
            .collect();
        w.write_expert(e as u32, &parts).unwrap();
    }
    w.finish().unwrap()
}

/// Two experts of two parts whose planes all have different odd lengths.
fn small() -> Vec<Expert> {
    let plane = |name: &str, n: usize| (name.to_owned(), (0..n).map(|i| (i * 7 + n) as u8).collect());
    (0..2)
        .map(|e| {
            let codec = |p: usize| format!("int{}-g64", 3 + p + e);
            (0..2).map(|p| (codec(p), vec![plane("codes", 300 + e), plane("scales", 17 + p)])).collect()
        })
        .collect()
}

fn n_planes(experts: &[Expert]) -> usize {
    experts.iter().flatten().map(|(_, planes)| planes.len()).sum()
}

/// Every plane of every expert is what was written, through both ways of reading.
fn check_content(bank: &Bank, experts: &[Expert]) {
    for (e, expert) in experts.iter().enumerate() {
        for direct in [false, true] {
            let options = ReadOptions { verify: true, direct };
            let record = bank.read_into(e as u32, options, AlignedBuf::default()).unwrap();
            assert_eq!(record.parts().count(), expert.len());
            for (view, (codec, planes)) in record.parts().zip(expert) {
                assert_eq!((&view.spec.codec, view.infos.len()), (codec, planes.len()));
                for ((bytes, info), (name, expected)) in view.planes.iter().zip(view.infos).zip(planes) {
                    assert_eq!(&info.spec.name, name);
                    assert_eq!(bytes, expected);
                    assert_eq!(bytes.as_ptr() as u64 % TENSOR_ALIGN, 0, "planes are aligned in memory too");
                }
            }
        }
    }
}

#[test]
fn goes_round_and_opens_in_the_stock_reader() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(bank_name(7));
    let experts = small();
    let summary = write(&path, ALIGN_DEFAULT, &experts, n_planes(&experts));
    let bank = Bank::open(&path).unwrap();
    assert_eq!((bank.layer(), bank.n_experts(), bank.align()), (7, 2, ALIGN_DEFAULT));
    assert_eq!(bank.codecs(), ["int3-g64", "int4-g64", "int5-g64"]);
    assert_eq!(bank.stride(), Some(16384));
    check_content(&bank, &experts);

    let bytes = std::fs::read(&path).unwrap();
    let stock = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for (e, expert) in experts.iter().enumerate() {
        for (part, (_, planes)) in PARTS.iter().zip(expert) {
            for (name, expected) in planes {
                let name = format!("layers.7.experts.{e}.{part}.{name}");
                assert_eq!(stock.tensor(&name).unwrap().data(), expected);
            }
        }
    }
    assert_eq!(summary.bytes, bytes.len() as u64);
    assert_eq!(summary.sha256, bank.file().sha256(&|| false).unwrap());
    assert_eq!(summary.payload_bytes, 2 * (300 + 301 + 17 + 18));
    let pads: u64 = bank.pads().iter().map(|(start, end)| end - start).sum();
    assert_eq!((summary.padding_bytes, summary.stride), (pads, Some(16384)));
    for &(start, end) in bank.pads() {
        assert!(bytes[start as usize..end as usize].iter().all(|&b| b == 0));
    }
}

#[test]
fn a_wrong_hint_changes_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let experts = small();
    let bytes = [0, n_planes(&experts), 1000].map(|hint| {
        let path = dir.path().join(bank_name(7));
        let summary = write(&path, 4096, &experts, hint);
        check_content(&Bank::open(&path).unwrap(), &experts);
        assert_eq!(summary.sha256, InputFile::open(&path).unwrap().sha256(&|| false).unwrap());
        std::fs::read(&path).unwrap()
    });
    assert_eq!(bytes[0], bytes[1]);
    assert_eq!(bytes[0], bytes[2]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing but the bank is left");
}

#[test]
fn a_header_of_long_names_moves_the_records() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(bank_name(7));
    let plane = |i: usize| (format!("{}{i:02}", "n".repeat(62)), vec![i as u8; 5]);
    let experts: Vec<Expert> =
        (0..40).map(|_| vec![("bf16".to_owned(), (0..32).map(plane).collect())]).collect();
    write(&path, 4096, &experts, n_planes(&experts));
    let bank = Bank::open(&path).unwrap();
    check_content(&bank, &experts);
    assert!(Header::read(bank.file()).unwrap().data_offset > 8 + 4096 + 256 * 40 * 32);
}

#[test]
fn a_flipped_bit_names_layer_and_expert() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(bank_name(7));
    write(&path, 4096, &small(), 8);
    let offset = Bank::open(&path).unwrap().record(1).unwrap().offset;
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[offset as usize + 3] ^= 4;
    std::fs::write(&path, bytes).unwrap();
    let bank = Bank::open(&path).unwrap();
    assert!(bank.read(0, true).is_ok() && bank.read(1, false).is_ok());
    let e = bank.read(1, true).unwrap_err();
    assert!(e.what().starts_with("layer 7 expert 1: crc32c is "), "{e}");
    assert_eq!((e.kind(), e.tensor(), e.byte()), (Kind::BadData, Some("layers.7.experts.1"), Some(offset)));
    assert_eq!(e.file(), Some(path.as_path()));
    assert_eq!(bank.read(2, true).unwrap_err().what(), "layer 7 has 2 experts, no expert 2");
}

#[test]
fn the_writer_refuses_what_does_not_fit_together() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b");
    let spec = |name: &str, rows| PartSpec { name: name.to_owned(), codec: "bf16".to_owned(), rows, cols: 1 };
    let part = |name: &str, rows, n: u64, bytes: &'static [u8]| PartBytes {
        spec: spec(name, rows),
        planes: vec![(PlaneSpec::new("weight", Dtype::U8, &[n]), bytes)],
    };
    let mut w = BankWriter::create(&path, 0, 2, 4096, 4).unwrap();
    let mut refuse = |expert, parts: &[PartBytes], what: &str| {
        let e = w.write_expert(expert, parts).unwrap_err();
        assert!(e.what().starts_with(what), "{e}");
    };
    refuse(1, &[part("a", 1, 2, b"xy")], "expert 1 is written, expected 0 of 2");
    refuse(0, &[], "0 parts of an expert, expected 1 to 8");
    refuse(0, &[part("a.b", 1, 2, b"xy")], r#"name "a.b", expected 1 to 64 letters"#);
    refuse(0, &[part("a", 1, 3, b"xy")], "2 bytes of a.weight, but shape [3] of U8 takes 3");
    refuse(0, &[part("a", 1, 0, b"")], "0 bytes of a.weight");
    refuse(0, &[part("a", 1, 2, b"xy"), part("a", 1, 2, b"xy")], r#"part "a" is listed twice"#);
    w.write_expert(0, &[part("a", 1, 2, b"xy")]).unwrap();
    let e = w.write_expert(1, &[part("a", 2, 2, b"xy")]).unwrap_err();
    assert!(e.what().contains("but expert 0 has"), "{e}");
    assert_eq!(w.finish().unwrap_err().what(), "1 experts were written, expected 2");
    let e = BankWriter::create(&path, 0, 2, 5000, 4).unwrap_err();
    assert_eq!(e.what(), "align 5000, expected a power of two from 4096 to 2097152");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn bank_names_go_back_and_forth() {
    assert_eq!(bank_name(3), "experts-00003.safetensors");
    assert!(is_bank_name("experts-00003.safetensors") && is_bank_name("experts-123456.safetensors"));
    assert!(!is_bank_name("experts-3.safetensors") && !is_bank_name("experts-0000x.safetensors"));
}

/// A small bank, an edit of its bytes, and the message that refuses it.
struct Broken {
    _dir: tempfile::TempDir,
    path: PathBuf,
    bytes: Vec<u8>,
    index: usize,
}

impl Broken {
    fn new() -> Broken {
        // Written once: hundreds of cases start from it, and each write waits for the disk.
        static WHOLE: OnceLock<(Vec<u8>, usize)> = OnceLock::new();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(bank_name(7));
        let (bytes, index) = WHOLE.get_or_init(|| {
            write(&path, 4096, &small(), 8);
            let header = Header::read(&InputFile::open(&path).unwrap()).unwrap();
            (std::fs::read(&path).unwrap(), header.data_offset as usize)
        });
        Broken { _dir: dir, path, bytes: bytes.clone(), index: *index }
    }

    /// Changes the row of an expert.
    fn row(mut self, expert: usize, change: impl FnOnce(&mut RecordEntry)) -> Broken {
        let at = self.index + expert * ROW_BYTES;
        let row: &mut [u8] = &mut self.bytes[at..at + ROW_BYTES];
        let mut entry = RecordEntry::decode(&(*row).try_into().unwrap()).unwrap();
        change(&mut entry);
        row.copy_from_slice(&entry.encode());
        self
    }

    /// Replaces a text in the header by one of the same length.
    fn text(mut self, from: &str, to: &str) -> Broken {
        assert_eq!(from.len(), to.len());
        let at = self.bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        self.bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        self
    }

    #[track_caller]
    fn refused(self, what: &str) {
        std::fs::write(&self.path, &self.bytes).unwrap();
        let e = Bank::open(&self.path).unwrap_err();
        assert!(e.what().starts_with(what), "{e}\nexpected {what}");
        assert_eq!((e.kind(), e.file()), (Kind::BadData, Some(self.path.as_path())));
    }
}

#[test]
fn an_index_that_contradicts_the_file() {
    let broken = Broken::new;
    broken().row(0, |r| r.layer = 8).refused("row 0 is about layer 8 expert 0, expected layer 7 expert 0");
    broken().row(1, |r| r.expert = 0).refused("row 1 is about layer 7 expert 0, expected layer 7 expert 1");
    broken().row(1, |r| r.n_parts = 3).refused("expert 1 has 3 parts, expected 2");
    broken().row(1, |r| r.codec_ids[1] = 3).refused("expert 1 has codec id 3, but there are 3 codecs");
    broken().row(1, |r| r.codec_ids[2] = 1).refused("reserved bytes of an index row are not zero");
    broken().row(1, |r| r.offset += 1).refused("expert 1 starts at byte 16385, expected a multiple of 4096");
    broken()
        .row(1, |r| r.offset -= 4096)
        .refused("expert 1 starts at byte 12288, inside what ends at byte 16384");
    broken().row(1, |r| r.offset += 4096).refused("expert 1 starts at byte 20480, expected byte 16384");
    broken().row(1, |r| r.offset = !4095).refused("expert 1 starts at byte 18446744073709547520");
    broken().row(1, |r| r.bytes = 0).refused("expert 1 has 0 bytes padded to 4096");
    broken().row(1, |r| r.bytes = u64::MAX).refused("expert 1 has 18446744073709551615 bytes");
    broken().row(1, |r| r.padded_bytes = 8192).refused("expert 1 has 1298 bytes padded to 8192");
    broken()
        .row(1, |r| (r.bytes, r.padded_bytes) = (5000, 8192))
        .refused("expert 1 has 8192 bytes at byte 16384");
    broken().row(1, |r| r.bytes -= 1).refused("bytes 17664 to 17682 of a record from 16384 to 17681");
    broken().row(1, |r| r.bytes += 1).refused("the last plane ends at byte 17682, the record at byte 17683");
}

#[test]
fn a_header_that_contradicts_the_index() {
    let broken = Broken::new;
    broken().text("\"moepack.bank\"", "\"moepack.bonk\"").refused(r#"format "moepack.bonk", expected"#);
    broken().text("\"1.0\"", "\"2.0\"").refused(r#"format version "2.0", this moepack reads "1.0""#);
    broken()
        .text("\"4096\"", "\"8192\"")
        .refused("expert 0 starts at byte 12288, expected a multiple of 8192");
    broken().text("\"4096\"", "\"4095\"").refused("align 4095, expected a power of two");
    broken().text("\"4096\"", "\"+4K!\"").refused(r#"align is "+4K!", expected a whole number"#);
    broken().text("\"layer\":\"7\"", "\"layer\":\"8\"").refused("row 0 is about layer 7");
    broken()
        .text("\"n_experts\":\"2\"", "\"n_experts\":\"3\"")
        .refused("the index is U8 [2, 64], expected U8 [3, 64]");
    broken().text("\"n_experts\":\"2\"", "\"n_experts\":\"0\"").refused("0 experts, expected 1 to 65536");
    broken().text("__index__", "__ondex__").refused("the first tensor is not __index__");
    broken().text("__pad__.1", "__pad__.9").refused("a pad of U8 [212], expected __pad__.1");
    broken()
        .text("experts.1.gate_proj.codes", "experts.0.gate_proj.zodes")
        .refused("tensor \"layers.7.experts.0");
    broken().text("experts.0.up_proj.codes", "experts.0.up_proj.co.es").refused(r#"name "co.es""#);
    broken().text("\\\"rows\\\"", "\\\"rewz\\\"").refused("parts: unknown field `rewz`");
}

#[test]
fn a_bank_cut_short_says_so() {
    let mut broken = Broken::new();
    broken.bytes.truncate(20000);
    broken.refused("needs 20480 bytes, has 20000");
}

#[test]
fn equal_experts_share_their_description() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(bank_name(7));
    let expert: Expert = vec![("bf16".to_owned(), vec![("weight".to_owned(), vec![1; 64])])];
    write(&path, 4096, &[expert.clone(), expert.clone(), expert], 3);
    let bank = Bank::open(&path).unwrap();
    assert!(std::ptr::eq(bank.parts(0).unwrap(), bank.parts(2).unwrap()));
}

fn experts() -> impl Strategy<Value = Vec<Expert>> {
    let bytes = prop_oneof![
        proptest::collection::vec(any::<u8>(), 1..700),
        proptest::collection::vec(any::<u8>(), 4090..4100),
        Just(vec![5; 256]),
        Just(vec![9; 20_000]),
    ];
    let planes = proptest::collection::vec(bytes, 1..4)
        .prop_map(|all| all.into_iter().enumerate().map(|(i, b)| (format!("p{i}"), b)).collect::<Planes>());
    let part = ("(bf16|int4-g64|mxfp4)", planes);
    (1..=3usize).prop_flat_map(move |n| {
        let expert = proptest::collection::vec(part.clone(), n);
        proptest::collection::vec(expert, 1..6)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn banks_of_any_sizes_go_round(experts in experts(), align in prop_oneof![Just(4096u64), Just(16384)], hint in 0..80usize) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(bank_name(7));
        let summary = write(&path, align, &experts, hint);
        let bank = Bank::open(&path).unwrap();
        check_content(&bank, &experts);
        let bytes = std::fs::read(&path).unwrap();
        let stock = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        prop_assert!(stock.len() > n_planes(&experts));
        prop_assert!(bank.records().iter().all(|r| r.offset % align == 0 && r.padded_bytes % align == 0));
        prop_assert_eq!(bank.stride(), summary.stride);
        prop_assert_eq!(bank.max_record_bytes(), summary.max_record_bytes);
        prop_assert_eq!(bank.payload_bytes(), summary.payload_bytes);
        let header_bytes = Header::read(bank.file()).unwrap().data_offset;
        let index_bytes = ROW_BYTES as u64 * experts.len() as u64;
        prop_assert_eq!(summary.bytes, header_bytes + index_bytes + summary.payload_bytes + summary.padding_bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// A bank with a few bytes changed opens and reads, or says what is wrong, but never panics.
    #[test]
    fn no_edit_makes_a_reader_panic(
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
        digits in any::<bool>(),
        cut in 0..3usize,
    ) {
        let mut broken = Broken::new();
        // Header text and index are where edits bite.
        let n = broken.bytes.iter().rposition(|&b| b == b'}').unwrap() + 1;
        let index = broken.index..broken.index + 2 * ROW_BYTES;
        let places: Vec<usize> = if digits {
            (8..n).filter(|&i| broken.bytes[i].is_ascii_digit()).collect()
        } else {
            (0..n).chain(index).collect()
        };
        for (place, value) in edits {
            broken.bytes[places[place.index(places.len())]] = if digits { b'0' + value % 10 } else { value };
        }
        let len = broken.bytes.len() - cut * cut;
        std::fs::write(&broken.path, &broken.bytes[..len]).unwrap();
        match Bank::open(&broken.path) {
            Ok(bank) => {
                for e in 0..bank.n_experts() {
                    let record = bank.read(e, false).unwrap();
                    prop_assert!(record.parts().all(|p| p.planes.iter().all(|b| !b.is_empty())));
                }
            }
            Err(e) => prop_assert!(matches!(e.kind(), Kind::BadData | Kind::Missing), "{}", e),
        }
    }
}
