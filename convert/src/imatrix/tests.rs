//! What is written is read back; what cannot be is refused. `tests/it/imatrix.rs` has files of llama-imatrix itself.

use std::path::PathBuf;

use moepack_format::Kind;
use proptest::prelude::*;

use super::*;
use crate::gguf::file::write_file;
use crate::gguf::{TensorInfo, Type, Value};

const NAME: &str = "blk.0.ffn_up_exps.weight";
const DOWN: &str = "blk.0.ffn_down_exps.weight";

fn entries() -> Vec<Entry> {
    let entry =
        |name: &str, cols, counts: &[u64]| Entry { name: name.to_owned(), cols, counts: counts.to_vec() };
    vec![
        entry(NAME, 3, &[700, 0]),
        entry(DOWN, 2, &[1, 512]),
        entry("blk.1.ffn_down_exps.weight", 2, &[0, 0]),
    ]
}

fn means(entry: usize) -> Vec<f32> {
    [vec![0.5, 0.0, 3.0, 0.0, 0.0, 0.0], vec![1e-9, 2.0, 1.0, 0.25], vec![0.0; 4]][entry].clone()
}

fn about() -> About {
    About { n_chunks: 2, chunk_tokens: Some(256), datasets: vec!["ä.txt".to_owned()] }
}

fn written(dir: &Path, form: Form) -> PathBuf {
    let path = dir.join("imatrix");
    write(&path, form, &about(), &entries(), |i| Ok(means(i))).unwrap();
    path
}

#[test]
fn what_is_written_is_read_in_either_form() {
    let dir = tempfile::tempdir().unwrap();
    for form in [Form::Gguf, Form::Dat] {
        let imatrix = Imatrix::open(&written(dir.path(), form)).unwrap();
        assert!(Imatrix::looks_like(imatrix.file().path()) && imatrix.form() == form);
        let kept = if form == Form::Gguf { 3 } else { 2 };
        assert_eq!(imatrix.names().count(), kept, "what nobody saw is left out of .dat");
        let chunk_tokens = Some(256).filter(|_| form == Form::Gguf);
        assert_eq!(imatrix.about(), &About { chunk_tokens, ..about() });
        let [seen, unseen] = &imatrix.columns(NAME, 2, 3).unwrap()[..] else { panic!("not two") };
        assert_eq!(seen.second_moment, [0.5, 0.0, 3.0]);
        let counts = if form == Form::Gguf { 700 } else { 3 * CHUNK_TOKENS };
        assert_eq!((seen.n_tokens, unseen.n_tokens), (counts, 0));
        let down = imatrix.columns(DOWN, 2, 2).unwrap();
        assert_eq!(down[0].second_moment, [1e-9, 2.0]);
    }
}

#[test]
fn an_entry_of_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for form in [Form::Gguf, Form::Dat] {
        let imatrix = Imatrix::open(&written(dir.path(), form)).unwrap();
        for (n, cols) in [(2, 4), (3, 3), (usize::MAX, 3)] {
            let e = imatrix.columns(NAME, n, cols).unwrap_err();
            assert!(e.what().contains("6 values, expected those of") && e.tensor() == Some(NAME), "{e}");
        }
        assert_eq!(imatrix.check("blk.9.ffn_up_exps.weight", 2, 3).unwrap_err().what(), "no such entry");
    }
}

#[test]
fn what_nobody_saw_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let none = &entries()[2..];
    let e = write(&dir.path().join("x"), Form::Dat, &about(), none, |_| Ok(vec![0.0; 4])).unwrap_err();
    assert!(e.what().contains("no expert saw a token") && !dir.path().join("x").exists(), "{e}");
}

/// Name, type and numbers.
type Stored<'a> = (&'a str, &'a str, &'a [f32]);

/// A GGUF imatrix of two matrices and two columns by hand.
fn gguf(dir: &Path, holds: &str, tensors: &[Stored<'_>]) -> PathBuf {
    let info = |(name, kind, values): &Stored<'_>| TensorInfo {
        name: (*name).to_owned(),
        dims: vec![values.len() as u64],
        kind: Type::of_codec(kind).unwrap(),
    };
    let keys = [("general.type".to_owned(), Value::String(holds.to_owned()))];
    let infos: Vec<TensorInfo> = tensors.iter().map(info).collect();
    let path = dir.join("hand.gguf");
    let bytes = |i: usize| {
        tensors[i].2.iter().flat_map(|v| v.to_le_bytes()).take(infos[i].bytes().unwrap() as usize).collect()
    };
    write_file(&path, &keys, &infos, |i, sink| sink(&bytes(i) as &Vec<u8>)).unwrap();
    path
}

