//! A bit flipped anywhere in a bundle is found, named and turned back; so is what is cut off or gone.
//!
//! `FLIPS=2000 cargo test --release -p moepack --test it repair` flips so many bits in each bundle.

use std::fs;
use std::path::{Path, PathBuf};

use moepack_format::{Bank, TrunkFile, is_pad};
use serde_json::Value;

use crate::support::{Run, contents, fixture, moepack, succeeds, text};

/// Bits flipped in each bundle where `FLIPS` does not say.
const FLIPS: usize = 24;

/// A bundle, and how it is repaired.
struct Bundle {
    work: tempfile::TempDir,
    repair: Vec<String>,
}

/// A number like any other, the same in each run (the output function of SplitMix64).
fn mix(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Bundle {
    /// Of a fixture, by these options; `calibrated` by a text, which repairing takes too.
    fn of(model: &str, options: &[&str], calibrated: bool) -> Bundle {
        let work = tempfile::tempdir().unwrap();
        let checkpoint = fixture(model).display().to_string();
        let mut quantize = vec!["quantize", &checkpoint, "-o", "q"];
        quantize.extend(options);
        let mut repair = vec!["check", "q", "--json", "--repair", &checkpoint];
        if calibrated {
            text(work.path(), "calibration.txt", 6000);
            let by = ["--calibrate", "calibration.txt", "--ctx", "64"];
            quantize.extend(by);
            repair.extend(by);
        }
        succeeds(work.path(), &quantize);
        let repair = repair.into_iter().map(str::to_owned).collect();
        Bundle { work, repair }
    }

    fn dir(&self) -> PathBuf {
        self.work.path().join("q")
    }

    fn check(&self) -> (Run, Value) {
        let run = moepack(self.work.path(), &["check", "q", "--json"]);
        let found =
            serde_json::from_str(&run.stdout).unwrap_or_else(|e| panic!("{e} {}{}", run.stdout, run.stderr));
        (run, found)
    }

    /// Repairs, and the bundle is as it was.
    #[track_caller]
    fn mends(&self, good: &std::collections::BTreeMap<PathBuf, Vec<u8>>, what: &str) -> Value {
        let run = moepack(self.work.path(), &self.repair);
        assert_eq!(run.code, Some(0), "{what}: {}{}", run.stdout, run.stderr);
        let now = contents(&self.dir());
        assert_eq!(now.keys().collect::<Vec<_>>(), good.keys().collect::<Vec<_>>(), "{what}: other files");
        for (path, bytes) in good {
            assert!(now[path] == *bytes, "{what}: {} is not as it was", path.display());
        }
        serde_json::from_str(&run.stdout).unwrap()
    }

    /// Flips bits one after the other; each is found, named and turned back.
    fn survives_flips(&self) {
        let good = contents(&self.dir());
        let total: u64 = good.values().map(|b| b.len() as u64).sum();
        let n = std::env::var("FLIPS").ok().and_then(|n| n.parse().ok()).unwrap_or(FLIPS);
        for i in 0..n {
            // Each file in turn, then anywhere.
            let (path, at) = match good.iter().nth(i) {
                Some((path, bytes)) => (path, mix(i as u64) % bytes.len() as u64),
                None => place(&good, mix(i as u64) % total),
            };
            let (at, bit) = (at as usize, mix(!(i as u64)) % 8);
            let what = format!("flip {i}: bit {bit} of byte {at} of {}", path.display());
            let expected = named(&self.dir().join(path), at as u64);
            let mut bytes = good[path].clone();
            bytes[at] ^= 1 << bit;
            fs::write(self.dir().join(path), bytes).unwrap();
            let (run, found) = self.check();
            assert_eq!(run.code, Some(1), "{what}: {}", run.stderr);
            expected.is_in(&found, &what);
            let report = self.mends(&good, &what);
            assert_eq!(report["repaired"].as_array().unwrap().len(), 1, "{what}: {report}");
        }
    }
}

/// The file and the byte in it where all files one behind the other have byte `at`.
fn place(files: &std::collections::BTreeMap<PathBuf, Vec<u8>>, mut at: u64) -> (&PathBuf, u64) {
    for (path, bytes) in files {
        match at.checked_sub(bytes.len() as u64) {
            Some(rest) => at = rest,
            None => return (path, at),
        }
    }
    panic!("a place behind all files")
}

/// How damage at a place is to be named.
#[derive(Debug, Default)]
struct Named {
    file: String,
    layer: Option<u32>,
    expert: Option<u32>,
    tensor: Option<String>,
}

/// What lies at byte `at` of an undamaged file.
fn named(path: &Path, at: u64) -> Named {
    let file = path.file_name().unwrap().to_str().unwrap().to_owned();
    let mut named = Named { file, ..Named::default() };
    if let Ok(bank) = Bank::open(path) {
        named.layer = Some(bank.layer());
        let record = bank.records().iter().find(|r| (r.offset..r.offset + r.bytes).contains(&at));
        named.expert = record.map(|r| r.expert);
        named.tensor = named.expert.map(|e| format!("layers.{}.experts.{e}", bank.layer()));
    } else if let Ok(trunk) = TrunkFile::open(path) {
        let tensors = trunk.header.tensors.iter().filter(|t| !is_pad(&t.name));
        named.tensor = tensors.into_iter().find(|t| (t.start..t.end).contains(&at)).map(|t| t.name.clone());
    }
    named
}

impl Named {
    #[track_caller]
    fn is_in(&self, found: &Value, what: &str) {
        let Named { file, layer, expert, tensor } = self;
        let is = |d: &&Value| {
            d["file"] == *file
                && (d["layer"] == Value::from(*layer))
                && (expert.is_none() || d["expert"] == Value::from(*expert))
                && (tensor.is_none() || d["tensor"] == Value::from(tensor.clone()))
        };
        let damage = found["damage"].as_array().unwrap();
        assert!(damage.iter().any(|d| is(&d)), "{what}: {self:?} is not in {found:#}");
    }
}

#[test]
fn flips_in_a_bundle_of_released_bytes() {
    Bundle::of("random/gpt_oss_mxfp4", &["--codec", "native"], false).survives_flips();
}

#[test]
fn flips_in_a_rounded_bundle() {
    Bundle::of("random/qwen3_moe_sharded", &["--codec", "int4-g32", "--trunk-codec", "int8-g64"], false)
        .survives_flips();
}

#[test]
fn flips_in_a_calibrated_bundle() {
    calibrated().survives_flips();
}

/// Experts of codes of all lengths and a trunk, both coded by what a text showed.
fn calibrated() -> Bundle {
    let options = ["--codec", "tcq256", "--bits", "3", "--trunk-codec", "int4-g64"];
    Bundle::of("tiny-deepseek-v3", &options, true)
}

#[test]
fn much_damage_at_once_in_a_calibrated_bundle() {
    let bundle = calibrated();
    let good = contents(&bundle.dir());
    // A flip in every file, and some more.
    for (i, (path, bytes)) in good.iter().enumerate() {
        let mut bytes = bytes.clone();
        for k in 0..3 {
            let at = mix((100 * i + k) as u64) as usize % bytes.len();
            bytes[at] ^= 1 << k;
        }
        fs::write(bundle.dir().join(path), bytes).unwrap();
    }
    let found = bundle.check().1;
    for path in good.keys() {
        let file = path.to_str().unwrap();
        assert!(found["damage"].as_array().unwrap().iter().any(|d| d["file"] == file), "{file}: {found:#}");
    }
    bundle.mends(&good, "three flips in each file");
}

#[test]
fn files_that_are_cut_off_or_gone() {
    let bundle = calibrated();
    let good = contents(&bundle.dir());
    let bank = bundle.dir().join("experts-00001.safetensors");
    let n_experts = Bank::open(&bank).unwrap().n_experts() as usize;
    let cut = |path: &Path, to: usize| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..to]).unwrap();
    };
    let n = good[Path::new("experts-00001.safetensors")].len();
    cut(&bank, n - 20_000);
    let report = bundle.mends(&good, "the end of a bank");
    assert_eq!(report["repaired"][0]["experts"].as_array().unwrap().len(), 1, "{report}");
    cut(&bank, 100);
    let report = bundle.mends(&good, "nearly all of a bank");
    assert_eq!(report["repaired"][0]["experts"].as_array().unwrap().len(), n_experts);
    for name in ["experts-00001.safetensors", "trunk-00001-of-00001.safetensors", "config.json"] {
        fs::remove_file(bundle.dir().join(name)).unwrap();
        bundle.mends(&good, name);
    }
    cut(&bundle.dir().join("trunk-00001-of-00001.safetensors"), 9000);
    bundle.mends(&good, "the beginning of a trunk");
}

