//! A damaged bundle made whole again from its checkpoint: only what is damaged is made anew, by the recipe that the manifest
//! keeps, and a file appears under its name only if it has the SHA-256 that the manifest says.
//!
//! What decides the bytes is all in the manifest but two things, which whoever repairs must have: the checkpoint, and, where
//! experts were coded by what a text showed, that text. Then the text runs through the model again, up to the last layer that
//! is damaged.

use std::collections::BTreeSet;
use std::path::Path;

use moepack_convert::checkpoint::Lenient;
use moepack_convert::{Model, OpenOptions};
use moepack_format::manifest::{FileEntry, Manifest};
use moepack_format::{Context, Error, InputFile, Result, atomic};
use moepack_quant::Isa;
use moepack_quant::solve::solver;
use moepack_verify::tokens::Windows;
use serde::Serialize;
use serde_json::Value;

use crate::engine::coder::Coder;
use crate::engine::quantize::{NAN_POLICY, ZERO};
use crate::engine::stats::{Stats, tokens_sha256};
use crate::engine::trunk::Trunk;
use crate::engine::trunk::rewrite::TrunkDamage;
use crate::engine::trunk::write::TrunkWork;
use crate::progress::Progress;
use crate::recipe::{Choices, Recipe, matrix_name};
use crate::session::Session;

mod banks;

pub use banks::BankDamage;

/// The bundle and what it was made from.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The bundle's directory.
    pub dir: &'a Path,
    /// Its manifest, undamaged.
    pub manifest: &'a Manifest,
    /// The checkpoint.
    pub model: &'a Model,
    /// The recipe that the manifest keeps.
    pub recipe: &'a Recipe,
    /// The recipe worked out.
    pub choices: &'a Choices,
}

/// What is to be made anew.
#[derive(Debug, Default)]
pub struct Survey {
    /// Files that are copied from the checkpoint.
    side: Vec<FileEntry>,
    /// Trunk files.
    trunk: TrunkDamage,
    /// Banks, ascending by layer.
    banks: Vec<BankDamage>,
}

/// A file that was made whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Repaired {
    /// Its name.
    pub file: String,
    /// The layer, if it is a bank.
    pub layer: Option<u32>,
    /// Experts of it that were coded anew.
    pub experts: Vec<u32>,
    /// Trunk matrices of it that were coded anew.
    pub tensors: Vec<String>,
}

/// What a calibration is to be given again.
#[derive(Debug, Default)]
pub struct Calibrated<'a> {
    /// The text.
    pub text: Option<Windows>,
    /// Or the stats.
    pub stats: Option<&'a Stats>,
}

/// Refuses a checkpoint that is not the one: other files, or of other sizes.
///
/// # Errors
/// `BadData` with both.
pub fn check_sources(manifest: &Manifest, model: &Model) -> Result<()> {
    let found: Vec<_> = model.files().iter().map(|f| (f.name.as_str(), f.fingerprint.bytes)).collect();
    for source in &manifest.provenance.sources {
        let bytes = found.iter().find(|(name, _)| *name == source.path).map(|(_, bytes)| *bytes);
        if bytes != Some(source.bytes) {
            let has = bytes.map_or("it has none".to_owned(), |n| format!("it has one of {n}"));
            let what = format!("the bundle was made from a {} of {} bytes, {has}", source.path, source.bytes);
            return Err(Error::bad_data(what)
                .in_file(model.root())
                .hint("repair from the checkpoint that the bundle was made from"));
        }
    }
    Ok(())
}

impl<'a> Source<'a> {
    /// Looks at the files of these names: what of them is lost, and must be made anew.
    ///
    /// # Errors
    /// A bundle that is not what its recipe makes of the checkpoint; a disk that fails.
    pub fn survey(&self, session: &Session, damaged: &BTreeSet<String>) -> Result<Survey> {
        let mut survey = Survey::default();
        let (trunk, quiet) = (self.trunk()?, session.progress("look", 0, 0));
        let is_trunk = |name: &String| self.manifest.trunk.iter().any(|t| t.file == *name);
        if damaged.iter().any(is_trunk) {
            let work = self.trunk_work(session, &quiet, None)?;
            survey.trunk = work.survey(&trunk, self.manifest, damaged)?;
        }
        for entry in &self.manifest.files {
            let layer = self.manifest.layers.iter().find(|l| l.bank == entry.path);
            match layer {
                _ if !damaged.contains(&entry.path) || is_trunk(&entry.path) => {}
                Some(layer) => survey.banks.push(BankDamage::of(self, session, layer, entry)?),
                None => survey.side.push(entry.clone()),
            }
        }
        survey.banks.sort_by_key(|b| b.layer);
        Ok(survey)
    }

    /// Makes everything whole that a survey found.
    ///
    /// # Errors
    /// What cannot be read, coded or written; a file that does not come out as it was, which then stays as it is.
    pub fn repair(&self, session: &Session, survey: &Survey, calibrated: Calibrated<'_>) -> Result<()> {
        let experts: usize = survey.banks.iter().map(|b| b.lost.len()).sum();
        let progress = session.progress("repair", 0, experts as u64);
        survey.side.iter().try_for_each(|entry| self.copy(entry))?;
        if !survey.trunk.is_empty() {
            let work = self.trunk_work(session, &progress, calibrated.text.as_ref())?;
            work.rewrite(&self.trunk()?, self.manifest, &survey.trunk)?;
        }
        banks::repair(self, session, &progress, &survey.banks, calibrated)
    }

