//! Experts in memory under a budget: the least recently used make room for those that are asked for.
//!
//! A record is read once however many threads ask for it, with one aligned read past the page cache where the file
//! system can, so that the budget is the only cache. Room is made before a read starts, and the memory of an expert
//! that left is read into again.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use serde::Serialize;

use crate::aligned::{AlignedBuf, MEMORY_ALIGN};
use crate::bank::{ReadOptions, Record};
use crate::bundle::Bundle;
use crate::error::{Error, Result};
use crate::handles::lock;
use crate::limits::PREFETCH_QUEUE_MAX;

/// How a [`Pager`] works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagerOptions {
    /// Memory of the experts it holds or is reading. Experts that left but that a caller still uses are the caller's.
    pub budget_bytes: u64,
    /// Compare the checksum of each record that is read.
    pub verify: bool,
    /// Go past the page cache where the file system can.
    pub direct: bool,
    /// Threads that read ahead; without any, `prefetch` does nothing.
    pub threads: usize,
}

/// What a pager did since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PagerStats {
    /// Calls of `get` that found the expert in memory or already being read.
    pub hits: u64,
    /// Calls of `get` that had to read it.
    pub misses: u64,
    /// Records read, by `get` or ahead of it.
    pub reads: u64,
    /// Padded bytes of these records.
    pub bytes_read: u64,
    /// Experts that had to leave.
    pub evictions: u64,
    /// Prefetches that were dropped because the queue was full.
    pub dropped: u64,
    /// Whether reads go past the page cache.
    pub direct: bool,
}

/// A cache of experts. All methods take `&self` and may be called from any thread.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// (layer, expert)
type Key = (u32, u32);

#[derive(Debug)]
struct Shared {
    bundle: Arc<Bundle>,
    options: PagerOptions,
    state: Mutex<State>,
    /// A read ended, so an expert is there or room can be made.
    read_ended: Condvar,
    /// A prefetch was queued, or the pager is being dropped.
    queued: Condvar,
}

#[derive(Debug, Default)]
struct State {
    slots: HashMap<Key, Slot>,
    /// Keys of the slots that are `Ready`, the least recently used first.
    order: BTreeMap<u64, Key>,
    clock: u64,
    /// Memory of all slots.
    bytes: u64,
    queue: VecDeque<Key>,
    closing: bool,
    stats: PagerStats,
}

#[derive(Debug)]
enum Slot {
    Reading,
    Ready { record: Arc<Record>, used: u64, bytes: u64 },
}

impl Pager {
    /// A pager with nothing in memory. Every bank is opened.
    ///
    /// # Errors
    /// A bank that cannot be opened, or a budget (kind `Plan`) that the largest expert does not fit in.
    pub fn new(bundle: Arc<Bundle>, options: PagerOptions) -> Result<Pager> {
        let mut largest = 0;
        let mut direct = options.direct;
        for layer in bundle.layers() {
            let bank = bundle.bank(layer.layer)?;
            largest = largest.max(memory_of(bank.max_record_bytes()));
            direct = direct && bank.is_direct();
        }
        if options.budget_bytes < largest {
            let what =
                format!("a budget of {} bytes, the largest expert needs {largest}", options.budget_bytes);
            return Err(Error::plan(what).hint(format!("allow at least {largest} bytes for experts")));
        }
        let state = State { stats: PagerStats { direct, ..PagerStats::default() }, ..State::default() };
        let shared = Arc::new(Shared {
            bundle,
            options,
            state: Mutex::new(state),
            read_ended: Condvar::new(),
            queued: Condvar::new(),
        });
        let mut pager = Pager { shared, threads: Vec::new() };
        for n in 0..options.threads {
            let shared = pager.shared.clone();
            let thread = std::thread::Builder::new().name(format!("pager-{n}"));
            let spawned = thread.spawn(move || shared.read_ahead());
            pager
                .threads
                .push(spawned.map_err(|e| Error::io(&e, "start a thread for", &pager.shared.bundle.dir))?);
        }
        Ok(pager)
    }

    /// The bundle it reads from.
    pub fn bundle(&self) -> &Arc<Bundle> {
        &self.shared.bundle
    }

    /// An expert, from memory or read now.
    ///
    /// # Errors
    /// An expert that is not there, a failed read, or a wrong checksum; later calls try again.
    pub fn get(&self, layer: u32, expert: u32) -> Result<Arc<Record>> {
        self.shared.get((layer, expert))
    }

    /// Asks the background threads for experts that will be needed, the most urgent first. Does not wait; what
    /// cannot be read is reported when it is asked for.
    pub fn prefetch(&self, keys: &[(u32, u32)]) {
        if self.threads.is_empty() {
            return;
        }
        let mut state = lock(&self.shared.state);
        for &key in keys {
            if state.slots.contains_key(&key) || state.queue.contains(&key) {
                continue;
            }
            if state.queue.len() >= PREFETCH_QUEUE_MAX {
                state.stats.dropped = state.stats.dropped.saturating_add(1);
                continue;
            }
            state.queue.push_back(key);
            self.shared.queued.notify_one();
        }
    }

