//! Making a plan: the directory appears whole or not at all.

use std::path::{Path, PathBuf};

use moepack_convert::Model;
use moepack_format::file::CHUNK_BYTES;
use moepack_format::{AtomicFile, Error, InputFile, Kind, Result, atomic, storage};
use moepack_verify::tokens::Windows;

use crate::cluster::folder::{FOLDERS, PlanFolder};
use crate::cluster::plan::{Calibration, LayerExperts, Piece, Plan, SCHEMA, Shard};
use crate::cluster::source::sources;
use crate::cluster::split::{split, units};
use crate::engine::budget::stream_bytes;
use crate::engine::sizes::Sizes;
use crate::engine::stats::tokens_sha256;
use crate::recipe::{Recipe, moe_layers};
use crate::stop::Stop;

/// Units of a calibration text unless something else is asked for: so many machines push it through the model together.
pub const UNITS_DEFAULT: usize = 16;

/// What a plan is made of.
#[derive(Debug)]
pub struct Job<'a> {
    /// The checkpoint, as given.
    pub checkpoint: &'a Path,
    /// The same, opened.
    pub model: &'a Model,
    /// Recipe, allocation done.
    pub recipe: &'a Recipe,
    /// Bytes of everything.
    pub sizes: &'a Sizes,
    /// Text to calibrate on.
    pub text: Option<&'a Windows>,
    /// Stats of an earlier calibration.
    pub stats: Option<&'a Path>,
    /// Shards that are asked for.
    pub n_shards: Option<usize>,
    /// Units of the text that are asked for.
    pub n_units: Option<usize>,
    /// Whether activations are kept by merging.
    pub keep_activations: bool,
    /// Peak memory of a worker.
    pub peak_memory_bytes: u64,
    /// Of the whole job on one machine.
    pub seconds: f64,
}

/// Makes the plan and writes it to `target`.
///
/// # Errors
/// A checkpoint that cannot be read, an impossible number of shards, a target that is in the way.
pub fn make(job: &Job<'_>, target: &Path, overwrite: bool, stop: &Stop) -> Result<Plan> {
    if job.model.is_names_alone() {
        return Err(Error::missing("no weight file is there, and a plan knows them by their hashes")
            .in_file(job.checkpoint)
            .hint("fetch the weights, or leave -o away to see what they would take"));
    }
    refuse_existing(target, overwrite)?;
    let plan = plan(job, stop)?;
    write(job, &plan, target, overwrite)?;
    Ok(plan)
}

/// The shards of a job.
///
/// # Errors
/// An impossible number of shards.
pub fn shards(job: &Job<'_>) -> Result<Vec<Shard>> {
    let layers = moe_layers(job.model.spec())
        .into_iter()
        .map(|(layer, n_experts)| (LayerExperts { layer, n_experts }, job.sizes.layer_source_bytes(layer)));
    let shards = split(&layers.collect::<Vec<_>>(), job.n_shards)?;
    Ok(shards.into_iter().map(|pieces| shard(job, pieces)).collect())
}

fn shard(job: &Job<'_>, pieces: Vec<Piece>) -> Shard {
    let sizes = job.sizes;
    let experts: u64 = sizes.layers.iter().map(|l| l.source_bytes).sum();
    let (mut n_experts, mut source_bytes, mut bytes) = (0, 0, 0);
    for piece in &pieces {
        let (layer, part) = match *piece {
            Piece::Trunk => {
                source_bytes += sizes.source_bytes.saturating_sub(experts);
                bytes += sizes.trunk_bytes + sizes.side_bytes;
                continue;
            }
            Piece::Bank { layer } => (layer, None),
            Piece::Experts { layer, first, end } => (layer, Some(end - first)),
        };
        let Some(of_layer) = sizes.layers.iter().find(|l| l.layer == layer) else { continue };
        let n = part.unwrap_or(of_layer.n_experts);
        let share = |bytes: u64| bytes / of_layer.n_experts.max(1) as u64 * n as u64;
        n_experts += n as u64;
        source_bytes += share(of_layer.source_bytes);
        // Whoever puts a layer together writes all of it again.
        bytes += if part.is_some() { 2 * of_layer.record_bytes } else { of_layer.record_bytes };
    }
    let seconds = job.seconds * source_bytes as f64 / sizes.source_bytes.max(1) as f64;
    Shard { pieces, n_experts, source_bytes, bytes, peak_memory_bytes: job.peak_memory_bytes, seconds }
}

fn plan(job: &Job<'_>, stop: &Stop) -> Result<Plan> {
    let shards = shards(job)?;
    let (sources, side) = sources(job.model, stop)?;
    let layers = moe_layers(job.model.spec());
    let mut plan = Plan {
        schema: SCHEMA.to_owned(),
        id: String::new(),
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        checkpoint: absolute(job.checkpoint)?,
        sources,
        side,
        recipe: job.recipe.clone(),
        calibration: calibration(job)?,
        activation_bytes: activation_bytes(job.model, job.text),
        layers: layers.into_iter().map(|(layer, n_experts)| LayerExperts { layer, n_experts }).collect(),
        shards,
        bundle_bytes: job.sizes.bundle_bytes(),
        keep_activations: job.keep_activations,
    };
    plan.id = plan.digest()?;
    job.model.check_unchanged()?;
    Ok(plan)
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::io(&e, "find", path))
}

