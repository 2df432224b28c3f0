//! Values that readers of text do not expect.

use crate::random::Random;

/// Ways to write what is no sensible number, name or list. They are JSON, and mostly TOML; a few are neither.
const VALUES: &[&str] = &[
    "0",
    "1",
    "-1",
    "2",
    "7",
    "255",
    "65536",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "1152921504606846976",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e3",
    "1e19",
    "1e308",
    "1e999",
    "-1e999",
    "0.5",
    "-0.0",
    "1e-320",
    "3.0000000000000001",
    "01",
    "+1",
    ".5",
    "NaN",
    "Infinity",
    "null",
    "true",
    "false",
    "\"\"",
    "\"0\"",
    "\"NaN\"",
    "\"../../etc/passwd\"",
    "\"/etc/passwd\"",
    "\"C:\\\\a\"",
    "\"a\\u0000b\"",
    "\"\\u001b[31m\\u202e\"",
    "\"\\ud800\"",
    "\"\u{feff}\"",
    "\"model.layers.0\"",
    "\"F32\"",
    "\"U8\"",
    "\"BF16\"",
    "\"F8_E4M3\"",
    "[]",
    "{}",
    "[[]]",
    "[0]",
    "[1,1]",
    "[-1]",
    "[0,0]",
    "[1152921504606846976,8]",
    "[4294967296,4294967296]",
    "[1,1,1,1,1,1,1,1,1]",
    "{\"a\":1}",
    "{\"a\":1,\"a\":2}",
    "\"mxfp4\"",
    "\"int4-g64\"",
    "\"layers.*.experts.*.*\"",
    "\"*\"",
];

/// A value out of the list, or one too long or too deep to stand there.
pub(super) fn hostile(random: &mut Random) -> Vec<u8> {
    match random.below(40) {
        0 => nested(random, "[", "]"),
        1 => nested(random, "{\"a\":", "}"),
        2 => {
            let n = long(random);
            format!("\"{}\"", "a".repeat(n)).into_bytes()
        }
        3 => {
            let n = long(random);
            format!("[{}0]", "0,".repeat(n)).into_bytes()
        }
        4 => "9".repeat(1 + random.below(400)).into_bytes(),
        _ => random.pick(VALUES).map(|v| v.as_bytes().to_vec()).unwrap_or_default(),
    }
}

fn long(random: &mut Random) -> usize {
    [20, 300, 2000, 70_000].get(random.below(4)).copied().unwrap_or(20)
}

fn nested(random: &mut Random, open: &str, close: &str) -> Vec<u8> {
    let n = [8, 70, 130, 30_000].get(random.below(4)).copied().unwrap_or(8);
    let inner = if open.ends_with(':') { "1" } else { "" };
    [open.repeat(n), inner.to_owned(), close.repeat(n)].concat().into_bytes()
}

/// A number near to or in some relation with this one.
pub(super) fn near(random: &mut Random, number: &str) -> Vec<u8> {
    if let Ok(n) = number.parse::<i128>() {
        let other = match random.below(8) {
            0 => n + 1,
            1 => n - 1,
            2 => n * 2,
            3 => n / 2,
            4 => -n,
            5 => n * 1000,
            6 => n << random.below(62),
            _ => n + i128::from(random.number() as i16),
        };
        return other.to_string().into_bytes();
    }
    match random.below(3) {
        0 => format!("-{number}").into_bytes(),
        1 => format!("\"{number}\"").into_bytes(),
        _ => format!("{number}e{}", random.below(400)).into_bytes(),
    }
}
