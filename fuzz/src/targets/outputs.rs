//! What an earlier run left beside an output, which the next one reads.

use std::path::Path;

use moepack::engine::trunk::write::TrunkNote;
use moepack::engine::workspace::{EXPORT, EXPORT_FORMAT, Workspace, refuse_existing};
use moepack::engine::writer::LayerNote;
use moepack_format::manifest::LayerEntry;
use moepack_format::{Error, FileSummary, Result};
use serde_json::{Value, json};

use super::models::bundle;
use super::{Ready, directory, put};
use crate::corpus::Seed;

/// The journal of work like this, or of other work.
pub(super) fn journal(dir: &Path) -> Result<Ready> {
    let target = dir.join("m.moepack");
    let partial = dir.join("m.moepack.partial");
    directory(&partial)?;
    let rules = [json!({"tensor": "layers.*.experts.*.*", "codec": "int4-g64"})];
    let sources = [json!({"path": "model.safetensors", "fingerprint": {"bytes": 77, "mtime_ns": 5}})];
    let work = json!({"version": "0.1.0", "work": {"recipe": {"rule": rules}, "calibration": null}, "sources": sources});
    let seeds = vec![Seed::new("journal", work.to_string())];
    Ready::new(seeds, move |_, bytes| {
        put(&partial.join("journal.json"), bytes)?;
        let opened = Workspace::open(&target, false, &work)?;
        assert!(opened.resumed(), "what is not the same work is refused");
        Ok(())
    })
}

/// Notes of finished banks, trunks and files.
pub(super) fn notes(dir: &Path) -> Result<Ready> {
    let bundle = bundle(dir, "int4-g64")?;
    let manifest = moepack_format::Manifest::read(&bundle)?;
    let file = manifest.files.first().ok_or_else(|| Error::bad_data("no file"))?;
    let summary = FileSummary {
        file: file.path.clone(),
        bytes: file.bytes,
        sha256: file.sha256.clone(),
        payload_bytes: 7,
        padding_bytes: 0,
        header_crc32c: "0".repeat(8),
        crc32c: "0".repeat(16),
    };
    let trunk = TrunkNote { files: vec![summary], ..TrunkNote::default() };
    let seeds = vec![
        seed("bank", &json!({"summary": bank_summary(&manifest.layers), "entry": manifest.layers.first()})),
        seed("trunk", &serde_json::to_value(&trunk).unwrap_or_default()),
    ];
    let workspace = Workspace::open(&dir.join("m.moepack"), false, &json!(1))?;
    Ready::new(seeds, move |of, bytes| {
        put(&workspace.home().join("piece.note.json"), bytes)?;
        match of {
            "bank" => workspace.note::<LayerNote>("piece").map(drop),
            _ => workspace.note::<TrunkNote>("piece").map(drop),
        }
    })
}

fn seed(name: &str, value: &Value) -> Seed {
    Seed::new(name, value.to_string())
}

fn bank_summary(layers: &[LayerEntry]) -> Value {
    let layer = layers.first();
    json!({"file": layer.map(|l| &l.bank), "bytes": 7, "sha256": "0".repeat(64), "stride": 4096, "max_record_bytes": 4096,
        "payload_bytes": 7, "padding_bytes": 1, "n_experts": 4, "layer": 0, "align": 4096, "codecs": ["int4-g64"]})
}

/// The list of an export's files, which decides whether a directory may be overwritten.
pub(super) fn export_list(dir: &Path) -> Result<Ready> {
    let target = dir.join("export");
    directory(&target)?;
    put(&target.join("model.safetensors"), b"weights")?;
    let files = json!([{"path": "model.safetensors", "bytes": 7, "sha256": "0".repeat(64)}]);
    let list =
        json!({"format": EXPORT_FORMAT, "tool": {"name": "moepack", "version": "0.1.0"}, "files": files});
    Ready::new(vec![seed("list", &list)], move |_, bytes| {
        put(&target.join(EXPORT), bytes)?;
        refuse_existing(&target, true)
    })
}
