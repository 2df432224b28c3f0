//! `moepack inspect`: what a checkpoint, bundle or GGUF file is.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use moepack_convert::{Model, Role, TrunkTensor};
use moepack_format::error::printable;
use moepack_format::{Error, Result};
use serde::Serialize;

use self::scheme::Scheme;
use super::options::OpenArgs;
use super::{Command, parse};
use crate::engine::coverage::{ExpertRow, expert_rows, expert_table};
use crate::engine::writer::bits_each;
use crate::output::{print, print_json, table};
use crate::session::Session;
use crate::size::human;

mod gguf;
mod scheme;

/// The table row.
pub const COMMAND: Command = Command {
    name: "inspect",
    about: "Show what a checkpoint, bundle or GGUF file is: family, layers, experts, codecs, bytes, bits per weight",
    examples: &[
        "moepack inspect Qwen3-30B-A3B",
        "moepack inspect Qwen3-30B-A3B.moepack --experts",
        "moepack inspect Qwen3-30B-A3B-Q4_K_M-00001-of-00002.gguf --tensors",
    ],
    args: Arguments::augment_args,
    run: |matches, session| run(&parse(matches)?, session),
};

#[derive(Args, Debug)]
struct Arguments {
    /// Checkpoint, Hugging Face cache directory, bundle, or GGUF file (of a split model any of its files)
    model: PathBuf,
    /// Show each matrix of each expert: bits, and what calibration found (checkpoints and bundles)
    #[arg(long)]
    experts: bool,
    /// Show each tensor: type, dimensions, bytes, place (GGUF files)
    #[arg(long, conflicts_with = "experts")]
    tensors: bool,
    #[command(flatten)]
    open: OpenArgs,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    model: String,
    kind: &'static str,
    family: String,
    /// What config.json says about how it is quantized.
    quantization: Option<Scheme>,
    n_layers: usize,
    n_moe_layers: usize,
    hidden: usize,
    vocab: usize,
    n_experts: usize,
    n_experts_used: usize,
    expert_weights: u64,
    trunk_weights: u64,
    expert_bytes: u64,
    trunk_bytes: u64,
    total_bytes: u64,
    bpw_experts: f64,
    bpw_total: f64,
    /// Bytes of the trunk by element type, or by codec where a matrix is coded.
    trunk_dtypes: BTreeMap<String, u64>,
    layers: Vec<LayerReport>,
    /// With `--experts`.
    #[serde(skip_serializing_if = "Option::is_none")]
    experts: Option<Vec<ExpertRow<'a>>>,
    /// What is kept as it is and no part of the forward pass, by place.
    carried: BTreeMap<String, Carried>,
    left_out: Vec<String>,
    warnings: Vec<String>,
}

