//! `manifest.json`: what a bundle consists of. It is written last, so without it there is no bundle.
//!
//! The last field is the SHA-256 of the file itself with that field's 64 digits as zeros, so that a flipped bit
//! in the manifest is found like one anywhere else. Unknown fields are ignored (a newer minor version may have
//! them); an unknown major version or an unknown required feature is refused by name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::atomic;
use crate::bank::check_align;
use crate::error::{Context, Error, Kind, Result};
use crate::file::{InputFile, hex};
use crate::limits::{EXPERTS_MAX, MANIFEST_BYTES_MAX};

/// Name of the manifest in a bundle.
pub const MANIFEST: &str = "manifest.json";

/// What `format` says in a manifest.
pub const BUNDLE_FORMAT: &str = "moepack.bundle";

/// The version that this code writes, and the newest that it reads in full.
pub const FORMAT_VERSION: FormatVersion = FormatVersion { major: 1, minor: 0 };

/// Required features that this code knows. Version 1.0 needs none.
pub const FEATURES: &[&str] = &[];

/// All about a bundle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`BUNDLE_FORMAT`].
    pub format: String,
    /// The lowest version that suffices to read it.
    pub format_version: FormatVersion,
    /// A reader that does not know one of these refuses the bundle.
    pub features_required: Vec<String>,
    /// A reader may ignore these.
    pub features_optional: Vec<String>,
    /// What wrote it.
    pub tool: Tool,
    /// What starts and lengths of records are multiples of.
    pub align: u64,
    /// Family of the model, as `model_type` in config.json.
    pub family: String,
    /// What it was made from.
    pub provenance: Provenance,
    /// Which codec each tensor got, as the recipe file says it.
    pub recipe: serde_json::Value,
    /// Every file but the manifest, sorted by path.
    pub files: Vec<FileEntry>,
    /// One for each layer with routed experts, ascending.
    pub layers: Vec<LayerEntry>,
    /// The trunk files in order.
    pub trunk: Vec<TrunkEntry>,
    /// Codec of each trunk tensor that is not stored as the checkpoint had it.
    pub trunk_codecs: BTreeMap<String, String>,
    /// Tensors of the checkpoint that the bundle does not have.
    pub left_out: Vec<LeftOut>,
    /// Sums over all of it.
    pub totals: Totals,
    /// SHA-256 of this file with these digits as zeros; [`Manifest::write`] fills it in.
    pub sha256: String,
}

/// Version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormatVersion {
    /// Another one cannot be read.
    pub major: u32,
    /// A larger one adds what may be ignored.
    pub minor: u32,
}

/// A program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// What a bundle was made from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// The files of the checkpoint, sorted by path, relative to it.
    pub sources: Vec<FileEntry>,
}

/// A file with what identifies its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Name in the bundle, or path in the checkpoint.
    pub path: String,
    /// Length.
    pub bytes: u64,
    /// SHA-256, 64 lower-case hex digits.
    pub sha256: String,
}

/// The routed experts of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerEntry {
    /// The layer.
    pub layer: u32,
    /// Name of its bank, one of `files`.
    pub bank: String,
    /// Number of experts.
    pub n_experts: u32,
    /// Distance of records if it is the same for all, else null.
    pub record_stride: Option<u64>,
    /// Padded bytes of the largest record.
    pub max_record_bytes: u64,
    /// Bytes of all planes of all experts.
    pub payload_bytes: u64,
    /// Bytes of all pads of the bank.
    pub padding_bytes: u64,
    /// How many tokens of the calibration text each expert saw, if there was one.
    pub usage: Option<Vec<u64>>,
    /// Codec of each part.
    pub codecs: BTreeMap<String, PartCodecs>,
    /// Relative squared error of the layer's expert weights against the checkpoint, if it was measured.
    pub error: Option<f64>,
}

/// The codec of one part of a layer's experts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PartCodecs {
    /// All experts have this one.
    Same(String),
    /// One for each expert.
    Each(Vec<String>),
}

