//! Importance matrices of llama.cpp, in and out, against those that llama-imatrix itself made of the same model and tokens
//! (`fixtures/goldens/imatrix.py`).

use std::path::{Path, PathBuf};

use moepack_convert::gguf::{Gguf, Value};
use moepack_convert::imatrix::{Form, Imatrix};
use serde_json::Value as Json;

use crate::support::{contents, fixture, moepack, succeeds};

/// Experts and columns of the model, whose hidden and intermediate sizes are alike.
const SIZES: (usize, usize) = (4, 64);

fn model() -> String {
    fixture("random/qwen3_moe").display().to_string()
}

fn golden(name: &str) -> PathBuf {
    fixture("goldens/imatrix").join(name)
}

/// Stats of the model over the tokens of the goldens.
fn stats(dir: &Path) {
    let tokens = golden("tokens.json").display().to_string();
    succeeds(dir, &["calibrate", &model(), "--tokens", &tokens, "-o", "stats"]);
}

fn exported(dir: &Path, target: &str) -> PathBuf {
    succeeds(dir, &["convert", "stats", "--to", target, "-o", target]);
    dir.join(target)
}

/// Names of the experts' entries.
fn names(imatrix: &Imatrix) -> Vec<String> {
    imatrix.names().filter(|n| n.contains("_exps.")).map(str::to_owned).collect()
}

/// Compares every count and every mean.
fn assert_agree(ours: &Imatrix, theirs: &Imatrix) {
    assert_eq!(names(ours), names(theirs));
    for name in names(ours) {
        let [ours, theirs] = [ours, theirs].map(|i| i.columns(&name, SIZES.0, SIZES.1).unwrap());
        for (e, (a, b)) in ours.iter().zip(&theirs).enumerate() {
            assert_eq!(a.n_tokens, b.n_tokens, "{name}, expert {e}");
            for (c, (a, b)) in a.second_moment.iter().zip(&b.second_moment).enumerate() {
                assert!((a - b).abs() <= 2e-5 * b.abs(), "{name}, expert {e}, column {c}: {a} and {b}");
            }
        }
    }
}

#[test]
fn what_calibrate_learns_is_what_llama_imatrix_learns() {
    let dir = tempfile::tempdir().unwrap();
    stats(dir.path());
    for (target, name, form) in
        [("imatrix", "imatrix.gguf", Form::Gguf), ("imatrix-dat", "imatrix.dat", Form::Dat)]
    {
        let ours = Imatrix::open(&exported(dir.path(), target)).unwrap();
        let theirs = Imatrix::open(&golden(name)).unwrap();
        assert_eq!((ours.form(), names(&ours).len()), (form, 6));
        assert_eq!(ours.about().n_chunks, theirs.about().n_chunks);
        assert_eq!(ours.about().chunk_tokens, theirs.about().chunk_tokens);
        assert_agree(&ours, &theirs);
    }
    // Some experts saw nothing, which the form must survive.
    let theirs = Imatrix::open(&golden("imatrix.gguf")).unwrap();
    let seen: Vec<u64> =
        theirs.columns("blk.1.ffn_down_exps.weight", 4, 64).unwrap().iter().map(|c| c.n_tokens).collect();
    assert_eq!(seen, [8, 95, 0, 89]);
}

#[test]
fn tensors_and_keys_are_those_of_llama_imatrix() {
    let dir = tempfile::tempdir().unwrap();
    stats(dir.path());
    let (ours, theirs) =
        (Gguf::open(&exported(dir.path(), "imatrix")).unwrap(), Gguf::open(&golden("imatrix.gguf")).unwrap());
    let experts = |gguf: &Gguf| -> Vec<_> {
        gguf.tensors.iter().map(|(t, _)| t.clone()).filter(|t| t.name.contains("_exps.")).collect()
    };
    assert_eq!(experts(&ours), experts(&theirs));
    assert!(ours.metadata.keys().eq(theirs.metadata.keys()), "{:?}", ours.metadata);
    for key in ["general.type", "imatrix.chunk_count", "imatrix.chunk_size"] {
        assert_eq!(ours.metadata[key], theirs.metadata[key], "{key}");
    }
    let Value::Array(_, datasets) = &ours.metadata["imatrix.datasets"] else { panic!("no datasets") };
    assert!(
        datasets[0].as_str().unwrap().starts_with("moepack calibrate, tokens of sha256 "),
        "{datasets:?}"
    );
}