/// Tensors of one place that are carried, such as those of a vision tower.
#[derive(Debug, Default, Serialize)]
struct Carried {
    tensors: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct LayerReport {
    layer: usize,
    n_experts: usize,
    bytes: u64,
    bpw: f64,
    /// Codec of each projection.
    codecs: BTreeMap<String, String>,
    /// Relative squared error of the weights, where a bundle knows it.
    error: Option<f64>,
}

fn run(args: &Arguments, session: &Session) -> Result<()> {
    if gguf::is_gguf(&args.model) {
        return gguf::run(args, session);
    }
    if args.tensors {
        let what = "--tensors is for GGUF files";
        return Err(Error::usage(what)
            .in_file(&args.model)
            .hint("--experts lists the matrices of a checkpoint or bundle"));
    }
    let model = args.open.open(&args.model)?;
    let report = report(&model, args)?;
    if session.json { print_json(&report) } else { print(&text(&report)) }
}

fn report<'a>(model: &'a Model, args: &Arguments) -> Result<Report<'a>> {
    let spec = model.spec();
    let mut layers = Vec::new();
    let (mut n_experts, mut n_experts_used) = (0, 0);
    for (l, moe) in spec.moe_layers() {
        (n_experts, n_experts_used) = (n_experts.max(moe.n_experts), n_experts_used.max(moe.n_experts_used));
        layers.push(layer_report(model, l, moe.n_experts)?);
    }
    let trunk = model.trunk_tensors();
    let (expert_weights, trunk_weights) = (spec.expert_weights(), model.trunk_weights());
    let (expert_bytes, trunk_bytes) =
        (layers.iter().map(|l| l.bytes).sum(), trunk.iter().map(|t| t.bytes).sum());
    let mut trunk_dtypes = BTreeMap::new();
    for tensor in trunk {
        let stored = model.trunk_codec(tensor).unwrap_or_else(|| tensor.dtype.name().to_owned());
        *trunk_dtypes.entry(stored).or_default() += tensor.bytes;
    }
    let total_bytes = match model.bundle() {
        Some(bundle) => bundle.manifest.totals.bundle_bytes,
        None => model.files().iter().map(|f| f.fingerprint.bytes).sum(),
    };
    Ok(Report {
        schema: "moepack.inspect/1",
        model: args.model.display().to_string(),
        kind: if model.bundle().is_some() { "bundle" } else { "checkpoint" },
        family: spec.family.to_owned(),
        quantization: Scheme::of(model).filter(|_| model.bundle().is_none()),
        n_layers: spec.layers.len(),
        n_moe_layers: layers.len(),
        hidden: spec.hidden,
        vocab: spec.vocab,
        n_experts,
        n_experts_used,
        expert_weights,
        trunk_weights,
        expert_bytes,
        trunk_bytes,
        total_bytes,
        bpw_experts: bits_each(expert_bytes, expert_weights),
        // One meaning everywhere: planes of experts and the trunk; padding and side files are in the bytes only.
        bpw_total: match model.bundle() {
            Some(bundle) => bundle.manifest.totals.bpw_total,
            None => bits_each(expert_bytes + trunk_bytes, expert_weights + trunk_weights),
        },
        trunk_dtypes,
        layers,
        experts: args.experts.then(|| experts(model)).transpose()?,
        carried: carried(trunk),
        left_out: model.catalog().left_out.iter().map(|(name, reason)| format!("{name}: {reason}")).collect(),
        warnings: model.warnings().to_vec(),
    })
}

/// Carried tensors by what their names begin with: to the first word, or that behind a layer's number.
fn carried(trunk: &[TrunkTensor]) -> BTreeMap<String, Carried> {
    let mut places = BTreeMap::<String, Carried>::new();
    for tensor in trunk.iter().filter(|t| t.role == Role::Carried) {
        let place = places.entry(place_of(&tensor.name)).or_default();
        place.tensors += 1;
        place.bytes += tensor.bytes;
    }
    places
}

fn place_of(name: &str) -> String {
    let words: Vec<&str> = name.split('.').collect();
    let is_number = |w: &&str| !w.is_empty() && w.bytes().all(|b| b.is_ascii_digit());
    let end = words.iter().position(is_number).map_or(1, |at| at + 2);
    let shown = words.iter().take(end).map(|w| if is_number(w) { "*" } else { w });
    shown.collect::<Vec<_>>().join(".")
}

fn layer_report(model: &Model, layer: usize, n_experts: usize) -> Result<LayerReport> {
    let (mut bytes, mut weights) = (0, 0_u64);
    let mut codecs: BTreeMap<String, String> = BTreeMap::new();
    for expert in 0..n_experts {
        for part in model.expert_parts(layer, expert)? {
            for plane in part.codec.planes(part.rows, part.cols)? {
                bytes += plane.bytes()?;
            }
            if part.part.is_matrix() {
                weights += (part.rows * part.cols) as u64;
                let codec = part.codec.name();
                let known = codecs.entry(part.part.name().to_owned()).or_insert_with(|| codec.clone());
                if *known != codec {
                    "mixed".clone_into(known);
                }
            }
        }
    }
    let entry = model.bundle().and_then(|b| b.manifest.layer(u32::try_from(layer).ok()?));
    let error = entry.and_then(|e| e.error);
    // Planes may be shorter than the codec's longest.
    let bytes = entry.map_or(bytes, |e| e.payload_bytes);
    Ok(LayerReport { layer, n_experts, bytes, bpw: bits_each(bytes, weights), codecs, error })
}

