//! The table of targets. A new reader is a row here and a function in `targets/`.

use std::path::Path;

use moepack_format::{Error, Result};

use crate::corpus::Seed;
use crate::mutate::Shape;

mod alarms;
mod checkpoints;
mod codecs;
mod commands;
mod containers;
mod gguf;
mod models;
mod outputs;
mod plans;
mod texts;

pub use alarms::ALARMS;

/// A reader and what it is tried with.
#[derive(Debug)]
pub struct Target {
    /// What the user types.
    pub name: &'static str,
    /// What it reads, for `--list`.
    pub about: &'static str,
    /// How its files are built.
    pub shape: Shape,
    /// One input costs as much time as so many of a fast reader: a run takes one in so many.
    pub cost: u64,
    /// Prepares it in a directory of its own.
    pub start: fn(&Path) -> Result<Ready>,
}

/// A prepared target.
pub struct Ready {
    /// What its inputs are made from.
    pub seeds: Vec<Seed>,
    /// Reads an input that was made from the seed of this name. An error is a refusal.
    pub read: Box<Reader>,
}

/// See [`Ready::read`].
pub type Reader = dyn Fn(&str, &[u8]) -> Result<()>;

impl Ready {
    /// A prepared target.
    pub fn new(seeds: Vec<Seed>, read: impl Fn(&str, &[u8]) -> Result<()> + 'static) -> Result<Ready> {
        Ok(Ready { seeds, read: Box::new(read) })
    }
}

const fn target(
    name: &'static str,
    shape: Shape,
    cost: u64,
    start: fn(&Path) -> Result<Ready>,
    about: &'static str,
) -> Target {
    Target { name, about, shape, cost, start }
}

/// Every reader there is.
pub const TARGETS: &[Target] = &[
    target("safetensors", Shape::Safetensors, 2, containers::safetensors, "header of a safetensors file"),
    target("bank", Shape::Bank, 5, containers::bank, "bank of a bundle: header, index, records"),
    target(
        "trunk",
        Shape::Safetensors,
        1,
        containers::trunk,
        "trunk file of a bundle, shapes of coded matrices",
    ),
    target(
        "manifest",
        Shape::Manifest,
        8,
        models::manifest,
        "manifest.json, and all that a bundle's model makes of it",
    ),
    target(
        "coded_trunk",
        Shape::Safetensors,
        4,
        models::coded_trunk,
        "trunk file with coded matrices, read as a model",
    ),
    target("index", Shape::Json, 5, checkpoints::index, "model.safetensors.index.json"),
    target(
        "config",
        Shape::Json,
        8,
        checkpoints::config,
        "config.json of every family, up to the catalog of its tensors",
    ),
    target("outline", Shape::Json, 12, checkpoints::outline, "config.json alone, tensors made up from it"),
    target(
        "forward",
        Shape::Json,
        25,
        checkpoints::forward,
        "config.json of every family, then the forward pass",
    ),
    target(
        "encodings",
        Shape::Safetensors,
        6,
        checkpoints::encodings,
        "releases in other people's schemes: packed numbers, scales",
    ),
    target(
        "quantization",
        Shape::Json,
        10,
        checkpoints::quantization,
        "quantization_config of such releases",
    ),
    target("tokenizer", Shape::Json, 20, texts::tokenizer, "tokenizer.json, then a text"),
    target(
        "vocabulary",
        Shape::Json,
        35,
        texts::vocabulary,
        "tokenizer.json as the vocabulary of a GGUF file",
    ),
    target(
        "tokenizer_config",
        Shape::Json,
        45,
        texts::tokenizer_config,
        "tokenizer_config.json, as far as a GGUF file takes it",
    ),
    target("tokens", Shape::Json, 1, texts::tokens, "--tokens: a JSON list of windows"),
    target("recipe", Shape::Toml, 3, texts::recipe, "recipe, worked out for a model"),
    target("journal", Shape::Json, 3, outputs::journal, "journal of unfinished work"),
    target("notes", Shape::Json, 1, outputs::notes, "notes of finished pieces"),
    target(
        "export_list",
        Shape::Json,
        2,
        outputs::export_list,
        "moepack.json of an export that is to be overwritten",
    ),
    target("plan", Shape::Json, 2, plans::plan, "plan of a job for several machines"),
    target("stream", Shape::Bytes, 1, plans::stream, "stored activations between two layers"),
    target("stats", Shape::Safetensors, 2, models::stats, "stats of a calibration"),
    target("baseline", Shape::Baseline, 1, models::baseline, "baseline, all rows"),
    target("gguf", Shape::Gguf, 1, gguf::file, "GGUF file, whole and as an outline"),
    target("gguf_set", Shape::Gguf, 1, gguf::set, "one of the files of a split GGUF model"),
    target("imatrix", Shape::Gguf, 4, gguf::imatrix, "importance matrix in GGUF"),
    target("imatrix_dat", Shape::Dat, 5, gguf::imatrix_dat, "importance matrix in llama.cpp's earlier form"),
    target("inspect_gguf", Shape::Gguf, 4, commands::inspect_gguf, "GGUF file, and what inspect shows of it"),
    target(
        "inspect_config",
        Shape::Json,
        20,
        commands::inspect_config,
        "checkpoint, and what inspect shows of it",
    ),
    target("codecs", Shape::Planes, 1, codecs::codecs, "decoder of every codec, ggml's blocks among them"),
];

/// The target of that name.
///
/// # Errors
/// None has it.
pub fn named(name: &str) -> Result<&'static Target> {
    TARGETS.iter().chain(ALARMS).find(|t| t.name == name).ok_or_else(|| {
        let known: Vec<_> = TARGETS.iter().map(|t| t.name).collect();
        Error::usage(format!("no target {name:?}, there are {}", known.join(" ")))
    })
}

/// Writes an input where a reader looks for it.
fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|e| Error::io(&e, "write", path))
}

/// Makes a directory in the target's own.
fn directory(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|e| Error::io(&e, "create", path))
}

/// Copies the files of a directory.
fn copy(from: &Path, to: &Path) -> Result<()> {
    directory(to)?;
    let entries = std::fs::read_dir(from).map_err(|e| Error::io(&e, "list", from))?;
    for entry in entries.flatten().filter(|e| e.path().is_file()) {
        std::fs::copy(entry.path(), to.join(entry.file_name()))
            .map_err(|e| Error::io(&e, "copy", &entry.path()))?;
    }
    Ok(())
}
