//! A bundle, open for reading: its manifest, its banks and its trunk, each file opened when it is first asked for.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::bank::{Bank, is_bank_name};
use crate::check::{self, CheckOptions, Damage, Progress};
use crate::contain::{contained, root_of};
use crate::error::{Context, Error, Kind, Result};
use crate::file::{InputFile, cut_short};
use crate::manifest::{FileEntry, LayerEntry, MANIFEST, Manifest};
use crate::safetensors::TensorInfo;
use crate::storage;
use crate::trunk::TrunkFile;

/// What [`Bundle::trunk`] says of a tensor that two files have.
pub(crate) const TRUNK_TWICE: &str = "another trunk file has this tensor too";

/// A bundle whose manifest holds together and whose files are all there in the right size.
#[derive(Debug)]
pub struct Bundle {
    /// Its directory.
    pub dir: PathBuf,
    /// What it says about itself.
    pub manifest: Manifest,
    /// Where links may lead.
    root: PathBuf,
    /// One for each of `manifest.layers`.
    banks: Vec<OnceLock<Bank>>,
    trunk: OnceLock<Vec<TrunkFile>>,
}

impl Bundle {
    /// Opens a bundle; sizes of all files are compared, nothing is read but the manifest.
    ///
    /// # Errors
    /// `Missing` without a manifest (an unfinished bundle) or with files missing, `BadData` if the manifest is
    /// damaged, too new, names files outside, or says other sizes than the files have.
    pub fn open(dir: &Path) -> Result<Bundle> {
        let bundle = Bundle::with_manifest(dir, Manifest::read(dir)?)?;
        let files = &bundle.manifest.files;
        let mut missing = Vec::new();
        for file in files {
            if !storage::exists(&dir.join(&file.path))? {
                missing.push(file.path.as_str());
            }
        }
        if !missing.is_empty() {
            let what = format!("{} files are missing: {}", missing.len(), missing.join(" "));
            return Err(Error::missing(what).in_file(dir).hint("copy or download the bundle again"));
        }
        files.iter().try_for_each(|file| bundle.open_entry(file).map(drop))?;
        Ok(bundle)
    }

    /// A bundle whose files were not looked at yet.
    pub(crate) fn with_manifest(dir: &Path, manifest: Manifest) -> Result<Bundle> {
        let banks = manifest.layers.iter().map(|_| OnceLock::new()).collect();
        let (dir, root) = (dir.to_path_buf(), root_of(dir)?);
        Ok(Bundle { dir, manifest, root, banks, trunk: OnceLock::new() })
    }

    /// Whether `path` is meant to be a bundle, finished or not.
    pub fn is_bundle(path: &Path) -> bool {
        let is_bank = |path: &PathBuf| path.file_name().and_then(|n| n.to_str()).is_some_and(is_bank_name);
        storage::is_file(&path.join(MANIFEST))
            || storage::list(path, usize::MAX).is_ok_and(|paths| paths.iter().any(is_bank))
    }

    /// Looks for damage in every file; see [`check::check`], which does not need the bundle to open.
    ///
    /// # Errors
    /// As [`check::check`].
    pub fn check(&self, options: CheckOptions, progress: &Progress<'_>) -> Result<Vec<Damage>> {
        check::check(&self.dir, options, progress)
    }

    /// The layers that have routed experts, ascending.
    pub fn layers(&self) -> &[LayerEntry] {
        &self.manifest.layers
    }

    /// The bank of a layer.
    ///
    /// # Errors
    /// A layer without experts, or a bank that contradicts itself or the manifest.
    pub fn bank(&self, layer: u32) -> Result<&Bank> {
        let found = self.manifest.layers.iter().zip(&self.banks).find(|(entry, _)| entry.layer == layer);
        let (entry, slot) = found.ok_or_else(|| {
            Error::bad_data(format!("layer {layer} has no routed experts")).in_file(&self.dir)
        })?;
        if let Some(bank) = slot.get() {
            return Ok(bank);
        }
        let path = self.path(&entry.bank)?;
        let bank = Bank::open(&path)?;
        check_bank(&bank, entry, self.manifest.align).in_file(&path)?;
        // Two threads may both come here; the first bank stays.
        Ok(slot.get_or_init(|| bank))
    }

