//! Safetensors headers that claim what is not so.

use super::*;

/// What a header may claim.
pub const HEADERS: &[Fault] = &[
    Fault {
        what: "overlapping tensors",
        of: QWEN3,
        exit: 65,
        says: &["overlaps", WEIGHTS, NORM],
        make: |m| {
            m.tensors(WEIGHTS, |t| {
                let norm = t.iter().position(|t| t.name == NORM).unwrap();
                let last = t.remove(norm);
                t.push(last);
            });
            m.header(|text| {
                let mut header: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
                let start = header[NORM]["data_offsets"][0].as_u64().unwrap();
                header[NORM]["data_offsets"] = json!([start - 64, start + 192]);
                serde_json::to_string(&header).unwrap()
            });
        },
    },
    Fault {
        what: "reversed offsets",
        of: QWEN3,
        exit: 65,
        says: &["reversed", WEIGHTS, NORM],
        make: |m| m.field(NORM, "data_offsets", json!([512, 256])),
    },
    Fault {
        what: "offsets beyond 2^64",
        of: QWEN3,
        exit: 65,
        says: &["beyond 2^64", WEIGHTS, NORM],
        make: |m| m.field(NORM, "data_offsets", json!([u64::MAX - 255, u64::MAX])),
    },
    Fault {
        what: "a hole between tensors",
        of: QWEN3,
        exit: 65,
        says: &["a hole of", WEIGHTS],
        make: |m| {
            m.header(|text| {
                let mut header: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
                header.remove(GATE);
                serde_json::to_string(&header).unwrap()
            });
        },
    },
    Fault {
        what: "one name twice",
        of: QWEN3,
        exit: 65,
        says: &["used twice", WEIGHTS, NORM],
        make: |m| {
            m.tensors(WEIGHTS, |t| t.push(zeros("model.norm.copied", &[64])));
            m.header(|text| text.replace("model.norm.copied", NORM));
        },
    },
    Fault {
        what: "a field twice",
        of: QWEN3,
        exit: 65,
        says: &["given twice", WEIGHTS],
        make: |m| {
            m.header(|text| text.replacen("\"dtype\":\"F32\"", "\"dtype\":\"F32\",\"dtype\":\"F32\"", 1))
        },
    },
    Fault {
        what: "a shape that is text",
        of: QWEN3,
        exit: 65,
        says: &[WEIGHTS, NORM],
        make: |m| m.field(NORM, "shape", json!("64")),
    },
    Fault {
        what: "an unknown field",
        of: QWEN3,
        exit: 65,
        says: &["unknown field", "stride", WEIGHTS, NORM],
        make: |m| m.field(NORM, "stride", json!(1)),
    },
    Fault {
        what: "a bomb of brackets",
        of: QWEN3,
        exit: 65,
        says: &[WEIGHTS],
        make: |m| {
            m.raw_header(format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000)).as_bytes())
        },
    },
    Fault {
        what: "a space before the header",
        of: QWEN3,
        exit: 65,
        says: &["header starts with ' '", WEIGHTS],
        make: |m| m.header(|text| format!(" {text}")),
    },
    Fault {
        what: "a byte order mark before the header",
        of: QWEN3,
        exit: 65,
        says: &["header starts with", WEIGHTS],
        make: |m| m.header(|text| format!("\u{feff}{text}")),
    },
    Fault {
        what: "a header that is a list",
        of: QWEN3,
        exit: 65,
        says: &["header starts with '['", WEIGHTS],
        make: |m| m.raw_header(b"[1, 2, 3, 4, 5]"),
    },
    Fault {
        what: "JSON cut short",
        of: QWEN3,
        exit: 65,
        says: &[WEIGHTS],
        make: |m| m.header(|text| text[..text.len() / 2].to_owned()),
    },
    Fault {
        what: "a negative dimension",
        of: QWEN3,
        exit: 65,
        says: &[WEIGHTS, NORM],
        make: |m| m.field(NORM, "shape", json!([-64])),
    },
    Fault {
        what: "a dimension of 64.5",
        of: QWEN3,
        exit: 65,
        says: &[WEIGHTS, NORM],
        make: |m| m.field(NORM, "shape", json!([64.5])),
    },
    Fault {
        what: "a dimension of 10^30",
        of: QWEN3,
        exit: 65,
        says: &[WEIGHTS, NORM],
        make: |m| m.field(NORM, "shape", json!([1e30])),
    },
    Fault {
        what: "a shape whose product overflows",
        of: QWEN3,
        exit: 65,
        says: &["4611686018427387904", WEIGHTS, NORM],
        make: |m| m.field(NORM, "shape", json!([1u64 << 62, 8])),
    },
    Fault {
        what: "shape and bytes disagree",
        of: QWEN3,
        exit: 65,
        says: &["256 bytes, but shape [65] of F32 takes 260", WEIGHTS, NORM],
        make: |m| m.field(NORM, "shape", json!([65])),
    },
    Fault {
        what: "dtype and bytes disagree",
        of: QWEN3,
        exit: 65,
        says: &["256 bytes, but shape [64] of BF16 takes 128", WEIGHTS, NORM],
        make: |m| m.field(NORM, "dtype", json!("BF16")),
    },
    Fault {
        what: "a dtype of the future",
        of: QWEN3,
        exit: 65,
        says: &["unknown dtype \"F2\"", WEIGHTS, NORM],
        make: |m| m.field(NORM, "dtype", json!("F2")),
    },
    Fault {
        what: "nine dimensions",
        of: QWEN3,
        exit: 65,
        says: &[WEIGHTS, NORM, "8"],
        make: |m| m.field(NORM, "shape", json!([64, 1, 1, 1, 1, 1, 1, 1, 1])),
    },
    Fault {
        what: "a name that is not UTF-8",
        of: QWEN3,
        exit: 65,
        says: &["0xff is not UTF-8", WEIGHTS],
        make: |m| {
            m.bytes(WEIGHTS, |b| {
                let at = b.windows(NORM.len()).position(|w| w == NORM.as_bytes()).unwrap();
                b[at] = 0xff;
            })
        },
    },
    Fault {
        what: "a name of 2000 bytes",
        of: QWEN3,
        exit: 65,
        says: &["a tensor name of 2000 bytes", WEIGHTS],
        make: |m| m.header(|text| text.replace(NORM, &"n".repeat(2000))),
    },
    Fault {
        what: "a tensor without a name",
        of: QWEN3,
        exit: 65,
        says: &["without a name", WEIGHTS],
        make: |m| m.header(|text| text.replace(NORM, "")),
    },
    Fault {
        what: "no tensors",
        of: QWEN3,
        exit: 66,
        says: &["no weights"],
        make: |m| m.tensors(WEIGHTS, Vec::clear),
    },
];
