//! Calibration on its own: a text through the reference, and what each expert's inputs were like as a stats file.
//!
//! Every layer's share is a file of the workspace, and so is the residual stream behind the last one: a killed run goes on
//! with the next layer.

use std::path::{Path, PathBuf};

use moepack_convert::Model;
use moepack_format::{Result, atomic, storage};
use moepack_quant::Isa;
use moepack_verify::forward::{LayerWeights, RoutedSum, ordered};
use moepack_verify::tokens::Windows;
use serde_json::json;

use crate::engine::calibration::{Calibration, Observed, observe_expert};
use crate::engine::stats::{About, StatsWriter, layer_bytes};
use crate::engine::workspace::Workspace;
use crate::engine::{quantize::sources, stored};
use crate::progress::Progress;
use crate::session::Session;
use crate::text;

/// The longest share of a layer that is read back.
const LAYER_BYTES_MAX: u64 = 1 << 36;

/// What is to be done.
#[derive(Debug)]
pub struct Job<'a> {
    /// The checkpoint.
    pub model: &'a Model,
    /// The text.
    pub windows: Windows,
    /// What the stats file says about itself.
    pub about: &'a About,
    /// The stats file.
    pub target: &'a Path,
    /// Whether a file there is replaced.
    pub overwrite: bool,
}

/// Experts that no token reached, as layer and expert.
pub type Starved = Vec<(usize, usize)>;

/// Pushes the text through every layer and writes the stats file.
///
/// # Errors
/// Whatever is wrong with input or output; nothing half-written is left but what the same command can go on with.
pub fn calibrate(session: &Session, job: Job<'_>) -> Result<Starved> {
    let work =
        json!({"version": env!("CARGO_PKG_VERSION"), "stats": job.about, "sources": sources(job.model)});
    let workspace = Workspace::open_file(job.target, job.overwrite, &work)?;
    match run(session, job, &workspace) {
        Ok(starved) => workspace.publish().map(|()| starved),
        Err(e) => Err(workspace.give_up(e)),
    }
}

fn run(session: &Session, job: Job<'_>, workspace: &Workspace) -> Result<Starved> {
    let (model, isa) = (job.model, Isa::get());
    let progress = session.progress("calibrate", 0, model.spec().n_experts());
    let layers: Vec<usize> = model.spec().moe_layers().map(|(l, _)| l).collect();
    let mut starved = Starved::new();
    let mut done = 0;
    for &l in &layers {
        let Some(of_layer) = workspace.note::<Starved>(&layer_note(l))? else { break };
        starved.extend(of_layer);
        done += 1;
    }
    if done < layers.len() {
        let last = done.checked_sub(1).and_then(|i| layers.get(i)).copied();
        let calibration = match last {
            Some(l) => go_on(model, workspace, l, job.windows)?,
            None => Calibration::begin(isa, model, job.windows)?,
        };
        let coded = model.spec().moe_layers().take(done).map(|(_, moe)| moe.n_experts as u64).sum();
        progress.add(0, coded);
        let mut pass = Pass { session, model, workspace, progress: &progress, calibration };
        for l in last.map_or(0, |l| l + 1)..model.spec().layers.len() {
            starved.extend(pass.layer(l)?);
        }
    }
    model.check_unchanged()?;
    if !workspace.is_published()? {
        write(model, job.about, workspace, &layers)?;
    }
    Ok(starved)
}

/// The text behind a layer, where an earlier run had it.
fn go_on(model: &Model, workspace: &Workspace, layer: usize, windows: Windows) -> Result<Calibration> {
    let path = stream_file(workspace, layer);
    let stream = stored::load(&path, &stream_head(layer), model.spec(), &windows)?;
    Ok(Calibration::resume(Isa::get(), windows, stream))
}

/// Puts the layers' shares together.
fn write(model: &Model, about: &About, workspace: &Workspace, layers: &[usize]) -> Result<()> {
    let mut writer = StatsWriter::create(workspace.file(), model, about)?;
    for &l in layers {
        writer.write(l, &text::read(&layer_file(workspace, l), LAYER_BYTES_MAX)?)?;
    }
    writer.finish()
}

fn layer_note(layer: usize) -> String {
    format!("layer-{layer:05}")
}

fn layer_file(workspace: &Workspace, layer: usize) -> PathBuf {
    workspace.home().join(layer_note(layer) + ".moments")
}

fn stream_file(workspace: &Workspace, layer: usize) -> PathBuf {
    workspace.home().join(layer_note(layer) + ".stream")
}

fn stream_head(layer: usize) -> String {
    format!("moepack stream behind layer {layer}\n")
}

/// The text on its way.
struct Pass<'a> {
    session: &'a Session,
    model: &'a Model,
    workspace: &'a Workspace,
    progress: &'a Progress,
    calibration: Calibration,
}

impl Pass<'_> {
    /// One layer; gives the experts that no token reached.
    fn layer(&mut self, l: usize) -> Result<Starved> {
        self.session.stop.check()?;
        let (isa, model) = (Isa::get(), self.model);
        let weights = LayerWeights::load(isa, model, l)?;
        self.calibration.enter(&weights)?;
        let Some(moe) = model.spec().moe(l) else { return Ok(Starved::new()) };
        let pass = self.calibration.route(&weights)?;
        let mut sum = RoutedSum::new(&pass);
        let mut stats: Vec<Observed> = Vec::with_capacity(moe.n_experts);
        let work = |e: usize| {
            self.session.stop.check()?;
            let mlp = weights.pack_expert(&model.expert(l, e)?.decode(isa)?)?;
            observe_expert(isa, &pass, e, &mlp, (pass.width(), moe.inter))
        };
        ordered(moe.n_experts, work, |_, (output, expert)| {
            sum.add(&output);
            stats.push(expert);
            self.progress.add(0, 1);
            Ok(())
        })?;
        let delta = pass.finish(sum)?;
        self.calibration.leave(&delta);
        self.keep(l, &stats)
    }

    /// Keeps what a later run needs to go on behind a layer.
    fn keep(&self, l: usize, stats: &[Observed]) -> Result<Starved> {
        let without = stats.iter().enumerate().filter(|(_, s)| s.weighted.input.n_tokens == 0);
        let starved: Starved = without.map(|(e, _)| (l, e)).collect();
        atomic::write_file(&layer_file(self.workspace, l), &layer_bytes(stats))?;
        stored::store(&stream_file(self.workspace, l), &stream_head(l), self.calibration.stream())?;
        self.workspace.leave_note(&layer_note(l), &starved)?;
        let before = self.model.spec().moe_layers().map(|(l, _)| l).take_while(|&other| other < l).last();
        if let Some(before) = before {
            // It takes space and is of no use any more; what stays goes with the workspace.
            let _ = storage::remove_file(&stream_file(self.workspace, before));
        }
        Ok(starved)
    }
}
