//! Banks made whole again: records whose checksum is right are taken as they are, the others are coded anew.

use std::collections::BTreeSet;

use moepack_convert::spec::Mlp;
use moepack_convert::{CodedExpert, CodedPart, Origin};
use moepack_format::bank::bank_name;
use moepack_format::manifest::{FileEntry, LayerEntry};
use moepack_format::salvage::{self, RecordLeft};
use moepack_format::{Error, InputFile, Kind, Result};
use moepack_quant::{Isa, Planes};
use moepack_verify::drift::SquareSums;
use moepack_verify::forward::{ExpertOutput, GatedMlp, LayerWeights, MoePass, RoutedSum, ordered};

use super::{Calibrated, Source};
use crate::engine::calibration::Calibration;
use crate::engine::coder::Coded;
use crate::engine::coding::Coding;
use crate::engine::sizes::coded_parts;
use crate::engine::stats::Stats;
use crate::engine::writer::{BankSink, bank_file};
use crate::progress::Progress;
use crate::session::Session;

/// A bank to be made again.
#[derive(Debug)]
pub struct BankDamage {
    /// Its name.
    pub file: String,
    /// Its layer.
    pub layer: usize,
    /// Experts that must be coded anew.
    pub lost: BTreeSet<usize>,
    sha256: String,
    old: Old,
}

/// What is left of it.
#[derive(Debug)]
struct Old {
    file: Option<InputFile>,
    records: Vec<Option<RecordLeft>>,
}

impl BankDamage {
    /// Reads what is left of a bank.
    pub(super) fn of(
        source: &Source<'_>,
        session: &Session,
        entry: &LayerEntry,
        file: &FileEntry,
    ) -> Result<BankDamage> {
        let layer = usize::try_from(entry.layer).unwrap_or(usize::MAX);
        let n_experts = source.model.spec().moe(layer).map_or(0, |moe| moe.n_experts);
        if n_experts as u64 != u64::from(entry.n_experts) || entry.bank != bank_name(entry.layer) {
            let what = format!(
                "the manifest says {} experts in {}, the checkpoint has {n_experts}",
                entry.n_experts, entry.bank
            );
            return Err(Error::bad_data(what).in_file(source.dir));
        }
        let old = Old::open(source, entry)?;
        let mut lost = BTreeSet::new();
        for expert in 0..n_experts {
            session.stop.check()?;
            if old.expert(source, layer, expert)?.is_none() {
                lost.insert(expert);
            }
        }
        Ok(BankDamage { file: file.path.clone(), layer, lost, sha256: file.sha256.clone(), old })
    }
}

impl Old {
    fn open(source: &Source<'_>, entry: &LayerEntry) -> Result<Old> {
        match InputFile::open(&source.dir.join(&entry.bank)) {
            Ok(file) => {
                let records = salvage::bank(&file, entry.layer, entry.n_experts)?;
                Ok(Old { file: Some(file), records })
            }
            Err(e) if matches!(e.kind(), Kind::Missing | Kind::BadData) => {
                Ok(Old { file: None, records: Vec::new() })
            }
            Err(e) => Err(e),
        }
    }

    /// An expert that is as it was.
    fn expert(&self, source: &Source<'_>, layer: usize, expert: usize) -> Result<Option<CodedExpert>> {
        let record = self.records.get(expert).and_then(Option::as_ref);
        let Some((file, record)) = self.file.as_ref().zip(record) else { return Ok(None) };
        let Some(bytes) = record.read(file)? else { return Ok(None) };
        let mut parts = Vec::new();
        for (stored, codec) in coded_parts(source.model, source.choices, layer, expert)? {
            let planes = record.planes.iter().filter(|p| p.part == stored.part.name());
            let of = |at: u64, n: u64| {
                Some(bytes.get(usize::try_from(at).ok()?..)?.get(..usize::try_from(n).ok()?)?.to_vec())
            };
            let Some(planes) = planes.map(|p| of(p.offset, p.bytes)).collect::<Option<Planes>>() else {
                return Ok(None);
            };
            let (rows, cols) = (stored.rows, stored.cols);
            let specs = codec.planes_of(rows, cols, &planes)?;
            let fits = specs.iter().zip(&planes).all(|(s, p)| s.bytes() == Ok(p.len() as u64));
            if !fits || specs.len() != planes.len() {
                return Ok(None);
            }
            parts.push(CodedPart { part: stored.part, codec, rows, cols, planes, source: Origin::default() });
        }
        let n_planes: usize = parts.iter().map(|p| p.planes.len()).sum();
        Ok((n_planes == record.planes.len()).then_some(CodedExpert { parts }))
    }
}