#[test]
fn sums_and_counts_that_cannot_be_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let good = &[1.0, 2.0, 3.0, 4.0][..];
    for (sums, counts, expected) in [
        (&[f32::NAN, 0.0, 0.0, 0.0][..], &[1.0, 1.0][..], "NaN in column 0 of matrix 0"),
        (&[0.0, 0.0, 0.0, f32::INFINITY], &[1.0, 1.0], "inf in column 1 of matrix 1"),
        (&[0.0, -1.0, 0.0, 0.0], &[1.0, 1.0], "-1 in column 1 of matrix 0"),
        (good, &[1.0, f32::NAN], "matrix 1 has a count of NaN"),
        (good, &[-1.0, 1.0], "matrix 0 has a count of -1"),
        (good, &[0.5, 1.0], "matrix 0 has a count of 0.5"),
        (good, &[1.0, 0.0], "matrix 1 has sums, but a count of 0"),
        (good, &[1.0; 3], "4 values, expected those of 2 matrices of 2 columns"),
    ] {
        let path = gguf(dir.path(), "imatrix", &[("a.in_sum2", "f32", sums), ("a.counts", "f32", counts)]);
        let e = Imatrix::open(&path).unwrap().columns("a", 2, 2).unwrap_err();
        assert!(e.what().contains(expected) && e.kind() == Kind::BadData, "expected {expected}: {e}");
        assert_eq!((e.file(), e.tensor()), (Some(path.as_path()), Some("a")));
    }
    // As files that llama.cpp made from .dat: one count for all.
    let path = gguf(
        dir.path(),
        "imatrix",
        &[("a.in_sum2", "f32", good), ("a.counts", "f32", &[2.0]), ("a.in_sum", "f32", good)],
    );
    let stats = Imatrix::open(&path).unwrap().columns("a", 2, 2).unwrap();
    assert_eq!((stats[1].n_tokens, &stats[1].second_moment[..]), (2, &[1.5, 2.0][..]));
}

#[test]
fn a_file_that_holds_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let good = &[1.0, 2.0, 3.0, 4.0][..];
    let cases: [(&str, &[Stored<'_>], &str); 5] = [
        ("model", &[("a.in_sum2", "f32", good)], "general.type is \"model\""),
        ("imatrix", &[("a.in_sum2", "f32", good)], "not there"),
        ("imatrix", &[("a.counts", "f32", good)], "not there"),
        ("imatrix", &[("a.in_sum2", "f16", good), ("a.counts", "f32", good)], "numbers of f16, expected f32"),
        ("imatrix", &[("a", "f32", good)], "an imatrix without entries"),
    ];
    for (holds, tensors, expected) in cases {
        let e = Imatrix::open(&gguf(dir.path(), holds, tensors)).unwrap_err();
        assert!(e.what().contains(expected) && e.file().is_some(), "expected {expected}: {e}");
    }
}

#[test]
fn a_dat_file_that_lies_is_refused() {
    let number = |n: i32| n.to_le_bytes().to_vec();
    let entry =
        |calls: i32, n: i32| [number(1), b"a".to_vec(), number(calls), number(n), vec![0; 8]].concat();
    let cases = [
        (vec![], "4 bytes are expected, but 0 are left"),
        (number(0), "0 entries, expected 1"),
        (number(-1), "-1 entries"),
        (number(i32::MAX), "2147483647 entries"),
        ([number(1), number(1 << 30)].concat(), "1073741824 bytes of a name"),
        ([number(1), number(100), vec![b'a'; 9]].concat(), "100 bytes are expected, but 9 are left"),
        ([number(1), number(1), vec![0xff], number(1)].concat(), "not UTF-8"),
        ([number(1), entry(0, 2)].concat(), "0 calls, expected 1"),
        ([number(1), entry(1, 0)].concat(), "0 values, expected 1"),
        ([number(1), entry(1, i32::MAX)].concat(), "8589934588 bytes are expected, but 8 are left"),
        ([number(2), entry(1, 2), entry(1, 2)].concat(), "a second entry of that name"),
        ([number(1), entry(1, 2), number(-2)].concat(), "-2 chunks"),
        ([number(1), entry(1, 2), number(1), number(5)].concat(), "5 bytes are expected, but 0 are left"),
        ([number(1), entry(1, 2), number(1), number(0), vec![0]].concat(), "1 bytes behind the end"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.dat");
    for (bytes, expected) in cases {
        std::fs::write(&path, bytes).unwrap();
        let e = Imatrix::open(&path).unwrap_err();
        assert!(e.what().contains(expected) && e.kind() == Kind::BadData, "expected {expected}: {e}");
        assert!(e.byte().is_some() && e.file() == Some(path.as_path()), "{e}");
    }
    std::fs::write(&path, [number(1), entry(2, 2)].concat()).unwrap();
    let old = Imatrix::open(&path).unwrap();
    assert_eq!(
        (old.about(), old.columns("a", 1, 2).unwrap()[0].n_tokens),
        (&About::default(), 2 * CHUNK_TOKENS)
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whatever is done to a good file: it is read, and so are its values, or refused.
    #[test]
    fn a_damaged_file_is_read_or_refused(
        is_gguf in any::<bool>(),
        cut in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<[u8; 4]>()), 0..4),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path(), if is_gguf { Form::Gguf } else { Form::Dat });
        let mut bytes = std::fs::read(&path).unwrap();
        for (place, word) in &edits {
            let i = place.index(bytes.len());
            bytes.iter_mut().skip(i).zip(word).for_each(|(b, w)| *b = *w);
        }
        if edits.len() < 2 {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(imatrix) = Imatrix::open(&path) {
            for stats in [imatrix.columns(NAME, 2, 3), imatrix.columns(DOWN, 2, 2)].into_iter().flatten().flatten() {
                prop_assert!(stats.second_moment.iter().all(|m| m.is_finite() && *m >= 0.0));
            }
        }
    }
}
