//! The experts of one layer: each read, run, coded and recorded, on any thread and in a fixed order.

use moepack_convert::{CodedExpert, Model};
use moepack_format::bank::{Bank, bank_name};
use moepack_format::{Error, Kind, Result};
use moepack_quant::Isa;
use moepack_quant::solve::solver;
use moepack_verify::drift::SquareSums;
use moepack_verify::forward::{Delta, ExpertOutput, GatedMlp, LayerWeights, MoePass, RoutedSum, ordered};

use crate::engine::calibration::Calibration;
use crate::engine::coder::{Coded, Coder};
use crate::engine::coding::Coding;
use crate::engine::pair::{Pair, PairDelta, PairOutput, PairPass, PairSums};
use crate::engine::stats::Stats;
use crate::engine::workspace::Workspace;
use crate::engine::writer::{BankSink, LayerNote, layer_note};
use crate::progress::Progress;
use crate::recipe::{Choices, Recipe};
use crate::session::Session;

/// One layer's experts and what is to be done with them.
pub struct ExpertWork<'a> {
    /// Instruction set of the kernels.
    pub isa: Isa,
    /// Threads, stop.
    pub session: &'a Session,
    /// Where the bank goes.
    pub workspace: &'a Workspace,
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
    /// Its routed experts.
    pub n_experts: usize,
    /// Rows of their gates.
    pub inter: usize,
}

/// What a layer's experts leave: the bank, and what they add to the texts on the way.
pub type LayerDone = (LayerNote, Option<Delta>, Option<PairDelta>);

impl ExpertWork<'_> {
    /// Does it; `trunk` is the layer's, the checkpoint's and the bundle's. With `finished`, the bank is there from an earlier
    /// run and its experts are read instead of coded.
    ///
    /// # Errors
    /// What cannot be read, coded or written; a requested stop.
    pub fn run(
        &self,
        trunk: Option<[&LayerWeights; 2]>,
        calibration: Option<&Calibration>,
        pair: Option<&Pair>,
        finished: Option<LayerNote>,
    ) -> Result<LayerDone> {
        let weights = trunk.map(|[weights, _]| weights);
        let calibrating = calibration.zip(weights).map(|(c, w)| c.route(w)).transpose()?;
        let pairing = pair.zip(trunk).map(|(p, [own, coded])| p.route(own, coded)).transpose()?;
        let solver = solver(&self.recipe.solver)?;
        let coder = Coder { isa: self.isa, choices: self.choices, solver };
        let begin = || {
            let size = (self.layer, self.n_experts, self.inter);
            Coding::of(coder, self.model, size, self.stats, calibrating.as_ref())
        };
        let turns = Turns {
            work: self,
            coding: if finished.is_none() { Some(begin()?) } else { None },
            bank: finished.as_ref().map(|_| self.open_bank()).transpose()?,
            weights,
            calibrating: calibrating.as_ref(),
            pairing: pairing.as_ref(),
        };
        let mut taken = Taken {
            bank: if finished.is_none() { Some(self.create_bank()?) } else { None },
            calibration: calibrating.as_ref().map(RoutedSum::new),
            pair: pairing.as_ref().map(|p| p.sums(self.layer)),
            usage: calibrating.as_ref().map(|_| Vec::new()),
        };
        ordered(
            self.n_experts,
            |expert| turns.take(expert),
            |expert, turn| {
                self.progress.add(turn.source_bytes, 1);
                taken.add(expert, &turn)
            },
        )?;
        let note = match (taken.bank, finished) {
            (Some(bank), _) => self.finish_bank(bank, taken.usage)?,
            (None, Some(note)) => note,
            (None, None) => return Err(Error::new(Kind::Io, "a finished bank without its note")),
        };
        let delta = calibrating.as_ref().zip(taken.calibration).map(|(p, sum)| p.finish(sum)).transpose()?;
        let paired = pairing.as_ref().zip(taken.pair).map(|(p, sums)| p.finish(sums)).transpose()?;
        Ok((note, delta, paired))
    }

    fn create_bank(&self) -> Result<BankSink> {
        BankSink::create(self.workspace.dir(), self.layer, self.n_experts, self.recipe.align, self.n_planes)
    }

    fn finish_bank(&self, bank: BankSink, usage: Option<Vec<u64>>) -> Result<LayerNote> {
        let note = bank.finish(usage)?;
        self.workspace.leave_note(&layer_note(self.layer), &note)?;
        Ok(note)
    }

    fn open_bank(&self) -> Result<Bank> {
        let id = u32::try_from(self.layer).unwrap_or(u32::MAX);
        Bank::open(&self.workspace.dir().join(bank_name(id)))
    }
}

/// What every expert's turn needs; shared by the threads.
struct Turns<'a> {
    work: &'a ExpertWork<'a>,
    /// How experts are coded, where they are.
    coding: Option<Coding<'a>>,
    /// The bank of an earlier run.
    bank: Option<Bank>,
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
        if let Some(coding) = &self.coding {
            return coding.code(expert, source, mlp);
        }
        let run = |(pass, mlp): (&MoePass<'_>, _)| pass.run_expert(expert, mlp, None);
        let output = self.calibrating.zip(mlp).map(run).transpose()?;
        let bank = self.bank.as_ref().ok_or_else(|| Error::new(Kind::Io, "a finished bank is not open"))?;
        let expert = self.work.model.expert_of_bank(bank, self.work.layer, expert)?;
        Ok((output, Coded { expert, sums: SquareSums::default(), notes: Vec::new() }))
    }
}

/// What the turns add up to, in order of experts.
struct Taken<'p> {
    bank: Option<BankSink>,
    calibration: Option<RoutedSum<'p>>,
    pair: Option<PairSums<'p>>,
    usage: Option<Vec<u64>>,
}

impl Taken<'_> {
    fn add(&mut self, expert: usize, turn: &Turn) -> Result<()> {
        if let Some(bank) = &mut self.bank {
            bank.write(expert, &turn.coded)?;
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
