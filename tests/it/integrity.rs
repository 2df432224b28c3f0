//! A bundle that was changed anywhere is found by `check`.

use std::fs;
use std::path::Path;

use sha2::{Digest, Sha256};

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

/// A checkpoint that was downloaded: to a directory of its own, or into a cache, with the hash that the hub gave.
fn downloaded(dir: &Path, into_cache: bool, sha256: &str) -> String {
    let model = fixture("random/qwen3_moe");
    let revision = "0123456789abcdef0123456789abcdef01234567";
    let root = if into_cache { dir.join("models--a--b") } else { dir.join("mine") };
    let snapshot = if into_cache { root.join("snapshots").join(revision) } else { root.clone() };
    fs::create_dir_all(&snapshot).unwrap();
    fs::copy(model.join("config.json"), snapshot.join("config.json")).unwrap();
    let weights = snapshot.join("model.safetensors");
    if into_cache {
        fs::create_dir_all(root.join("blobs")).unwrap();
        fs::create_dir_all(root.join("refs")).unwrap();
        fs::write(root.join("refs/main"), revision).unwrap();
        fs::copy(model.join("model.safetensors"), root.join("blobs").join(sha256)).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{sha256}"), weights).unwrap();
    } else {
        let metadata = snapshot.join(".cache/huggingface/download");
        fs::create_dir_all(&metadata).unwrap();
        let text = format!("{revision}\n{sha256}\n1726498445.95\n");
        fs::write(metadata.join("model.safetensors.metadata"), text).unwrap();
        fs::copy(model.join("model.safetensors"), weights).unwrap();
    }
    root.display().to_string()
}

#[test]
fn weights_that_are_not_what_the_hub_has_are_refused() {
    let weights = fs::read(fixture("random/qwen3_moe/model.safetensors")).unwrap();
    let right = sha256(&weights);
    let wrong = right.replace(['0', '1', '2', '3'], "4");
    for into_cache in [true, false] {
        let work = tempfile::tempdir().unwrap();
        let at = work.path();
        let sound = downloaded(&at.join("sound"), into_cache, &right);
        succeeds(at, &["quantize", &sound, "-o", "q"]);
        let damaged = downloaded(&at.join("damaged"), into_cache, &wrong);
        let run = moepack(at, &["quantize", &damaged, "-o", "q2"]);
        assert_eq!(run.code, Some(65), "{}", run.stderr);
        for says in [&right, &wrong, "model.safetensors", "hint:"] {
            assert!(run.stderr.contains(says), "{says} is missing in {}", run.stderr);
        }
        assert!(!at.join("q2").exists() && !at.join("q2.partial").exists());
    }
}

#[test]
fn the_list_of_hashes_is_what_sha256sum_checks() {
    let work = bundle();
    let at = work.path();
    succeeds(at, &["check", "out.moepack", "--sha256sums", "sums", "--statement", "statement.json"]);
    let run = std::process::Command::new("sha256sum")
        .args(["-c", "--strict", "../sums"])
        .current_dir(at.join("out.moepack"))
        .output();
    let run = run.expect("sha256sum is there");
    let said = String::from_utf8(run.stdout).unwrap();
    assert!(run.status.success(), "{said}");
    assert_eq!(said.lines().count(), contents(&at.join("out.moepack")).len(), "{said}");
    let statement: serde_json::Value =
        serde_json::from_slice(&fs::read(at.join("statement.json")).unwrap()).unwrap();
    let resources = statement["predicate"]["resources"].as_array().unwrap();
    for (resource, (path, bytes)) in resources.iter().zip(contents(&at.join("out.moepack"))) {
        assert_eq!(resource["name"], path.to_str().unwrap());
        assert_eq!(resource["digest"], sha256(&bytes));
    }
    let run = moepack(at, &["check", "out.moepack", "--statement", "statement.json"]);
    assert_eq!(run.code, Some(73), "{}", run.stderr);
    // A signature beside the files is nobody's damage.
    fs::write(at.join("out.moepack/model.sig"), "{}").unwrap();
    succeeds(at, &["check", "out.moepack"]);
    fs::write(at.join("out.moepack/stray"), "").unwrap();
    let run = moepack(at, &["check", "out.moepack", "--sha256sums", "more"]);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(!at.join("more").exists(), "a list of a bundle that is not sound");
}

fn sha256(bytes: &[u8]) -> String {
    moepack_format::file::hex(&Sha256::digest(bytes))
}