/// A trunk file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrunkEntry {
    /// Its name, one of `files`.
    pub file: String,
}

/// A tensor that was not carried over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Its name in the checkpoint.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// Sums over a bundle.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Weights of all routed experts.
    pub expert_weights: u64,
    /// Weights of everything else.
    pub trunk_weights: u64,
    /// Bytes of all planes of all experts.
    pub expert_payload_bytes: u64,
    /// Bytes of all pads of all banks.
    pub padding_bytes: u64,
    /// Bytes of the trunk files.
    pub trunk_bytes: u64,
    /// Bytes of all files but the manifest.
    pub bundle_bytes: u64,
    /// Bits per weight of the routed experts: `expert_payload_bytes` over `expert_weights`.
    pub bpw_experts: f64,
    /// Bits per weight of the model: `expert_payload_bytes` and `trunk_bytes` over all weights.
    pub bpw_total: f64,
}

impl Totals {
    /// The sums, from what the manifest lists.
    pub fn sum(
        files: &[FileEntry],
        layers: &[LayerEntry],
        trunk: &[TrunkEntry],
        expert_weights: u64,
        trunk_weights: u64,
    ) -> Totals {
        let bytes_of = |name: &str| files.iter().find(|f| f.path == name).map_or(0, |f| f.bytes);
        // Numbers of a stranger's manifest come here too, so sums saturate.
        let sum = |all: &mut dyn Iterator<Item = u64>| all.fold(0, u64::saturating_add);
        let expert_payload_bytes = sum(&mut layers.iter().map(|l| l.payload_bytes));
        let trunk_bytes = sum(&mut trunk.iter().map(|t| bytes_of(&t.file)));
        let bpw = |bytes: u64, weights: u64| {
            if weights == 0 { 0.0 } else { bytes as f64 * 8.0 / weights as f64 }
        };
        Totals {
            expert_weights,
            trunk_weights,
            expert_payload_bytes,
            padding_bytes: sum(&mut layers.iter().map(|l| l.padding_bytes)),
            trunk_bytes,
            bundle_bytes: sum(&mut files.iter().map(|f| f.bytes)),
            bpw_experts: bpw(expert_payload_bytes, expert_weights),
            bpw_total: bpw(
                expert_payload_bytes.saturating_add(trunk_bytes),
                expert_weights.saturating_add(trunk_weights),
            ),
        }
    }
}

impl Manifest {
    /// Reads and checks the manifest of the bundle at `dir`.
    ///
    /// # Errors
    /// `Missing` if there is none, `BadData` if it was damaged, is newer than this code, or contradicts itself.
    pub fn read(dir: &Path) -> Result<Manifest> {
        let path = dir.join(MANIFEST);
        let text = read_text(dir)?;
        check_version(&text).and_then(|()| check_hash(&text)).in_file(&path)?;
        Manifest::parse(&text).in_file(&path)
    }

    /// Checks the text of a manifest, but not its hash.
    ///
    /// # Errors
    /// `BadData` as [`Manifest::read`].
    pub fn parse(text: &[u8]) -> Result<Manifest> {
        check_version(text)?;
        let manifest: Manifest = serde_json::from_slice(text).map_err(|e| json_error(&e, text))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Writes it into the bundle at `dir`, whole or not at all, with its own hash filled in.
    ///
    /// # Errors
    /// A manifest that could not be read again, or a failed write.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let text = self.to_text().in_file(dir.join(MANIFEST))?;
        atomic::write_file(&dir.join(MANIFEST), text.as_bytes())
    }

    /// The text that [`Manifest::write`] writes.
    ///
    /// # Errors
    /// A manifest that could not be read again.
    pub fn to_text(&self) -> Result<String> {
        let blank = Manifest { sha256: "0".repeat(64), ..self.clone() };
        blank.check()?;
        let json = serde_json::to_string_pretty(&blank);
        let mut text = json.map_err(|e| Error::bad_data(format!("cannot write JSON: {e}")))?;
        text.push('\n');
        let digits = hex(&Sha256::digest(&text));
        let (head, tail) = split_hash(text.as_bytes()).ok_or_else(|| Error::bad_data(HASH_PLACE))?;
        let mut out = head.to_vec();
        out.extend_from_slice(digits.as_bytes());
        out.extend_from_slice(tail);
        Manifest::parse(&out)?;
        String::from_utf8(out).map_err(|e| Error::bad_data(e.to_string()))
    }

