//! Files beside a model, which are compared with it: manifest, coded trunk, stats, baseline.

use std::path::{Path, PathBuf};

use moepack::engine::baseline::write_baseline;
use moepack::engine::calibration::Observed;
use moepack::engine::quantize::{Job, quantize};
use moepack::engine::sizes::Sizes;
use moepack::engine::stats::{About, ExpertStats, SCHEMA, Stats, StatsWriter, config_sha256, layer_bytes};
use moepack::recipe::{Choices, Recipe, TrunkRule};
use moepack::session::Session;
use moepack::stop::Stop;
use moepack_convert::{Model, OpenOptions};
use moepack_format::manifest::MANIFEST;
use moepack_format::{CheckLevel, CheckOptions, Error, Result};
use moepack_quant::stats::ColumnStats;
use moepack_verify::baseline::{Baseline, Meta};
use moepack_verify::tokens::Windows;

use super::{Ready, put};
use crate::corpus::{Seed, fixture};

/// The model that these files belong to.
pub(super) const MODEL: &str = "random/qwen3_moe";
/// The first file of its trunk.
const TRUNK: &str = "trunk-00001-of-00001.safetensors";

/// It, opened.
pub(super) fn model() -> Result<Model> {
    Model::open(&fixture(MODEL), &OpenOptions::default())
}

/// One thread, no progress.
pub(super) fn session() -> Session {
    Session { json: true, quiet: true, threads: 1, memory: None, stop: Stop::default() }
}

/// A bundle of it in `dir`: experts in `codec`, the trunk coded too.
pub(super) fn bundle(dir: &Path, codec: &str) -> Result<PathBuf> {
    let (model, target) = (model()?, dir.join(format!("{codec}.moepack")));
    let mut recipe = Recipe::uniform(codec, "rtn", 4096);
    recipe.trunk = Some(TrunkRule { codec: "int8-g64".to_owned(), bits: None });
    let choices = Choices::of(&recipe, model.spec())?;
    let sizes = Sizes::of(&model, &recipe, &choices, None)?;
    let (recipe, choices, sizes) = (&recipe, &choices, &sizes);
    let (calibration, stats, evaluation) = (None, None, None);
    let job = Job {
        model: &model,
        recipe,
        choices,
        sizes,
        target: &target,
        overwrite: false,
        calibration,
        stats,
        evaluation,
    };
    quantize(&session(), job)?;
    Ok(target)
}

/// A manifest with a hash that fits, and everything that is read because of it.
pub(super) fn manifest(dir: &Path) -> Result<Ready> {
    let mut seeds = Vec::new();
    for codec in ["int4-g64", "native"] {
        let bundle = bundle(dir, codec)?;
        seeds.push(Seed::file(codec, &bundle.join(MANIFEST))?);
    }
    let dir = dir.to_path_buf();
    Ready::new(seeds, move |of, bytes| {
        let bundle = dir.join(format!("{of}.moepack"));
        put(&bundle.join(MANIFEST), bytes)?;
        let options = CheckOptions { level: CheckLevel::Quick, threads: 1 };
        for damage in
            moepack_format::check::check(&bundle, options, &|_| std::ops::ControlFlow::Continue(()))?
        {
            assert!(!damage.to_string().is_empty());
        }
        read(&bundle)
    })
}

/// Opens the model in a bundle, with an expert of each bank and the outline of the release that it was made from.
fn read(bundle: &Path) -> Result<()> {
    let model = Model::open(bundle, &OpenOptions::default())?;
    model.released()?;
    for tensor in model.trunk_tensors() {
        model.trunk_encoding(tensor)?;
    }
    model.check_trunk_scales()?;
    model.spec().moe_layers().try_for_each(|(layer, _)| model.expert(layer, 0).map(drop))
}

/// A trunk whose manifest is content with it: only the model looks at it.
pub(super) fn coded_trunk(dir: &Path) -> Result<Ready> {
    let bundle = bundle(dir, "int4-g64")?;
    let manifest = moepack_format::Manifest::read(&bundle)?;
    let seeds = vec![Seed::file(TRUNK, &bundle.join(TRUNK))?];
    Ready::new(seeds, move |_, bytes| {
        put(&bundle.join(TRUNK), bytes)?;
        let model = Model::open_trunk(&bundle, vec![TRUNK.to_owned()], &manifest.trunk_codecs)?;
        model.check_trunk_scales()?;
        for tensor in model.trunk_tensors().iter().filter(|t| model.trunk_codec(t).is_some()) {
            model.trunk_planes(tensor)?;
            model.decode_trunk(tensor, 0..1)?;
        }
        Ok(())
    })
}

/// A stats file of the model's own calibration.
pub(super) fn stats(dir: &Path) -> Result<Ready> {
    let (model, path) = (model()?, dir.join("stats"));
    let about = About {
        schema: SCHEMA.to_owned(),
        family: model.spec().family.to_owned(),
        config_sha256: config_sha256(&model)?,
        n_tokens: 70,
        tokens_sha256: "0".repeat(64),
        window_tokens: Some(7),
    };
    let mut writer = StatsWriter::create(&path, &model, &about)?;
    for (layer, moe) in model.spec().moe_layers() {
        let columns = |cols| ColumnStats { n_tokens: 7, second_moment: vec![0.25; cols] };
        let stats = || ExpertStats { input: columns(model.spec().hidden), inner: columns(moe.inter) };
        let observed: Vec<_> =
            (0..moe.n_experts).map(|_| Observed { weighted: stats(), plain: stats() }).collect();
        writer.write(layer, &layer_bytes(&observed))?;
    }
    writer.finish()?;
    let seeds = vec![Seed::file("stats", &path)?];
    Ready::new(seeds, move |_, bytes| {
        put(&path, bytes)?;
        all_layers(&path, &model)
    })
}

/// Opens stats of either kind and reads every layer.
pub(super) fn all_layers(path: &Path, model: &Model) -> Result<()> {
    let stats = Stats::open(path, model)?;
    stats.provenance();
    model.spec().moe_layers().try_for_each(|(layer, _)| stats.layer(model, layer).map(drop))
}

/// What the model predicts of a few tokens.
pub(super) fn baseline(dir: &Path) -> Result<Ready> {
    let (model, path) = (model()?, dir.join("baseline"));
    let windows = Windows { tokens: vec![3, 1, 4, 1, 5, 9, 2], lens: vec![4, 3] };
    let text = |t: &str| t.to_owned();
    let meta = Meta { tool: text("moepack"), model: text("m"), family: text("qwen3_moe"), ..Meta::default() };
    write_baseline(&session(), &model, &windows, &path, &meta)?;
    let seeds = vec![Seed::file("baseline", &path)?];
    Ready::new(seeds, move |_, bytes| {
        put(&path, bytes)?;
        if !Baseline::is_baseline(&path) {
            return Err(Error::bad_data("no baseline"));
        }
        let baseline = Baseline::open(&path)?;
        baseline.check_vocab(model.spec().vocab)?;
        (0..baseline.windows().n_windows()).try_for_each(|w| baseline.rows(w).map(drop))
    })
}
