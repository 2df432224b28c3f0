//! The main job: checkpoint in, bundle out, calibrated and measured on the way.

use std::collections::BTreeMap;
use std::path::Path;

use moepack_convert::Model;
use moepack_convert::spec::Mlp;
use moepack_format::manifest::{FileEntry, Manifest};
use moepack_format::trunk::FileSummary;
use moepack_format::{Error, Kind, Result};
use moepack_quant::Isa;
use moepack_quant::solve::solver;
use moepack_verify::forward::LayerWeights;
use moepack_verify::tokens::Windows;
use serde_json::{Value, json};

use crate::engine::calibration::Calibration;
use crate::engine::coder::Coder;
use crate::engine::experts::{ExpertWork, Place};
use crate::engine::hash::Hashes;
use crate::engine::pair::{Drift, Pair};
use crate::engine::parts::Parts;
use crate::engine::sizes::Sizes;
use crate::engine::stats::{Stats, tokens_sha256};
use crate::engine::trunk::Trunk;
use crate::engine::trunk::write::{TrunkNote, TrunkWork};
use crate::engine::workspace::Workspace;
use crate::engine::writer::{self, LayerNote, Pieces, Written, bank_file, layer_note};
use crate::progress::Progress;
use crate::recipe::{Choices, Recipe};
use crate::session::Session;

/// The note about the trunk in a workspace.
const TRUNK_NOTE: &str = "trunk";
/// What the kept recipe calls the policy for weights that are no numbers.
pub const NAN_POLICY: &str = "nan_policy";
/// They are read as 0.
pub const ZERO: &str = "zero";
/// The note about side files.
const SIDE_NOTE: &str = "side-files";

/// What is to be done.
#[derive(Debug)]
pub struct Job<'a> {
    /// The checkpoint.
    pub model: &'a Model,
    /// Codec of each matrix, solver, alignment.
    pub recipe: &'a Recipe,
    /// The recipe worked out for this model.
    pub choices: &'a Choices,
    /// Bytes of everything.
    pub sizes: &'a Sizes,
    /// Where the bundle goes.
    pub target: &'a Path,
    /// Whether a bundle there is replaced.
    pub overwrite: bool,
    /// Text to calibrate on.
    pub calibration: Option<Windows>,
    /// Stats of an earlier calibration.
    pub stats: Option<&'a Stats>,
    /// Text to measure drift on.
    pub evaluation: Option<Windows>,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// The bundle's manifest.
    pub manifest: Manifest,
    /// Drift on the evaluation text.
    pub drift: Option<Drift>,
    /// Whether earlier work went on.
    pub resumed: bool,
    /// What was noted on the way.
    pub notes: Vec<String>,
}

/// Does the job.
///
/// # Errors
/// Whatever is wrong with input, output or recipe; nothing half-written is left but what the same command can go on
/// with.
pub fn quantize(session: &Session, job: Job<'_>) -> Result<Outcome> {
    job.model.check_trunk_scales()?;
    let workspace = Workspace::open(job.target, job.overwrite, &identity(&job))?;
    match run(session, job, &workspace) {
        Ok(outcome) => workspace.publish().map(|()| outcome),
        Err(e) => Err(workspace.give_up(e)),
    }
}

/// What decides the bytes of the bundle: another value, and the unfinished work is not ours.
fn identity(job: &Job<'_>) -> Value {
    json!({ "version": env!("CARGO_PKG_VERSION"), "work": recipe_value(job), "sources": sources(job.model) })
}

/// The files of a model as a journal knows them.
pub fn sources(model: &Model) -> Vec<Value> {
    model.files().iter().map(|f| json!({"path": f.name, "fingerprint": f.fingerprint})).collect()
}

/// The recipe as the manifest keeps it, with what it was calibrated on.
fn recipe_value(job: &Job<'_>) -> Value {
    kept_recipe(job.model, job.recipe, job.calibration.as_ref(), job.stats)
}

/// The same from its parts.
pub fn kept_recipe(model: &Model, recipe: &Recipe, text: Option<&Windows>, stats: Option<&Stats>) -> Value {
    let calibration = match (text, stats) {
        (Some(windows), _) => {
            json!({"tokens": windows.tokens.len(), "tokens_sha256": tokens_sha256(windows)})
        }
        (None, Some(stats)) => stats.provenance(),
        (None, None) => Value::Null,
    };
    let mut value = json!({"recipe": recipe, "calibration": calibration});
    if model.zeroes() {
        value[NAN_POLICY] = json!(ZERO);
    }
    value
}

