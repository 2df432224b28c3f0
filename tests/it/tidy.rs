//! What we care about in the sources themselves.

use std::path::{Path, PathBuf};

/// Longer than this is two ideas.
const LINES_MAX: usize = 700;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

fn all_sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for dir in ["src", "tests", "format", "quant", "convert", "verify"] {
        sources(&root().join(dir), &mut found);
    }
    assert!(found.len() > 50, "only {} sources found", found.len());
    found
}

#[test]
fn every_source_says_what_it_is_for_and_stays_readable() {
    let mut complaints = Vec::new();
    for path in all_sources() {
        let text = std::fs::read_to_string(&path).unwrap();
        if !text.starts_with("//!") {
            complaints.push(format!("{} does not begin with what it is for", path.display()));
        }
        if text.lines().count() > LINES_MAX {
            complaints.push(format!("{} has more than {LINES_MAX} lines", path.display()));
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn unsafe_code_is_in_the_kernels_only() {
    let mut complaints = Vec::new();
    for path in all_sources() {
        let kernel = path.starts_with(root().join("quant/src"));
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = text.lines().filter(|l| !l.trim_start().starts_with("//"));
        let n_unsafe = lines
            .filter(|l| l.contains(concat!("unsafe", " {")) || l.contains(concat!("unsafe", " fn")))
            .count();
        if n_unsafe > 0 && !kernel {
            complaints.push(path.display().to_string());
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn the_documents_name_files_that_exist() {
    for document in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let text = std::fs::read_to_string(root().join(document)).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            assert!(root().join(link).exists(), "{document} links to {link}");
        }
        for word in text.split(['`', ' ', '(', ')', '\n']).filter(|w| w.ends_with(".rs") && w.contains('/')) {
            let example = word.contains("/x.rs") || word.contains('<');
            assert!(example || root().join(word).exists(), "{document} names {word}");
        }
    }
}
