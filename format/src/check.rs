//! Looking for damage: every file, every checksum, every invariant, and all that is wrong at once.
//!
//! A file is read once; its SHA-256, the checksums of its records and the zeros of its pads are computed from the
//! same bytes. A bundle whose manifest is damaged is still looked at as far as the manifest can be understood.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::bank::{Bank, record_name};
use crate::bundle::{Bundle, check_bank};
use crate::error::{Context, Error, Kind, Result};
use crate::file::{InputFile, hex};
use crate::handles::lock;
use crate::manifest::{FileEntry, MANIFEST, Manifest, Totals, check_hash, read_text};
use crate::storage;
use crate::trunk::TrunkFile;

/// How much is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckLevel {
    /// The manifest, names and sizes of files, headers and indexes.
    Quick,
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
    /// What was found and what was expected.
    pub what: String,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut place = vec![self.file.clone()];
        place.extend(self.layer.map(|layer| format!("layer {layer}")));
        place.extend(self.expert.map(|expert| format!("expert {expert}")));
        place.extend(self.tensor.clone());
        place.extend(self.byte.map(|byte| format!("byte {byte}")));
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
    let text = read_text(dir)?;
    let mut damage: Vec<_> =
        check_hash(&text).err().map(|e| damage_of(&e, MANIFEST, None)).into_iter().collect();
    let manifest = match Manifest::parse(&text).in_file(dir.join(MANIFEST)) {
        Ok(manifest) => manifest,
        Err(e) if damage.is_empty() => return Err(e),
        Err(e) => {
            damage.push(damage_of(&e, MANIFEST, None));
            return Ok(damage);
        }
    };
    let bundle = Bundle::with_manifest(dir, manifest)?;
    damage.extend(wrong_totals(&bundle.manifest));
    damage.extend(check_files(&bundle, options, progress)?);
    damage.extend(trunk_twice(&bundle));
    damage.extend(extra_files(&bundle)?);
    Ok(damage)
}

/// Looks at each file, several at a time; the outcome is in the order of the manifest.
fn check_files(bundle: &Bundle, options: CheckOptions, progress: &Progress<'_>) -> Result<Vec<Damage>> {
    let files = &bundle.manifest.files;
    let bytes_total = match options.level {
        CheckLevel::Quick => 0,
        CheckLevel::Full => files.iter().fold(0, |n: u64, f| n.saturating_add(f.bytes)),
    };
    let bytes_done = AtomicU64::new(0);
    let tick = |bytes: usize| {
        let bytes_done = bytes_done.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
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
        None => return Ok(subject.damage),
    };
    let regions = match subject.regions(bundle) {
        Ok(regions) => regions,
        Err(e) => {
            subject.keep::<()>(Err(e))?;
            Vec::new()
        }
    };
    if level == CheckLevel::Full {
        subject.read(&file, regions, tick)?;
    }
    Ok(subject.damage)
}

/// The file that is being looked at, and what was found.
struct Subject<'a> {
    entry: &'a FileEntry,
    layer: Option<u32>,
    damage: Vec<Damage>,
}

impl<'a> Subject<'a> {
    fn new(bundle: &Bundle, entry: &'a FileEntry) -> Self {
        let layer = bundle.layers().iter().find(|l| l.bank == entry.path).map(|l| l.layer);
        Subject { entry, layer, damage: Vec::new() }
    }

