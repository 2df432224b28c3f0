//! Merging: when every shard is done, the manifest is written and the bundle gets its name. No bank is read or copied.

use std::path::{Path, PathBuf};

use moepack_format::bundle::Bundle;
use moepack_format::manifest::{FileEntry, Manifest, Totals};
use moepack_format::{Context, Error, InputFile, Kind, Result, atomic, storage};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::cluster::folder::PlanFolder;
use crate::cluster::make::rename;
use crate::cluster::plan::{Piece, Plan};
use crate::cluster::publish::replace_json;
use crate::cluster::reports::{missing, ranges, report};
use crate::engine::workspace::{read_json, refuse_existing};
use crate::engine::writer::{LayerNote, fill_up};
use crate::stop::Stop;

/// Files of a bundle that are looked at: more than any has.
const FILES_MAX: usize = 1 << 20;
/// The note that a plan is merged.
const MERGED: &str = "merged.json";

/// Where the bundle went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Merged {
    /// Id of the plan.
    plan: String,
    bundle: PathBuf,
}

/// How to merge.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Where the bundle goes.
    pub target: &'a Path,
    /// Whether a bundle there is replaced.
    pub overwrite: bool,
    /// Whether all files are hashed again.
    pub verify: bool,
}

/// Writes the manifest and gives the bundle its name. Merged before, nothing is done.
///
/// # Errors
/// Shards that are not done (kind `Temporary`, all of them named); a file or report that is not theirs; the file system
/// refuses.
pub fn merge(folder: &PlanFolder, plan: &Plan, options: Options<'_>, stop: &Stop) -> Result<Manifest> {
    let note = folder.path().join(MERGED);
    let target = std::path::absolute(options.target).map_err(|e| Error::io(&e, "find", options.target))?;
    if let Some(merged) = read_json::<Merged>(&note)?.filter(|m| m.plan == plan.id)
        && !storage::exists(&folder.bundle())?
    {
        return merged_before(&merged, &target);
    }
    refuse_existing(options.target, options.overwrite)?;
    let missing = missing(folder, plan)?;
    if !missing.is_empty() {
        let (n, all) = (missing.len(), plan.shards.len());
        let what = format!("{n} of {all} shards are not done: {}", ranges(&missing));
        return Err(Error::new(Kind::Temporary, what)
            .in_file(folder.path())
            .hint("`moepack status` tells more; run `moepack worker --shard N` for each of them"));
    }
    let manifest = manifest(folder, plan)?;
    check_files(folder, &manifest, options.verify, stop)?;
    manifest.write(&folder.bundle())?;
    storage::sync_dir(&folder.bundle()).map_err(|e| Error::output(&e, "fsync", &folder.bundle()))?;
    replace_json(&note, &Merged { plan: plan.id.clone(), bundle: target })?;
    give_name(folder, options)?;
    clean(folder, plan);
    Ok(manifest)
}

/// Whether a plan is merged, so that nothing is left to be done.
///
/// # Errors
/// A note that is damaged.
pub fn is_merged(folder: &PlanFolder, plan: &Plan) -> Result<bool> {
    let merged = read_json::<Merged>(&folder.path().join(MERGED))?;
    Ok(merged.is_some_and(|m| m.plan == plan.id) && !storage::exists(&folder.bundle())?)
}

fn merged_before(merged: &Merged, target: &Path) -> Result<Manifest> {
    if merged.bundle != target || !Bundle::is_bundle(target) {
        return Err(Error::new(Kind::CannotCreate, "the plan is merged already")
            .in_file(&merged.bundle)
            .hint("the bundle was written there; plan again to make another"));
    }
    Manifest::read(target)
}

/// The manifest, put together from the reports.
fn manifest(folder: &PlanFolder, plan: &Plan) -> Result<Manifest> {
    let gone = || Error::new(Kind::Io, "a report is gone").in_file(folder.path());
    let mut manifest = report::<Manifest>(folder, plan, Piece::Trunk)?.ok_or_else(gone)?.note;
    for layer in &plan.layers {
        let piece = Piece::Bank { layer: layer.layer };
        let LayerNote { summary, entry } = report::<LayerNote>(folder, plan, piece)?.ok_or_else(gone)?.note;
        if entry.layer as usize != layer.layer || entry.n_experts as usize != layer.n_experts {
            return Err(Error::bad_data("the report of another bank").in_file(folder.report(piece)));
        }
        manifest.files.push(FileEntry { path: summary.file, bytes: summary.bytes, sha256: summary.sha256 });
        manifest.layers.push(entry);
    }
    manifest.files.sort_by(|a, b| a.path.cmp(&b.path));
    let weights = (manifest.totals.expert_weights, manifest.totals.trunk_weights);
    manifest.totals = Totals::sum(&manifest.files, &manifest.layers, &manifest.trunk, weights.0, weights.1);
    fill_up(&mut manifest, &plan.recipe)?;
    Ok(manifest)
}

/// Compares what lies in the bundle with the reports: names and lengths, and hashes where asked for.
fn check_files(folder: &PlanFolder, manifest: &Manifest, verify: bool, stop: &Stop) -> Result<()> {
    let dir = folder.bundle();
    atomic::sweep(&dir)?;
    let entries = storage::list(&dir, FILES_MAX).map_err(|e| Error::io(&e, "list", &dir))?;
    for path in entries {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name != moepack_format::manifest::MANIFEST && manifest.file(&name).is_none() {
            return Err(Error::bad_data("no shard of this plan made this file")
                .in_file(dir.join(&*name))
                .hint("move it away"));
        }
    }
    manifest.files.par_iter().try_for_each(|entry| {
        let path = dir.join(&entry.path);
        let file = InputFile::open(&path)?;
        let found = if verify { file.sha256(&|| stop.requested())? } else { entry.sha256.clone() };
        stop.check()?;
        if file.len() == entry.bytes && found == entry.sha256 {
            return Ok(());
        }
        let what = format!(
            "{} bytes with sha256 {found}, its shard reported {} with {}",
            file.len(),
            entry.bytes,
            entry.sha256
        );
        Err(Error::bad_data(what).hint("remove it and its report, then run its shard again")).in_file(path)
    })
}

fn give_name(folder: &PlanFolder, options: Options<'_>) -> Result<()> {
    rename(&folder.bundle(), options.target, options.overwrite).map_err(|e| {
        if e.what().contains("os error 18") {
            e.hint("bundle and plan must be on one file system, since nothing is copied; merge beside the plan and move it")
        } else {
            e
        }
    })
}

/// Removes what nobody needs any more. What stays is only untidy.
fn clean(folder: &PlanFolder, plan: &Plan) {
    let activations = (!plan.keep_activations).then(|| folder.activations());
    for dir in activations.into_iter().chain([folder.attempts(), folder.parts()]) {
        let _ = storage::remove_dir_all(&dir);
    }
}
