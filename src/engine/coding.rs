//! How the experts of one layer are coded, with whatever a calibration says of them: what quantizing and repairing share.

use std::ops::Range;

use moepack_convert::{CodedExpert, Model};
use moepack_format::Result;
use moepack_quant::Isa;
use moepack_verify::forward::{ExpertOutput, GatedMlp, MoePass};

use crate::engine::calibration;
use crate::engine::coder::{Coded, Coder, Learnt};
use crate::engine::evidence::{self, Pool};
use crate::engine::stats::{ExpertStats, Stats};

/// A layer whose experts are coded; shared by the threads.
pub struct Coding<'a> {
    isa: Isa,
    layer: usize,
    /// Rows of the experts' gates.
    inter: usize,
    coder: Coder<'a>,
    /// What the layer's tokens are like, for a solver that works with Hessians.
    pool: Option<Pool>,
    stored: Option<Vec<ExpertStats>>,
    /// The calibration text at this layer.
    calibrating: Option<&'a MoePass<'a>>,
}

impl<'a> Coding<'a> {
    /// Of these experts of a layer, whose gates have `inter` rows. `calibrating` is the text that is on its way, `stats` what an
    /// earlier calibration learnt.
    ///
    /// # Errors
    /// Stats that cannot be read; an input that is no finite number.
    pub fn of(
        coder: Coder<'a>,
        model: &Model,
        (layer, experts, inter): (usize, Range<usize>, usize),
        stats: Option<&Stats>,
        calibrating: Option<&'a MoePass<'a>>,
    ) -> Result<Coding<'a>> {
        let isa = coder.isa;
        let with_pool = calibrating.filter(|_| coder.needs_hessians(layer, experts.clone()));
        let pool = with_pool.map(|pass| Pool::of(isa, pass, pass.width(), inter)).transpose()?;
        let stored = stats.map(|s| s.layer(model, layer)).transpose()?;
        Ok(Coding { isa, layer, inter, coder, pool, stored, calibrating })
    }

    /// Runs an expert over the calibration text, if there is one, and codes it by what was learnt; both of that is dropped
    /// again here. `mlp` is the expert, where there is a text.
    ///
    /// # Errors
    /// A matrix that cannot be coded; an input that is no finite number.
    pub fn code(
        &self,
        expert: usize,
        source: CodedExpert,
        mlp: Option<&GatedMlp>,
    ) -> Result<(Option<ExpertOutput>, Coded)> {
        let (isa, layer) = (self.isa, self.layer);
        let calibrating = self.calibrating.zip(mlp);
        if let (Some((pass, mlp)), Some(pool)) = (calibrating, &self.pool) {
            let needs = self.coder.needs(layer, expert)?;
            let (output, evidence) = evidence::run_expert(isa, pass, pool, (expert, mlp), needs)?;
            let coded = self.coder.code(layer, expert, source, Learnt::Evidence(&evidence))?;
            return Ok((Some(output), coded));
        }
        let run = |(pass, mlp): (&MoePass<'_>, _)| {
            calibration::run_expert(isa, pass, expert, mlp, (pass.width(), self.inter))
        };
        let (output, fresh) = calibrating.map(run).transpose()?.unzip();
        let stats = fresh.as_ref().or_else(|| self.stored.as_ref()?.get(expert));
        let coded = self.coder.code(layer, expert, source, stats.map_or(Learnt::Nothing, Learnt::Stats))?;
        Ok((output, coded))
    }
}
