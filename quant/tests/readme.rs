//! README.md says what the code does: its table is measured again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

#[path = "../examples/gaussian.rs"]
#[allow(dead_code, reason = "an example has a main")]
mod gaussian;

use moepack_quant::codec::CODECS;

const README: &str = include_str!("../README.md");

#[test]
fn the_table_of_codecs_is_what_the_example_prints() {
    let lines: Vec<Vec<&str>> = README
        .lines()
        .filter(|l| l.starts_with("| `"))
        .map(|l| l.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`')).collect::<Vec<_>>())
        .filter(|cells| cells.len() == 4)
        .collect();
    for row in gaussian::table() {
        let line = lines.iter().find(|l| l.first() == Some(&row.name));
        let &[_, bpw, mse, gap] = &line.unwrap_or_else(|| panic!("README has no {}", row.name))[..] else {
            panic!("the line of {} has other columns", row.name)
        };
        assert_eq!(bpw, format!("{:.3}", row.bpw), "bpw of {}", row.name);
        let found = mse.parse::<f64>().unwrap();
        assert!(
            (found / row.mse - 1.0).abs() < 0.006,
            "relative MSE of {}: {found:e}, measured {:e}",
            row.name,
            row.mse
        );
        let expected = row.bpw + 0.5 * row.mse.log2();
        assert!(
            (gap.parse::<f64>().unwrap() - expected).abs() < 0.002,
            "gap of {}: {gap}, {expected:.3}",
            row.name
        );
    }
}

#[test]
fn every_family_of_codecs_is_named() {
    let readme = README.replace("\\|", "|");
    for family in CODECS {
        assert!(readme.contains(&format!("`{}`", family.pattern)), "README does not say {}", family.pattern);
    }
}
