//! What we care about in the sources themselves.

use std::path::{Path, PathBuf};

/// Longer than this is two ideas.
const LINES_MAX: usize = 500;

/// Files that may be longer, and why.
const LONG: &[(&str, &str)] = &[(
    "convert/src/model/tests.rs",
    "one table of how each family lies in its files, with a writer for each",
)];

/// The crates in the order in which they may use each other: only what is to the left.
const CRATES: &[(&str, &str)] = &[
    ("moepack-format", "format/Cargo.toml"),
    ("moepack-quant", "quant/Cargo.toml"),
    ("moepack-convert", "convert/Cargo.toml"),
    ("moepack-verify", "verify/Cargo.toml"),
    ("moepack", "Cargo.toml"),
    ("moepack-fuzz", "fuzz/Cargo.toml"),
];

/// Methods that std takes from the platform's library, so that their last bits differ from one machine to another.
const PLATFORM_MATH: &[&str] = &[
    ".exp()",
    ".exp2()",
    ".exp_m1()",
    ".ln()",
    ".ln_1p()",
    ".log2()",
    ".log10()",
    ".powf(",
    ".powi(",
    ".sin()",
    ".cos()",
    ".tan()",
    ".tanh()",
    ".cbrt()",
    ".sin_cos()",
];

/// Calls on files, which tests cannot make fail.
const FILE_CALLS: &[&str] = &[
    "std::fs",
    "rustix::fs",
    ".exists()",
    ".try_exists()",
    ".canonicalize()",
    ".symlink_metadata()",
    ".read_dir()",
];

/// Every page that names files, seen from the root.
const DOCUMENTS: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/allocation.md",
    "docs/cluster.md",
    "docs/export.md",
    "docs/integrity.md",
    "format/SPEC.md",
    "quant/README.md",
    "verify/BASELINE.md",
    "fixtures/README.md",
    "fixtures/hostile/README.md",
    "benches/peers/README.md",
];

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
    for dir in ["src", "tests", "format", "quant", "convert", "verify", "fuzz"] {
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
        if text.lines().count() > LINES_MAX && !LONG.iter().any(|(file, _)| path == root().join(file)) {
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
fn files_are_touched_in_one_place() {
    let mut complaints = Vec::new();
    for path in all_sources() {
        let inside = path.strip_prefix(root()).unwrap().to_str().unwrap();
        let is_code = inside.starts_with("src/") || inside.contains("/src/") && !inside.starts_with("fuzz/");
        // What the kernel makes up when it is read is no file.
        let is_storage = inside.starts_with("format/src/storage")
            || ["src/memory.rs", "src/cluster/who.rs"].contains(&inside);
        let is_test =
            ["tests.rs", "testing.rs", "format/src/spec.rs"].iter().any(|end| inside.ends_with(end));
        if !is_code || is_storage || is_test || inside.contains("/tests/") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        for (n, line) in code.lines().enumerate().filter(|(_, l)| !l.trim_start().starts_with("//")) {
            let line = line.replace("std::fs::Metadata", "").replace("rustix::fs::OFlags", "");
            let found = FILE_CALLS.iter().filter(|call| line.contains(**call));
            complaints.extend(found.map(|call| format!("{inside}:{}: {call}", n + 1)));
        }
    }
    assert!(complaints.is_empty(), "use format::storage:\n{}", complaints.join("\n"));
}

#[test]
fn what_reaches_an_output_takes_no_mathematics_from_the_platform() {
    let mut complaints = Vec::new();
    for path in all_sources() {
        let inside = path.strip_prefix(root()).unwrap().to_str().unwrap();
        let is_code = inside.starts_with("src/") || inside.contains("/src/");
        if !is_code || inside.ends_with("tests.rs") || inside.contains("/codec/laws") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        for (n, line) in code.lines().enumerate().filter(|(_, l)| !l.trim_start().starts_with("//")) {
            let found = PLATFORM_MATH.iter().filter(|f| line.contains(**f));
            complaints.extend(found.map(|f| format!("{inside}:{}: {f}", n + 1)));
        }
    }
    assert!(complaints.is_empty(), "use quant::math or libm:\n{}", complaints.join("\n"));
}

#[test]
fn each_crate_uses_only_those_to_its_left_and_has_the_lints_of_all() {
    for (n, (name, manifest)) in CRATES.iter().enumerate() {
        let text = std::fs::read_to_string(root().join(manifest)).unwrap();
        let manifest: toml::Table = text.parse().unwrap();
        assert_eq!(manifest["package"]["name"].as_str(), Some(*name));
        assert_eq!(manifest["lints"]["workspace"].as_bool(), Some(true), "{name}");
        for table in ["dependencies", "dev-dependencies"] {
            let Some(used) = manifest.get(table).and_then(toml::Value::as_table) else { continue };
            for (right, _) in &CRATES[n..] {
                assert!(!used.contains_key(*right), "{name} uses {right}");
            }
        }
    }
}

#[test]
fn the_readme_tells_of_every_command_and_every_exit_code() {
    let text = std::fs::read_to_string(root().join("README.md")).unwrap();
    for command in moepack::commands::COMMANDS {
        assert!(text.contains(&format!("moepack {} ", command.name)), "README.md has no {}", command.name);
    }
    let codes = text.split("Exit codes: ").nth(1).unwrap().split("\n\n").next().unwrap();
    for code in [0, 1, 2, 65, 66, 73, 74, 75, 77, 78, 130] {
        let told = codes.split(['·', '\n']).any(|c| c.trim().starts_with(&format!("{code} ")));
        assert!(told, "README.md does not tell exit code {code}");
    }
}

#[test]
fn the_documents_name_files_that_exist() {
    let mut complaints = Vec::new();
    for document in DOCUMENTS {
        let text = std::fs::read_to_string(root().join(document)).unwrap();
        let beside = root().join(document).parent().unwrap().to_path_buf();
        let exists = |path: &str| root().join(path).exists() || beside.join(path).exists();
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let links = links.filter(|l| !l.starts_with("http"));
        let is_source = |w: &&str| [".rs", ".py", ".md"].iter().any(|e| w.ends_with(e)) && w.contains('/');
        let words = text.split(['`', ' ', '(', ')', '\n']).filter(is_source);
        let words = words.filter(|w| !w.contains("/x.rs") && !w.contains(['<', '*']));
        complaints.extend(links.chain(words).filter(|p| !exists(p)).map(|p| format!("{document} names {p}")));
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