    /// The file of this name.
    pub fn file(&self, path: &str) -> Option<&FileEntry> {
        self.files.iter().find(|f| f.path == path)
    }

    /// The experts of this layer.
    pub fn layer(&self, layer: u32) -> Option<&LayerEntry> {
        let at = self.layers.binary_search_by_key(&layer, |l| l.layer).ok()?;
        self.layers.get(at)
    }

    fn check(&self) -> Result<()> {
        if self.format != BUNDLE_FORMAT {
            return Err(Error::bad_data(format!("format {:?}, expected {BUNDLE_FORMAT:?}", self.format)));
        }
        check_align(self.align)?;
        for file in &self.files {
            check_file_name(&file.path)?;
            if file.path == MANIFEST {
                return Err(Error::bad_data("the manifest lists itself"));
            }
        }
        self.files.iter().chain(&self.provenance.sources).try_for_each(check_sha256)?;
        ascending(self.files.iter().map(|f| &f.path), "files")?;
        ascending(self.layers.iter().map(|l| &l.layer), "layers")?;
        self.layers.iter().try_for_each(check_layer)?;
        let banks = self.layers.iter().map(|l| &l.bank);
        let trunk = self.trunk.iter().map(|t| &t.file);
        let mut used = BTreeSet::new();
        for name in banks.chain(trunk) {
            if self.file(name).is_none() || !used.insert(name) {
                return Err(Error::bad_data(format!("{name:?} is used twice or not among the files")));
            }
        }
        Ok(())
    }
}

/// A name that cannot lead out of the bundle's directory.
///
/// # Errors
/// Separators, `..`, hidden names, control characters, or a name too long for a file.
pub fn check_file_name(name: &str) -> Result<()> {
    let fine = |c: char| !matches!(c, '/' | '\\' | ':') && !c.is_control();
    if !name.is_empty() && name.len() <= 255 && !name.starts_with('.') && name.chars().all(fine) {
        return Ok(());
    }
    Err(Error::bad_data(format!("file name {name:?}, expected a plain name inside the bundle")))
}

/// The bytes of the manifest at `dir`.
pub(crate) fn read_text(dir: &Path) -> Result<Vec<u8>> {
    let path = dir.join(MANIFEST);
    let file = InputFile::open(&path).map_err(|e| match e.kind() {
        Kind::Missing if dir.is_dir() => unfinished(dir),
        _ => e,
    })?;
    if file.len() > MANIFEST_BYTES_MAX {
        let what = format!("{} bytes, expected at most {MANIFEST_BYTES_MAX}", file.len());
        return Err(Error::bad_data(what).in_file(path));
    }
    let mut text = vec![0; file.len() as usize];
    file.read_exact_at(0, &mut text)?;
    Ok(text)
}

/// The hash at the end of the text is that of the text.
///
/// # Errors
/// `BadData` with both hashes.
pub(crate) fn check_hash(text: &[u8]) -> Result<()> {
    let (head, tail) = split_hash(text).ok_or_else(|| Error::bad_data(HASH_PLACE))?;
    let stored = text.get(head.len()..text.len() - tail.len()).unwrap_or_default();
    let mut hash = Sha256::new();
    hash.update(head);
    hash.update("0".repeat(64));
    hash.update(tail);
    let found = hex(&hash.finalize());
    if stored == found.as_bytes() {
        return Ok(());
    }
    let what = format!("sha256 of the manifest is {found}, it says {}", String::from_utf8_lossy(stored));
    Err(Error::bad_data(what).hint("the manifest was damaged or edited; copy the bundle again"))
}

