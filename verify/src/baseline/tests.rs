//! Tests of baseline files: what they cost, what they bound, and what is refused.

use std::path::PathBuf;

use moepack_format::Kind;
use moepack_quant::Isa;
use proptest::prelude::*;

use super::row::{CODES_PER_NAT, NO_CODE, SAMPLES, SUM_TOLERANCE};
use super::*;
use crate::drift::{LogitDrift, WindowDrift, logits};

/// A generator with its seed in sight: PCG-XSH-RR 64/32 (O'Neill 2014).
struct Pcg(u64);

impl Pcg {
    fn uniform(&mut self) -> f64 {
        let old = self.0;
        self.0 = old.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mixed = (((old >> 18) ^ old) >> 27) as u32;
        (f64::from(mixed.rotate_right((old >> 59) as u32)) + 0.5) / 4_294_967_296.0
    }
    fn normal(&mut self) -> f32 {
        let (u, v) = (self.uniform(), self.uniform());
        ((-2.0 * libm::log(u)).sqrt() * libm::cos(std::f64::consts::TAU * v)) as f32
    }
    fn row(&mut self, vocab: usize, scale: f32) -> Vec<f32> {
        (0..vocab).map(|_| self.normal() * scale).collect()
    }
    fn noisy(&mut self, row: &[f32], noise: f32) -> Vec<f32> {
        row.iter().map(|l| l + self.normal() * noise).collect()
    }
}

fn encoded(format: RowFormat, logits: &[f32], target: u32, position: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    format.encode(Isa::get(), logits, target, position, &mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, format.bytes());
    bytes
}

fn row(format: RowFormat, logits: &[f32], target: u32, position: u64) -> Row {
    Row::decode(format, &encoded(format, logits, target, position)).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]
    #[test]
    fn the_truth_lies_between_the_bounds(
        seed: u64, vocab in 2_usize..400, scale in 0.0_f32..30.0, noise in 0.0_f32..4.0, top_k in 1_u32..64, samples in 0_u32..9,
    ) {
        let mut rng = Pcg(seed);
        let format = RowFormat { vocab: vocab as u32, top_k: top_k.min(vocab as u32), n_samples: samples };
        let reference = rng.row(vocab, scale);
        let bundle = rng.noisy(&reference, noise);
        let target = (seed % vocab as u64) as u32;
        let truth = logits::compare(Isa::get(), &reference, &bundle, target).unwrap();
        let (got, bound) = row(format, &reference, target, seed).compare(Isa::get(), &bundle, target).unwrap();
        prop_assert!(got.kld >= 0.0 && bound.rounding >= 0.0);
        prop_assert!(got.kld - bound.rounding <= truth.kld + 1e-12, "{} - {} > {}", got.kld, bound.rounding, truth.kld);
        prop_assert!(truth.kld <= bound.upper + 1e-12, "{} > {}", truth.kld, bound.upper);
        prop_assert!(bound.estimate >= got.kld);
        prop_assert_eq!((got.top1, got.nll_bundle), (truth.top1, truth.nll_bundle));
        prop_assert!((got.nll_reference - truth.nll_reference).abs() <= truth.nll_reference * 1e-7);
    }
}

#[test]
fn the_upper_bound_is_reached_by_the_worst_tail() {
    // p = (0.5, 0.25, 0.25, 0): one token kept, and the tail is a corner, where the bundle expects least.
    let reference = [4.0_f32.ln() * 0.5, 0.0, 0.0, -60.0];
    let bundle = [0.0_f32, -2.0, -2.0, 1.0];
    let format = RowFormat { vocab: 4, top_k: 2, n_samples: 0 };
    let truth = logits::compare(Isa::get(), &reference, &bundle, 0).unwrap().kld;
    let (_, bound) = row(format, &reference, 0, 0).compare(Isa::get(), &bundle, 0).unwrap();
    assert!(truth <= bound.upper && bound.upper < truth * 1.001, "{truth} {}", bound.upper);
}

