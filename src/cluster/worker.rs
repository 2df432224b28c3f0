//! A worker: does one shard of a plan.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moepack_convert::{Model, OpenOptions};
use moepack_format::manifest::FileEntry;
use moepack_format::{Context, Error, Kind, Result, storage};
use moepack_quant::Isa;
use moepack_quant::solve::solver;
use moepack_verify::forward::LayerWeights;
use moepack_verify::tokens::Windows;

use crate::cluster::activations::Units;
use crate::cluster::assemble::{assemble, publish_bank};
use crate::cluster::beat::{Heart, State};
use crate::cluster::folder::{PlanFolder, part_file};
use crate::cluster::merge::is_merged;
use crate::cluster::plan::{Calibration as Planned, Piece, Plan};
use crate::cluster::publish::{Attempt, sweep};
use crate::cluster::reports::{ExpertsReport, TrunkReport, is_done, is_shard_done};
use crate::cluster::source::{SourceFile, check_side_unchanged, check_unchanged};
use crate::cluster::who::Who;
use crate::engine::budget::{Budget, within_memory};
use crate::engine::calibration::Calibration;
use crate::engine::coder::Coder;
use crate::engine::experts::{ExpertWork, Place};
use crate::engine::quantize::kept_recipe;
use crate::engine::sizes::{CalibrationSize, Sizes};
use crate::engine::space::check_free;
use crate::engine::stats::{Stats, tokens_sha256};
use crate::engine::trunk::Trunk;
use crate::engine::trunk::write::{TrunkNote, TrunkWork};
use crate::engine::writer::{self, LayerNote, Pieces, Written, bank_file};
use crate::output::say;
use crate::progress::Progress;
use crate::recipe::Choices;
use crate::session::Session;

/// Bytes of the token windows as JSON: as many tokens as a run may have, with their commas.
const TOKENS_BYTES_MAX: u64 = 11 << 28;

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything was there before.
    DoneBefore,
    /// It is done now.
    Done,
}

/// Does a shard; at once where it is done already.
///
/// # Errors
/// Whatever is wrong with plan, checkpoint or output; bytes that differ from another attempt's; a requested stop.
pub fn run(session: &Session, folder: &PlanFolder, plan: &Plan, index: usize) -> Result<Outcome> {
    let shard = plan.shard(index)?;
    if is_merged(folder, plan)? || is_shard_done(folder, plan, shard)? {
        return Ok(Outcome::DoneBefore);
    }
    keep_freed_memory();
    let who = Who::this();
    sweep(folder, index, &who);
    let label = format!("shard {index}");
    let progress = Arc::new(session.progress(&label, shard.source_bytes, shard.n_experts));
    let heart = Heart::start(folder.status(index), &plan.id, index, &who, Arc::clone(&progress))?;
    let done =
        Shard::begin(session, folder, plan, (index, &who), &heart, &progress).and_then(|shard| shard.run());
    if done.is_err() && is_merged(folder, plan)? {
        // Another attempt was first, and merging took the directory away.
        return Ok(Outcome::DoneBefore);
    }
    match &done {
        Ok(()) => heart.say(State::Done, None),
        Err(e) => {
            let temporary = matches!(e.kind(), Kind::Temporary | Kind::Interrupted);
            heart.say(if temporary { State::Stopped } else { State::Failed }, Some(e.what().to_owned()));
        }
    }
    done.map(|()| Outcome::Done)
}

/// A shard in work.
struct Shard<'a> {
    session: Session,
    folder: &'a PlanFolder,
    plan: &'a Plan,
    pieces: &'a [Piece],
    who: &'a Who,
    heart: &'a Heart,
    progress: &'a Progress,
    attempt: Attempt,
    model: Model,
    choices: Choices,
    sizes: Sizes,
    text: Option<Windows>,
    stats: Option<Stats>,
}

impl<'a> Shard<'a> {
    /// Opens everything and compares it with the plan.
    fn begin(
        session: &Session,
        folder: &'a PlanFolder,
        plan: &'a Plan,
        (index, who): (usize, &'a Who),
        heart: &'a Heart,
        progress: &'a Progress,
    ) -> Result<Shard<'a>> {
        let shard = plan.shard(index)?;
        let model = Model::open(&plan.checkpoint, &OpenOptions::default())?;
        check_unchanged(&model, &plan.sources, &session.stop)?;
        check_side_unchanged(&model, &plan.side, &session.stop)?;
        model.check_trunk_scales()?;
        check_layers(&model, plan)?;
        let (text, stats) = learnt(folder, plan, &model)?;
        let choices = Choices::of(&plan.recipe, model.spec())?;
        let sizes = Sizes::of(&model, &plan.recipe, &choices, size(text.as_ref(), stats.as_ref()))?;
        let hessians = solver(&plan.recipe.solver)?.needs_hessian();
        let budget = |threads| Budget::of(&model, &sizes, threads, (text.as_ref(), hessians), None);
        let (session, _) = within_memory(session, budget)?;
        check_free(folder.path(), shard.bytes)?;
        let (pieces, attempt) = (&shard.pieces, Attempt::create(folder, index, who)?);
        let shard = Shard {
            session,
            folder,
            plan,
            pieces,
            who,
            heart,
            progress,
            attempt,
            model,
            choices,
            sizes,
            text,
            stats,
        };
        Ok(shard)
    }

