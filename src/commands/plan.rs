//! `moepack plan`: a dry run. Bytes, bits per weight, peak memory, time; and the recipe as a file to edit, or the job cut into
//! shards for more than one machine.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use moepack_format::{Error, Result};
use moepack_quant::solve::solver;
use serde::Serialize;

use self::cluster::ClusterArgs;
use super::options::{Calibrated, Given, OpenArgs, RecipeArgs};
use super::quantize::check_places;
use super::{Command, parse};
use crate::cluster::make;
use crate::cluster::nodes::{Node, Row};
use crate::engine::budget::{Budget, within_memory};
use crate::engine::prediction::{Prediction, predict};
use crate::engine::sizes::{PartSizes, Sizes};
use crate::engine::stats::Stats;
use crate::engine::writer::bits_each;
use crate::output::{print, print_json, refuse_existing_file, say, table, warn, write_file};
use crate::recipe::{NATIVE, Recipe, Rule, matrix_pattern};
use crate::session::Session;
use crate::size::human;
use crate::text::{WindowArgs, windows_of_text};

mod cluster;

/// The table row.
pub const COMMAND: Command = Command {
    name: "plan",
    about: "Dry run of quantize: bytes of every part, bits per weight, peak memory, time; writes the recipe, or a plan for a cluster",
    examples: &[
        "moepack plan Qwen3-30B-A3B --codec int4-g64",
        "moepack plan Qwen3-30B-A3B --codec int3-g64 -o recipe.toml",
        "moepack plan DeepSeek-V4-Pro --bits 2.5 --calibrate calib.txt -o v4.plan",
        "moepack plan DeepSeek-V4-Pro --bits 2.5 --solver gptq --calibration-tokens 131072 --nodes 1,16,128",
    ],
    args: Arguments::augment_args,
    run: |matches, session| run(&parse(matches)?, session),
};

#[derive(Args, Debug)]
struct Arguments {
    /// Checkpoint directory or Hugging Face cache directory; config.json and the index will do
    checkpoint: PathBuf,
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Text that `quantize` will calibrate on: sensitivities are measured on a sample of it
    #[arg(long, value_name = "TEXT", conflicts_with = "stats")]
    calibrate: Option<PathBuf>,
    /// Stats that `quantize` will be given, or an importance matrix of llama.cpp
    #[arg(long, value_name = "STATS", visible_alias = "imatrix")]
    stats: Option<PathBuf>,
    /// Text that `quantize` will measure drift on
    #[arg(long, value_name = "TEXT")]
    verify: Option<PathBuf>,
    #[command(flatten)]
    windows: WindowArgs,
    /// A name that ends in .toml: write the recipe there, one rule for each layer and projection, to be edited and given to
    /// `quantize --recipe`. Any other: write a plan there, a directory that `worker`, `status`, `submit` and `merge` work with
    #[arg(short, long, value_name = "RECIPE.toml|PLAN")]
    output: Option<PathBuf>,
    /// Replace what is there
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    open: OpenArgs,
}

