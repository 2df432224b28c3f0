//! The same inputs give the same bytes, whatever the number of threads, the instruction set or the locale.

use std::path::Path;

use crate::support::{assert_same, fixture, moepack_with, text};

const MODEL: &str = "tiny-deepseek-v3";

/// Codecs of every kind, so that each kernel is compared.
const CODECS: &[&str] =
    &["int2", "int3-g32", "int4", "int4-asym", "int5", "int6-g128", "int8", "mxfp4", "nvfp4", "fp8-block"];

#[test]
fn threads_do_not_change_a_bundle() {
    let work = tempfile::tempdir().unwrap();
    let one = quantize(work.path(), "one", MODEL, &[], &["--codec", "int4", "--threads", "1"]);
    for n in ["2", "7"] {
        let many = quantize(work.path(), n, MODEL, &[], &["--codec", "int4", "--threads", n]);
        assert_same(&one, &many, &format!("{n} threads"));
    }
}

#[test]
fn the_instruction_set_does_not_change_a_bundle() {
    let work = tempfile::tempdir().unwrap();
    for codec in CODECS {
        let of = |isa: &str| {
            let name = format!("{codec}-{isa}");
            quantize(
                work.path(),
                &name,
                "random/qwen3_moe_sharded",
                &[("MOEPACK_ISA", isa)],
                &["--codec", codec],
            )
        };
        let scalar = of("scalar");
        for isa in ["avx2", "avx512"] {
            assert_same(&scalar, &of(isa), &format!("{codec} with {isa}"));
        }
    }
}

#[test]
fn nothing_changes_a_calibrated_bundle() {
    let work = tempfile::tempdir().unwrap();
    let calibration = text(work.path(), "calibration.txt", 6_000);
    let calibrate = ["--codec", "int3", "--calibrate", calibration.to_str().unwrap(), "--threads"];
    let of = |name: &str, environment: &[(&str, &str)], threads: &str| {
        let args: Vec<&str> = calibrate.into_iter().chain([threads]).collect();
        quantize(work.path(), name, MODEL, environment, &args)
    };
    let one = of("one", &[], "1");
    for threads in ["2", "7"] {
        assert_same(&one, &of(threads, &[], threads), &format!("{threads} threads"));
    }
    for isa in ["scalar", "avx2"] {
        assert_same(&one, &of(isa, &[("MOEPACK_ISA", isa)], "2"), isa);
    }
    let elsewhere = [("LC_ALL", "tr_TR.UTF-8"), ("TZ", "Asia/Kathmandu"), ("LANG", "de_DE.UTF-8")];
    assert_same(&one, &of("elsewhere", &elsewhere, "2"), "another locale");
    let plain = quantize(work.path(), "plain", MODEL, &[], &["--codec", "int3"]);
    let bank = "experts-00001.safetensors";
    let differs = std::fs::read(one.join(bank)).unwrap() != std::fs::read(plain.join(bank)).unwrap();
    assert!(differs, "calibration changed nothing, so this test compares nothing");
}

/// Quantizes a fixture into `work/name` and returns that directory.
fn quantize(
    work: &Path,
    name: &str,
    model: &str,
    environment: &[(&str, &str)],
    args: &[&str],
) -> std::path::PathBuf {
    let model = fixture(model);
    let fixed = ["quantize", model.to_str().unwrap(), "-o", name];
    let args: Vec<&str> = fixed.into_iter().chain(args.iter().copied()).collect();
    let run = moepack_with(work, environment, &args);
    assert_eq!(run.code, Some(0), "{args:?}: {}", run.stderr);
    work.join(name)
}