    fn run(&self) -> Result<()> {
        self.session.in_pool(|| self.pieces.iter().try_for_each(|&piece| self.piece(piece)))
    }

    fn piece(&self, piece: Piece) -> Result<()> {
        self.session.stop.check()?;
        if is_done(self.folder, self.plan, piece)? {
            if let Some((layer, experts)) = self.plan.experts_of(piece) {
                let source = self.sizes.layer_source_bytes(layer);
                self.progress.add(
                    source * experts.len() as u64 / self.plan.n_experts(layer).max(1) as u64,
                    experts.len() as u64,
                );
            }
        } else {
            match piece {
                Piece::Trunk => self.trunk()?,
                Piece::Bank { layer } => {
                    let written = self.experts(layer, piece, &bank_file(layer))?;
                    let note = LayerNote::of(layer, written);
                    publish_bank(self.folder, self.plan, layer, &self.attempt, note)?;
                }
                Piece::Experts { layer, first, end } => {
                    let name = part_file(layer, &(first..end));
                    let note = self.experts(layer, piece, &name)?;
                    self.attempt.publish(&name, &self.folder.parts().join(&name), &note.0.sha256)?;
                    let report = ExpertsReport { plan: self.plan.id.clone(), note };
                    self.attempt.publish_report(&report, &self.folder.report(piece))?;
                }
            }
            self.model.check_unchanged()?;
        }
        match piece {
            Piece::Experts { layer, .. } => assemble(self.folder, self.plan, layer, &self.attempt),
            _ => Ok(()),
        }
    }

    /// Codes experts into a file of the attempt.
    fn experts(&self, layer: usize, piece: Piece, name: &str) -> Result<Written> {
        let isa = Isa::get();
        let (_, experts) = self.plan.experts_of(piece).unwrap_or_default();
        let inter = self.model.spec().moe(layer).map_or(0, |moe| moe.inter);
        let n_planes = self.sizes.layer_planes(layer) * experts.len() / self.plan.n_experts(layer).max(1);
        let work = ExpertWork {
            isa,
            session: &self.session,
            progress: self.progress,
            model: &self.model,
            recipe: &self.plan.recipe,
            choices: &self.choices,
            stats: self.stats.as_ref(),
            n_planes,
            layer,
            experts,
            inter,
        };
        let path = self.attempt.path().join(name);
        let lost = || Error::new(Kind::Io, "a new bank without what is known of it");
        let Some(windows) = &self.text else {
            return work.run(None, None, None, Place::New(&path))?.0.ok_or_else(lost);
        };
        let waits = |what: Option<String>| match what {
            Some(what) => self.heart.say(State::Waiting, Some(format!("waits for {what}"))),
            None => self.heart.say(State::Running, None),
        };
        let units = self.units(isa, windows, &waits);
        let mut calibration = Calibration::resume(isa, windows.clone(), units.stream_at(layer)?);
        let weights = LayerWeights::load(isa, &self.model, layer)?;
        calibration.enter(&weights)?;
        let trunk = Some([&weights, &weights]);
        let (written, delta, _) = work.run(trunk, Some(&calibration), None, Place::New(&path))?;
        if let Some(delta) = delta {
            units.leave(layer, calibration.into_stream(), &delta)?;
        }
        written.ok_or_else(lost)
    }

