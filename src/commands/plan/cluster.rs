//! Options of a plan for more than one machine, and the arithmetic of the job on so many.

use clap::Args;
use moepack_convert::Model;
use moepack_format::Result;
use moepack_quant::solve::solver;
use moepack_verify::tokens::Windows;

use crate::cluster::make::UNITS_DEFAULT;
use crate::cluster::nodes::{Node, Row, Work};
use crate::cluster::plan::LayerExperts;
use crate::cluster::rates::Rates;
use crate::cluster::split::{split, units};
use crate::commands::options::Prepared;
use crate::output::table;
use crate::recipe::{Choice, MATRICES, moe_layers};
use crate::size::{human, parse_arg};

/// How a job is cut into shards.
#[derive(Args, Debug)]
#[command(next_help_heading = "For more than one machine")]
pub struct ClusterArgs {
    /// Cut the job into so many shards [default: the trunk, and each layer's experts]
    #[arg(long, value_name = "N", visible_alias = "bundle-shards")]
    pub shards: Option<usize>,
    /// Cut the calibration text into so many units, which are pushed through the model side by side [default: 16]
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u16).range(1..))]
    pub calibration_shards: Option<u16>,
    /// `merge` leaves the stored activations of the calibration text
    #[arg(long)]
    pub keep_activations: bool,
    /// Show what the job takes on so many machines, such as 1,16,128, at the speed of this one's cores
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    pub nodes: Vec<u32>,
    /// Cores of such a machine
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub node_cpus: u32,
    /// Bytes a second that such a machine reads from shared storage
    #[arg(long, value_name = "SIZE", default_value = "2GiB", value_parser = parse_arg)]
    pub node_bandwidth: u64,
    /// Bytes a second that shared storage gives to all machines together
    #[arg(long, value_name = "SIZE", default_value = "40GiB", value_parser = parse_arg)]
    pub storage_bandwidth: u64,
    /// Tokens of the calibration text for `--nodes`, where there is no text at hand
    #[arg(long, value_name = "N", conflicts_with_all = ["calibrate", "stats"])]
    pub calibration_tokens: Option<u64>,
}

/// The job on each of the numbers of machines that are asked for.
///
/// # Errors
/// Shards that cannot be made; a codec that cannot be tried.
pub fn rows(
    args: &ClusterArgs,
    model: &Model,
    prepared: &Prepared,
    text: Option<&Windows>,
) -> Result<(Node, Vec<Row>)> {
    let of = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
    let node = Node {
        cpus: of(args.node_cpus),
        bytes_per_second: args.node_bandwidth,
        storage_bytes_per_second: args.storage_bandwidth,
    };
    if args.nodes.is_empty() {
        return Ok((node, Vec::new()));
    }
    let solver = solver(&prepared.recipe.solver)?;
    let n_tokens = text.map_or(args.calibration_tokens.unwrap_or(0), |w| w.tokens.len() as u64);
    let n_units = args.calibration_shards.map_or(UNITS_DEFAULT, usize::from);
    let n_units = text.map_or(n_units, |w| units(w.lens.len(), n_units).len());
    let rates = Rates::measured(codec(model, prepared)?, solver)?;
    let sizes = &prepared.sizes;
    let work = Work { model, sizes, solver, n_tokens, n_units, rates, node };
    let layers: Vec<_> = moe_layers(model.spec())
        .into_iter()
        .map(|(layer, n_experts)| (LayerExperts { layer, n_experts }, sizes.layer_source_bytes(layer)))
        .collect();
    let usual = split(&layers, args.shards)?;
    let most = 1 + sizes.n_experts() as usize;
    let row = |&n: &u32| {
        // As many shards as there are machines at least.
        let more = (args.shards.is_none() && usual.len() <= of(n)).then(|| (of(n) + 1).min(most));
        Ok(match more {
            Some(n_shards) => work.on(of(n), &split(&layers, Some(n_shards))?),
            None => work.on(of(n), &usual),
        })
    };
    Ok((node, args.nodes.iter().map(row).collect::<Result<_>>()?))
}

/// The codec of the first matrix that is coded, which stands for all.
fn codec<'a>(model: &Model, prepared: &'a Prepared) -> Result<Option<&'a moepack_quant::CodecRef>> {
    for (layer, _) in moe_layers(model.spec()) {
        for part in MATRICES {
            if let Choice::Codec(codec) = prepared.choices.of_part(layer, 0, part)? {
                return Ok(Some(codec));
            }
        }
    }
    Ok(None)
}

/// A table for people.
pub fn text(node: &Node, rows: &[Row]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let head = [
        "nodes",
        "shards",
        "units",
        "plan",
        "forward",
        "layers",
        "longest",
        "trunk",
        "storage",
        "total",
        "read",
        "activations",
        "network",
    ];
    let mut lines = vec![head.map(String::from).to_vec()];
    lines.extend(rows.iter().map(|r| {
        vec![
            r.nodes.to_string(),
            r.shards.to_string(),
            r.units.to_string(),
            time(r.plan_seconds),
            time(r.forward_seconds),
            time(r.layers_seconds),
            time(r.longest_shard_seconds),
            time(r.trunk_seconds),
            time(r.storage_seconds),
            time(r.total_seconds),
            human(r.read_bytes),
            human(r.activation_bytes),
            human(r.network_bytes),
        ]
    }));
    let (each, all) = (human(node.bytes_per_second), human(node.storage_bytes_per_second));
    format!(
        "\nOn machines of {} cores like one of this machine's, reading {each}/s each and {all}/s together:\n{}",
        node.cpus,
        table(&lines)
    )
}

/// Seconds for people.
fn time(seconds: f64) -> String {
    match seconds {
        s if s < 60.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
