//! Stretches of a file that have a checksum of their own, compared while the file goes by.

/// Consecutive bytes that are checked by themselves.
#[derive(Clone, Debug)]
pub(super) struct Region {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) meaning: Meaning,
    /// The checksum; of a pad, 0.
    pub(super) crc32c: u32,
}

#[derive(Clone, Debug)]
pub(super) enum Meaning {
    /// Header, and index where there is one.
    Header,
    Record(u32),
    Tensor(String),
    /// All zero.
    Pad,
}

/// A region that is wrong: the checksum it has, or of a pad the bits that should not be there. `None` if the file ends before.
pub(super) struct Bad {
    pub(super) region: Region,
    pub(super) found: Option<u32>,
}

/// Regions that do not overlap, in order, fed with the bytes of their file in chunks of any size.
pub(super) struct Scan {
    regions: Vec<Region>,
    /// The region that comes next, or is going by.
    next: usize,
    /// Checksum of it so far, or all bits seen in it where it is a pad.
    state: u32,
    bad: Vec<Bad>,
}

impl Scan {
    pub(super) fn new(mut regions: Vec<Region>) -> Scan {
        regions.sort_by_key(|r| (r.start, r.end));
        Scan { regions, next: 0, state: 0, bad: Vec::new() }
    }

    pub(super) fn feed(&mut self, offset: u64, chunk: &[u8]) {
        let chunk_end = offset.saturating_add(chunk.len() as u64);
        while let Some(region) = self.regions.get(self.next).filter(|r| r.start < chunk_end) {
            let place = |at: u64| usize::try_from(at.saturating_sub(offset)).unwrap_or(usize::MAX);
            let bytes = chunk.get(place(region.start)..place(region.end.min(chunk_end)));
            self.state = region.add(self.state, bytes.unwrap_or_default());
            if region.end > chunk_end {
                return;
            }
            if self.state != region.crc32c {
                self.bad.push(Bad { region: region.clone(), found: Some(self.state) });
            }
            self.state = 0;
            self.next = self.next.saturating_add(1);
        }
    }

    /// What was wrong; regions that did not go by are, too.
    pub(super) fn finish(mut self) -> Vec<Bad> {
        let rest = self.regions.drain(self.next.min(self.regions.len())..);
        // Empty ones at the end of the file have nothing that could be wrong.
        let cut = rest.filter(|r| r.start < r.end).map(|region| Bad { region, found: None });
        self.bad.extend(cut);
        self.bad
    }
}

impl Region {
    pub(super) fn bytes(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    fn add(&self, state: u32, bytes: &[u8]) -> u32 {
        match self.meaning {
            Meaning::Pad => bytes.iter().fold(state, |bits, &b| bits | u32::from(b)),
            _ => crc32c::crc32c_append(state, bytes),
        }
    }
}
