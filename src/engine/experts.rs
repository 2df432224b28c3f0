//! The experts of one layer: each read, run, coded and recorded, on any thread and in a fixed order.

use std::ops::Range;
use std::path::Path;

use moepack_convert::{CodedExpert, Model};
use moepack_format::bank::Bank;
use moepack_format::{Error, Kind, Result};
use moepack_quant::Isa;
use moepack_quant::solve::solver;
use moepack_verify::drift::SquareSums;
use moepack_verify::forward::{Delta, ExpertOutput, GatedMlp, LayerWeights, MoePass, RoutedSum, ordered};

use crate::engine::calibration::Calibration;
use crate::engine::coder::{Coded, Coder};
use crate::engine::coding::Coding;
use crate::engine::pair::{Pair, PairDelta, PairOutput, PairPass, PairSums};
use crate::engine::parts::{Parts, PartsSink};
use crate::engine::stats::Stats;
use crate::engine::writer::{BankSink, Written};
use crate::progress::Progress;
use crate::recipe::{Choices, Recipe};
use crate::session::Session;

/// One layer's experts, or some of them, and what is to be done with them.
pub struct ExpertWork<'a> {
    /// Instruction set of the kernels.
    pub isa: Isa,
    /// Threads, stop.
    pub session: &'a Session,
    /// Told of each expert.
    pub progress: &'a Progress,
    /// The checkpoint.
    pub model: &'a Model,
    /// Solver and alignment.
    pub recipe: &'a Recipe,
    /// Codec of each matrix.
    pub choices: &'a Choices,
    /// Stats of an earlier calibration.
    pub stats: Option<&'a Stats>,
    /// Planes of all experts, for the bank's header.
    pub n_planes: usize,
    /// The layer.
    pub layer: usize,
    /// Which of its routed experts.
    pub experts: Range<usize>,
    /// Rows of their gates.
    pub inter: usize,
}

/// Where a layer's experts go.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// Into a file of this name.
    New(&'a Path),
    /// Into a file of this name, by way of parts that outlive a killed run.
    Parted(&'a Path, &'a Parts<'a>),
    /// They are in this bank from an earlier run, and are read instead of coded.
    Finished(&'a Path),
}

/// What a layer's experts leave: the bank, if it is new, and what they add to the texts on the way.
pub type LayerDone = (Option<Written>, Option<Delta>, Option<PairDelta>);

impl ExpertWork<'_> {
    /// Does it; `trunk` is the layer's, the checkpoint's and the bundle's. What experts add to the texts is known where all
    /// of the layer's have run.
    ///
    /// # Errors
    /// What cannot be read, coded or written; a requested stop.
    pub fn run(
        &self,
        trunk: Option<[&LayerWeights; 2]>,
        calibration: Option<&Calibration>,
        pair: Option<&Pair>,
        place: Place<'_>,
    ) -> Result<LayerDone> {
        let weights = trunk.map(|[weights, _]| weights);
        let calibrating = calibration.zip(weights).map(|(c, w)| c.route(w)).transpose()?;
        let pairing = pair.zip(trunk).map(|(p, [own, coded])| p.route(own, coded)).transpose()?;
        let solver = solver(&self.recipe.solver)?;
        let coder = Coder { isa: self.isa, choices: self.choices, solver };
        let begin = || {
            let size = (self.layer, self.experts.clone(), self.inter);
            Coding::of(coder, self.model, size, self.stats, calibrating.as_ref())
        };
        let turns = Turns {
            work: self,
            coding: if matches!(place, Place::Finished(_)) { None } else { Some(begin()?) },
            earlier: Earlier::of(place)?,
            weights,
            calibrating: calibrating.as_ref(),
            pairing: pairing.as_ref(),
        };
        let mut taken = Taken {
            bank: self.create_bank(place)?,
            calibration: calibrating.as_ref().filter(|_| self.are_all()).map(RoutedSum::new),
            pair: pairing.as_ref().map(|p| p.sums(self.layer)),
            usage: calibrating.as_ref().map(|_| Vec::new()),
        };
        ordered(
            self.experts.len(),
            |i| turns.take(self.experts.start + i),
            |i, turn| {
                self.progress.add(turn.source_bytes, 1);
                taken.add(self.experts.start + i, &turn)
            },
        )?;
        let written = match (taken.bank, place) {
            (Sink::Whole(bank), _) => Some(bank.finish(taken.usage)?),
            (Sink::Parted(parts), Place::Parted(path, _)) => Some(parts.finish(path)?),
            _ => None,
        };
        let delta = calibrating.as_ref().zip(taken.calibration).map(|(p, sum)| p.finish(sum)).transpose()?;
        let paired = pairing.as_ref().zip(taken.pair).map(|(p, sums)| p.finish(sums)).transpose()?;
        Ok((written, delta, paired))
    }

    fn create_bank<'p>(&self, place: Place<'p>) -> Result<Sink<'p>> {
        let n = self.experts.len();
        Ok(match place {
            Place::New(path) => {
                let new = BankSink::create(path, self.layer, n, self.recipe.align, self.n_planes);
                Sink::Whole(Box::new(new?))
            }
            Place::Parted(_, parts) => {
                Sink::Parted(Box::new(PartsSink::new(parts, self.n_planes.div_ceil(n.max(1)))))
            }
            Place::Finished(_) => Sink::None,
        })
    }

    /// Whether these are all experts of the layer.
    fn are_all(&self) -> bool {
        self.model.spec().moe(self.layer).is_some_and(|moe| self.experts == (0..moe.n_experts))
    }
}

