//! `check --repair`: what is damaged made anew from the checkpoint.

use std::collections::BTreeSet;
use std::path::Path;

use moepack_convert::Model;
use moepack_format::check::{Damage, read_manifest};
use moepack_format::manifest::{MANIFEST, Manifest};
use moepack_format::storage::File;
use moepack_format::{Error, Kind, Result, atomic};
use moepack_quant::solve::solver;
use rustix::fs::OFlags;

use super::Arguments;
use crate::engine::budget::{Budget, within_memory};
use crate::engine::repair::{Repaired, Source, check_sources, kept_options, kept_recipe};
use crate::engine::sizes::Sizes;
use crate::engine::stats::Stats;
use crate::recipe::Choices;
use crate::session::Session;
use crate::text::windows_of_text;

/// Makes everything whole that `damage` names; gives what was.
///
/// # Errors
/// A checkpoint or calibration that is not the bundle's; a manifest beyond repair; another process that is at it; what cannot
/// be read, coded or written. Files that were whole by then stay so.
pub(super) fn repair(
    args: &Arguments,
    session: &Session,
    checkpoint: &Path,
    damage: &[Damage],
) -> Result<Vec<Repaired>> {
    if damage.is_empty() {
        return Ok(Vec::new());
    }
    let dir = args.bundle.as_path();
    let _lock = lock(dir)?;
    atomic::sweep(dir)?;
    let mut repaired = Vec::new();
    let manifest = mended_manifest(dir, &mut repaired)?;
    let damaged: BTreeSet<String> = damage.iter().map(|d| d.file.clone()).collect();
    if !manifest.files.iter().any(|f| damaged.contains(&f.path)) {
        return Ok(repaired);
    }
    let model = Model::open(checkpoint, &kept_options(&manifest))?;
    if model.bundle().is_some() {
        return Err(Error::usage("a bundle is repaired from its checkpoint, and this is a bundle")
            .in_file(checkpoint));
    }
    check_sources(&manifest, &model)?;
    let recipe = kept_recipe(&manifest, dir)?;
    let choices = Choices::of(&recipe, model.spec())?;
    let source = Source { dir, manifest: &manifest, model: &model, recipe: &recipe, choices: &choices };
    let survey = session.in_pool(|| source.survey(session, &damaged))?;
    let stats = args.stats.as_ref().map(|p| Stats::open(p, &model)).transpose()?;
    let text = || args.calibrate.as_ref().map(|t| windows_of_text(&model, t, &args.windows)).transpose();
    let calibrated = source.calibration(&survey, text, stats.as_ref())?;
    let sizes = Sizes::of(&model, &recipe, &choices, None)?;
    let hessians = solver(&recipe.solver)?.needs_hessian();
    let budget = |threads| Budget::of(&model, &sizes, threads, (calibrated.text.as_ref(), hessians), None);
    let (session, _) = within_memory(session, budget)?;
    session.in_pool(|| source.repair(&session, &survey, calibrated))?;
    repaired.extend(survey.repaired(&manifest));
    Ok(repaired)
}

/// The manifest, written again if bits of it were flipped.
fn mended_manifest(dir: &Path, repaired: &mut Vec<Repaired>) -> Result<Manifest> {
    let read = read_manifest(dir)?;
    let beyond = || {
        Error::new(
            Kind::Finding,
            "the manifest is damaged in more than a few bits, and nothing else says what it said",
        )
        .in_file(dir.join(MANIFEST))
        .hint("copy manifest.json from another copy of the bundle and run this again, or quantize anew")
    };
    if let Some(text) = read.mended {
        atomic::write_file(&dir.join(MANIFEST), &text)?;
        let (file, experts, tensors) = (MANIFEST.to_owned(), Vec::new(), Vec::new());
        repaired.push(Repaired { file, layer: None, experts, tensors });
    } else if read.damage.iter().any(|d| d.file == MANIFEST) {
        return Err(beyond());
    }
    read.manifest.ok_or_else(beyond)
}

/// A lock on the bundle's directory, which leaves nothing in it.
fn lock(dir: &Path) -> Result<File> {
    let file = File::open(dir, OFlags::empty()).map_err(|e| Error::io(&e, "open", dir))?;
    match file.try_lock().map_err(|e| Error::io(&e, "lock", dir))? {
        true => Ok(file),
        false => Err(Error::new(Kind::Temporary, "another process repairs this bundle")
            .in_file(dir)
            .hint("wait until it is done, then run the same command again")),
    }
}