fn run(session: &Session, job: Job<'_>, workspace: &Workspace) -> Result<Outcome> {
    let (model, stop) = (job.model, &session.stop);
    let (kept, recipe) = (recipe_value(&job), job.recipe);
    let sources: Vec<_> =
        model.files().iter().map(|f| (f.name.clone(), f.path.clone(), f.fingerprint.bytes)).collect();
    let paths = sources.iter().map(|(_, path, _)| path.clone()).collect();
    let (manifest, drift, notes) = std::thread::scope(|scope| {
        let hashes = Hashes::start(scope, paths, stop.clone());
        let progress = session.progress("quantize", job.sizes.source_bytes, job.sizes.n_experts());
        let mut notes = Vec::new();
        let coded_trunk = Trunk::of(model, job.choices.trunk())?;
        let (trunk_codecs, left_out) = (coded_trunk.codecs(), coded_trunk.left_out());
        let solver = solver(&recipe.solver)?;
        let coder = Coder { isa: Isa::get(), choices: job.choices, solver };
        let text = job.calibration.as_ref();
        let dir = workspace.dir();
        let work =
            TrunkWork { model, dir, scratch: workspace.home(), coder, text, progress: &progress, stop };
        let TrunkNote { files: trunk, errors: trunk_errors, n_fell_back } =
            trunk_note(workspace, &work, &coded_trunk)?;
        if n_fell_back > 0 {
            notes.push(format!(
                "{n_fell_back} of {} trunk matrices are rounded to nearest, which is better on held-out inputs",
                trunk_codecs.len()
            ));
        }
        let side = side_note(workspace, model, &mut notes)?;
        let written = written_trunk(&job, workspace, &trunk, &trunk_codecs)?;
        let align = job.recipe.align;
        let (layers, drift) = Layers::begin(job, written, workspace, &progress, session)?.run()?;
        stop.check()?;
        let hashes = hashes.finish()?;
        stop.check()?;
        model.check_unchanged()?;
        let entry = |((path, _, bytes), sha256)| FileEntry { path, bytes, sha256 };
        let sources = sources.into_iter().zip(hashes).map(entry).collect();
        let pieces = Pieces {
            trunk,
            trunk_codecs,
            trunk_errors,
            left_out,
            layers,
            side,
            sources,
            recipe: kept,
            align,
        };
        let mut manifest = writer::manifest(model, pieces);
        writer::fill_up(&mut manifest, recipe)?;
        notes.extend(model.zeroed_note());
        Ok::<_, Error>((manifest, drift, notes))
    })?;
    if !workspace.is_published()? {
        manifest.write(workspace.dir())?;
    }
    Ok(Outcome { manifest, drift, resumed: workspace.resumed(), notes })
}

/// The side files, of an earlier run or written now.
fn side_note(workspace: &Workspace, model: &Model, notes: &mut Vec<String>) -> Result<Vec<FileEntry>> {
    if let Some(done) = workspace.note(SIDE_NOTE)? {
        return Ok(done);
    }
    let side = writer::write_side_files(model, workspace.dir(), notes)?;
    workspace.leave_note(SIDE_NOTE, &side)?;
    Ok(side)
}

/// The trunk, of an earlier run or written now.
fn trunk_note(workspace: &Workspace, work: &TrunkWork<'_>, trunk: &Trunk<'_>) -> Result<TrunkNote> {
    if let Some(done) = workspace.note(TRUNK_NOTE)? {
        return Ok(done);
    }
    let note = work.write(trunk)?;
    workspace.leave_note(TRUNK_NOTE, &note)?;
    Ok(note)
}

/// The trunk that was written, for the bundle's side of the evaluation; `None` where that is the checkpoint's.
fn written_trunk(
    job: &Job<'_>,
    workspace: &Workspace,
    files: &[FileSummary],
    codecs: &BTreeMap<String, String>,
) -> Result<Option<Model>> {
    if job.evaluation.is_none() || codecs.is_empty() {
        return Ok(None);
    }
    let names = files.iter().map(|f| f.file.clone()).collect();
    Model::open_trunk(workspace.dir(), names, codecs).map(Some)
}

/// The layers, one after the other.
struct Layers<'a> {
    isa: Isa,
    job: Job<'a>,
    workspace: &'a Workspace,
    progress: &'a Progress,
    session: &'a Session,
    calibration: Option<Calibration>,
    pair: Option<Pair>,
    /// The bundle's trunk, where it is another than the checkpoint's.
    trunk: Option<Model>,
    done: Vec<LayerNote>,
}

/// A layer's trunk on its way.
struct Entered {
    weights: LayerWeights,
    /// The bundle's, where it is another.
    coded: Option<LayerWeights>,
}

impl Entered {
    /// The checkpoint's and the bundle's.
    fn both(&self) -> [&LayerWeights; 2] {
        [&self.weights, self.coded.as_ref().unwrap_or(&self.weights)]
    }
}