/// What an earlier run coded.
enum Earlier<'a> {
    Nothing,
    All(Box<Bank>),
    Some(&'a Parts<'a>),
}

impl<'a> Earlier<'a> {
    fn of(place: Place<'a>) -> Result<Earlier<'a>> {
        Ok(match place {
            Place::New(_) => Earlier::Nothing,
            Place::Finished(path) => Earlier::All(Box::new(Bank::open(path)?)),
            Place::Parted(_, parts) => Earlier::Some(parts),
        })
    }

    /// The bank that has an expert, and its place there.
    fn bank_of(&self, expert: usize) -> Option<(&Bank, usize)> {
        match self {
            Earlier::Nothing => None,
            Earlier::All(bank) => Some((bank, expert)),
            Earlier::Some(parts) => parts.finished(expert),
        }
    }
}

/// Where coded experts go.
enum Sink<'p> {
    /// They are there.
    None,
    Whole(Box<BankSink>),
    Parted(Box<PartsSink<'p>>),
}

/// What every expert's turn needs; shared by the threads.
struct Turns<'a> {
    work: &'a ExpertWork<'a>,
    /// How experts are coded, where they are.
    coding: Option<Coding<'a>>,
    earlier: Earlier<'a>,
    weights: Option<&'a LayerWeights>,
    calibrating: Option<&'a MoePass<'a>>,
    pairing: Option<&'a PairPass<'a>>,
}

/// What one expert's turn gives.
struct Turn {
    coded: Coded,
    calibrated: Option<ExpertOutput>,
    n_tokens: Option<u64>,
    paired: Option<PairOutput>,
    source_bytes: u64,
}

impl Turns<'_> {
    fn take(&self, expert: usize) -> Result<Turn> {
        let ExpertWork { isa, session, model, layer, .. } = *self.work;
        session.stop.check()?;
        let source = model.expert(layer, expert)?;
        let source_bytes = source.bytes() as u64;
        let mlp = self.weights.map(|w| w.pack_expert(&source.decode(isa)?)).transpose()?;
        let (calibrated, coded) = self.run_and_code(expert, source, mlp.as_ref())?;
        let mut paired = None;
        if let (Some(pass), Some(mlp), Some(weights)) = (self.pairing, &mlp, self.weights) {
            let coded = weights.pack_expert(&coded.expert.decode(isa)?)?;
            paired = Some(pass.run_expert(expert, mlp, &coded)?);
        }
        let n_tokens = self.calibrating.map(|pass| pass.routing().tokens_of(expert).len() as u64);
        Ok(Turn { coded, calibrated, n_tokens, paired, source_bytes })
    }

    /// Runs an expert over the calibration text, if there is one; codes it, or reads what an earlier run coded.
    fn run_and_code(
        &self,
        expert: usize,
        source: CodedExpert,
        mlp: Option<&GatedMlp>,
    ) -> Result<(Option<ExpertOutput>, Coded)> {
        let Some((bank, index)) = self.earlier.bank_of(expert) else {
            let coding =
                self.coding.as_ref().ok_or_else(|| Error::new(Kind::Io, "nothing codes this expert"))?;
            return coding.code(expert, source, mlp);
        };
        let run = |(pass, mlp): (&MoePass<'_>, _)| pass.run_expert(expert, mlp, None);
        let output = self.calibrating.zip(mlp).map(run).transpose()?;
        let expert = self.work.model.expert_of_bank(bank, self.work.layer, index)?;
        Ok((output, Coded { expert, sums: SquareSums::default(), notes: Vec::new() }))
    }
}

/// What the turns add up to, in order of experts.
struct Taken<'p> {
    bank: Sink<'p>,
    calibration: Option<RoutedSum<'p>>,
    pair: Option<PairSums<'p>>,
    usage: Option<Vec<u64>>,
}

impl Taken<'_> {
    fn add(&mut self, expert: usize, turn: &Turn) -> Result<()> {
        match &mut self.bank {
            Sink::None => {}
            Sink::Whole(bank) => bank.write(&turn.coded)?,
            Sink::Parted(parts) => parts.write(expert, &turn.coded, turn.n_tokens)?,
        }
        if let (Some(sum), Some(output)) = (&mut self.calibration, &turn.calibrated) {
            sum.add(output);
        }
        if let (Some(sums), Some(output)) = (&mut self.pair, &turn.paired) {
            sums.add(output);
        }
        if let (Some(usage), Some(n)) = (&mut self.usage, turn.n_tokens) {
            usage.push(n);
        }
        Ok(())
    }
}