fn calibration(job: &Job<'_>) -> Result<Calibration> {
    Ok(match (job.text, job.stats) {
        (Some(text), _) => Calibration::Text {
            tokens_sha256: tokens_sha256(text),
            n_windows: text.lens.len(),
            n_tokens: text.tokens.len(),
            units: units(text.lens.len(), job.n_units.unwrap_or(UNITS_DEFAULT)),
        },
        (None, Some(stats)) => Calibration::Stats { sha256: InputFile::open(stats)?.sha256(&|| false)? },
        (None, None) => Calibration::None,
    })
}

/// Bytes of the text's streams at all layers with experts.
pub fn activation_bytes(model: &Model, text: Option<&Windows>) -> u64 {
    let n_tokens = text.map_or(0, |text| text.tokens.len() as u64);
    let layers = model.spec().moe_layers().count() as u64;
    4 * model.spec().width() as u64 * n_tokens * layers
}

/// Memory that a unit of so many tokens takes on its way.
pub fn unit_bytes(model: &Model, n_tokens: u64) -> u64 {
    stream_bytes(model.spec(), n_tokens)
}

/// Refuses a target that exists, unless it is a plan and may be overwritten.
///
/// # Errors
/// Kind `CannotCreate`.
pub fn refuse_existing(target: &Path, overwrite: bool) -> Result<()> {
    let cannot =
        |what: &str, hint: &str| Err(Error::new(Kind::CannotCreate, what).in_file(target).hint(hint));
    match storage::symlink_metadata(target) {
        Err(_) => Ok(()),
        Ok(_) if !overwrite => cannot("the output exists", "choose another name, or say --overwrite"),
        Ok(_) => match Plan::read(&PlanFolder::of(target)) {
            Ok(_) if target.is_dir() => Ok(()),
            _ => cannot("the output is no plan", "only a plan is ever overwritten; choose another name"),
        },
    }
}

fn write(job: &Job<'_>, plan: &Plan, target: &Path, overwrite: bool) -> Result<()> {
    let name = target.file_name().ok_or_else(|| Error::usage("the plan needs a name").in_file(target))?;
    let growing = target.with_file_name(format!(".{}.tmp-{}-0", name.to_string_lossy(), std::process::id()));
    let made = fill(job, plan, &growing).and_then(|()| rename(&growing, target, overwrite));
    if made.is_err() {
        // The error that led here matters more.
        let _ = storage::remove_dir_all(&growing);
    }
    made
}

/// Gives a finished directory its name, durably. An old one changes places with it and is removed.
///
/// # Errors
/// The file system refuses.
pub fn rename(from: &Path, to: &Path, overwrite: bool) -> Result<()> {
    let failed = |e: std::io::Error| Error::output(&e, "rename what is finished to", to);
    if overwrite && storage::exists(to)? {
        storage::exchange(from, to).map_err(failed)?;
        storage::remove_dir_all(from).map_err(|e| Error::output(&e, "remove the old", from))?;
    } else {
        storage::rename_new(from, to).map_err(failed)?;
    }
    storage::sync_dir(to.parent().unwrap_or(Path::new("."))).map_err(failed)
}

fn fill(job: &Job<'_>, plan: &Plan, dir: &Path) -> Result<()> {
    let folder = PlanFolder::of(dir);
    storage::create_dir(dir).map_err(|e| Error::output(&e, "create the plan", dir))?;
    for name in FOLDERS {
        let path = dir.join(name);
        storage::create_dir(&path).map_err(|e| Error::output(&e, "create", &path))?;
    }
    if let Some(text) = job.text {
        let windows: Vec<&[u32]> = text.iter().collect();
        let json = serde_json::to_vec(&windows).map_err(|e| Error::bad_data(e.to_string()))?;
        atomic::write_file(&folder.tokens(), &json)?;
    }
    if let (None, Some(stats)) = (job.text, job.stats) {
        copy(stats, &folder.stats())?;
    }
    let text = serde_json::to_vec_pretty(plan).map_err(|e| Error::bad_data(e.to_string()))?;
    atomic::write_file(&folder.plan(), &text)?;
    storage::sync_dir(dir).map_err(|e| Error::output(&e, "fsync", dir))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let (source, mut target) = (InputFile::open(from)?, AtomicFile::create(to)?);
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut left = source.len();
    while left > 0 {
        let n = usize::try_from(left).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let part = chunk.get_mut(..n).unwrap_or_default();
        source.read_exact_at(source.len() - left, part)?;
        target.append(part)?;
        left -= n as u64;
    }
    target.commit()
}