#[test]
fn only_what_is_damaged_is_coded_anew() {
    let bundle = calibrated();
    let good = contents(&bundle.dir());
    let path = bundle.dir().join("experts-00001.safetensors");
    let record = *Bank::open(&path).unwrap().record(2).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[record.offset as usize + 5] ^= 4;
    // The header's JSON, too, where it says where expert 3 lies.
    let place = bytes.windows(10).position(|w| w == b"experts.3.").unwrap();
    bytes[place] ^= 1;
    fs::write(&path, bytes).unwrap();
    let report = bundle.mends(&good, "a record and an entry of the header");
    assert_eq!(report["repaired"][0]["experts"], serde_json::json!([2, 3]), "{report}");
    assert_eq!((&report["ok"], report["left"].as_array().map(Vec::len)), (&Value::Bool(true), Some(0)));
}

#[test]
fn what_decided_the_bytes_must_be_there_again() {
    let bundle = calibrated();
    let at = bundle.work.path();
    let path = bundle.dir().join("experts-00001.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let checkpoint = fixture("tiny-deepseek-v3").display().to_string();
    let repair = ["check", "q", "--repair", &checkpoint];
    // Padding is nobody's level; no text is needed for it.
    succeeds(at, &repair);
    let record = *Bank::open(&path).unwrap().record(1).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[record.offset as usize] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let refused = |args: &[&str], code: i32, what: &str| {
        let run = moepack(at, &[&repair[..], args].concat());
        assert_eq!(run.code, Some(code), "{}", run.stderr);
        assert!(run.stderr.contains(what), "{}", run.stderr);
        assert!(fs::read(&path).unwrap() == bytes, "a refused repair changed the bank");
    };
    refused(&[], 2, "layers.1.experts.1 is damaged, and it was coded by what calibration showed");
    refused(&["--calibrate", "calibration.txt", "--ctx", "32"], 65, "with the same --ctx and --bos");
    let other = fixture("random/deepseek_v2").display().to_string();
    let run = moepack(at, &["check", "q", "--repair", &other]);
    assert_eq!(run.code, Some(65), "{}", run.stderr);
    assert!(run.stderr.contains("the bundle was made from a "), "{}", run.stderr);
    let run = moepack(at, &["check", "q", "--repair", "q"]);
    assert!(matches!(run.code, Some(2 | 65)), "{}", run.stderr);
}

#[test]
fn a_sample_says_what_it_looked_at() {
    let bundle = Bundle::of("random/qwen3_moe_sharded", &["--codec", "int8"], false);
    let sampled = |args: &[&str]| {
        let run = succeeds(bundle.work.path(), &[&["check", "q", "--json", "--sample"], args].concat());
        serde_json::from_str::<Value>(&run.stdout).unwrap()["sample"].clone()
    };
    let five = sampled(&["5%"]);
    assert_eq!((five["share"].as_f64(), five["seed"].as_u64()), (Some(0.05), Some(0)));
    assert!(five["layers"].as_array().unwrap().iter().all(|l| l["experts"].as_array().unwrap().len() == 1));
    assert_eq!(five, sampled(&["0.05"]));
    assert_ne!(five, sampled(&["50%", "--sample-seed", "3"]));
    // All of it finds all of it.
    let path = bundle.dir().join("experts-00001.safetensors");
    let record = *Bank::open(&path).unwrap().record(1).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[record.offset as usize] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let run = moepack(bundle.work.path(), &["check", "q", "--sample", "100%"]);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(run.stdout.contains("layer 1, expert 1"), "{}", run.stdout);
}
