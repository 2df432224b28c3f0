//! A layer's bank in parts, so that a killed run loses minutes and not a layer of hundreds of experts.
//!
//! Experts are coded in order; so many of them make a part, a bank of its own in the workspace, and a note says that it is there.
//! At the end of the layer the parts become the bank, whose bytes do not depend on them.

use std::ops::Range;
use std::path::{Path, PathBuf};

use moepack_format::{Bank, Error, PartBytes, Result, storage};

use crate::engine::coder::Coded;
use crate::engine::workspace::Workspace;
use crate::engine::writer::{BankFacts, BankSink, Written, layer_note};

/// Parts of a layer, however small it is.
const PARTS_MIN: usize = 4;
/// Source bytes of a part, at most.
const SOURCE_BYTES_MAX: u64 = 1 << 30;

/// The parts of a layer's bank, and those of them that an earlier run finished.
#[derive(Debug)]
pub struct Parts<'a> {
    workspace: &'a Workspace,
    layer: usize,
    align: u64,
    parts: Vec<PartOf>,
}

#[derive(Debug)]
struct PartOf {
    experts: Range<usize>,
    finished: Option<(Bank, BankFacts)>,
}

impl<'a> Parts<'a> {
    /// The parts of a layer of so many experts, which have `source_bytes` as released.
    ///
    /// # Errors
    /// What an earlier run left cannot be read.
    pub fn open(
        workspace: &'a Workspace,
        (layer, n_experts): (usize, usize),
        source_bytes: u64,
        align: u64,
    ) -> Result<Parts<'a>> {
        let n = PARTS_MIN.max(usize::try_from(source_bytes.div_ceil(SOURCE_BYTES_MAX)).unwrap_or(n_experts));
        let each = n_experts.div_ceil(n).max(1);
        let mut new = Parts { workspace, layer, align, parts: Vec::new() };
        for first in (0..n_experts).step_by(each) {
            let experts = first..n_experts.min(first + each);
            let facts: Option<BankFacts> = workspace.note(&new.name(&experts))?;
            let finished = facts.map(|facts| Ok::<_, Error>((Bank::open(&new.path(&experts))?, facts)));
            new.parts.push(PartOf { experts, finished: finished.transpose()? });
        }
        Ok(new)
    }

    /// The bank that has an expert, if an earlier run coded it, and its place there.
    pub fn finished(&self, expert: usize) -> Option<(&Bank, usize)> {
        let part = self.parts.iter().find(|part| part.experts.contains(&expert))?;
        part.finished.as_ref().map(|(bank, _)| (bank, expert - part.experts.start))
    }

    /// Removes the parts; the bank is there. What cannot be removed goes with the workspace.
    pub fn remove(self) {
        for part in &self.parts {
            let _ = storage::remove_file(&self.path(&part.experts));
        }
    }

    fn name(&self, experts: &Range<usize>) -> String {
        format!("{}.part-{:05}", layer_note(self.layer), experts.start)
    }

    fn path(&self, experts: &Range<usize>) -> PathBuf {
        self.workspace.home().join(self.name(experts) + ".safetensors")
    }
}

/// Parts being written.
#[derive(Debug)]
pub struct PartsSink<'p> {
    parts: &'p Parts<'p>,
    n_planes_each: usize,
    /// What is known of the parts behind this.
    facts: BankFacts,
    paths: Vec<PathBuf>,
    current: Option<BankSink>,
    usage: Option<Vec<u64>>,
}

impl<'p> PartsSink<'p> {
    /// None yet; an expert has so many planes, near enough.
    pub fn new(parts: &'p Parts<'p>, n_planes_each: usize) -> PartsSink<'p> {
        let (facts, paths) = (BankFacts::default(), Vec::new());
        PartsSink { parts, n_planes_each, facts, paths, current: None, usage: None }
    }

    /// Appends an expert; experts come in order, those too that an earlier run coded.
    ///
    /// # Errors
    /// A failed write.
    pub fn write(&mut self, expert: usize, coded: &Coded, n_tokens: Option<u64>) -> Result<()> {
        let Some(part) = self.parts.parts.iter().find(|part| part.experts.contains(&expert)) else {
            return Ok(());
        };
        let is_last = expert + 1 == part.experts.end;
        if let Some((_, facts)) = &part.finished {
            if is_last {
                self.end(&part.experts, facts.clone());
            }
            return Ok(());
        }
        if self.current.is_none() {
            let (n, path) = (part.experts.len(), self.parts.path(&part.experts));
            let planes = n * self.n_planes_each;
            self.current = Some(BankSink::create(&path, self.parts.layer, n, self.parts.align, planes)?);
        }
        if let Some(sink) = &mut self.current {
            sink.write(coded)?;
        }
        if let Some(n) = n_tokens {
            self.usage.get_or_insert_default().push(n);
        }
        if let Some(sink) = self.current.take_if(|_| is_last) {
            let (_, facts) = sink.finish(self.usage.take())?;
            self.parts.workspace.leave_note(&self.parts.name(&part.experts), &facts)?;
            self.end(&part.experts, facts);
        }
        Ok(())
    }

    fn end(&mut self, experts: &Range<usize>, facts: BankFacts) {
        self.facts.append(facts);
        self.paths.push(self.parts.path(experts));
    }

    /// Puts the bank together as `path`.
    ///
    /// # Errors
    /// A part that cannot be read, a failed write.
    pub fn finish(self, path: &Path) -> Result<Written> {
        let banks = self.paths.iter().map(|path| Bank::open(path)).collect::<Result<Vec<_>>>()?;
        join(path, (self.parts.layer, self.parts.align), &banks, self.facts)
    }
}

/// Puts the banks of consecutive experts of a layer together as one of them all; its bytes are those of a bank that was
/// written in one go.
///
/// # Errors
/// A record that cannot be read or is damaged, a failed write.
pub fn join(path: &Path, (layer, align): (usize, u64), banks: &[Bank], facts: BankFacts) -> Result<Written> {
    let n_planes = banks.iter().map(n_planes).sum::<Result<usize>>()?;
    let mut sink = BankSink::create(path, layer, facts.experts.len(), align, n_planes)?;
    let mut each = facts.experts.into_iter();
    for bank in banks {
        for (expert, facts) in (0..bank.n_experts()).zip(&mut each) {
            let record = bank.read(expert, true)?;
            let parts = record.parts().map(|part| {
                let specs = part.infos.iter().map(|info| info.spec.clone());
                PartBytes { spec: part.spec.clone(), planes: specs.zip(part.planes).collect() }
            });
            sink.append(&parts.collect::<Vec<_>>(), facts)?;
        }
    }
    sink.finish(facts.usage)
}

fn n_planes(bank: &Bank) -> Result<usize> {
    let of = |expert| Ok(bank.parts(expert)?.iter().map(|part| part.planes.len()).sum::<usize>());
    (0..bank.n_experts()).map(of).sum()
}
