//! `manifest.json`: what a bundle consists of. It is written last, so without it there is no bundle.
//!
//! The last field is the SHA-256 of the file itself with that field's 64 digits as zeros, so that a flipped bit
//! in the manifest is found like one anywhere else; the field before it says which bit it was (`mend.rs`). Unknown fields are ignored (a newer minor version may have
//! them); an unknown major version or an unknown required feature is refused by name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::atomic;
use crate::bank::check_align;
use crate::error::{Context, Error, Kind, Result};
use crate::file::InputFile;
use crate::limits::{EXPERTS_MAX, MANIFEST_BYTES_MAX};

mod entries;
mod mend;
mod text;

pub(crate) use entries::crc_of_hex;
pub use entries::{
    FileEntry, FormatVersion, LayerEntry, LeftOut, PartCodecs, PerExpert, ProjectionEntry, Provenance,
    TensorPattern, Tool, Totals, TrunkEntry, four_digits,
};
pub use mend::{BLOCK_BYTES, Mended, mend};
pub(crate) use text::check_hash;
use text::{check_version, fill_checks, json_error, to_json};

/// Name of the manifest in a bundle.
pub const MANIFEST: &str = "manifest.json";

/// Name of the signature that OpenSSF model signing leaves in the directory of a model; no file of the bundle.
pub const SIGNATURE: &str = "model.sig";

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
    /// Relative squared error of each of these by name, where calibration decided how they were coded.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub trunk_errors: BTreeMap<String, f64>,
    /// Tensors of the checkpoint that the bundle does not have.
    pub left_out: Vec<LeftOut>,
    /// Sums over all of it.
    pub totals: Totals,
    /// CRC-32C of each 1024 bytes of this file in front of this field, 8 hex digits each, by which flipped bits are turned
    /// back; [`Manifest::write`] fills it in. Earlier versions had none.
    #[serde(default)]
    pub crc32c: String,
    /// SHA-256 of this file with these digits as zeros; [`Manifest::write`] fills it in.
    pub sha256: String,
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
        let blank = Manifest { crc32c: String::new(), sha256: "0".repeat(64), ..self.clone() };
        blank.check()?;
        let mut text = to_json(&blank)?;
        text.push(b'\n');
        let out = fill_checks(&text)?;
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
        Kind::Missing if crate::storage::is_dir(dir) => unfinished(dir),
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
        codecs.n_listed().map_or(Ok(()), |found| check(&format!("codecs of {part}"), found))?;
    }
    for (projection, entry) in &layer.experts {
        let ProjectionEntry { bits, hessian_source, heldout_error, heldout_error_rtn, fallback } = entry;
        let (errors, names) = ([heldout_error, heldout_error_rtn], [hessian_source, fallback]);
        let listed = errors.iter().map(|c| c.n_listed()).chain(names.iter().map(|c| c.n_listed()));
        for found in listed.chain([bits.n_listed()]).flatten() {
            check(&format!("values of {projection}"), found)?;
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