#[test]
fn an_export_says_what_nobody_saw_and_is_the_same_each_time() {
    let dir = tempfile::tempdir().unwrap();
    stats(dir.path());
    let args = ["convert", "stats", "--to", "imatrix", "-o", "a.gguf"];
    let run = succeeds(dir.path(), &args);
    assert!(
        run.stdout.contains("2 experts saw no token") && run.stdout.contains("0.3 1.2"),
        "{}",
        run.stdout
    );
    assert!(run.stdout.contains("a.gguf: imatrix of 6 tensors"), "{}", run.stdout);
    let again = moepack(dir.path(), &args);
    assert!(again.code == Some(73) && again.stderr.contains("--overwrite"), "{}", again.stderr);
    let json = succeeds(dir.path(), &[&args[..5], &["b.gguf", "--json", "--threads", "1"]].concat()).stdout;
    let json: Json = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&json["schema"], &json["target"]),
        (&Json::from("moepack.convert/1"), &Json::from("imatrix"))
    );
    assert_eq!(json["files"][0]["path"], "b.gguf");
    let bytes = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    assert_eq!(bytes("a.gguf"), bytes("b.gguf"));
    let same = moepack(dir.path(), &["convert", "stats", "--to", "imatrix", "-o", "stats", "--overwrite"]);
    let foreign =
        moepack(dir.path(), &["convert", "stats", "--to", "imatrix", "-o", "c", "--requantize", "int4"]);
    assert_eq!((same.code, foreign.code), (Some(2), Some(2)), "{}{}", same.stderr, foreign.stderr);
}

#[test]
fn stats_that_do_not_know_it_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    stats(dir.path());
    let bytes = std::fs::read(dir.path().join("stats")).unwrap();
    let at = bytes.windows(11).position(|w| w == b"inner_plain").unwrap();
    let mut old = bytes.clone();
    old[at..at + 11].copy_from_slice(b"inner_other");
    std::fs::write(dir.path().join("old"), old).unwrap();
    std::fs::write(dir.path().join("none"), b"nothing of the kind").unwrap();
    for (name, code, expected) in
        [("old", 65, "calibrate again"), ("none", 65, "none"), ("absent", 66, "absent")]
    {
        let run = moepack(dir.path(), &["convert", name, "--to", "imatrix", "-o", "x"]);
        assert!(run.code == Some(code) && run.stderr.contains(expected), "{name}: {}", run.stderr);
        assert!(!dir.path().join("x").exists());
    }
}

#[test]
fn an_imatrix_is_calibration_for_quantize() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let [gguf, dat] = ["imatrix.gguf", "imatrix.dat"].map(|n| golden(n).display().to_string());
    let model = model();
    let quantize = |out: &str, more: &[&str]| {
        succeeds(at, &[&["quantize", &model, "-o", out, "--codec", "int4-g32"], more].concat());
        let manifest = std::fs::read_to_string(at.join(out).join("manifest.json")).unwrap();
        serde_json::from_str::<Json>(&manifest).unwrap()["recipe"].clone()
    };
    let by_gguf = quantize("gguf", &["--imatrix", &gguf]);
    assert_eq!(by_gguf["recipe"]["solver"], "weighted");
    let calibration = &by_gguf["calibration"];
    assert_eq!(
        (&calibration["form"], &calibration["chunks"], &calibration["tokens"]),
        (&"gguf".into(), &3.into(), &96.into())
    );
    assert_eq!(calibration["imatrix_sha256"].as_str().unwrap().len(), 64);
    let by_dat = quantize("dat", &["--stats", &dat, "--threads", "1"]);
    assert_eq!(
        (&by_dat["calibration"]["form"], &by_dat["calibration"]["tokens"]),
        (&"dat".into(), &Json::Null)
    );
    quantize("plain", &[]);
    let banks = |out: &str| {
        let all = contents(&at.join(out))
            .into_iter()
            .filter(|(path, _)| path.to_string_lossy().contains("experts-"));
        all.collect::<Vec<_>>()
    };
    assert!(
        banks("gguf") != banks("plain") && banks("dat") != banks("plain"),
        "importance changes what is coded"
    );
    // The stats that the imatrix was exported from, but for their routing weights.
    stats(at);
    exported(at, "imatrix");
    quantize("ours", &["--imatrix", "imatrix"]);
    quantize("ours-1", &["--imatrix", "imatrix", "--threads", "1"]);
    assert_eq!(banks("ours"), banks("ours-1"));
}