    fn units<'u>(
        &'u self,
        isa: Isa,
        windows: &'u Windows,
        waits: &'u (dyn Fn(Option<String>) + Sync),
    ) -> Units<'u> {
        Units {
            isa,
            folder: self.folder,
            plan: &self.plan.id,
            model: &self.model,
            windows,
            units: self.plan.units(),
            who: self.who,
            stop: &self.session.stop,
            waits,
        }
    }

    /// Trunk files, side files, and the manifest as far as it is known.
    fn trunk(&self) -> Result<()> {
        let (model, dir, mut notes) = (&self.model, self.attempt.path(), Vec::new());
        let coder =
            Coder { isa: Isa::get(), choices: &self.choices, solver: solver(&self.plan.recipe.solver)? };
        let scratch = Scratch::create(dir, self.sizes.trunk_bytes, self.who);
        let (text, stop) = (self.text.as_ref(), &self.session.stop);
        let work =
            TrunkWork { model, dir, scratch: &scratch.path, coder, text, progress: self.progress, stop };
        let trunk = Trunk::of(model, self.choices.trunk())?;
        let TrunkNote { files, errors, .. } = work.write(&trunk)?;
        let side = writer::write_side_files(model, dir, &mut notes)?;
        notes.iter().for_each(|note| say(&format!("note: {note}")));
        let entry =
            |f: &SourceFile| FileEntry { path: f.path.clone(), bytes: f.bytes, sha256: f.sha256.clone() };
        let note = writer::manifest(
            model,
            Pieces {
                trunk: files,
                trunk_codecs: trunk.codecs(),
                trunk_errors: errors,
                left_out: trunk.left_out(),
                layers: Vec::new(),
                side,
                sources: self.plan.sources.iter().map(entry).collect(),
                recipe: kept_recipe(model, &self.plan.recipe, text, self.stats.as_ref()),
                align: self.plan.recipe.align,
            },
        );
        for file in &note.files {
            self.attempt.publish(&file.path, &self.folder.bundle().join(&file.path), &file.sha256)?;
        }
        let report = TrunkReport { plan: self.plan.id.clone(), note };
        self.attempt.publish_report(&report, &self.folder.report(Piece::Trunk)).map(drop)
    }
}

/// Bytes of a block that is freed at the start.
const BLOCK_BYTES: usize = 16 << 20;

/// glibc gives memory back at once where what is freed is larger than any block that it saw freed, so that every expert's
/// buffers would be cleared pages again: a tenth of the time of a fast codec. It learns from the first large block.
fn keep_freed_memory() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(BLOCK_BYTES)));
}

/// What solvers learn from, as it lies in the plan.
fn learnt(folder: &PlanFolder, plan: &Plan, model: &Model) -> Result<(Option<Windows>, Option<Stats>)> {
    let changed = |path: PathBuf| {
        Err(Error::bad_data("not what was planned with: its sha256 is another")
            .in_file(path)
            .hint("plan again"))
    };
    match &plan.calibration {
        Planned::None => Ok((None, None)),
        Planned::Text { tokens_sha256: expected, n_windows, .. } => {
            let path = folder.tokens();
            let text = crate::text::read(&path, TOKENS_BYTES_MAX)?;
            let windows = Windows::from_json(&text, model.spec().vocab).in_file(&path)?;
            if tokens_sha256(&windows) != *expected || windows.lens.len() != *n_windows {
                return changed(path);
            }
            Ok((Some(windows), None))
        }
        Planned::Stats { sha256 } => {
            let path = folder.stats();
            if moepack_format::InputFile::open(&path)?.sha256(&|| false)? != *sha256 {
                return changed(path);
            }
            Ok((None, Some(Stats::open(&path, model)?)))
        }
    }
}

fn size(text: Option<&Windows>, stats: Option<&Stats>) -> Option<CalibrationSize> {
    let of_text = text.map(|w| CalibrationSize { n_tokens: w.tokens.len() as u64, by_text: true });
    of_text.or(stats.map(|s| CalibrationSize { n_tokens: s.n_tokens(), by_text: false }))
}

/// Refuses a plan of another model's layers.
fn check_layers(model: &Model, plan: &Plan) -> Result<()> {
    let found: BTreeMap<usize, usize> =
        model.spec().moe_layers().map(|(l, moe)| (l, moe.n_experts)).collect();
    let planned: BTreeMap<usize, usize> = plan.layers.iter().map(|l| (l.layer, l.n_experts)).collect();
    if found == planned {
        return Ok(());
    }
    Err(Error::bad_data("the plan's layers are not the checkpoint's")
        .in_file(model.root())
        .hint("plan again"))
}

/// Where matrices of the trunk wait for the headers of their files, a directory of this process alone: in what the scheduler
/// gives a job for this, if there is room, else beside the rest.
struct Scratch {
    path: PathBuf,
    is_own: bool,
}

impl Scratch {
    fn create(beside: &Path, bytes: u64, who: &Who) -> Scratch {
        let named = ["SLURM_TMPDIR", "TMPDIR"].iter().filter_map(std::env::var_os).map(PathBuf::from);
        let fits =
            |dir: &PathBuf| dir.is_absolute() && storage::is_dir(dir) && check_free(dir, bytes).is_ok();
        let own = |dir: PathBuf| dir.join(format!("moepack-{}-{}", who.machine(), who.pid));
        let created = named.filter(fits).map(own).find(|dir| storage::create_dir(dir).is_ok());
        let is_own = created.is_some();
        Scratch { path: created.unwrap_or_else(|| beside.to_path_buf()), is_own }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.is_own {
            // It is empty: what was in it had no name.
            let _ = storage::remove_dir(&self.path);
        }
    }
}