    /// What it did so far.
    pub fn stats(&self) -> PagerStats {
        lock(&self.shared.state).stats
    }

    /// Memory of the experts it holds or is reading; never more than the budget.
    pub fn bytes(&self) -> u64 {
        lock(&self.shared.state).bytes
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        lock(&self.shared.state).closing = true;
        self.shared.queued.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing left to clean up.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn get(&self, key: Key) -> Result<Arc<Record>> {
        let mut state = lock(&self.state);
        loop {
            match state.touch(key) {
                Some(Found::Ready(record)) => {
                    state.stats.hits = state.stats.hits.saturating_add(1);
                    return Ok(record);
                }
                Some(Found::Reading) => state = wait(&self.read_ended, state),
                None => {
                    state.stats.misses = state.stats.misses.saturating_add(1);
                    return self.read(key, state);
                }
            }
        }
    }

    /// What each background thread does until the pager is dropped.
    fn read_ahead(&self) {
        let mut state = lock(&self.state);
        while !state.closing {
            let Some(key) = state.queue.pop_front() else {
                state = wait(&self.queued, state);
                continue;
            };
            if !state.slots.contains_key(&key) {
                // Whoever needs this expert reads it again and gets the error.
                let _ = self.read(key, state);
                state = lock(&self.state);
            }
        }
    }

    /// Reads an expert that no slot has. Takes the lock, gives it up while reading.
    fn read(&self, key: Key, mut state: MutexGuard<'_, State>) -> Result<Arc<Record>> {
        let (layer, expert) = key;
        let bank = self.bundle.bank(layer)?;
        let padded = bank.record(expert)?.padded_bytes;
        let bytes = memory_of(padded);
        state.slots.insert(key, Slot::Reading);
        let mut left = Vec::new();
        while state.bytes.saturating_add(bytes) > self.options.budget_bytes {
            match state.evict() {
                Some(record) => left.push(record),
                // The rest is being read by others; each read ends and can leave then.
                None => state = wait(&self.read_ended, state),
            }
        }
        state.bytes = state.bytes.saturating_add(bytes);
        drop(state);

        let options = ReadOptions { verify: self.options.verify, direct: self.options.direct };
        let outcome = bank.read_into(expert, options, reuse(left, padded));

        let mut state = lock(&self.state);
        state.stats.reads = state.stats.reads.saturating_add(1);
        state.stats.bytes_read = state.stats.bytes_read.saturating_add(padded);
        let outcome = outcome.map(Arc::new);
        match &outcome {
            Ok(record) => state.insert(key, record.clone(), bytes),
            Err(_) => {
                state.slots.remove(&key);
                state.bytes = state.bytes.saturating_sub(bytes);
            }
        }
        self.read_ended.notify_all();
        outcome
    }
}

/// What a slot has.
enum Found {
    Ready(Arc<Record>),
    Reading,
}

impl State {
    /// Looks an expert up and makes it the most recently used.
    fn touch(&mut self, key: Key) -> Option<Found> {
        let Slot::Ready { record, used, .. } = self.slots.get_mut(&key)? else { return Some(Found::Reading) };
        self.clock = self.clock.saturating_add(1);
        self.order.remove(used);
        *used = self.clock;
        self.order.insert(self.clock, key);
        Some(Found::Ready(record.clone()))
    }

    fn insert(&mut self, key: Key, record: Arc<Record>, bytes: u64) {
        self.clock = self.clock.saturating_add(1);
        self.order.insert(self.clock, key);
        self.slots.insert(key, Slot::Ready { record, used: self.clock, bytes });
    }

    /// Lets the least recently used expert leave, if there is one that is not being read.
    fn evict(&mut self) -> Option<Arc<Record>> {
        let (_, key) = self.order.pop_first()?;
        let Some(Slot::Ready { record, bytes, .. }) = self.slots.remove(&key) else { return None };
        self.bytes = self.bytes.saturating_sub(bytes);
        self.stats.evictions = self.stats.evictions.saturating_add(1);
        Some(record)
    }
}

/// The memory of one of these records if nobody uses it any more and it is of the right size; a larger one
/// would hold more than was counted.
fn reuse(left: Vec<Arc<Record>>, padded: u64) -> AlignedBuf {
    let fits = |buf: &AlignedBuf| (padded..=memory_of(padded)).contains(&(buf.capacity() as u64));
    let mut bufs = left.into_iter().filter_map(Arc::into_inner).map(Record::into_buf);
    bufs.find(fits).unwrap_or_default()
}

/// What a record of so many padded bytes costs in the budget.
pub fn memory_of(padded: u64) -> u64 {
    padded.saturating_add(MEMORY_ALIGN as u64)
}

fn wait<'a>(condition: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    condition.wait(state).unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
