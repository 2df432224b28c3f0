//! A model to read from: a checkpoint or a bundle behind one face.
//!
//! The trunk is handed out decoded, or raw for copying; experts one at a time in the codec they are stored
//! in. Only the bytes asked for are read. Everything here may be called from many threads at once.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use moepack_format::{Bundle, Error, InputFile, Result};

use crate::catalog::{Catalog, Source, outline};
use crate::checkpoint::{Checkpoint, Lenient, Place, SideFile, SourceFile};
use crate::describe::{describe, hints, storage};
use crate::encoding::Hints;
use crate::family::{Family, Mtp};
use crate::hparams::Config;
use crate::limits::CONFIG_BYTES_MAX;
use crate::names::{Meaning, Names};
use crate::spec::{GateUp, Mlp, ModelSpec, Moe, Role};

mod experts;
mod finite;
mod released;
mod stored;
#[cfg(test)]
mod tests;
mod trunk;

pub use experts::{ReleasedPiece, StoredPart};
pub use finite::FiniteCheck;

const CONFIG: &str = "config.json";

/// How to open a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// What is only odd is an error too.
    pub strict: bool,
    /// A checkpoint of which only config.json and the index are there will do: its tensors have the dtypes and shapes that
    /// these say they must have, and no bytes.
    pub names_alone: bool,
    /// What else may pass.
    pub lenient: Lenient,
}

/// An opened, validated model.
#[derive(Debug)]
pub struct Model {
    /// All tensors of a checkpoint; the trunk of a bundle.
    checkpoint: Checkpoint,
    bundle: Option<Arc<Bundle>>,
    family: &'static Family,
    config: Config,
    spec: ModelSpec,
    hints: Hints,
    catalog: Catalog,
    warnings: Vec<String>,
    names_alone: bool,
}