#[test]
fn a_bundle_that_changes_nothing_has_no_drift_to_speak_of() {
    let mut rng = Pcg(7);
    let format = RowFormat::for_vocab(2048).unwrap();
    for position in 0..200 {
        let logits = rng.row(2048, 3.0);
        let (p, bound) = row(format, &logits, 5, position).compare(Isa::get(), &logits, 5).unwrap();
        assert!(p.kld < 3e-8 && bound.estimate < 3e-8 && bound.rounding < 3e-7, "{p:?} {bound:?}");
        assert!(p.top1);
    }
}

/// True, coarse and estimated KLD over many positions, as means, and the coarse one's rounding.
fn means(scale: f32, noise: f32) -> (f64, f64, f64, f64) {
    let (mut rng, n) = (Pcg(11), 2000);
    let format = RowFormat::for_vocab(2048).unwrap();
    let (mut truth, mut window) = (0.0, WindowDrift::default());
    for position in 0..n {
        let reference = rng.row(2048, scale);
        let bundle = rng.noisy(&reference, noise);
        truth += logits::compare(Isa::get(), &reference, &bundle, 0).unwrap().kld / n as f64;
        window.add_row(Isa::get(), &row(format, &reference, 0, position), &bundle, 0).unwrap();
    }
    let summary = LogitDrift { windows: vec![window] }.summary();
    let tail = summary.tail.unwrap();
    assert!(tail.lower <= truth && truth <= tail.upper);
    println!("true {truth:.5}, coarse {:.5}, estimate {:?}, {tail:?}", summary.kld_mean.value, tail.estimate);
    (truth, summary.kld_mean.value, tail.estimate.value, tail.tail_mass)
}

#[test]
fn the_estimate_has_no_bias() {
    for (scale, noise) in [(2.5, 0.1), (2.5, 0.5), (1.5, 0.2)] {
        let (truth, coarse, estimate, tail_mass) = means(scale, noise);
        assert!(coarse < 0.95 * truth, "{tail_mass} of tail hides something: {coarse} of {truth}");
        assert!((estimate / truth - 1.0).abs() < 0.02, "{estimate}, but {truth}");
    }
}

#[test]
fn a_file_takes_at_most_five_percent_of_f16_logits() {
    let meta = Meta { model: "m".repeat(64), config_sha256: "0".repeat(64), ..example_meta() };
    let meta_bytes = serde_json::to_vec(&meta).unwrap().len() as u64;
    for vocab in (2048..4200).chain([16_384, 32_000, 65_536, 65_537, 129_280, 151_936, 262_144]) {
        let format = RowFormat::for_vocab(vocab).unwrap();
        for (n_windows, len) in [(64, 2), (1, 65), (1, 256), (462, 256)] {
            let layout = Layout::sizes(format, n_windows, n_windows * len, meta_bytes).unwrap();
            let full = n_windows * (len - 1) * vocab as u64 * 2;
            let share = layout.file_bytes as f64 / full as f64;
            assert!(share <= 0.05, "vocab {vocab}, {n_windows} windows of {len}: {share}");
        }
    }
}

fn example_meta() -> Meta {
    Meta { tool: "moepack 0.1.0".into(), model: "tiny".into(), family: "olmoe".into(), ..Meta::default() }
}

/// Windows, and the logits of each scored position with its target.
fn example(vocab: usize) -> (Windows, Vec<(Vec<f32>, u32)>) {
    let windows = Windows { tokens: vec![1, 2, 3, 0, 3], lens: vec![3, 2] };
    let mut rng = Pcg(3);
    let rows = [2, 3, 3].map(|target| (rng.row(vocab, 3.0), target)).to_vec();
    (windows, rows)
}

fn written(vocab: usize) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base");
    let (windows, rows) = example(vocab);
    let mut writer = BaselineWriter::create(&path, &example_meta(), &windows, vocab).unwrap();
    let format = writer.row_format();
    let bytes: Vec<Vec<u8>> = rows.iter().zip(0..).map(|((l, t), i)| encoded(format, l, *t, i)).collect();
    writer.push_window(&bytes[..2].concat()).unwrap();
    writer.push_window(&bytes[2]).unwrap();
    let n_bytes = writer.finish().unwrap();
    assert_eq!(n_bytes, std::fs::metadata(&path).unwrap().len());
    (dir, path)
}