    /// What is wrong with the data becomes damage; what is wrong with the machine stays an error.
    fn keep<T>(&mut self, outcome: Result<T>) -> Result<Option<T>> {
        match outcome {
            Ok(value) => Ok(Some(value)),
            Err(e) if matches!(e.kind(), Kind::BadData | Kind::Missing) => {
                self.damage.push(damage_of(&e, &self.entry.path, self.layer));
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Checks the structure of a bank or trunk file, and says which of its bytes have a meaning of their own.
    fn regions(&self, bundle: &Bundle) -> Result<Vec<Region>> {
        let path = bundle.path(&self.entry.path)?;
        let is_trunk = bundle.manifest.trunk.iter().any(|t| t.file == self.entry.path);
        let mut out = Vec::new();
        if let Some(entry) = self.layer.and_then(|layer| bundle.manifest.layer(layer)) {
            let bank = Bank::open(&path)?;
            check_bank(&bank, entry, bundle.manifest.align).in_file(&path)?;
            out.extend(bank.records().iter().map(|r| Region {
                start: r.offset,
                end: r.offset.saturating_add(r.bytes),
                meaning: Meaning::Record { expert: r.expert, crc32c: r.crc32c },
            }));
            out.extend(bank.pads().iter().map(|&(start, end)| Region { start, end, meaning: Meaning::Pad }));
        } else if is_trunk {
            let file = TrunkFile::open(&path)?;
            out.extend(file.pads().map(|(start, end)| Region { start, end, meaning: Meaning::Pad }));
        }
        Ok(out)
    }

    /// Reads the file once, computing everything that is stored about it.
    fn read(&mut self, file: &InputFile, regions: Vec<Region>, tick: &Tick<'_>) -> Result<()> {
        let mut hash = Sha256::new();
        let (records, pads) =
            regions.into_iter().partition(|r: &Region| matches!(r.meaning, Meaning::Record { .. }));
        let (mut records, mut pads) = (Scan::new(records), Scan::new(pads));
        let read = file.chunks(|offset, chunk| {
            hash.update(chunk);
            records.feed(offset, chunk);
            pads.feed(offset, chunk);
            tick(chunk.len())
        });
        if self.keep(read)?.is_none() {
            return Ok(());
        }
        for bad in records.bad.into_iter().chain(pads.bad) {
            self.report(bad);
        }
        let (found, expected) = (hex(&hash.finalize()), &self.entry.sha256);
        if found != *expected {
            let what = format!("sha256 is {found}, the manifest says {expected}");
            self.damage.push(damage_of(&Error::bad_data(what), &self.entry.path, self.layer));
        }
        Ok(())
    }

    fn report(&mut self, bad: Bad) {
        let Bad { region, found } = bad;
        let mut damage = match region.meaning {
            Meaning::Record { expert, crc32c } => Damage {
                expert: Some(expert),
                tensor: self.layer.map(|layer| record_name(layer, expert)),
                what: format!("the record's crc32c is {found:08x}, expected {crc32c:08x}"),
                ..damage_of(&Error::bad_data(""), &self.entry.path, self.layer)
            },
            Meaning::Pad => {
                let what = format!("padding of {} bytes is not zero", region.end - region.start);
                damage_of(&Error::bad_data(what), &self.entry.path, self.layer)
            }
        };
        damage.byte = Some(region.start);
        self.damage.push(damage);
    }
}

/// Consecutive bytes that are checked by themselves.
#[derive(Clone, Copy, Debug)]
struct Region {
    start: u64,
    end: u64,
    meaning: Meaning,
}

#[derive(Clone, Copy, Debug)]
enum Meaning {
    Record { expert: u32, crc32c: u32 },
    Pad,
}

/// A region that is wrong: for a record the checksum it has, for a pad the bits that should not be there.
struct Bad {
    region: Region,
    found: u32,
}

/// Regions that do not overlap, in order, fed with the bytes of their file in chunks of any size.
struct Scan {
    regions: std::iter::Peekable<std::vec::IntoIter<Region>>,
    /// Checksum of the current record so far, or all bits seen in the current pad.
    state: u32,
    bad: Vec<Bad>,
}

impl Scan {
    fn new(regions: Vec<Region>) -> Scan {
        Scan { regions: regions.into_iter().peekable(), state: 0, bad: Vec::new() }
    }

    fn feed(&mut self, offset: u64, chunk: &[u8]) {
        let chunk_end = offset.saturating_add(chunk.len() as u64);
        while let Some(&region) = self.regions.peek().filter(|r| r.start < chunk_end) {
            let from = region.start.max(offset) - offset;
            let to = region.end.min(chunk_end).saturating_sub(offset);
            let bytes = chunk.get(from as usize..to as usize).unwrap_or_default();
            let (state, expected) = match region.meaning {
                Meaning::Record { crc32c, .. } => (crc32c::crc32c_append(self.state, bytes), crc32c),
                Meaning::Pad => (bytes.iter().fold(self.state, |bits, &b| bits | u32::from(b)), 0),
            };
            self.state = state;
            if region.end > chunk_end {
                return;
            }
            if state != expected {
                self.bad.push(Bad { region, found: state });
            }
            self.state = 0;
            self.regions.next();
        }
    }
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

/// Files that the manifest does not list. Hidden ones belong to whoever moved the bundle here.
fn extra_files(bundle: &Bundle) -> Result<Vec<Damage>> {
    let dir = &bundle.dir;
    let paths = storage::list(dir, usize::MAX).map_err(|e| Error::io(&e, "list", dir))?;
    let names = paths.iter().filter_map(|path| path.file_name());
    let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    names.retain(|n| !n.starts_with('.') && n != MANIFEST && bundle.manifest.file(n).is_none());
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
        what: error.what().to_owned(),
    }
}

#[cfg(test)]
mod tests;
