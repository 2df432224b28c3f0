//! stdout carries data, stderr carries talk. Nothing needs colour to be understood.

use std::io::{ErrorKind, Write};
use std::path::Path;

use moepack_format::error::printable;
use moepack_format::{Error, Kind, Result, atomic, storage};
use serde::Serialize;

/// Writes `text` to stdout. A closed pipe (`| head`) is no error: the reader has what it wanted.
///
/// # Errors
/// Any other failure to write.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(Error::new(Kind::Io, format!("cannot write to stdout: {e}")))
        }
        _ => Ok(()),
    }
}

/// Writes one JSON document to stdout.
///
/// # Errors
/// As [`print`].
pub fn print_json(document: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(document)
        .map_err(|e| Error::new(Kind::Io, format!("cannot write the result as JSON: {e}")))?;
    print(&(text + "\n"))
}

/// Refuses an output file that exists, unless it may be overwritten, and removes what killed runs left of it. Asked before
/// any work is done.
///
/// # Errors
/// Kind `CannotCreate`.
pub fn refuse_existing_file(path: &Path, overwrite: bool) -> Result<()> {
    if overwrite || storage::symlink_metadata(path).is_err() {
        atomic::sweep_dead(path);
        return Ok(());
    }
    Err(Error::new(Kind::CannotCreate, "the output exists")
        .in_file(path)
        .hint("choose another name, or say --overwrite"))
}

/// Writes a text file, whole or not at all.
///
/// # Errors
/// The file cannot be written.
pub fn write_file(path: &Path, text: &str) -> Result<()> {
    atomic::write_file(path, text.as_bytes())
}

/// One line of talk on stderr; a stderr that is gone is no reason to stop.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", printable(text));
}

/// A warning on stderr.
pub fn warn(text: &str) {
    say(&format!("warning: {text}"));
}

/// A table for people: columns padded to their widest cell, numbers (cells that start with a digit, sign or dot) to
/// the right. The first row is the heading.
pub fn table(rows: &[Vec<String>]) -> String {
    let n_columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..n_columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &w)| pad(cell, w)).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn pad(cell: &str, width: usize) -> String {
    let numeric = cell.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c));
    let fill = " ".repeat(width.saturating_sub(cell.chars().count()));
    if numeric { fill + cell } else { cell.to_owned() + &fill }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_lines_up() {
        let row = |cells: &[&str]| cells.iter().map(|c| (*c).to_owned()).collect::<Vec<_>>();
        let text = table(&[row(&["layer", "bpw"]), row(&["0", "4.25"]), row(&["total", "10.5"])]);
        assert_eq!(text, "layer  bpw\n    0  4.25\ntotal  10.5\n");
    }
}