#[test]
fn what_is_written_is_read() {
    for vocab in [4, 100, 70_000] {
        let (_dir, path) = written(vocab);
        assert!(Baseline::is_baseline(&path));
        let baseline = Baseline::open(&path).unwrap();
        let (windows, rows) = example(vocab);
        assert_eq!(
            (baseline.meta(), baseline.windows(), baseline.vocab()),
            (&example_meta(), &windows, vocab)
        );
        let format = baseline.row_format();
        let expected: Vec<Row> = rows.iter().zip(0..).map(|((l, t), i)| row(format, l, *t, i)).collect();
        assert_eq!([baseline.rows(0).unwrap(), baseline.rows(1).unwrap()].concat(), expected);
        assert_eq!(baseline.rows(2).unwrap_err().kind(), Kind::Usage);
        assert_eq!(baseline.check_vocab(vocab), Ok(()));
        assert_eq!(baseline.check_vocab(vocab + 1).unwrap_err().kind(), Kind::BadData);
    }
}

#[test]
fn all_levels_write_the_same_bytes() {
    let logits = Pcg(5).row(5000, 4.0);
    let format = RowFormat::for_vocab(5000).unwrap();
    let bytes = |isa| {
        let mut out = Vec::new();
        format.encode(isa, &logits, 17, 1, &mut out).unwrap();
        out
    };
    for isa in Isa::available() {
        assert_eq!(bytes(isa), bytes(Isa::SCALAR), "{}", isa.name());
    }
}

#[test]
fn unlikely_tokens_leave_slots_empty() {
    let format = RowFormat::for_vocab(100).unwrap();
    let mut logits = vec![-40.0; 100];
    logits[7] = 9.0;
    let row = row(format, &logits, 7, 0);
    assert_eq!((row.top.len(), row.has_empty_slots, row.samples.len()), (1, true, SAMPLES as usize));
    let mut bundle = logits.clone();
    bundle[8] = 8.0;
    let truth = logits::compare(Isa::get(), &logits, &bundle, 7).unwrap();
    let (got, bound) = row.compare(Isa::get(), &bundle, 7).unwrap();
    assert!(got.kld - bound.rounding <= truth.kld && truth.kld <= bound.upper);
}

#[test]
fn an_infinite_nll_is_no_baseline() {
    let format = RowFormat::for_vocab(3).unwrap();
    for logits in [[0.0, f32::NAN, 1.0], [0.0, f32::NEG_INFINITY, 1.0], [0.0, 1.0, f32::INFINITY]] {
        let error = format.encode(Isa::get(), &logits, 1, 0, &mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), Kind::BadData);
    }
}

#[test]
fn a_baseline_of_another_model_is_refused() {
    let format = RowFormat::for_vocab(100).unwrap();
    let row = row(format, &Pcg(1).row(100, 1.0), 3, 0);
    assert!(row.compare(Isa::get(), &[0.0; 50], 3).is_err());
}

#[test]
fn nan_in_the_bundle_is_not_hidden() {
    let format = RowFormat::for_vocab(100).unwrap();
    let row = row(format, &Pcg(1).row(100, 1.0), 3, 0);
    let mut bundle = vec![0.0; 100];
    bundle[50] = f32::NAN;
    let (p, bound) = row.compare(Isa::get(), &bundle, 3).unwrap();
    assert!(p.kld.is_nan() && bound.estimate.is_nan() && bound.upper.is_nan());
}

/// Opens a file with these bytes and reads all of it.
fn read_all(bytes: &[u8]) -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base");
    std::fs::write(&path, bytes).unwrap();
    let baseline = Baseline::open(&path)?;
    (0..baseline.windows().n_windows()).try_for_each(|w| baseline.rows(w).map(|_| ()))
}

#[test]
fn every_flipped_bit_is_found() {
    let (_dir, path) = written(4);
    let good = std::fs::read(path).unwrap();
    read_all(&good).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        let error = read_all(&bad).expect_err(&format!("byte {at}"));
        assert_eq!(error.kind(), Kind::BadData, "byte {at}");
    }
}

