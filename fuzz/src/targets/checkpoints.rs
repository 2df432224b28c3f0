//! Checkpoints: what config.json, index and tensors of a stranger become.

use std::path::{Path, PathBuf};

use moepack_convert::{Checkpoint, Model, OpenOptions, Role};
use moepack_format::Result;
use moepack_quant::Isa;
use moepack_verify::forward::{Head, run_layers};
use moepack_verify::tokens::Windows;

use super::commands::planned;
use super::{Ready, copy, directory, put};
use crate::corpus::{Seed, directories, fixture};

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const WEIGHTS: &str = "model.safetensors";

/// Indexes of checkpoints in several files, whose files are there.
pub(super) fn index(dir: &Path) -> Result<Ready> {
    let names = ["random/qwen3_moe_sharded", "random/deepseek_v3_fp8"];
    let seeds = prepared(dir, names.map(|n| (n.to_owned(), fixture(n))).to_vec(), INDEX)?;
    let dir = dir.to_path_buf();
    Ready::new(seeds, move |of, bytes| {
        put(&dir.join(of).join(INDEX), bytes)?;
        Checkpoint::open(&dir.join(of)).map(drop)
    })
}

/// Copies checkpoints; `file` of each is a seed.
fn prepared(dir: &Path, all: Vec<(String, PathBuf)>, file: &str) -> Result<Vec<Seed>> {
    let mut seeds = Vec::new();
    for (name, path) in all {
        copy(&path, &dir.join(&name))?;
        seeds.push(Seed::file(name, &path.join(file))?);
    }
    Ok(seeds)
}

/// Random models of every family, and what was released.
fn families() -> Result<Vec<(String, PathBuf)>> {
    let mut all = directories("random")?;
    all.extend(directories("released")?);
    Ok(all)
}

/// config.json of every family beside its tensors.
pub(super) fn config(dir: &Path) -> Result<Ready> {
    let seeds = prepared(dir, families()?, CONFIG)?;
    let dir = dir.to_path_buf();
    Ready::new(seeds, move |of, bytes| {
        put(&dir.join(of).join(CONFIG), bytes)?;
        let model = Model::open(&dir.join(of), &OpenOptions::default())?;
        for (layer, _) in model.spec().moe_layers() {
            model.expert_parts(layer, 0)?;
        }
        Ok(())
    })
}

/// config.json beside an index that names files nobody has.
pub(super) fn outline(dir: &Path) -> Result<Ready> {
    let names = ["random/deepseek_v3_fp8", "random/qwen3_moe_sharded", "released/deepseek_v41"];
    let mut seeds = Vec::new();
    for name in names {
        directory(&dir.join(name))?;
        put(&dir.join(name).join(INDEX), &Seed::file("", &fixture(name).join(INDEX))?.bytes)?;
        seeds.push(Seed::file(name, &fixture(name).join(CONFIG))?);
    }
    let dir = dir.to_path_buf();
    Ready::new(seeds, move |of, bytes| {
        put(&dir.join(of).join(CONFIG), bytes)?;
        Model::open(&dir.join(of), &OpenOptions { names_alone: true, ..OpenOptions::default() })
            .and_then(|model| planned(&model))
    })
}

/// A config.json that a model could be opened with is also run: numbers that only the forward pass uses are tried there.
pub(super) fn forward(dir: &Path) -> Result<Ready> {
    let seeds = prepared(dir, families()?, CONFIG)?;
    let dir = dir.to_path_buf();
    Ready::new(seeds, move |of, bytes| {
        put(&dir.join(of).join(CONFIG), bytes)?;
        let model = Model::open(&dir.join(of), &OpenOptions::default())?;
        if !model.spec().has_forward() {
            return Ok(());
        }
        let windows = Windows { tokens: vec![3, 1, 4, 1, 5, 2], lens: vec![4, 2] };
        windows.check_vocab(model.spec().vocab)?;
        let stream = run_layers(Isa::get(), &model, &windows, &|_| Ok(()))?;
        Head::load(Isa::get(), &model)?.nll(&windows, &stream, &|_, _| ()).map(drop)
    })
}

/// Packed numbers and scales of every scheme.
pub(super) fn encodings(dir: &Path) -> Result<Ready> {
    let seeds = prepared(dir, directories("encodings")?, WEIGHTS)?;
    let dir = dir.to_path_buf();
    Ready::new(seeds, move |of, bytes| {
        put(&dir.join(of).join(WEIGHTS), bytes)?;
        decoded(&dir.join(of))
    })
}

/// What config.json says of such numbers.
pub(super) fn quantization(dir: &Path) -> Result<Ready> {
    let seeds = prepared(dir, directories("encodings")?, CONFIG)?;
    let dir = dir.to_path_buf();
    Ready::new(seeds, move |of, bytes| {
        put(&dir.join(of).join(CONFIG), bytes)?;
        decoded(&dir.join(of))
    })
}

/// Opens a model and decodes two experts and a matrix of the trunk.
fn decoded(dir: &Path) -> Result<()> {
    let model = Model::open(dir, &OpenOptions::default())?;
    model.check_trunk_scales()?;
    for (layer, moe) in model.spec().moe_layers() {
        for expert in [0, moe.n_experts.saturating_sub(1)] {
            model.expert(layer, expert)?.decode(Isa::get())?;
        }
        if model.has(Some(layer), Role::Q) {
            model.trunk(Some(layer), Role::Q)?;
        }
    }
    Ok(())
}
