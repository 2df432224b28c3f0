//! Whole commands that only look: what they work out and print of a file.

use std::path::Path;

use moepack::cli::parser;
use moepack::commands::COMMANDS;
use moepack::engine::budget::Budget;
use moepack::engine::sizes::Sizes;
use moepack::memory::Limit;
use moepack::recipe::{Choices, Recipe};
use moepack_convert::Model;
use moepack_format::{Error, Result};

use super::models::session;
use super::{Ready, checkpoints, gguf, put};

/// `inspect` of a GGUF file, every tensor shown.
pub(super) fn inspect_gguf(dir: &Path) -> Result<Ready> {
    let seeds = gguf::file(dir)?.seeds;
    let path = dir.join("inspected.gguf");
    let inspect = command("inspect", &path, &["--tensors"])?;
    Ready::new(seeds, move |_, bytes| {
        put(&path, bytes)?;
        inspect()
    })
}

/// `inspect` of checkpoints, every expert shown.
pub(super) fn inspect_config(dir: &Path) -> Result<Ready> {
    let seeds = checkpoints::config(dir)?.seeds;
    let commands = seeds.iter().map(|seed| {
        let model = dir.join(&seed.name);
        Ok((seed.name.clone(), model.join("config.json"), command("inspect", &model, &["--experts"])?))
    });
    let commands = commands.collect::<Result<Vec<_>>>()?;
    Ready::new(seeds, move |of, bytes| {
        let found = commands.iter().find(|(name, ..)| name == of);
        let (_, path, inspect) = found.ok_or_else(|| Error::missing("no such seed"))?;
        put(path, bytes)?;
        inspect()
    })
}

/// A command on a file or directory, ready to run again and again.
pub(super) fn command(name: &str, path: &Path, more: &[&str]) -> Result<impl Fn() -> Result<()> + use<>> {
    let words = ["moepack".as_ref(), name.as_ref(), path.as_os_str()];
    let words = words.into_iter().chain(more.iter().map(AsRef::as_ref));
    let matches = parser().try_get_matches_from(words).map_err(|e| Error::usage(e.to_string()))?;
    let command = COMMANDS.iter().find(|c| c.name == name).ok_or_else(|| Error::usage("no such command"))?;
    let session = session();
    Ok(move || {
        let (_, matches) = matches.subcommand().ok_or_else(|| Error::usage("no command"))?;
        (command.run)(matches, &session)
    })
}

/// What a plan works out before anything is read: bytes of everything, and the memory that a run takes.
pub(super) fn planned(model: &Model) -> Result<()> {
    let recipe = Recipe::uniform("int4-g32", "rtn", 4096);
    let choices = Choices::of(&recipe, model.spec())?;
    let sizes = Sizes::of(model, &recipe, &choices, None)?;
    let padding = sizes.layers.iter().map(|l| l.record_bytes).sum::<u64>() - sizes.payload_bytes();
    assert!(padding <= sizes.bundle_bytes(), "padding is a part of the whole");
    let budget = Budget::of(model, &sizes, 2, (None, false), None);
    budget.check(Some(Limit { bytes: u64::MAX, of: "nobody" }))
}