    fn trunk(&self) -> Result<Trunk<'a>> {
        Trunk::of(self.model, self.choices.trunk())
    }

    fn coder(&self) -> Result<Coder<'a>> {
        Ok(Coder { isa: Isa::get(), choices: self.choices, solver: solver(&self.recipe.solver)? })
    }

    fn trunk_work<'w>(
        &'w self,
        session: &'w Session,
        progress: &'w Progress,
        text: Option<&'w Windows>,
    ) -> Result<TrunkWork<'w>> {
        let (model, dir, stop) = (self.model, self.dir, &session.stop);
        Ok(TrunkWork { model, dir, scratch: dir, coder: self.coder()?, text, progress, stop })
    }

    /// Copies a side file.
    fn copy(&self, entry: &FileEntry) -> Result<()> {
        let side = self.model.side_files(&mut Vec::new())?.into_iter().find(|s| s.name == entry.path);
        let side = side.ok_or_else(|| {
            Error::missing(format!("the checkpoint has no {:?}", entry.path)).in_file(self.model.root())
        })?;
        let file = InputFile::open(&side.path)?;
        let mut bytes = vec![0; usize::try_from(file.len()).unwrap_or(0)];
        file.read_exact_at(0, &mut bytes)?;
        let found = file.sha256(&|| false)?;
        if found != entry.sha256 {
            let what = format!("sha256 is {found}, the bundle's was {}", entry.sha256);
            return Err(Error::bad_data(what)
                .in_file(&side.path)
                .hint("the checkpoint's file is another by now; the bundle's stays as it is"));
        }
        atomic::write_file(&self.dir.join(&entry.path), &bytes)
    }

    /// Whether what is lost was coded by what calibration showed, and an example of it.
    fn needs_calibration(&self, survey: &Survey) -> Result<Option<String>> {
        let solver = solver(&self.recipe.solver)?;
        let coder = self.coder()?;
        let by_hessian = solver.needs_hessian().then(|| survey.trunk.lost().next().cloned()).flatten();
        if by_hessian.is_some() || !solver.needs_stats() {
            return Ok(by_hessian);
        }
        for bank in &survey.banks {
            for &expert in &bank.lost {
                let needs = coder.needs(bank.layer, expert)?;
                if needs.input || needs.inner {
                    let name = matrix_name(bank.layer, expert, moepack_convert::Part::Down);
                    return Ok(Some(name.trim_end_matches(".down_proj").to_owned()));
                }
            }
        }
        Ok(None)
    }

    /// The calibration that repairing takes, of what is at hand: `text` and `stats` give it.
    ///
    /// # Errors
    /// None was given (kind `Usage`), or another (`BadData`).
    pub fn calibration<'s>(
        &self,
        survey: &Survey,
        text: impl FnOnce() -> Result<Option<Windows>>,
        stats: Option<&'s Stats>,
    ) -> Result<Calibrated<'s>> {
        let said = self.manifest.recipe.get("calibration").unwrap_or(&Value::Null);
        let Some(lost) = self.needs_calibration(survey)?.filter(|_| !said.is_null()) else {
            return Ok(Calibrated::default());
        };
        if let Some(sha256) = said.get("tokens_sha256").and_then(Value::as_str) {
            let text = text()?.ok_or_else(|| missing(&lost, "--calibrate TEXT", said))?;
            let found = tokens_sha256(&text);
            if found != sha256 {
                let what = format!("{} tokens with sha256 {found}, the bundle's: {said}", text.tokens.len());
                return Err(Error::bad_data(what)
                    .hint("give the text that it was calibrated on, with the same --ctx and --bos"));
            }
            return Ok(Calibrated { text: Some(text), stats: None });
        }
        let stats = stats.ok_or_else(|| missing(&lost, "--stats STATS", said))?;
        if stats.provenance() != *said {
            let what = format!("stats {}, the bundle was made by {said}", stats.provenance());
            return Err(Error::bad_data(what).hint("give the stats file or imatrix that it was made by"));
        }
        Ok(Calibrated { text: None, stats: Some(stats) })
    }
}

fn missing(lost: &str, option: &str, said: &Value) -> Error {
    Error::usage(format!("{lost} is damaged, and it was coded by what calibration showed: {said}"))
        .hint(format!("give {option}, the same as when the bundle was made"))
}

impl Survey {
    /// What is made whole by it.
    pub fn repaired(&self, manifest: &Manifest) -> Vec<Repaired> {
        let file = |file: &str| Repaired {
            file: file.to_owned(),
            layer: None,
            experts: Vec::new(),
            tensors: Vec::new(),
        };
        let side = self.side.iter().map(|f| file(&f.path));
        let trunk = self.trunk.files(manifest).map(|(name, tensors)| Repaired { tensors, ..file(name) });
        let banks = self.banks.iter().map(|b| Repaired {
            layer: u32::try_from(b.layer).ok(),
            experts: b.lost.iter().filter_map(|&e| u32::try_from(e).ok()).collect(),
            ..file(&b.file)
        });
        side.chain(trunk).chain(banks).collect()
    }
}

/// How the checkpoint of a bundle is read, by what its manifest keeps of how it was.
pub fn kept_options(manifest: &Manifest) -> OpenOptions {
    let zero_non_finite = manifest.recipe.get(NAN_POLICY).and_then(Value::as_str) == Some(ZERO);
    OpenOptions { lenient: Lenient { same_twice: true, zero_non_finite }, ..OpenOptions::default() }
}

/// The recipe that a manifest keeps.
///
/// # Errors
/// `BadData` if this version does not read it.
pub fn kept_recipe(manifest: &Manifest, dir: &Path) -> Result<Recipe> {
    let recipe = manifest.recipe.get("recipe").cloned().unwrap_or_default();
    serde_json::from_value(recipe)
        .map_err(|e| Error::bad_data(format!("the manifest keeps no recipe that this version reads: {e}")))
        .in_file(dir)
}
