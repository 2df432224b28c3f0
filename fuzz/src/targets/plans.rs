//! What machines of a cluster tell each other: the plan, stored activations.

use std::path::Path;

use moepack::cluster::folder::PlanFolder;
use moepack::cluster::plan::Plan;
use moepack::engine::stored;
use moepack_format::{Error, Result};
use moepack_verify::forward::Stream;
use moepack_verify::tokens::Windows;

use super::commands::command;
use super::models::{MODEL, model};
use super::{Ready, Seed, put};
use crate::corpus::fixture;

/// plan.json: as it is, and with the id that its content has.
pub(super) fn plan(dir: &Path) -> Result<Ready> {
    let made = dir.join("job");
    let to = made.to_string_lossy().into_owned();
    command("plan", &fixture(MODEL), &["--codec", "int4-g32", "--shards", "3", "-o", &to])?()?;
    let folder = PlanFolder::of(&made);
    let seeds = vec![Seed::file("plan", &folder.plan())?];
    Ready::new(seeds, move |_, bytes| {
        put(&folder.plan(), bytes)?;
        if let Ok(mut changed) = serde_json::from_slice::<Plan>(bytes) {
            changed.id = changed.digest()?;
            let text = serde_json::to_vec(&changed).map_err(|e| Error::bad_data(e.to_string()))?;
            put(&folder.plan(), &text)?;
        }
        Plan::read(&folder).map(drop)
    })
}

/// A residual stream between two layers.
pub(super) fn stream(dir: &Path) -> Result<Ready> {
    let (model, path) = (model()?, dir.join("stream"));
    let windows = Windows { tokens: vec![1; 5], lens: vec![2, 3] };
    let width = model.spec().width();
    stored::store(&path, "mine\n", &Stream::new(width, vec![0.5; 5 * width]))?;
    let seeds = vec![Seed::file("stream", &path)?];
    Ready::new(seeds, move |_, bytes| {
        put(&path, bytes)?;
        stored::load(&path, "mine\n", model.spec(), &windows).map(drop)
    })
}
