//! Sizes as people write them: `96GiB`, `400 MiB`, `1.5GB`, `4096`.

use moepack_format::{Error, Result};

const UNITS: &[(&str, f64)] = &[
    ("", 1.0),
    ("b", 1.0),
    ("k", 1024.0),
    ("m", 1048576.0),
    ("g", 1073741824.0),
    ("t", 1099511627776.0),
    ("kib", 1024.0),
    ("mib", 1048576.0),
    ("gib", 1073741824.0),
    ("tib", 1099511627776.0),
    ("kb", 1e3),
    ("mb", 1e6),
    ("gb", 1e9),
    ("tb", 1e12),
];

/// Bytes that `text` means; a fraction of a byte is dropped.
///
/// # Errors
/// No number, an unknown unit, or more than 2^63 bytes.
pub fn parse(text: &str) -> Result<u64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim().to_ascii_lowercase();
    let factor = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor);
    match (number.parse::<f64>(), factor) {
        (Ok(n), Some(factor)) if n * factor < 9.2e18 => Ok((n * factor) as u64),
        _ => Err(Error::usage(format!("{text:?} is no size"))
            .hint("write 400MiB, 96GiB, 1.5TB or a number of bytes")),
    }
}

/// `parse` for clap.
pub fn parse_arg(text: &str) -> std::result::Result<u64, String> {
    parse(text).map_err(|e| e.to_string())
}

/// Bytes for people: `1.5 GiB`.
pub fn human(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.2} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in
            [("96GiB", 96 << 30), ("1.5 kb", 1500), ("4096", 4096), ("400 MiB", 400 << 20), ("2g", 2 << 30)]
        {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "GiB", "3 bananas", "-1", "1e9", "99999999999 TiB"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_written_for_people() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(1536), "1.50 KiB");
        assert_eq!(human(96 << 30), "96.00 GiB");
    }
}
