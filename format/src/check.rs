//! Looking for damage: every file, every checksum, every invariant, and all that is wrong at once.
//!
//! A file is read once; its SHA-256, the checksums of its records and the zeros of its pads are computed from the
//! same bytes. A bundle whose manifest is damaged is still looked at as far as the manifest can be understood.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::bundle::Bundle;
use crate::error::{Context, Error, Kind, Result};
use crate::file::InputFile;
use crate::handles::lock;
use crate::manifest::{
    FileEntry, MANIFEST, Manifest, Mended, SIGNATURE, Totals, check_hash, mend, read_text,
};
use crate::storage;
use serde::Serialize;

mod sample;
mod scan;
mod subject;

pub use sample::Sample;
use scan::Meaning;
use subject::Subject;

/// How much is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckLevel {
    /// The manifest, names and sizes of files, headers and indexes.
    Quick,
    /// The same, and a share of all records and trunk tensors.
    Sample(Sample),
    /// Every byte.
    Full,
}

/// How to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckOptions {
    /// How much is looked at.
    pub level: CheckLevel,
    /// Files that are read at the same time, at least one.
    pub threads: usize,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The file, relative to the bundle.
    pub file: String,
    /// The layer, if it is a bank.
    pub layer: Option<u32>,
    /// The expert, if it is in a record.
    pub expert: Option<u32>,
    /// The tensor or record.
    pub tensor: Option<String>,
    /// Where in the file it is or starts.
    pub byte: Option<u64>,
    /// First byte behind it, where that is known.
    pub end: Option<u64>,
    /// What was found and what was expected.
    pub what: String,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut place = vec![self.file.clone()];
        place.extend(self.layer.map(|layer| format!("layer {layer}")));
        place.extend(self.expert.map(|expert| format!("expert {expert}")));
        place.extend(self.tensor.clone());
        place.extend(self.byte.map(|byte| {
            match self.end.and_then(|end| end.checked_sub(1)).filter(|last| *last > byte) {
                Some(last) => format!("bytes {byte} to {last}"),
                None => format!("byte {byte}"),
            }
        }));
        f.write_str(&crate::error::printable(&format!("{}: {}", place.join(", "), self.what)))
    }
}

/// How far a check is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckProgress {
    /// Bytes read so far.
    pub bytes_done: u64,
    /// Bytes of all files, or zero if none is read.
    pub bytes_total: u64,
}

/// Told after each chunk, by any thread; it can stop the check.
pub type Progress<'a> = dyn Fn(CheckProgress) -> ControlFlow<()> + Sync + 'a;

/// All damage of the bundle at `dir`, in the order of its files; none means that it is whole.
///
/// # Errors
/// `Missing` without a manifest, `BadData` if it is of a version that is not ours to read, a failed read, or
/// `Interrupted` if `progress` said so.
pub fn check(dir: &Path, options: CheckOptions, progress: &Progress<'_>) -> Result<Vec<Damage>> {
    let ManifestRead { manifest, mut damage, .. } = read_manifest(dir)?;
    let Some(manifest) = manifest else { return Ok(damage) };
    let bundle = Bundle::with_manifest(dir, manifest)?;
    damage.extend(wrong_totals(&bundle.manifest));
    damage.extend(check_files(&bundle, options, progress)?);
    damage.extend(trunk_twice(&bundle));
    damage.extend(extra_files(&bundle)?);
    Ok(damage)
}

/// A manifest as far as it can be read.
#[derive(Clone, Debug)]
pub struct ManifestRead {
    /// What it says, flipped bits turned back; `None` if it says nothing any more.
    pub manifest: Option<Manifest>,
    /// Its text with flipped bits turned back, if there were any and that was possible.
    pub mended: Option<Vec<u8>>,
    /// What is wrong with it.
    pub damage: Vec<Damage>,
}

/// Reads the manifest of the bundle at `dir`, damaged as it may be.
///
/// # Errors
/// `Missing` without a manifest, `BadData` if it is undamaged and cannot be read nevertheless, a failed read.
pub fn read_manifest(dir: &Path) -> Result<ManifestRead> {
    let text = read_text(dir)?;
    let parse = |text: &[u8]| Manifest::parse(text).in_file(dir.join(MANIFEST));
    let wrong_hash = match check_hash(&text) {
        Ok(()) => {
            return Ok(ManifestRead { manifest: Some(parse(&text)?), mended: None, damage: Vec::new() });
        }
        Err(e) => damage_of(&e, MANIFEST, None),
    };
    if let Some(Mended { text: mended, places }) = mend(&text)
        && let Ok(manifest) = parse(&mended)
    {
        let damage = places.iter().map(|&at| flipped(at, &text, &mended)).collect();
        return Ok(ManifestRead { manifest: Some(manifest), mended: Some(mended), damage });
    }
    let (manifest, unreadable) = match parse(&text) {
        Ok(manifest) => (Some(manifest), None),
        Err(e) => (None, Some(damage_of(&e, MANIFEST, None))),
    };
    let damage = [wrong_hash].into_iter().chain(unreadable).collect();
    Ok(ManifestRead { manifest, mended: None, damage })
}

