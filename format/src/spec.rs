//! `SPEC.md` says what the code does: its numbers, its field names and its hex dump.

use std::collections::BTreeSet;

use crate::bank::{BankWriter, PartBytes, PartSpec, bank_name};
use crate::testing::SmallBundle;
use crate::{ALIGN_DEFAULT, Bank, Dtype, PlaneSpec, TENSOR_ALIGN, limits as l};

const SPEC: &str = include_str!("../SPEC.md");

#[test]
fn every_limit_is_in_the_table_with_its_value() {
    let limits = [
        ("HEADER_BYTES_MIN", l::HEADER_BYTES_MIN),
        ("HEADER_BYTES_MAX", l::HEADER_BYTES_MAX),
        ("TENSORS_MAX", l::TENSORS_MAX as u64),
        ("NAME_BYTES_MAX", l::NAME_BYTES_MAX as u64),
        ("DIMS_MAX", l::DIMS_MAX as u64),
        ("EXPERTS_MAX", l::EXPERTS_MAX.into()),
        ("PARTS_MAX", l::PARTS_MAX as u64),
        ("PLANES_MAX", l::PLANES_MAX as u64),
        ("RECORD_BYTES_MAX", l::RECORD_BYTES_MAX),
        ("ALIGN_MIN", l::ALIGN_MIN),
        ("ALIGN_MAX", l::ALIGN_MAX),
        ("MANIFEST_BYTES_MAX", l::MANIFEST_BYTES_MAX),
        ("PREFETCH_QUEUE_MAX", l::PREFETCH_QUEUE_MAX as u64),
    ];
    let in_code = include_str!("limits.rs").matches("\npub const ").count();
    assert_eq!(limits.len(), in_code, "a limit is missing in this test");
    for (name, value) in limits {
        let row = format!("| `{name}` | {value} |");
        assert!(SPEC.contains(&row), "SPEC.md does not say {row}");
    }
}

#[test]
fn other_constants_are_those_of_the_code() {
    let versions = (crate::manifest::FORMAT_VERSION.major, crate::manifest::FORMAT_VERSION.minor);
    for text in [
        format!("# The moepack bundle, version {}.{}\n", versions.0, versions.1),
        format!(r#"`{{"major": {}, "minor": {}}}`"#, versions.0, versions.1),
        format!("`format_version` is `{}`", crate::bank::FILE_VERSION),
        format!("| `format` | `{}` |", crate::bank::BANK_FORMAT),
        format!("`format` is `{}`", crate::trunk::TRUNK_FORMAT),
        format!("| `format` | `{}` |", crate::manifest::BUNDLE_FORMAT),
        format!("`TENSOR_ALIGN` = {TENSOR_ALIGN}"),
        format!("`ROW_BYTES` = {}", crate::index::ROW_BYTES),
        format!("`ALIGN_DEFAULT` = {ALIGN_DEFAULT}"),
        format!("shape `[n_experts, {}]`", crate::index::ROW_BYTES),
    ] {
        assert!(SPEC.contains(&text), "SPEC.md does not say {text}");
    }
}

#[test]
fn every_field_that_is_written_is_described() {
    let small = SmallBundle::new();
    let manifest = serde_json::to_value(&small.manifest).unwrap();
    let objects = [
        &manifest,
        &manifest["layers"][0],
        &manifest["totals"],
        &manifest["layers"][0]["experts"]["gate_proj"],
    ];
    let fields = objects.iter().flat_map(|o| o.as_object().unwrap().keys().cloned());
    let bank = crate::Header::read(&small.bank_file(1)).unwrap();
    let mut seen = BTreeSet::new();
    for field in fields.chain(bank.metadata.keys().cloned()) {
        assert!(SPEC.contains(&format!("\n| `{field}` | ")), "SPEC.md has no row for {field}");
        seen.insert(field);
    }
    assert!(seen.len() > 30, "{seen:?}");
}

#[test]
fn the_hex_dump_is_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(bank_name(3));
    let mut w = BankWriter::create(&path, 3, 1, 4096, 3).unwrap();
    let part = |name: &str, codec: &str, rows, cols, planes| PartBytes {
        spec: PartSpec { name: name.to_owned(), codec: codec.to_owned(), rows, cols },
        planes,
    };
    let bias: Vec<u8> = [1.0f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let codes = (PlaneSpec::new("codes", Dtype::U8, &[2, 2]), &[0x10, 0x32, 0x54, 0x76][..]);
    let scales = (PlaneSpec::new("scales", Dtype::F16, &[2, 1]), &[0x00, 0x3c, 0x00, 0x38][..]);
    let values = (PlaneSpec::new("values", Dtype::F32, &[2]), bias.as_slice());
    let parts = [
        part("gate_proj", "int4-g4", 2, 4, vec![codes, scales]),
        part("gate_bias", "f32", 2, 1, vec![values]),
    ];
    w.write_expert(0, &parts).unwrap();
    w.finish().unwrap();
    assert!(Bank::open(&path).unwrap().read(0, true).is_ok());
    let written = hex_dump(&std::fs::read(&path).unwrap());
    let (_, rest) = SPEC.split_once("```hex\n").unwrap();
    let (printed, _) = rest.split_once("```").unwrap();
    assert!(printed == written, "the dump in SPEC.md should be\n{written}");
}

/// As `hexdump -C` prints it.
fn hex_dump(bytes: &[u8]) -> String {
    let mut out = String::new();
    let (mut before, mut starred) = (None, false);
    for (i, row) in bytes.chunks(16).enumerate() {
        if before == Some(row) {
            if !starred {
                out.push_str("*\n");
            }
            starred = true;
            continue;
        }
        (before, starred) = (Some(row), false);
        let hex: Vec<_> = row.iter().map(|b| format!("{b:02x}")).collect();
        let halves = hex.chunks(8).map(|half| half.join(" ")).collect::<Vec<_>>().join("  ");
        let visible = |&b: &u8| if (0x20..0x7f).contains(&b) { char::from(b) } else { '.' };
        let text: String = row.iter().map(visible).collect();
        out.push_str(&format!("{:08x}  {halves:48}  |{text}|\n", i * 16));
    }
    out + &format!("{:08x}\n", bytes.len())
}