#[test]
fn an_imatrix_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let gguf = golden("imatrix.gguf").display().to_string();
    let gptq = moepack(at, &["quantize", &model(), "-o", "q", "--imatrix", &gguf, "--solver", "gptq"]);
    assert!(
        gptq.code == Some(2) && gptq.stderr.contains("needs Hessians, and imatrix and stats files have none"),
        "{}",
        gptq.stderr
    );
    let damaged = |name: &str, from: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = std::fs::read(golden(from)).unwrap();
        change(&mut bytes);
        std::fs::write(at.join(name), bytes).unwrap();
        name.to_owned()
    };
    let find =
        |bytes: &[u8], word: &str| bytes.windows(word.len()).position(|w| w == word.as_bytes()).unwrap();
    let nan = damaged("nan.dat", "imatrix.dat", &|b| {
        let at = find(b, "blk.0.ffn_down_exps.weight") + 26 + 8;
        b[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let negative = damaged("negative.gguf", "imatrix.gguf", &|b| {
        let gguf = Gguf::open(&golden("imatrix.gguf")).unwrap();
        let (_, place) =
            gguf.tensors.iter().find(|(t, _)| t.name == "blk.1.ffn_up_exps.weight.counts").unwrap();
        b[*place as usize..][..4].copy_from_slice(&(-1f32).to_le_bytes());
    });
    let cut = damaged("cut.dat", "imatrix.dat", &|b| b.truncate(b.len() / 2));
    let no_experts = damaged("dense.dat", "imatrix.dat", &|b| {
        for word in ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"] {
            while let Some(at) = b.windows(word.len()).position(|w| w == word.as_bytes()) {
                b[at] = b'g';
            }
        }
    });
    for (model_name, file, expected) in [
        ("random/olmoe", gguf.as_str(), "expected those of 6 matrices"),
        ("random/llama", &gguf, "the imatrix has no entry of any expert"),
        ("random/qwen2_moe_mixed", &gguf, "blk."),
        ("random/qwen3_moe", &nan, "NaN in column 0 of matrix 0"),
        ("random/qwen3_moe", &negative, "matrix 0 has a count of -1"),
        ("random/qwen3_moe", &cut, "bytes are expected, but"),
        ("random/qwen3_moe", &no_experts, "the imatrix has no entry of any expert"),
    ] {
        let model = fixture(model_name).display().to_string();
        let run = moepack(at, &["quantize", &model, "-o", "q", "--codec", "int8", "--imatrix", file]);
        assert_eq!(run.code, Some(65), "{model_name}, {file}: {}", run.stderr);
        for words in [expected, file.rsplit('/').next().unwrap(), "hint:"] {
            assert!(run.stderr.contains(words), "{model_name}, {file}: no {words:?} in {}", run.stderr);
        }
        assert!(!at.join("q").exists());
    }
}

/// ik_llama.cpp leaves out what has partial data; its experts are rounded plainly, and that is said.
#[test]
fn entries_that_are_left_out_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = std::fs::read(golden("imatrix.dat")).unwrap();
    let word = b"blk.1.ffn_down_exps.weight";
    let at = bytes.windows(word.len()).position(|w| w == word).unwrap();
    bytes[at..at + 5].copy_from_slice(b"blk.7");
    std::fs::write(dir.path().join("part.dat"), bytes).unwrap();
    let run =
        succeeds(dir.path(), &["quantize", &model(), "-o", "q", "--codec", "int8", "--imatrix", "part.dat"]);
    assert!(
        run.stderr.contains("nothing for 1 of 4 tensors of experts, such as blk.1.ffn_down_exps.weight"),
        "{}",
        run.stderr
    );
}