#[test]
fn every_truncation_and_a_tail_are_found() {
    let (_dir, path) = written(4);
    let mut bytes = std::fs::read(path).unwrap();
    for len in 0..bytes.len() {
        assert_eq!(read_all(&bytes[..len]).unwrap_err().kind(), Kind::BadData, "{len}");
    }
    bytes.push(0);
    assert!(read_all(&bytes).unwrap_err().what().contains("the header says"));
}

/// The good file with `patch` at `at`, and a digest that fits: a forger can compute one too.
fn forged(at: usize, patch: &[u8]) -> Vec<u8> {
    let (_dir, path) = written(100);
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at..at + patch.len()].copy_from_slice(patch);
    let end = bytes.len() - DIGEST_BYTES as usize;
    let digest = Sha256::digest(&bytes[..end]);
    bytes[end..].copy_from_slice(&digest);
    bytes
}

#[test]
fn every_forgery_gets_its_own_message() {
    let layout = {
        let (_dir, path) = written(100);
        Baseline::open(&path).unwrap().layout
    };
    let row0 = layout.rows_offset as usize;
    let (k, s) = (32, SAMPLES as usize);
    let (codes, sample_ids, sample_logs) = (row0 + 8 + 2 * k, row0 + 8 + 4 * k, row0 + 8 + 4 * k + 2 * s);
    let big = u64::MAX.to_le_bytes();
    let cases: [(usize, &[u8], &str, usize); 26] = [
        (0, b"safetens", "begins with \"safetens\"", 0),
        (8, &[2], "baseline version 2", 8),
        (12, &[0, 0], "vocab is 0", 12),
        (12, &[0, 0, 0, 255], "vocab is 4278190080", 12),
        (16, &[0], "top_k is 0, allowed is 1 to 100", 16),
        (16, &[101], "top_k is 101, allowed is 1 to 100", 16),
        (20, &[1, 1], "n_samples is 257", 20),
        (24, &[0], "n_windows is 0", 24),
        (24, &big, "n_windows is 18446744073709551615, allowed is 1 to 2", 24),
        (32, &big, "n_tokens is 18446744073709551615", 32),
        (40, &big, "meta_bytes is 18446744073709551615", 40),
        (48, &big, "file_bytes is 18446744073709551615", 48),
        (56, &[1], "the reserved field is 1", 56),
        (HEADER_BYTES as usize, b"[", "meta block", HEADER_BYTES as usize),
        (layout.lens_offset as usize, &[1], "window 0 has 1 tokens, 5 are left", layout.lens_offset as usize),
        (layout.lens_offset as usize, &[2], "1 tokens of 5 are in no window", layout.lens_offset as usize),
        (
            layout.tokens_offset as usize,
            &[200],
            "token id 200 in window 0, index 0",
            layout.tokens_offset as usize,
        ),
        (row0, &f32::NAN.to_le_bytes(), "an NLL of NaN", row0),
        (row0, &(-1.0_f32).to_le_bytes(), "an NLL of -1", row0),
        (row0 + 4, &2.0_f32.to_le_bytes(), "a tail mass of 2", row0 + 4),
        (row0 + 4, &0.9_f32.to_le_bytes(), "probabilities that add up to", row0 + 4),
        (row0 + 10, &[255], "token id 255, the vocabulary has 100", row0 + 10),
        (codes + 2, &[0, 0], "code 0 of token id", codes + 2),
        (codes + 2 * (k - 1), &[255, 255], "code 65535 of token id", codes + 2 * (k - 1)),
        (sample_ids, &[255], "sampled token id 255", sample_ids),
        (sample_logs, &f32::NAN.to_le_bytes(), "with ln p NaN", sample_ids),
    ];
    for (at, patch, message, offset) in cases {
        let error = read_all(&forged(at, patch)).expect_err(message);
        assert!(error.what().contains(message), "{:?} lacks {message:?}", error.what());
        assert_eq!((error.kind(), error.byte()), (Kind::BadData, Some(offset as u64)), "{message}");
        assert!(error.file().is_some(), "{message}");
    }
}