impl Model {
    /// Opens a checkpoint directory, a Hugging Face cache directory or a bundle.
    ///
    /// # Errors
    /// Whatever is wrong with it, before any weight is read.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Model> {
        let model = if Bundle::is_bundle(path) {
            let bundle = Arc::new(Bundle::open(path)?);
            Model::of(Checkpoint::of_bundle(&bundle)?, Some(bundle), true)?
        } else {
            let outlined = if options.names_alone { outlined(path)? } else { None };
            let names_alone = outlined.is_some();
            let checkpoint = outlined.map_or_else(|| Checkpoint::open_with(path, options.lenient), Ok)?;
            Model { names_alone, ..Model::of(checkpoint, None, false)? }
        };
        match model.warnings.first().filter(|_| options.strict) {
            Some(warning) => {
                Err(Error::bad_data(warning).in_file(model.root()).hint("--strict makes this an error"))
            }
            None => Ok(model),
        }
    }

    /// Opens the trunk of a bundle that is being written to `dir`: its config.json and these trunk files are there
    /// already, its banks are not. The codecs are those of `trunk_codecs` in the manifest to come.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open_trunk(dir: &Path, files: Vec<String>, codecs: &BTreeMap<String, String>) -> Result<Model> {
        Model::of(Checkpoint::of_trunk(dir, files, codecs)?, None, true)
    }

    fn of(checkpoint: Checkpoint, bundle: Option<Arc<Bundle>>, in_banks: bool) -> Result<Model> {
        let Described { config, family, mut spec, hints } = described(&checkpoint)?;
        let mut warnings = checkpoint.warnings().to_vec();
        let mut catalog = Catalog::build(Source {
            family,
            spec: &spec,
            checkpoint: &checkpoint,
            in_banks,
            head_may_be_tied: spec.tied_head || !config.mentions(&["tie_word_embeddings"]),
            hints,
        })?;
        if let Some(bundle) = &bundle {
            check_side_file(bundle, checkpoint.place(), CONFIG)?;
            check_bundle(bundle, family, &spec)?;
            let left_out = bundle.manifest.left_out.iter();
            catalog.left_out.extend(left_out.map(|l| (l.name.clone(), l.reason.clone())));
        }
        spec.tied_head = is_tied(&checkpoint, &catalog, spec.tied_head, &mut warnings)?;
        warnings.extend(absent_mtp(family, &config, &catalog));
        Ok(Model { checkpoint, bundle, family, config, spec, hints, catalog, warnings, names_alone: false })
    }

    /// The directory; for a cache, the snapshot's.
    pub fn root(&self) -> &Path {
        self.checkpoint.place().root()
    }

    /// Whether the weight files are not there, see [`OpenOptions::names_alone`].
    pub fn is_names_alone(&self) -> bool {
        self.names_alone
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The family it belongs to.
    pub fn family(&self) -> &'static Family {
        self.family
    }

    /// Its config.json.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Every tensor and what it is for.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The bundle, if it is one.
    pub fn bundle(&self) -> Option<&Arc<Bundle>> {
        self.bundle.as_ref()
    }

    /// What was odd, but no reason to stop.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Whether weights that are NaN or infinite are read as 0, as somebody asked for.
    pub fn zeroes(&self) -> bool {
        self.checkpoint.zeroes()
    }

    /// What became of that so far, if anything: how many numbers in which tensors.
    pub fn zeroed_note(&self) -> Option<String> {
        let zeroed = self.checkpoint.zeroed();
        let (first, _) = zeroed.first_key_value()?;
        let n: u64 = zeroed.values().sum();
        Some(format!(
            "{n} weights of {} tensors are NaN or infinite and were read as 0, such as {first}",
            zeroed.len()
        ))
    }

    /// The weight files, with length and time of change; of a bundle, its trunk.
    pub fn files(&self) -> &[SourceFile] {
        self.checkpoint.files()
    }

    /// The files to copy beside the weights; what is left behind is told in `notes`.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn side_files(&self, notes: &mut Vec<String>) -> Result<Vec<SideFile>> {
        self.checkpoint.place().side_files(notes)
    }

    /// A small file beside the weights, such as the tokenizer; of a bundle, the one that its manifest knows.
    ///
    /// # Errors
    /// `Missing` if it is not there; `BadData` if it is longer than `bytes_max`, leads out of the model's directory or
    /// is not what the manifest says.
    pub fn side_file(&self, name: &str, bytes_max: u64) -> Result<Vec<u8>> {
        let place = self.checkpoint.place();
        if let Some(bundle) = &self.bundle {
            check_side_file(bundle, place, name)?;
        }
        place.read_small(name, bytes_max)
    }

    /// Refuses a source that changed since it was opened.
    ///
    /// # Errors
    /// `BadData` for the first file that differs.
    pub fn check_unchanged(&self) -> Result<()> {
        self.checkpoint.check_unchanged()
    }
}

/// Refuses a side file of a bundle that is not the one its manifest lists.
fn check_side_file(bundle: &Bundle, place: &Place, name: &str) -> Result<()> {
    let Some(entry) = bundle.manifest.file(name) else { return Ok(()) };
    let path = place.resolve(name)?;
    let found = InputFile::open(&path)?.sha256(&|| false)?;
    if found == entry.sha256 {
        return Ok(());
    }
    Err(Error::bad_data(format!("sha256 is {found}, the manifest says {}", entry.sha256))
        .in_file(&path)
        .hint("the file is damaged or was changed; `moepack check` lists all damage"))
}

/// The checkpoint of names alone in `path`, if it is one, with the tensors that config.json makes of them.
fn outlined(path: &Path) -> Result<Option<Checkpoint>> {
    let Some((names, total_bytes)) = Checkpoint::of_names(path)? else { return Ok(None) };
    let Described { config, family, spec, hints } = described(&names)?;
    let source =
        Source { family, spec: &spec, checkpoint: &names, in_banks: false, head_may_be_tied: true, hints };
    let tensors = outline(source, storage(&config, total_bytes)?)?;
    Ok(Some(names.with_tensors(tensors)))
}

/// What config.json says, and the names of the tensors where it leaves a choice.
struct Described {
    config: Config,
    family: &'static Family,
    spec: ModelSpec,
    hints: Hints,
}

fn described(checkpoint: &Checkpoint) -> Result<Described> {
    let config = read_config(checkpoint.place())?;
    let family = Family::of(&config)?;
    let mut spec = describe(family, &config)?;
    fuse(&mut spec, family, checkpoint);
    let hints = hints(&config)?;
    Ok(Described { config, family, spec, hints })
}