/// Makes the banks again; they come ascending by layer.
pub(super) fn repair(
    source: &Source<'_>,
    session: &Session,
    progress: &Progress,
    banks: &[BankDamage],
    calibrated: Calibrated<'_>,
) -> Result<()> {
    let (isa, model) = (Isa::get(), source.model);
    // Only what is coded anew needs the text.
    let last_lost = banks.iter().filter(|b| !b.lost.is_empty()).map(|b| b.layer).max();
    let text = calibrated.text.filter(|_| last_lost.is_some());
    let mut calibration = text.map(|text| Calibration::begin(isa, model, text)).transpose()?;
    let Some(last) = banks.iter().map(|b| b.layer).max() else { return Ok(()) };
    for (l, layer) in model.spec().layers.iter().enumerate().take(last + 1) {
        session.stop.check()?;
        let bank = banks.iter().find(|b| b.layer == l);
        if bank.is_none() && calibration.is_none() {
            continue;
        }
        let weights = calibration.as_ref().map(|_| LayerWeights::load(isa, model, l)).transpose()?;
        if let (Some(calibration), Some(weights)) = (&mut calibration, &weights) {
            calibration.enter(weights)?;
        }
        let Mlp::Moe(moe) = &layer.mlp else { continue };
        let pass = calibration.as_ref().zip(weights.as_ref()).map(|(c, w)| c.route(w)).transpose()?;
        let turns = Turns {
            source,
            session,
            layer: l,
            size: (moe.n_experts, moe.inter),
            bank,
            weights: weights.as_ref(),
            pass: pass.as_ref(),
            goes_on: last_lost.is_some_and(|last| l < last),
            stats: calibrated.stats,
        };
        let sum = turns.run(progress)?;
        let delta = pass.as_ref().zip(sum).map(|(pass, sum)| pass.finish(sum)).transpose()?;
        drop(pass);
        if let (Some(calibration), Some(delta)) = (&mut calibration, delta) {
            calibration.leave(&delta);
        }
        if last_lost == Some(l) {
            calibration = None;
        }
    }
    Ok(())
}

/// One layer's experts.
struct Turns<'a> {
    source: &'a Source<'a>,
    session: &'a Session,
    layer: usize,
    /// Experts, and rows of their gates.
    size: (usize, usize),
    bank: Option<&'a BankDamage>,
    weights: Option<&'a LayerWeights>,
    /// The calibration text at this layer.
    pass: Option<&'a MoePass<'a>>,
    /// Whether the text goes on to another layer.
    goes_on: bool,
    stats: Option<&'a Stats>,
}

impl<'a> Turns<'a> {
    /// Makes the bank again, if it is to be; gives what the experts add to the text, if it goes on.
    fn run(&self, progress: &Progress) -> Result<Option<RoutedSum<'a>>> {
        let (n_experts, inter) = self.size;
        let is_lost = |e: usize| self.bank.is_some_and(|b| b.lost.contains(&e));
        let coding = (0..n_experts).any(is_lost).then(|| {
            let size = (self.layer, 0..n_experts, inter);
            Coding::of(self.source.coder()?, self.source.model, size, self.stats, self.pass)
        });
        let coding = coding.transpose()?;
        let mut sink = self.bank.map(|_| self.create_bank()).transpose()?;
        let mut sum = self.pass.filter(|_| self.goes_on).map(RoutedSum::new);
        ordered(
            n_experts,
            |e| self.take(e, coding.as_ref().filter(|_| is_lost(e))),
            |e, (output, coded): (Option<ExpertOutput>, Option<Coded>)| {
                if let (Some(sink), Some(coded)) = (&mut sink, &coded) {
                    sink.write(coded)?;
                }
                if let (Some(sum), Some(output)) = (&mut sum, &output) {
                    sum.add(output);
                }
                progress.add(0, u64::from(is_lost(e)));
                Ok(())
            },
        )?;
        sink.zip(self.bank).map(|(sink, bank)| sink.finish_as(&bank.sha256)).transpose()?;
        Ok(sum)
    }

    /// What one expert makes of the text, where that is wanted, and its record, where there is a bank.
    fn take(
        &self,
        expert: usize,
        coding: Option<&Coding<'_>>,
    ) -> Result<(Option<ExpertOutput>, Option<Coded>)> {
        self.session.stop.check()?;
        let model = self.source.model;
        let read = || -> Result<(CodedExpert, Option<GatedMlp>)> {
            let released = model.expert(self.layer, expert)?;
            let pack = |w: &LayerWeights| w.pack_expert(&released.decode(Isa::get())?);
            let mlp = self.weights.map(pack).transpose()?;
            Ok((released, mlp))
        };
        if let Some(coding) = coding {
            let (released, mlp) = read()?;
            let (output, coded) = coding.code(expert, released, mlp.as_ref())?;
            return Ok((output, Some(coded)));
        }
        let mut output = None;
        if let Some(pass) = self.pass.filter(|_| self.goes_on)
            && let (_, Some(mlp)) = read()?
        {
            output = Some(pass.run_expert(expert, &mlp, None)?);
        }
        let left = self.bank.map(|bank| {
            let expert = bank.old.expert(self.source, self.layer, expert)?;
            let expert =
                expert.ok_or_else(|| Error::new(Kind::Io, "damaged meanwhile").in_file(&bank.file))?;
            Ok::<_, Error>(Coded { expert, sums: SquareSums::default(), notes: Vec::new() })
        });
        Ok((output, left.transpose()?))
    }

    fn create_bank(&self) -> Result<BankSink> {
        let (n_experts, Source { model, choices, recipe, .. }) = (self.size.0, self.source);
        let mut n_planes = 0;
        for expert in 0..n_experts {
            for (stored, codec) in coded_parts(model, choices, self.layer, expert)? {
                n_planes += codec.planes(stored.rows, stored.cols)?.len();
            }
        }
        let path = self.source.dir.join(bank_file(self.layer));
        BankSink::create(&path, self.layer, n_experts, recipe.align, n_planes)
    }
}