impl<'a> Layers<'a> {
    fn begin(
        mut job: Job<'a>,
        trunk: Option<Model>,
        workspace: &'a Workspace,
        progress: &'a Progress,
        session: &'a Session,
    ) -> Result<Layers<'a>> {
        let (isa, model) = (Isa::get(), job.model);
        let calibration = job.calibration.take().map(|w| Calibration::begin(isa, model, w)).transpose()?;
        // Embedding and head are never coded, so both sides have the checkpoint's.
        let pair = job.evaluation.take().map(|w| Pair::begin(isa, model, model, w)).transpose()?;
        Ok(Layers { isa, job, workspace, progress, session, calibration, pair, trunk, done: Vec::new() })
    }

    fn run(mut self) -> Result<(Vec<LayerNote>, Option<Drift>)> {
        let model = self.job.model;
        for (l, layer) in model.spec().layers.iter().enumerate() {
            self.session.stop.check()?;
            match &layer.mlp {
                Mlp::Dense { .. } | Mlp::None => self.dense(l)?,
                Mlp::Moe(moe) => self.moe(l, moe.n_experts, moe.inter)?,
            }
        }
        let drift = self.pair.take().map(|pair| pair.finish(model, model)).transpose()?;
        Ok((self.done, drift))
    }

    /// The layer's trunk, the checkpoint's and the bundle's where that is another, and every text through its attention;
    /// nothing where no text is on the way.
    fn enter(&mut self, l: usize) -> Result<Option<Entered>> {
        if self.calibration.is_none() && self.pair.is_none() {
            return Ok(None);
        }
        let load = |model: &Model| LayerWeights::load(self.isa, model, l);
        let (weights, coded) = (load(self.job.model)?, self.trunk.as_ref().map(load).transpose()?);
        if let Some(calibration) = &mut self.calibration {
            calibration.enter(&weights)?;
        }
        if let Some(pair) = &mut self.pair {
            pair.enter(&weights, coded.as_ref().unwrap_or(&weights))?;
        }
        Ok(Some(Entered { weights, coded }))
    }

    fn dense(&mut self, l: usize) -> Result<()> {
        self.enter(l)?;
        if let Some(pair) = &mut self.pair {
            pair.leave(l, None);
        }
        Ok(())
    }

    fn moe(&mut self, l: usize, n_experts: usize, inter: usize) -> Result<()> {
        let finished = self.workspace.note::<LayerNote>(&layer_note(l))?;
        let weights = self.enter(l)?;
        let (note, calibrated, paired) = match (finished, weights) {
            (Some(note), None) => {
                self.progress.add(self.job.sizes.layer_source_bytes(l), n_experts as u64);
                (note, None, None)
            }
            (finished, weights) => {
                let work = ExpertWork {
                    isa: self.isa,
                    session: self.session,
                    progress: self.progress,
                    model: self.job.model,
                    recipe: self.job.recipe,
                    choices: self.job.choices,
                    stats: self.job.stats,
                    n_planes: self.job.sizes.layer_planes(l),
                    layer: l,
                    experts: 0..n_experts,
                    inter,
                };
                let path = self.workspace.dir().join(bank_file(l));
                let parts = self.parts(l, n_experts, finished.as_ref())?;
                let place = match &parts {
                    _ if finished.is_some() => Place::Finished(&path),
                    Some(parts) => Place::Parted(&path, parts),
                    None => Place::New(&path),
                };
                let (trunk, calibration) = (weights.as_ref().map(Entered::both), self.calibration.as_ref());
                let (written, delta, paired) = work.run(trunk, calibration, self.pair.as_ref(), place)?;
                let note = self.layer_note(l, written, finished)?;
                parts.into_iter().for_each(Parts::remove);
                (note, delta, paired)
            }
        };
        if let (Some(calibration), Some(delta)) = (&mut self.calibration, calibrated) {
            calibration.leave(&delta);
        }
        if let (Some(pair), Some(delta)) = (&mut self.pair, paired) {
            let overlap = pair.add(delta);
            pair.leave(l, Some(overlap));
        }
        self.done.push(note);
        Ok(())
    }

    /// The parts of a layer whose coding takes long enough for them.
    fn parts(&self, l: usize, n_experts: usize, finished: Option<&LayerNote>) -> Result<Option<Parts<'a>>> {
        if finished.is_some() || self.job.choices.is_copied(l, n_experts)? {
            return Ok(None);
        }
        let source_bytes = self.job.sizes.layer_source_bytes(l);
        Parts::open(self.workspace, (l, n_experts), source_bytes, self.job.recipe.align).map(Some)
    }

    /// The note of a layer whose bank is new, or was finished by an earlier run.
    fn layer_note(
        &self,
        l: usize,
        written: Option<Written>,
        finished: Option<LayerNote>,
    ) -> Result<LayerNote> {
        match (written, finished) {
            (Some(written), _) => {
                let note = LayerNote::of(l, written);
                self.workspace.leave_note(&layer_note(l), &note)?;
                Ok(note)
            }
            (None, Some(note)) => Ok(note),
            (None, None) => Err(Error::new(Kind::Io, "a finished bank without its note")),
        }
    }
}
