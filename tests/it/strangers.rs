//! Texts, tokens, templates, bundles and other processes that a run meets: what is wrong with them is said, and nothing is
//! left behind.

use std::fs::{self, File};
use std::path::Path;

use rustix::fs::FlockOperation;

use crate::support::{Run, fixture, listing, moepack, succeeds};

fn refused(dir: &Path, args: &[&str], code: i32, says: &[&str]) -> Run {
    let before = listing(dir);
    let run = moepack(dir, args);
    assert_eq!(run.code, Some(code), "{args:?}: {}", run.stderr);
    for words in says.iter().chain(&["error: ", "hint: "]) {
        assert!(run.stderr.contains(words), "{args:?}: no {words:?} in {}", run.stderr);
    }
    assert!(
        !run.stderr.contains("panicked") && listing(dir) == before,
        "{args:?} left something: {}",
        run.stderr
    );
    run
}

/// Every command that runs a text.
#[test]
fn a_text_that_is_none_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("tiny-deepseek-v3").display().to_string();
    let texts: [(&str, &[u8], &[&str]); 5] = [
        ("empty.txt", b"", &["the text is empty", "empty.txt"]),
        ("latin.txt", b"caf\xe9 abc", &["not UTF-8", "0xe9", "latin.txt, byte 3"]),
        ("cut.txt", "naïve ä".as_bytes().split_last().unwrap().1, &["not UTF-8", "cut.txt, byte 7"]),
        ("binary.txt", b"\x7fELF\x02\x01\x01\0\xff", &["not UTF-8", "binary file"]),
        ("one.txt", b"a", &["1, but 2 are needed", "one.txt"]),
    ];
    for (name, bytes, says) in texts {
        fs::write(dir.path().join(name), bytes).unwrap();
        refused(dir.path(), &["calibrate", &model, "--text", name, "-o", "s"], 65, says);
        refused(dir.path(), &["perplexity", &model, "--text", name], 65, says);
        refused(
            dir.path(),
            &["quantize", &model, "-o", "q", "--codec", "int8", "--calibrate", name],
            65,
            says,
        );
        refused(dir.path(), &["quantize", &model, "-o", "q", "--codec", "int8", "--verify", name], 65, says);
    }
    refused(dir.path(), &["calibrate", &model, "--text", "absent.txt", "-o", "s"], 66, &["absent.txt"]);
    fs::create_dir(dir.path().join("texts")).unwrap();
    refused(
        dir.path(),
        &["calibrate", &model, "--text", "texts", "-o", "s"],
        65,
        &["a directory, expected", "texts"],
    );
}

#[test]
fn tokens_that_are_none_are_refused_with_their_place() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("random/qwen3_moe").display().to_string();
    for (json, says) in [
        ("[]", "no window"),
        ("[[]]", "window 0"),
        ("[[1]]", "a window needs 2"),
        ("[[1, 96]]", "id 96, but the model has 96 tokens"),
        ("[[1, 2], [3, -2]]", "window 1, index 1"),
        ("[[1, 2.5]]", "window 0, index 1"),
        ("[[1, 2], \"x\"]", "window 1"),
        ("[[1, 18446744073709551616]]", "window 0, index 1"),
        ("{}", "expected a list of windows"),
        ("[[1, 2", "EOF"),
        ("\u{feff}[[1, 2]]", "line 1 column 1"),
    ] {
        fs::write(dir.path().join("t.json"), json).unwrap();
        refused(dir.path(), &["calibrate", &model, "--tokens", "t.json", "-o", "s"], 65, &[says, "t.json"]);
    }
    fs::write(dir.path().join("t.json"), "[".repeat(200_000)).unwrap();
    refused(dir.path(), &["perplexity", &model, "--tokens", "t.json"], 65, &["t.json"]);
}

/// It is data, never rendered, and never printed raw.
#[test]
fn a_chat_template_travels_as_it_is_and_is_never_run() {
    const TEMPLATE: &str =
        "{% for i in range(10**9) %}{{ ''.__class__.__mro__ }}{% endfor %}\u{1b}[2J\u{202e}\n";
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixture("random/qwen3_moe").join(name), model.join(name)).unwrap();
    }
    fs::write(model.join("chat_template.jinja"), TEMPLATE).unwrap();
    for args in [
        &["inspect", "model"][..],
        &["quantize", "model", "-o", "q", "--codec", "int8"],
        &["inspect", "q"],
        &["check", "q"],
    ] {
        let run = succeeds(dir.path(), args);
        assert!(!run.stdout.contains('\u{1b}') && !run.stderr.contains('\u{1b}'), "{args:?}");
    }
    assert_eq!(fs::read_to_string(dir.path().join("q/chat_template.jinja")).unwrap(), TEMPLATE);
}

/// Odd by itself, wrong where asked for.
#[test]
fn a_stray_shard_is_an_error_where_odd_things_are() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("random/qwen3_moe").display().to_string();
    assert!(succeeds(dir.path(), &["inspect", &model]).stderr.contains("golden.safetensors"));
    refused(dir.path(), &["inspect", &model, "--strict"], 65, &["golden.safetensors"]);
}

#[test]
fn a_bundle_of_an_unknown_codec_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("random/qwen3_moe").display().to_string();
    succeeds(dir.path(), &["quantize", &model, "-o", "q", "--codec", "int8-g64"]);
    let path = dir.path().join("q/manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("int8-g64", "int8-g65")).unwrap();
    for args in [&["inspect", "q"][..], &["check", "q"]] {
        let run = moepack(dir.path(), args);
        let refused = matches!(run.code, Some(65 | 1)) && run.stderr.contains("error: ");
        assert!(refused && !run.stderr.contains("panicked"), "{args:?}: {:?} {}", run.code, run.stderr);
    }
}

/// Whoever comes second is told who is at it, and may try again.
#[test]
fn a_second_writer_is_told_who_holds_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let partial = dir.path().join("q.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("lock"), "process 123 on elsewhere\n").unwrap();
    let holder = File::options().read(true).write(true).open(partial.join("lock")).unwrap();
    rustix::fs::flock(&holder, FlockOperation::NonBlockingLockExclusive).unwrap();
    let model = fixture("random/qwen3_moe").display().to_string();
    let args = ["quantize", &model, "-o", "q", "--codec", "int8"];
    refused(dir.path(), &args, 75, &["another run writes here (process 123 on elsewhere)"]);
    drop(holder);
    succeeds(dir.path(), &args);
    assert!(!partial.exists());
}