/// A byte of the manifest that was turned back.
fn flipped(at: usize, found: &[u8], expected: &[u8]) -> Damage {
    let byte = |text: &[u8]| text.get(at).copied().unwrap_or_default();
    let what = format!("0x{:02x}, its checksums say 0x{:02x}", byte(found), byte(expected));
    Damage { byte: Some(at as u64), ..damage_of(&Error::bad_data(what), MANIFEST, None) }
}

/// Looks at each file, several at a time; the outcome is in the order of the manifest.
fn check_files(bundle: &Bundle, options: CheckOptions, progress: &Progress<'_>) -> Result<Vec<Damage>> {
    let files = &bundle.manifest.files;
    let bytes_total = match options.level {
        CheckLevel::Quick | CheckLevel::Sample(_) => 0,
        CheckLevel::Full => files.iter().fold(0, |n: u64, f| n.saturating_add(f.bytes)),
    };
    let bytes_done = AtomicU64::new(0);
    let tick = |bytes: usize| {
        let bytes_done = bytes_done.fetch_add(bytes as u64, Ordering::Relaxed).saturating_add(bytes as u64);
        match progress(CheckProgress { bytes_done, bytes_total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::new(Kind::Interrupted, "stopped")),
        }
    };
    let outcomes: Vec<_> = files.iter().map(|_| Mutex::new(Ok(Vec::new()))).collect();
    let next = AtomicUsize::new(0);
    let take = || {
        let i = next.fetch_add(1, Ordering::Relaxed);
        files.get(i).zip(outcomes.get(i))
    };
    let work = || {
        while let Some((file, outcome)) = take() {
            let found = tick(0).and_then(|()| check_file(bundle, file, options.level, &tick));
            let stop = found.is_err();
            *lock(outcome) = found;
            if stop {
                next.store(files.len(), Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..options.threads.min(files.len()) {
            scope.spawn(work);
        }
        work();
    });
    let mut damage = Vec::new();
    for outcome in &outcomes {
        damage.append(lock(outcome).as_mut().map_err(|e| e.clone())?);
    }
    Ok(damage)
}

/// Called after each chunk with its bytes; says when to stop.
type Tick<'a> = dyn Fn(usize) -> Result<()> + Sync + 'a;

/// All damage of one file.
fn check_file(bundle: &Bundle, entry: &FileEntry, level: CheckLevel, tick: &Tick<'_>) -> Result<Vec<Damage>> {
    let mut subject = Subject::new(bundle, entry);
    let file = match subject.keep(bundle.open_entry(entry))? {
        Some(file) => file,
        // One that was cut short is looked at as far as it goes.
        None => match subject.keep_silent(bundle.path(&entry.path).and_then(|p| InputFile::open(&p)))? {
            Some(file) => file,
            None => return Ok(subject.damage),
        },
    };
    let regions = match subject.regions(bundle) {
        Ok(regions) => regions,
        Err(e) => {
            subject.keep::<()>(Err(e))?;
            subject.regions_left(&file)?
        }
    };
    match level {
        CheckLevel::Quick => {
            subject.read_some(&file, regions, |r| matches!(r.meaning, Meaning::Header), tick)?
        }
        CheckLevel::Sample(sample) => subject.read_sample(&file, regions, sample, tick)?,
        CheckLevel::Full => subject.read(&file, regions, tick)?,
    }
    Ok(subject.damage)
}

/// What the manifest says in sum is the sum of what it says.
fn wrong_totals(manifest: &Manifest) -> Option<Damage> {
    let Manifest { files, layers, trunk, totals, .. } = manifest;
    let sum = Totals::sum(files, layers, trunk, totals.expert_weights, totals.trunk_weights);
    let what = format!("totals {totals:?}, expected {sum:?}");
    (sum != *totals).then(|| damage_of(&Error::bad_data(what), MANIFEST, None))
}

/// A tensor that two trunk files have. Other faults of these files were found one by one.
fn trunk_twice(bundle: &Bundle) -> Option<Damage> {
    let error = bundle.trunk().err().filter(|e| e.what() == crate::bundle::TRUNK_TWICE)?;
    let file = error.file().and_then(Path::file_name).map(|n| n.to_string_lossy().into_owned());
    Some(damage_of(&error, &file.unwrap_or_default(), None))
}

/// Files that the manifest does not list. Hidden ones belong to whoever moved the bundle here, a signature to whoever signed it.
fn extra_files(bundle: &Bundle) -> Result<Vec<Damage>> {
    let dir = &bundle.dir;
    let paths = storage::list(dir, usize::MAX).map_err(|e| Error::io(&e, "list", dir))?;
    let names = paths.iter().filter_map(|path| path.file_name());
    let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    names.retain(|n| !n.starts_with('.') && ![MANIFEST, SIGNATURE].contains(&n.as_str()));
    names.retain(|n| bundle.manifest.file(n).is_none());
    names.sort_unstable();
    let error = Error::bad_data("the manifest does not list this file");
    Ok(names.iter().map(|name| damage_of(&error, name, None)).collect())
}

fn damage_of(error: &Error, file: &str, layer: Option<u32>) -> Damage {
    Damage {
        file: file.to_owned(),
        layer,
        expert: None,
        tensor: error.tensor().map(str::to_owned),
        byte: error.byte(),
        end: None,
        what: error.what().to_owned(),
    }
}

#[cfg(test)]
mod tests;
