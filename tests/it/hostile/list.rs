//! `fixtures/hostile/README.md` compared with the tests: each fault once, each test that it names there, no row of a table
//! and no file of the folder left out.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::{Fault, configs, encodings, files, headers, tensors};
use crate::support::fixture;

/// Faults are numbered up to here.
const N_FAULTS: usize = 76;
/// Exit codes of the program.
const EXITS: [i32; 11] = [0, 1, 2, 65, 66, 73, 74, 75, 77, 78, 130];

/// A line of the page's tables.
struct Line {
    number: usize,
    outcome: String,
    made_by: Vec<String>,
}

fn page() -> String {
    fs::read_to_string(fixture("hostile/README.md")).unwrap()
}

fn lines() -> Vec<Line> {
    let cells = |line: &str| line.trim_matches('|').split(" | ").map(|c| c.trim().to_owned()).collect();
    let text = page();
    let rows = text.lines().filter(|l| l.starts_with("| ") && !l.starts_with("| n "));
    rows.map(|row| {
        let cells: Vec<String> = cells(row);
        let [number, _, outcome, made_by] = &cells[..] else { panic!("four cells are expected: {row}") };
        let made_by = made_by.split("; ").map(|m| m.trim_matches('|').trim().to_owned());
        let made_by = made_by.filter(|m| !m.is_empty()).collect();
        Line { number: number.parse().unwrap(), outcome: outcome.clone(), made_by }
    })
    .collect()
}

fn faults() -> impl Iterator<Item = &'static Fault> {
    let tables = [
        files::FILES,
        headers::HEADERS,
        configs::INDEXES,
        configs::CONFIGS,
        tensors::TENSORS,
        tensors::VALUES,
        encodings::HEADERS,
        encodings::VALUES,
    ];
    tables.into_iter().flatten()
}

fn row_of(made_by: &str) -> Option<&str> {
    made_by.strip_prefix("row \"")?.strip_suffix('"')
}

/// Numbers in the outcome that are exit codes.
fn exits(outcome: &str) -> Vec<i32> {
    let words = outcome.split(|c: char| !c.is_ascii_digit());
    words.filter_map(|w| w.parse().ok()).filter(|n| EXITS.contains(n)).collect()
}

#[test]
fn each_fault_has_one_line() {
    let numbers: Vec<usize> = lines().iter().map(|l| l.number).collect();
    assert_eq!(numbers, (1..=N_FAULTS).collect::<Vec<_>>());
}

#[test]
fn each_line_says_what_happens_and_names_tests_that_are_there() {
    for line in lines() {
        let Line { number, outcome, made_by } = line;
        if let Some(reason) = outcome.strip_prefix("not applicable: ") {
            assert!(reason.len() > 20 && made_by.is_empty(), "fault {number} is {outcome}");
            continue;
        }
        assert!(!made_by.is_empty(), "nothing makes fault {number}");
        for test in made_by {
            match row_of(&test) {
                Some(row) => {
                    let fault = faults().find(|f| f.what == row);
                    let fault = fault.unwrap_or_else(|| panic!("fault {number}: there is no row {row:?}"));
                    assert!(
                        exits(&outcome).contains(&fault.exit),
                        "fault {number}: {row:?} exits with {}",
                        fault.exit
                    );
                }
                None => assert_is_test(number, &test),
            }
        }
    }
}

fn assert_is_test(number: usize, test: &str) {
    let parts = test.strip_prefix('`').and_then(|t| t.split_once("` "));
    let (file, name) = parts.unwrap_or_else(|| panic!("fault {number}: {test:?} is no `file` test"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("fault {number}: {file}: {e}"));
    let before = text.split(&format!("fn {name}(")).next().unwrap();
    assert!(before.len() < text.len(), "fault {number}: {file} has no {name}");
    assert!(before.trim_end().ends_with("#[test]"), "fault {number}: {name} of {file} is no test");
}

#[test]
fn each_row_and_each_file_is_on_the_page() {
    let text = page();
    let all: BTreeSet<String> = lines().into_iter().flat_map(|l| l.made_by).collect();
    for fault in faults() {
        let named = all.iter().any(|m| row_of(m) == Some(fault.what));
        assert!(named, "row {:?} is not on the page", fault.what);
    }
    for entry in fs::read_dir(fixture("hostile")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name == "README.md" || text.contains(&format!("`{name}`")), "{name} is not on the page");
    }
}