const HASH_PLACE: &str = "the manifest does not end with its sha256";

/// What lies before and behind the 64 digits at the end.
fn split_hash(text: &[u8]) -> Option<(&[u8], &[u8])> {
    const BEFORE: &[u8] = b"\n  \"sha256\": \"";
    const BEHIND: &[u8] = b"\"\n}\n";
    let digits_end = text.len().checked_sub(BEHIND.len())?;
    let (head, tail) = text.split_at_checked(digits_end)?;
    let head = head.get(..head.len().checked_sub(64)?)?;
    (head.ends_with(BEFORE) && tail == BEHIND).then_some((head, tail))
}

/// Only what every version of the format has.
#[derive(Deserialize)]
struct Versioned {
    format_version: FormatVersion,
    #[serde(default)]
    features_required: Vec<String>,
}

fn check_version(text: &[u8]) -> Result<()> {
    let found: Versioned = serde_json::from_slice(text).map_err(|e| json_error(&e, text))?;
    let FormatVersion { major, minor } = found.format_version;
    if major != FORMAT_VERSION.major {
        let FormatVersion { major: ours, .. } = FORMAT_VERSION;
        let what = format!("format version {major}.{minor}, this moepack reads version {ours}");
        return Err(Error::bad_data(what).hint(format!("use a moepack that reads version {major}")));
    }
    match found.features_required.iter().find(|f| !FEATURES.contains(&f.as_str())) {
        Some(feature) => {
            let what = format!("required feature {feature:?} is unknown, known are {FEATURES:?}");
            Err(Error::bad_data(what).hint("use a newer moepack"))
        }
        None => Ok(()),
    }
}

fn json_error(error: &serde_json::Error, text: &[u8]) -> Error {
    let lines_before = text.split_inclusive(|&b| b == b'\n').take(error.line().saturating_sub(1));
    let start: usize = lines_before.map(<[u8]>::len).sum();
    let message = error.to_string();
    let what = message.rsplit_once(" at line ").map_or(message.as_str(), |(what, _)| what);
    Error::bad_data(what).at_byte(start.saturating_add(error.column().saturating_sub(1)) as u64)
}

fn unfinished(dir: &Path) -> Error {
    Error::missing(format!("no {MANIFEST}: this is an unfinished bundle, or none"))
        .in_file(dir)
        .hint("run the same `moepack quantize` again with --resume")
}

fn check_layer(layer: &LayerEntry) -> Result<()> {
    let (l, n) = (layer.layer, layer.n_experts);
    if n == 0 || n > EXPERTS_MAX {
        return Err(Error::bad_data(format!("layer {l} has {n} experts, expected 1 to {EXPERTS_MAX}")));
    }
    let check = |what: &str, found: usize| {
        if found == n as usize {
            return Ok(());
        }
        Err(Error::bad_data(format!("layer {l} has {found} {what}, but {n} experts")))
    };
    if let Some(usage) = &layer.usage {
        check("usage counts", usage.len())?;
    }
    for (part, codecs) in &layer.codecs {
        if let PartCodecs::Each(codecs) = codecs {
            check(&format!("codecs of {part}"), codecs.len())?;
        }
    }
    Ok(())
}

fn check_sha256(file: &FileEntry) -> Result<()> {
    let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if file.sha256.len() == 64 && file.sha256.bytes().all(digit) {
        return Ok(());
    }
    Err(Error::bad_data(format!("sha256 {:?} of {:?}, expected 64 hex digits", file.sha256, file.path)))
}

/// Each item is larger than the one before: sorted, and none twice.
fn ascending<T: Ord + std::fmt::Debug>(items: impl Iterator<Item = T>, what: &str) -> Result<()> {
    let mut before = None;
    for item in items {
        if before.as_ref().is_some_and(|b| *b >= item) {
            return Err(Error::bad_data(format!(
                "{what}: {item:?} behind {before:?}, expected ascending order"
            )));
        }
        before = Some(item);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