    /// The trunk files in order.
    ///
    /// # Errors
    /// A file that is none, or a tensor that two files have.
    pub fn trunk(&self) -> Result<&[TrunkFile]> {
        if let Some(files) = self.trunk.get() {
            return Ok(files);
        }
        let mut files: Vec<TrunkFile> = Vec::new();
        for entry in &self.manifest.trunk {
            let new = TrunkFile::open(&self.path(&entry.file)?)?;
            let twice =
                new.header.tensors.iter().find(|t| {
                    !crate::is_pad(&t.name) && files.iter().any(|f| f.header.get(&t.name).is_some())
                });
            if let Some(t) = twice {
                let error = Error::bad_data(TRUNK_TWICE);
                return Err(error.in_file(new.file.path()).in_tensor(&t.name).at_byte(t.start));
            }
            files.push(new);
        }
        Ok(self.trunk.get_or_init(|| files))
    }

    /// The trunk tensor of this name and the file it lies in.
    ///
    /// # Errors
    /// A trunk file that cannot be opened.
    pub fn trunk_tensor(&self, name: &str) -> Result<Option<(&InputFile, &TensorInfo)>> {
        let found = |f: &'_ TrunkFile| f.header.get(name).is_some();
        let file = self.trunk()?.iter().find(|f| found(f));
        Ok(file.and_then(|f| f.header.get(name).map(|t| (&f.file, t))))
    }

    /// Opens one of the bundle's files (`config.json`, `tokenizer.json` …).
    ///
    /// # Errors
    /// A name that the manifest does not list, or a file of another size than it says.
    pub fn open_file(&self, name: &str) -> Result<InputFile> {
        let entry = self
            .manifest
            .file(name)
            .ok_or_else(|| Error::missing(format!("the manifest lists no {name:?}")).in_file(&self.dir))?;
        self.open_entry(entry)
    }

    /// Opens a listed file and compares its size.
    pub(crate) fn open_entry(&self, entry: &FileEntry) -> Result<InputFile> {
        let file = InputFile::open(&self.path(&entry.path)?)?;
        if file.len() == entry.bytes {
            return Ok(file);
        }
        let what = format!("needs {} bytes, has {}", entry.bytes, file.len());
        Err(cut_short(Error::new(Kind::BadData, what).in_file(self.dir.join(&entry.path))))
    }

    /// The path of a file, which was proven to lie inside.
    pub(crate) fn path(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        contained(&self.root, &path)?;
        Ok(path)
    }
}

/// The manifest's numbers about a bank are the bank's.
pub(crate) fn check_bank(bank: &Bank, entry: &LayerEntry, align: u64) -> Result<()> {
    let compare = |what: &str, found: u64, said: u64| {
        if found == said {
            return Ok(());
        }
        Err(Error::bad_data(format!("{what} is {found}, the manifest says {said}")))
    };
    compare("layer", bank.layer().into(), entry.layer.into())?;
    compare("n_experts", bank.n_experts().into(), entry.n_experts.into())?;
    compare("align", bank.align(), align)?;
    compare("max_record_bytes", bank.max_record_bytes(), entry.max_record_bytes)?;
    compare("payload_bytes", bank.payload_bytes(), entry.payload_bytes)?;
    compare("record_stride", bank.stride().unwrap_or(0), entry.record_stride.unwrap_or(0))?;
    let pads = bank.pads().iter().map(|(start, end)| end.saturating_sub(*start));
    compare("padding_bytes", pads.fold(0, u64::saturating_add), entry.padding_bytes)
}

#[cfg(test)]
mod tests;
