//! A small bundle for the tests of this crate: two layers of three experts, a trunk of two files, one side file.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::bank::{BankWriter, PartBytes, PartSpec, bank_name};
use crate::file::hex;
use crate::manifest::{
    BUNDLE_FORMAT, FORMAT_VERSION, FileEntry, LayerEntry, Manifest, PartCodecs, PerExpert, ProjectionEntry,
    Provenance, Tool, Totals, TrunkEntry,
};
use crate::trunk::{TrunkWriter, trunk_name};
use crate::{Dtype, InputFile, PlaneSpec};

/// Layers that have experts.
pub(crate) const LAYERS: [u32; 2] = [1, 4];
/// Experts of each.
pub(crate) const N_EXPERTS: u32 = 3;
/// Alignment of records.
pub(crate) const ALIGN: u64 = 4096;

/// A bundle in a directory that goes away with it.
pub(crate) struct SmallBundle {
    _temp: tempfile::TempDir,
    /// The bundle's directory.
    pub(crate) dir: PathBuf,
    /// Its manifest as written, without the hash.
    pub(crate) manifest: Manifest,
}

impl SmallBundle {
    /// Writes one; in layer 4 records differ in size.
    pub(crate) fn new() -> SmallBundle {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("small.moepack");
        std::fs::create_dir(&dir).unwrap();
        let mut files = Vec::new();
        std::fs::write(dir.join("config.json"), b"{\"model_type\": \"small\"}\n").unwrap();
        let sha256 = hex(&Sha256::digest(std::fs::read(dir.join("config.json")).unwrap()));
        files.push(FileEntry { path: "config.json".to_owned(), bytes: 24, sha256 });
        let layers = LAYERS.map(|layer| write_bank(&dir, layer, &mut files)).to_vec();
        let trunk = [1, 2].map(|n| write_trunk(&dir, n, &mut files)).to_vec();
        let manifest = Manifest {
            format: BUNDLE_FORMAT.to_owned(),
            format_version: FORMAT_VERSION,
            features_required: Vec::new(),
            features_optional: Vec::new(),
            tool: Tool { name: "moepack".to_owned(), version: "0.1.0".to_owned() },
            align: ALIGN,
            family: "small".to_owned(),
            provenance: Provenance::default(),
            recipe: serde_json::json!({ "codec": "bf16" }),
            totals: Totals::sum(&files, &layers, &trunk, 1000, 100),
            files,
            layers,
            trunk,
            trunk_codecs: Default::default(),
            trunk_errors: Default::default(),
            left_out: Vec::new(),
            crc32c: String::new(),
            sha256: String::new(),
        };
        manifest.write(&dir).unwrap();
        SmallBundle { _temp: temp, dir, manifest }
    }

    /// The bank of a layer, as a file.
    pub(crate) fn bank_file(&self, layer: u32) -> InputFile {
        InputFile::open(&self.dir.join(bank_name(layer))).unwrap()
    }

    /// Rewrites the manifest after a change, so that its hash is right.
    pub(crate) fn rewrite(&self, change: impl FnOnce(&mut Manifest)) {
        let mut manifest = self.manifest.clone();
        change(&mut manifest);
        manifest.write(&self.dir).unwrap();
    }
}

/// The byte at a place of an expert's plane.
pub(crate) fn byte(layer: u32, expert: u32, i: usize) -> u8 {
    (layer as usize * 31 + expert as usize * 7 + i) as u8
}

fn write_bank(dir: &Path, layer: u32, files: &mut Vec<FileEntry>) -> LayerEntry {
    let mut w = BankWriter::create(&dir.join(bank_name(layer)), layer, N_EXPERTS, ALIGN, 6).unwrap();
    for expert in 0..N_EXPERTS {
        let n = if layer == 4 { 3000 + 2000 * expert as usize } else { 700 };
        let codes: Vec<u8> = (0..n).map(|i| byte(layer, expert, i)).collect();
        let spec = PartSpec { name: "gate_proj".to_owned(), codec: "bf16".to_owned(), rows: 1, cols: 1 };
        let planes = vec![
            (PlaneSpec::new("weight", Dtype::U8, &[n as u64]), codes.as_slice()),
            (PlaneSpec::new("scales", Dtype::U8, &[5]), &[1, 2, 3, 4, 5]),
        ];
        w.write_expert(expert, &[PartBytes { spec, planes }]).unwrap();
    }
    let summary = w.finish().unwrap();
    let (path, bytes, sha256) = (summary.file.clone(), summary.bytes, summary.sha256);
    files.push(FileEntry { path, bytes, sha256 });
    LayerEntry {
        layer,
        bank: summary.file,
        n_experts: N_EXPERTS,
        record_stride: summary.stride,
        max_record_bytes: summary.max_record_bytes,
        payload_bytes: summary.payload_bytes,
        padding_bytes: summary.padding_bytes,
        usage: Some(vec![5, 6, 7]),
        codecs: [("gate_proj".to_owned(), PartCodecs::Same("bf16".to_owned()))].into(),
        error: Some(0.001),
        header_crc32c: summary.header_crc32c,
        experts: [("gate_proj".to_owned(), projection())].into(),
    }
}

fn projection() -> ProjectionEntry {
    ProjectionEntry {
        bits: PerExpert::Same(4.25),
        hessian_source: PerExpert::Each(
            [Some("own"), None, Some("pooled")].map(|s| s.map(str::to_owned)).to_vec(),
        ),
        heldout_error: PerExpert::Each(vec![Some(0.01), None, Some(1.25e-6)]),
        heldout_error_rtn: PerExpert::Same(Some(0.02)),
        fallback: PerExpert::Each(vec![None, Some("rtn".to_owned()), None]),
    }
}

fn write_trunk(dir: &Path, n: usize, files: &mut Vec<FileEntry>) -> TrunkEntry {
    let names = [format!("tensor.{n}.a"), format!("tensor.{n}.b")];
    let specs = names.each_ref().map(|name| PlaneSpec::new(name, Dtype::U8, &[10]));
    let mut w = TrunkWriter::create(&dir.join(trunk_name(n, 2)), &specs).unwrap();
    for (i, name) in names.iter().enumerate() {
        w.write(name, &[(10 * n + i) as u8; 10]).unwrap();
    }
    let summary = w.finish().unwrap();
    let (path, bytes, sha256) = (summary.file.clone(), summary.bytes, summary.sha256);
    files.push(FileEntry { path, bytes, sha256 });
    TrunkEntry { file: summary.file, header_crc32c: summary.header_crc32c, crc32c: summary.crc32c }
}
