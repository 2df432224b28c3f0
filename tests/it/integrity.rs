//! A bundle that was changed anywhere is found by `check`.

use std::fs;
use std::path::Path;

use crate::support::{contents, fixture, moepack, succeeds};

/// Bits flipped in each file.
const FLIPS: usize = 12;

#[test]
fn one_flipped_bit_anywhere_is_found() {
    let work = bundle();
    let dir = work.path().join("out.moepack");
    let mut missed = Vec::new();
    for (file, bytes) in contents(&dir) {
        for n in 0..FLIPS {
            // Beginning, end and places between, each time another bit.
            let at = (bytes.len() - 1) * n / (FLIPS - 1);
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (n % 8);
            fs::write(dir.join(&file), damaged).unwrap();
            let run = moepack(work.path(), &["check", "out.moepack"]);
            if !matches!(run.code, Some(1 | 65)) {
                missed.push(format!(
                    "byte {at} of {}: exit code {:?} {}",
                    file.display(),
                    run.code,
                    run.stderr
                ));
            }
        }
        fs::write(dir.join(&file), bytes).unwrap();
    }
    assert!(missed.is_empty(), "{} of the damages were not found\n{}", missed.len(), missed.join("\n"));
    succeeds(work.path(), &["check", "out.moepack"]);
}

#[test]
fn all_damage_is_told_at_once() {
    let work = bundle();
    for bank in ["experts-00000.safetensors", "experts-00001.safetensors"] {
        let path = work.path().join("out.moepack").join(bank);
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 20_000;
        bytes[last] ^= 0x10;
        fs::write(path, bytes).unwrap();
    }
    let run = moepack(work.path(), &["check", "out.moepack"]);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    let said = run.stdout + &run.stderr;
    for bank in ["experts-00000.safetensors", "experts-00001.safetensors"] {
        assert!(said.contains(bank), "{bank} is not named\n{said}");
    }
}

#[test]
fn a_file_that_is_gone_is_found() {
    let work = bundle();
    fs::remove_file(work.path().join("out.moepack/experts-00001.safetensors")).unwrap();
    let run = moepack(work.path(), &["check", "out.moepack"]);
    assert!(matches!(run.code, Some(1 | 66)), "{:?} {}", run.code, run.stderr);
    assert!((run.stdout + &run.stderr).contains("experts-00001.safetensors"));
}

#[test]
fn a_bundle_without_its_manifest_is_unfinished() {
    let work = bundle();
    fs::remove_file(work.path().join("out.moepack/manifest.json")).unwrap();
    let run = moepack(work.path(), &["check", "out.moepack"]);
    assert_eq!(run.code, Some(66), "{}", run.stderr);
}

#[test]
fn an_output_is_never_overwritten_unasked() {
    let work = bundle();
    let before = contents(work.path());
    let again = moepack(work.path(), &quantize("int4"));
    assert_eq!(again.code, Some(73), "{}", again.stderr);
    assert!(before == contents(work.path()), "a refused run changed files");
    let mut asked = quantize("int4");
    asked.push("--overwrite".to_owned());
    succeeds(work.path(), &asked);
    succeeds(work.path(), &["check", "out.moepack"]);
    assert!(before != contents(work.path()), "--overwrite changed nothing");
}

/// A directory with a sound bundle `out.moepack`.
fn bundle() -> tempfile::TempDir {
    let work = tempfile::tempdir().unwrap();
    succeeds(work.path(), &quantize("int8"));
    assert!(Path::new(&work.path().join("out.moepack/manifest.json")).exists());
    work
}

fn quantize(codec: &str) -> Vec<String> {
    let model = fixture("random/qwen3_moe_sharded");
    let args = ["quantize", model.to_str().unwrap(), "-o", "out.moepack", "--codec", codec];
    args.into_iter().map(str::to_owned).collect()
}