#[derive(Debug, Serialize)]
struct Report {
    schema: &'static str,
    checkpoint: String,
    source_bytes: u64,
    bundle_bytes: u64,
    trunk_bytes: u64,
    expert_payload_bytes: u64,
    padding_bytes: u64,
    bpw_experts: f64,
    peak_rss_bytes: u64,
    seconds: f64,
    kld_mean: f64,
    kld_basis: &'static str,
    parts: Vec<PartReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<Node>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    nodes: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct PartReport {
    layer: usize,
    part: &'static str,
    codec: String,
    weights: u64,
    bytes: u64,
    bpw: f64,
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    let started = Instant::now();
    let (recipe_file, plan_folder) = outputs(args)?;
    let model = args.open.open_to_plan(&args.checkpoint)?;
    let stats = args.stats.as_ref().map(|p| Stats::open(p, &model)).transpose()?;
    stats.iter().flat_map(Stats::warnings).for_each(|w| warn(w));
    let windows =
        |text: &Option<PathBuf>| text.as_ref().map(|t| windows_of_text(&model, t, &args.windows)).transpose();
    let (calibration, evaluation) = (windows(&args.calibrate)?, windows(&args.verify)?);
    let given = Given { text: calibration.as_ref(), stats_tokens: stats.as_ref().map(Stats::n_tokens) };
    let prepared = args.recipe.prepare(session, &model, given)?;
    if plan_folder.is_some() {
        args.open.refuse_lenient()?;
        prepared.check_calibrated(Calibrated::by(args.calibrate.is_some(), args.stats.is_some()))?;
    }
    let hessians = solver(&prepared.recipe.solver)?.needs_hessian();
    let budget = |threads| {
        let calibration = (calibration.as_ref(), hessians);
        Budget::of(&model, &prepared.sizes, threads, calibration, evaluation.as_ref())
    };
    let (session, budget) = within_memory(session, budget)?;
    let (calibration, evaluation) = (calibration.as_ref(), evaluation.as_ref());
    let prediction = predict(&session, prepared.plan(&model, calibration, evaluation, started), &budget)?;
    let sizes = &prepared.sizes;
    if let Some(path) = recipe_file {
        write_file(path, &spelled_out(&prepared.recipe, sizes).to_toml()?)?;
        say(&format!("recipe written to {}", path.display()));
    }
    if let Some(path) = plan_folder {
        let job = make::Job {
            checkpoint: &args.checkpoint,
            model: &model,
            recipe: &prepared.recipe,
            sizes,
            text: calibration,
            stats: args.stats.as_deref(),
            n_shards: args.cluster.shards,
            n_units: args.cluster.calibration_shards.map(usize::from),
            keep_activations: args.cluster.keep_activations,
            peak_memory_bytes: budget.bytes(),
            seconds: prediction.seconds,
        };
        let plan = session.in_pool(|| make::make(&job, path, args.overwrite, &session.stop))?;
        say(&format!("plan written to {}: {} shards, id {}", path.display(), plan.shards.len(), plan.id));
    }
    let (node, nodes) = cluster::rows(&args.cluster, &model, &prepared, calibration)?;
    let on_nodes = cluster::text(&node, &nodes);
    let node = (!nodes.is_empty()).then_some(node);
    let report = Report { node, nodes, ..report(args, sizes, &prediction) };
    if session.json { print_json(&report) } else { print(&(text(&report) + &on_nodes)) }
}

/// The recipe file and the plan that are asked for, at most one of both.
fn outputs(args: &Arguments) -> Result<(Option<&Path>, Option<&Path>)> {
    let is_recipe = |path: &&Path| path.extension().is_some_and(|e| e == "toml");
    let output = args.output.as_deref();
    let (recipe, plan) = (output.filter(is_recipe), output.filter(|path| !is_recipe(path)));
    recipe.map_or(Ok(()), |path| refuse_existing_file(path, args.overwrite))?;
    plan.map_or(Ok(()), |path| make::refuse_existing(path, args.overwrite))?;
    if plan.is_some() && args.verify.is_some() {
        return Err(Error::usage("--verify has no meaning in a plan for more than one machine")
            .hint("measure the merged bundle with `moepack verify`"));
    }
    if plan.is_some() {
        check_places(&args.checkpoint, plan.unwrap_or(Path::new("")))?;
    }
    Ok((recipe, plan))
}

fn report(args: &Arguments, sizes: &Sizes, prediction: &Prediction) -> Report {
    let records: u64 = sizes.layers.iter().map(|l| l.record_bytes).sum();
    let parts = sizes.layers.iter().flat_map(|l| l.parts.iter().map(move |p| (l.layer, p)));
    Report {
        schema: "moepack.plan/1",
        checkpoint: args.checkpoint.display().to_string(),
        source_bytes: sizes.source_bytes,
        bundle_bytes: prediction.bundle_bytes,
        trunk_bytes: sizes.trunk_bytes,
        expert_payload_bytes: sizes.payload_bytes(),
        padding_bytes: records - sizes.payload_bytes(),
        bpw_experts: bits_each(sizes.payload_bytes(), sizes.expert_weights()),
        peak_rss_bytes: prediction.peak_rss_bytes,
        seconds: prediction.seconds,
        kld_mean: prediction.kld_mean,
        kld_basis: prediction.kld_basis,
        parts: parts
            .map(|(layer, p)| PartReport {
                layer,
                part: p.part.name(),
                codec: p.codec.clone(),
                weights: p.weights,
                bytes: p.bytes,
                bpw: bits_each(p.bytes, p.weights),
            })
            .collect(),
        node: None,
        nodes: Vec::new(),
    }
}

fn text(r: &Report) -> String {
    let mut rows = vec![["layer", "part", "codec", "weights", "bytes", "bpw"].map(String::from).to_vec()];
    for p in &r.parts {
        let (bytes, bpw) = (human(p.bytes), format!("{:.4}", p.bpw));
        rows.push(vec![
            p.layer.to_string(),
            p.part.to_owned(),
            p.codec.clone(),
            p.weights.to_string(),
            bytes,
            bpw,
        ]);
    }
    let lines = [
        format!("source         {}", human(r.source_bytes)),
        format!("experts        {}, {:.4} bits per weight", human(r.expert_payload_bytes), r.bpw_experts),
        format!("padding        {}", human(r.padding_bytes)),
        format!("trunk          {}", human(r.trunk_bytes)),
        format!("bundle         {}", human(r.bundle_bytes)),
        format!("peak memory    about {}", human(r.peak_rss_bytes)),
        format!("time           about {:.3} s", r.seconds),
        format!("mean KLD       about {:.3e} nats (sensitivity {})", r.kld_mean, r.kld_basis),
    ];
    format!("{}\n{}\n", table(&rows), lines.join("\n"))
}

/// The recipe with one rule for each layer and projection, and what each is expected to take. What allocation wrote is
/// kept as it is, so that it makes the same bundle, and so is a recipe that tells experts apart.
fn spelled_out(recipe: &Recipe, sizes: &Sizes) -> Recipe {
    let parts = || sizes.layers.iter().flat_map(|l| l.parts.iter().map(move |p| (l.layer, p)));
    let allocated = recipe.rules.iter().any(|r| r.bits.is_some() || r.expected_loss.is_some());
    if allocated || parts().any(|(_, p)| p.codec == "mixed") || recipe.rules.iter().any(|r| r.codec == NATIVE)
    {
        return recipe.clone();
    }
    let rule = |(layer, p): (usize, &PartSizes)| {
        let tensor = matrix_pattern(layer, p.part);
        Rule { tensor, codec: p.codec.clone(), bits: None, bytes: Some(p.bytes), expected_loss: None }
    };
    Recipe { rules: parts().map(rule).collect(), ..recipe.clone() }
}