fn read_config(place: &Place) -> Result<Config> {
    if !place.has(CONFIG)? {
        return Err(Error::missing("config.json is not there")
            .in_file(place.root().join(CONFIG))
            .hint("fetch it with the weights; the tensors alone do not say what the model is"));
    }
    let text = place.read_small(CONFIG, CONFIG_BYTES_MAX)?;
    Config::parse(&place.root().join(CONFIG), &text)
}

/// The banks of a bundle are those that its config.json asks for.
fn check_bundle(bundle: &Bundle, family: &Family, spec: &ModelSpec) -> Result<()> {
    let bad = |what: String| Err(Error::bad_data(what).in_file(&bundle.dir));
    if bundle.manifest.family != family.name() {
        let (said, is) = (&bundle.manifest.family, family.name());
        return bad(format!("the manifest says family {said:?}, config.json says {is:?}"));
    }
    let expected: Vec<(u64, u64)> =
        spec.moe_layers().map(|(l, moe)| (l as u64, moe.n_experts as u64)).collect();
    let found: Vec<(u64, u64)> =
        bundle.layers().iter().map(|l| (u64::from(l.layer), u64::from(l.n_experts))).collect();
    match expected.iter().zip(&found).find(|(e, f)| e != f) {
        None if expected.len() == found.len() => Ok(()),
        None => {
            bad(format!("banks of {} layers, config.json has {} with experts", found.len(), expected.len()))
        }
        Some(((layer, n), (bank_layer, bank_n))) => bad(format!(
            "a bank of {bank_n} experts for layer {bank_layer}, config.json has {n} experts in layer {layer}"
        )),
    }
}

/// Gate and up of an MLP are one matrix where the checkpoint has it: families that are stored both ways have rules for both.
fn fuse(spec: &mut ModelSpec, family: &'static Family, checkpoint: &Checkpoint) {
    let names = Names::of(family);
    for tensor in checkpoint.tensors() {
        let Some(place) = names.find(&names.canonical(&tensor.name)) else { continue };
        let layer = place.layer.and_then(|l| spec.layers.get_mut(l));
        match (place.meaning, layer.map(|l| &mut l.mlp)) {
            (Meaning::Trunk(rule), Some(Mlp::Dense { gate_up, .. })) if rule.role == Role::DenseGateUp => {
                *gate_up = GateUp::One;
            }
            (Meaning::Trunk(rule), Some(Mlp::Moe(Moe { shared: Some(shared), .. }))) => {
                shared.fused |= rule.role == Role::SharedGateUp;
            }
            _ => {}
        }
    }
}

/// Whether the head is the embedding. Where config.json ties them and both are there, they are tied if they
/// are equal, which is what transformers does.
fn is_tied(
    checkpoint: &Checkpoint,
    catalog: &Catalog,
    tied: bool,
    warnings: &mut Vec<String>,
) -> Result<bool> {
    let get = |role| catalog.find(None, role).and_then(|t| checkpoint.tensors().get(t.tensor));
    let (Some(embed), Some(head)) = (get(Role::Embed), get(Role::LmHead)) else { return Ok(true) };
    if !tied {
        return Ok(false);
    }
    let coded = [embed, head].iter().any(|t| checkpoint.coded(&t.name).is_some());
    if !coded && checkpoint.is_same(embed, head)? {
        return Ok(true);
    }
    warnings
        .push(format!("config.json ties the head to the embedding, but {} differs; it is used", head.name));
    Ok(false)
}

/// A warning about multi-token-prediction layers that config.json announces and the files lack.
fn absent_mtp(family: &Family, config: &Config, catalog: &Catalog) -> Option<String> {
    if family.mtp == Mtp::None && !family.carried.contains(&"mtp.") {
        return None;
    }
    let n = config.uint_opt(&["num_nextn_predict_layers"], 1, crate::limits::LAYERS_MAX).ok().flatten()?;
    let there = catalog.trunk.iter().any(|t| t.role == Role::Carried);
    (!there).then(|| format!("config.json announces {n} multi-token-prediction layers, the files have none"))
}

/// A length from a file as a length in memory.
fn to_usize(n: u64) -> Result<usize> {
    usize::try_from(n).map_err(|_| Error::bad_data(format!("{n} does not fit memory")))
}
