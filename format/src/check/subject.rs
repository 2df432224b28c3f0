//! One file that is being looked at: which of its bytes have a checksum of their own, and what is wrong with them.

use sha2::{Digest, Sha256};

use super::sample::Sample;
use super::scan::{Bad, Meaning, Region, Scan};
use super::{Damage, Tick, damage_of};
use crate::bank::{Bank, record_name};
use crate::bundle::{Bundle, check_bank};
use crate::error::{Context, Error, Kind, Result};
use crate::file::{CHUNK_BYTES, InputFile, hex};
use crate::index::ROW_BYTES;
use crate::layout::is_pad;
use crate::manifest::{FileEntry, LayerEntry, TrunkEntry, crc_of_hex};
use crate::salvage;
use crate::trunk::TrunkFile;

/// The file that is being looked at, and what was found.
pub(super) struct Subject<'a> {
    entry: &'a FileEntry,
    kind: What<'a>,
    pub(super) damage: Vec<Damage>,
}

/// What a file is.
#[derive(Clone, Copy)]
enum What<'a> {
    Bank(&'a LayerEntry),
    /// With its place among the trunk files.
    Trunk(usize, &'a TrunkEntry),
    Side,
}

impl<'a> Subject<'a> {
    pub(super) fn new(bundle: &'a Bundle, entry: &'a FileEntry) -> Self {
        let bank = bundle.layers().iter().find(|l| l.bank == entry.path).map(What::Bank);
        let mut trunk = bundle.manifest.trunk.iter().enumerate();
        let trunk = trunk.find(|(_, t)| t.file == entry.path).map(|(i, t)| What::Trunk(i, t));
        Subject { entry, kind: bank.or(trunk).unwrap_or(What::Side), damage: Vec::new() }
    }

    fn layer(&self) -> Option<u32> {
        match self.kind {
            What::Bank(layer) => Some(layer.layer),
            _ => None,
        }
    }

    fn damage(&self, error: &Error) -> Damage {
        damage_of(error, &self.entry.path, self.layer())
    }

    /// What is wrong with the data becomes damage; what is wrong with the machine stays an error.
    pub(super) fn keep<T>(&mut self, outcome: Result<T>) -> Result<Option<T>> {
        if let Err(e) = &outcome
            && matches!(e.kind(), Kind::BadData | Kind::Missing)
        {
            self.damage.push(self.damage(e));
        }
        self.keep_silent(outcome)
    }

    /// The same of what was told before.
    pub(super) fn keep_silent<T>(&self, outcome: Result<T>) -> Result<Option<T>> {
        match outcome {
            Ok(value) => Ok(Some(value)),
            Err(e) if matches!(e.kind(), Kind::BadData | Kind::Missing) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Checks the structure of a bank or trunk file, and says which of its bytes have a meaning of their own.
    pub(super) fn regions(&self, bundle: &Bundle) -> Result<Vec<Region>> {
        let path = bundle.path(&self.entry.path)?;
        match self.kind {
            What::Bank(entry) => {
                let bank = Bank::open(&path)?;
                check_bank(&bank, entry, bundle.manifest.align).in_file(&path)?;
                let records = bank.records().iter().map(|r| {
                    let (start, end) = (r.offset, r.offset.saturating_add(r.bytes));
                    Region { start, end, meaning: Meaning::Record(r.expert), crc32c: r.crc32c }
                });
                let index_bytes = u64::from(bank.n_experts()).saturating_mul(ROW_BYTES as u64);
                let index_end = bank.index_offset().saturating_add(index_bytes);
                let header = header(index_end, &entry.header_crc32c);
                Ok(header.into_iter().chain(records).chain(bank.pads().iter().copied().map(pad)).collect())
            }
            What::Trunk(_, entry) => {
                let file = TrunkFile::open(&path)?;
                let of = |t: &&crate::TensorInfo| !is_pad(&t.name);
                let tensors = file.header.tensors.iter().filter(of);
                let places = tensors.map(|t| (t.name.clone(), t.start, t.end)).collect();
                let header = header(file.header.data_offset, &entry.header_crc32c);
                Ok(header.into_iter().chain(tensors_of(entry, places)).chain(file.pads().map(pad)).collect())
            }
            What::Side => Ok(Vec::new()),
        }
    }

    /// The same of a file whose header does not hold together: what can be found of it all the same.
    pub(super) fn regions_left(&mut self, file: &InputFile) -> Result<Vec<Region>> {
        match self.kind {
            What::Bank(entry) => {
                let mut regions = Vec::new();
                let records = salvage::bank(file, entry.layer, entry.n_experts)?;
                for (expert, record) in (0..).zip(records) {
                    match record {
                        Some(r) => regions.push(Region {
                            start: r.offset,
                            end: r.offset.saturating_add(r.bytes),
                            meaning: Meaning::Record(expert),
                            crc32c: r.crc32c,
                        }),
                        None => self.lost(entry.layer, expert),
                    }
                }
                Ok(regions)
            }
            What::Trunk(_, entry) => {
                let found = salvage::trunk(file)?.into_iter().filter(|(name, _)| !is_pad(name));
                let mut places: Vec<_> = found.map(|(name, (start, end))| (name, start, end)).collect();
                places.sort_by_key(|&(_, start, end)| (start, end));
                Ok(tensors_of(entry, places))
            }
            What::Side => Ok(Vec::new()),
        }
    }

    fn lost(&mut self, layer: u32, expert: u32) {
        let error = Error::bad_data("cut off, or neither header nor index says any more where it lies");
        let tensor = Some(record_name(layer, expert));
        self.damage.push(Damage { expert: Some(expert), tensor, ..self.damage(&error) });
    }

    /// Reads the file once, computing everything that is stored about it.
    pub(super) fn read(&mut self, file: &InputFile, regions: Vec<Region>, tick: &Tick<'_>) -> Result<()> {
        let mut hash = Sha256::new();
        let (pads, sums) = regions.into_iter().partition(|r: &Region| matches!(r.meaning, Meaning::Pad));
        let (mut sums, mut pads) = (Scan::new(sums), Scan::new(pads));
        let read = file.chunks(|offset, chunk| {
            hash.update(chunk);
            sums.feed(offset, chunk);
            pads.feed(offset, chunk);
            tick(chunk.len())
        });
        if self.keep(read)?.is_none() {
            return Ok(());
        }
        for bad in sums.finish().into_iter().chain(pads.finish()) {
            self.report(bad);
        }
        let (found, expected) = (hex(&hash.finalize()), &self.entry.sha256);
        if found != *expected {
            let what = format!("sha256 is {found}, the manifest says {expected}");
            self.damage.push(self.damage(&Error::bad_data(what)));
        }
        Ok(())
    }

    /// Reads the header and a sample of the rest; side files, which are small, whole.
    pub(super) fn read_sample(
        &mut self,
        file: &InputFile,
        regions: Vec<Region>,
        sample: Sample,
        tick: &Tick<'_>,
    ) -> Result<()> {
        let drawn = match self.kind {
            What::Bank(layer) => sample.experts(layer),
            What::Trunk(nth, entry) => sample.tensors(nth, entry.n_tensors()),
            What::Side => return self.read(file, regions, tick),
        };
        let mut nth_tensor = 0..;
        let is_drawn = |r: &Region| match r.meaning {
            Meaning::Header => true,
            Meaning::Record(expert) => drawn.binary_search(&expert).is_ok(),
            Meaning::Tensor(_) => nth_tensor.next().is_some_and(|i| drawn.binary_search(&i).is_ok()),
            Meaning::Pad => false,
        };
        self.read_some(file, regions, is_drawn, tick)
    }

    /// Reads some regions.
    pub(super) fn read_some(
        &mut self,
        file: &InputFile,
        regions: Vec<Region>,
        wanted: impl FnMut(&Region) -> bool,
        tick: &Tick<'_>,
    ) -> Result<()> {
        let wanted: Vec<Region> = regions.into_iter().filter(wanted).collect();
        for region in wanted {
            let mut scan = Scan::new(vec![region.clone()]);
            let (mut at, mut buf) = (region.start, vec![0; CHUNK_BYTES]);
            let end = region.end.min(file.len());
            while at < end {
                let n = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX).min(buf.len());
                let chunk = buf.get_mut(..n).unwrap_or_default();
                file.read_exact_at(at, chunk)?;
                scan.feed(at, chunk);
                tick(n)?;
                at = at.saturating_add(n as u64);
            }
            scan.finish().into_iter().for_each(|bad| self.report(bad));
        }
        Ok(())
    }

    fn report(&mut self, bad: Bad) {
        let Bad { region, found } = bad;
        let crc = |of: &str| match found {
            Some(found) => format!("{of} crc32c is {found:08x}, expected {:08x}", region.crc32c),
            None => format!("the file ends before {} bytes of it", region.bytes()),
        };
        let mut damage = self.damage(&Error::bad_data(""));
        (damage.byte, damage.end) = (Some(region.start), Some(region.end));
        match region.meaning {
            Meaning::Header if self.layer().is_some() => damage.what = crc("header and index: the"),
            Meaning::Header => damage.what = crc("the header's"),
            Meaning::Record(expert) => {
                damage.what = crc("the record's");
                damage.expert = Some(expert);
                damage.tensor = self.layer().map(|layer| record_name(layer, expert));
            }
            Meaning::Tensor(ref name) => {
                damage.what = crc("the tensor's");
                damage.tensor = Some(name.clone());
            }
            Meaning::Pad => {
                damage.what = format!("padding of {} bytes is not zero", region.bytes());
            }
        }
        self.damage.push(damage);
    }
}

/// The header, where the manifest has its checksum.
fn header(end: u64, digits: &str) -> Option<Region> {
    let crc32c = crc_of_hex(digits)?;
    Some(Region { start: 0, end, meaning: Meaning::Header, crc32c })
}

fn pad((start, end): (u64, u64)) -> Region {
    Region { start, end, meaning: Meaning::Pad, crc32c: 0 }
}

/// The tensors of a trunk file with the checksums that the manifest has of them, if it has one of each.
fn tensors_of(entry: &TrunkEntry, places: Vec<(String, u64, u64)>) -> Vec<Region> {
    if places.len() != entry.n_tensors() as usize {
        return Vec::new();
    }
    let region = |((name, start, end), crc32c): ((String, u64, u64), Option<u32>)| {
        Some(Region { start, end, meaning: Meaning::Tensor(name), crc32c: crc32c? })
    };
    places.into_iter().zip(entry.tensor_crc32cs()).filter_map(region).collect()
}