/// What a bundle's manifest says of each matrix; of a checkpoint the bits alone.
fn experts(model: &Model) -> Result<Vec<ExpertRow<'_>>> {
    let known = model.bundle().map(|b| expert_rows(&b.manifest.layers)).unwrap_or_default();
    if !known.is_empty() {
        return Ok(known);
    }
    let mut rows = Vec::new();
    for (layer, moe) in model.spec().moe_layers() {
        for expert in 0..moe.n_experts {
            for part in model.expert_parts(layer, expert)?.iter().filter(|p| p.part.is_matrix()) {
                let bits = part.codec.bits_per_weight(part.rows, part.cols)?;
                let layer = u32::try_from(layer).unwrap_or(u32::MAX);
                rows.push(ExpertRow::of_bits(layer, expert, part.part.name(), bits));
            }
        }
    }
    Ok(rows)
}

fn text(r: &Report<'_>) -> String {
    let line = |name: &str, value: String| format!("{name:<15}{value}\n");
    let mut text = line(r.kind, r.model.clone());
    text += &line("family", r.family.clone());
    if let Some(scheme) = &r.quantization {
        text += &line("quantization", printable(&scheme.text()));
    }
    text += &line(
        "layers",
        format!("{} ({} with experts), hidden {}, vocab {}", r.n_layers, r.n_moe_layers, r.hidden, r.vocab),
    );
    text += &line("experts", format!("{} a layer, {} used by a token", r.n_experts, r.n_experts_used));
    let weights = (r.expert_weights + r.trunk_weights) as f64 / 1e6;
    text += &line(
        "weights",
        format!("{weights:.2} M, {:.2} M of them in routed experts", r.expert_weights as f64 / 1e6),
    );
    text += &line("expert bytes", format!("{}, {:.4} bits per weight", human(r.expert_bytes), r.bpw_experts));
    let dtypes: Vec<String> = r.trunk_dtypes.iter().map(|(d, b)| format!("{d} {}", human(*b))).collect();
    text += &line("trunk bytes", format!("{} ({})", human(r.trunk_bytes), dtypes.join(", ")));
    text += &line("total", format!("{}; {:.4} bits per weight", human(r.total_bytes), r.bpw_total));
    let mut rows = vec![
        ["layer", "experts", "bytes", "bpw", "gate_proj", "up_proj", "down_proj", "rel. sq. error"]
            .map(String::from)
            .to_vec(),
    ];
    for l in &r.layers {
        let codec = |name: &str| l.codecs.get(name).cloned().unwrap_or_else(|| "-".into());
        let error = l.error.map_or_else(|| "-".into(), |e| format!("{e:.3e}"));
        let bpw = format!("{:.4}", l.bpw);
        let cells = [codec("gate_proj"), codec("up_proj"), codec("down_proj"), error];
        rows.push(
            [vec![l.layer.to_string(), l.n_experts.to_string(), human(l.bytes), bpw], cells.to_vec()]
                .concat(),
        );
    }
    text += "\n";
    text += &table(&rows);
    if let Some(rows) = &r.experts {
        text += &format!("\n{}", expert_table(rows));
    }
    for (place, c) in &r.carried {
        text += &format!("carried: {place}, {} tensors, {}\n", c.tensors, human(c.bytes));
    }
    for note in &r.left_out {
        text += &format!("left out: {note}\n");
    }
    text
}