#[test]
fn a_token_is_kept_or_sampled_and_once() {
    let format = RowFormat::for_vocab(100).unwrap();
    let good = encoded(format, &Pcg(9).row(100, 1.0), 3, 0);
    let first = good[8..10].to_vec();
    let mut twice = good.clone();
    twice[10..12].copy_from_slice(&first);
    assert!(Row::decode(format, &twice).unwrap_err().what().ends_with("twice"));
    let mut both = good.clone();
    both[8 + 32 * 4..][..2].copy_from_slice(&first);
    assert!(Row::decode(format, &both).unwrap_err().what().ends_with("both kept and sampled from the tail"));
    assert!(Row::decode(format, &good[1..]).is_err());
}

#[test]
fn any_bytes_are_a_row_or_an_error() {
    let mut rng = Pcg(1);
    let format = RowFormat { vocab: 300, top_k: 3, n_samples: 2 };
    for _ in 0..20_000 {
        let bytes: Vec<u8> = (0..format.bytes()).map(|_| (rng.uniform() * 256.0) as u8).collect();
        if let Ok(row) = Row::decode(format, &bytes) {
            row.compare(Isa::get(), &[0.0; 300], 0).unwrap();
        }
    }
}

#[test]
fn a_writer_that_is_given_something_else_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base");
    let (windows, _) = example(4);
    let create = || BaselineWriter::create(&path, &example_meta(), &windows, 4);
    assert_eq!(create().unwrap().finish().unwrap_err().what(), "2 windows of the baseline were not written");
    assert!(create().unwrap().push_window(&[0; 3]).is_err());
    let bad_len = Windows { tokens: vec![1, 2], lens: vec![1, 1] };
    assert!(BaselineWriter::create(&path, &example_meta(), &bad_len, 4).is_err());
    assert!(BaselineWriter::create(&path, &example_meta(), &windows, 3).is_err());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

const DOC: &str = include_str!("../../BASELINE.md");

#[test]
fn the_document_has_our_numbers() {
    let rows = [
        ("version", VERSION.to_string()),
        ("magic", String::from_utf8(MAGIC.to_vec()).unwrap()),
        ("header", format!("{HEADER_BYTES} bytes")),
        ("digest", format!("{DIGEST_BYTES} bytes")),
        ("vocab", format!("1 to {VOCAB_MAX}")),
        ("top_k", format!("1 to {TOP_K_MAX}")),
        ("n_samples", format!("0 to {SAMPLES_MAX}, written {SAMPLES}")),
        ("n_tokens", format!("{WINDOW_TOKENS_MIN} to {TOKENS_MAX}")),
        ("window length", format!("{WINDOW_TOKENS_MIN} to {WINDOW_TOKENS_MAX}")),
        ("meta_bytes", format!("2 to {META_BYTES_MAX}")),
        ("codes per nat", CODES_PER_NAT.to_string()),
        ("empty slot", NO_CODE.to_string()),
        ("sum tolerance", SUM_TOLERANCE.to_string()),
    ];
    for (name, value) in rows {
        let row = format!("| {name} | {value} |");
        assert!(DOC.contains(&row), "BASELINE.md lacks {row}");
    }
    for (vocab, bytes) in [(2048, 184), (32_000, 1080), (151_936, 1608)] {
        let format = RowFormat::for_vocab(vocab).unwrap();
        assert_eq!(format.bytes(), bytes);
        let row = format!("| {vocab} | {} | {bytes} |", format.top_k);
        assert!(DOC.contains(&row), "BASELINE.md lacks {row}");
    }
}

#[test]
fn the_document_has_a_real_dump() {
    let (_dir, path) = written(4);
    let bytes = std::fs::read(path).unwrap();
    let line = |(i, chunk): (usize, &[u8])| {
        let hex = chunk.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
        let text: String =
            chunk.iter().map(|&b| if (32..127).contains(&b) { char::from(b) } else { '.' }).collect();
        format!("{:04x}  {hex:<47}  {text}", i * 16)
    };
    let dump: Vec<String> = bytes.chunks(16).enumerate().map(line).collect();
    assert!(DOC.contains(&dump.join("\n")), "the dump is\n{}", dump.join("\n"));
}
