//! The experts of one layer: each read, run, coded and recorded, on any thread and in a fixed order.

use std::ops::Range;
use std::path::Path;

use moepack_convert::{CodedExpert, Model};
use moepack_format::Result;
use moepack_format::bank::Bank;
use moepack_quant::Isa;
use moepack_quant::solve::solver;
use moepack_verify::drift::SquareSums;
use moepack_verify::forward::{Delta, ExpertOutput, GatedMlp, LayerWeights, MoePass, RoutedSum, ordered};

use crate::engine::calibration::{self, Calibration};
use crate::engine::coder::{Coded, Coder, Learnt};
use crate::engine::evidence::{self, Pool};
use crate::engine::pair::{Pair, PairDelta, PairOutput, PairPass, PairSums};
use crate::engine::parts::{Parts, PartsSink};
use crate::engine::stats::{ExpertStats, Stats};
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
        let with_pool = calibrating.as_ref().filter(|_| !matches!(place, Place::Finished(_)));
        let with_pool = with_pool.filter(|_| coder.needs_hessians(self.layer, self.experts.clone()));
        let turns = Turns {
            work: self,
            coder,
            pool: with_pool.map(|pass| Pool::of(self.isa, pass, pass.width(), self.inter)).transpose()?,
            stored: self.stats.map(|s| s.layer(self.model, self.layer)).transpose()?,
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
    coder: Coder<'a>,
    /// What the layer's tokens are like, for a solver that works with Hessians.
    pool: Option<Pool>,
    stored: Option<Vec<ExpertStats>>,
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

    /// Runs an expert over the calibration text, if there is one, and codes it by what was learnt; both of that is dropped
    /// again here.
    fn run_and_code(
        &self,
        expert: usize,
        source: CodedExpert,
        mlp: Option<&GatedMlp>,
    ) -> Result<(Option<ExpertOutput>, Coded)> {
        let ExpertWork { isa, model, layer, inter, .. } = *self.work;
        let calibrating = self.calibrating.zip(mlp);
        if let Some((bank, index)) = self.earlier.bank_of(expert) {
            let output = calibrating.map(|(pass, mlp)| pass.run_expert(expert, mlp, None)).transpose()?;
            let expert = model.expert_of_bank(bank, layer, index)?;
            return Ok((output, Coded { expert, sums: SquareSums::default(), notes: Vec::new() }));
        }
        if let (Some((pass, mlp)), Some(pool)) = (calibrating, &self.pool) {
            let needs = self.coder.needs(layer, expert)?;
            let (output, evidence) = evidence::run_expert(isa, pass, pool, (expert, mlp), needs)?;
            let coded = self.coder.code(layer, expert, source, Learnt::Evidence(&evidence))?;
            return Ok((Some(output), coded));
        }
        let run = |(pass, mlp): (&MoePass<'_>, _)| {
            calibration::run_expert(isa, pass, expert, mlp, (pass.width(), inter))
        };
        let fresh = calibrating.map(run);
        let (output, fresh) = fresh.transpose()?.unzip();
        let stats = fresh.as_ref().or_else(|| self.stored.as_ref()?.get(expert));
        let coded = self.coder.code(layer, expert, source, stats.map_or(Learnt::Nothing, Learnt::Stats))?;
        Ok((output, coded))
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
