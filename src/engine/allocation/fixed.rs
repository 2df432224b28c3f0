//! Budgets with codecs of fixed rate: each projection gets one of them, so that the bytes are used as well as the steps
//! between codecs allow.
//!
//! What a codec loses on a projection is measured on a sample of its own weights: rows of a few experts, coded by
//! round-to-nearest, relative squared error.

use moepack_convert::Model;
use moepack_convert::spec::Part;
use moepack_format::{Error, Result};
use moepack_quant::allocate::{Alternative, allocate};
use moepack_quant::codec::codec;
use moepack_quant::{CodecRef, Isa, Matrix};
use moepack_verify::drift::SquareSums;
use rayon::prelude::*;

use super::{Ask, Group, Limit, groups, sizes};
use crate::recipe::{MATRICES, Recipe, Rule};

/// What allocation may choose from, all of which every matrix can hold.
const CODECS: &[&str] = &[
    "int2-g128",
    "int2-g64",
    "int2-g32",
    "int3-g128",
    "int3-g64",
    "int3-g32",
    "int4-g128",
    "int4-g64",
    "int4-g32",
    "int5-g64",
    "int5-g32",
    "int6-g64",
    "int6-g32",
    "int8-g64",
    "int8-g32",
];
/// Rows of one expert that are tried.
const SAMPLE_ROWS: usize = 64;
/// Experts of a layer that are tried.
const SAMPLE_EXPERTS: usize = 3;

/// One projection of a group of experts.
struct Item {
    group: Group,
    part: Part,
    alternatives: Vec<Alternative>,
}

/// The recipe that loses least within the limit.
///
/// # Errors
/// A limit that cannot be met (kind `Plan`, with the smallest possible); weights that cannot be read.
pub fn recipe(model: &Model, ask: &Ask<'_>) -> Result<Recipe> {
    let codecs = CODECS.iter().map(|name| codec(name)).collect::<Result<Vec<_>>>()?;
    let items = items(model, ask, &codecs)?;
    let choose = |payload_bytes: u64| {
        let alternatives: Vec<Vec<Alternative>> = items.iter().map(|i| i.alternatives.clone()).collect();
        allocate(&alternatives, payload_bytes).map(|chosen| spelled_out(&items, &chosen, ask))
    };
    let least = items.iter().filter_map(|i| i.alternatives.iter().map(|a| a.bytes).min()).sum();
    match ask.limit {
        Limit::Bits(bits) => {
            let weights = model.spec().expert_weights();
            let nearest = (least as f64 * 8e4 / weights as f64).ceil() / 1e4;
            choose((bits * weights as f64 / 8.0) as u64).map_err(|e| {
                Error::plan(format!("--bits {bits} cannot be met: {}", e.what()))
                    .hint(format!("the nearest that can is --bits {nearest}"))
            })
        }
        Limit::BundleBytes(bytes) => within_bundle(model, ask, bytes, least, choose),
    }
}

/// Padding and headers depend on what is chosen, so the payload's budget is found by trying: it grows by what is left
/// over until the bundle would be too large.
fn within_bundle(
    model: &Model,
    ask: &Ask<'_>,
    bytes: u64,
    least: u64,
    choose: impl Fn(u64) -> Result<Recipe>,
) -> Result<Recipe> {
    const ROUNDS: usize = 40;
    let size = |recipe: &Recipe| sizes(model, recipe, ask).map(|s| s.bundle_bytes());
    let (mut low, mut high) = (0, bytes);
    let mut best = None;
    for _ in 0..ROUNDS {
        let budget = low + (high - low) / 2;
        // A budget below the smallest possible payload says how large that is.
        let fits = match choose(budget) {
            Err(_) => true,
            Ok(recipe) => {
                let fits = size(&recipe)? <= bytes;
                if fits {
                    best = Some(recipe);
                }
                fits
            }
        };
        if fits {
            low = budget
        } else {
            high = budget
        }
        if high - low < 256 {
            break;
        }
    }
    let Some(best) = best else {
        let nearest = size(&choose(least)?)?;
        return Err(Error::plan(format!(
            "--target-size {bytes} cannot be met: the smallest possible takes about {nearest} bytes"
        ))
        .hint(format!(
            "nothing but routed experts is quantized; the nearest that can is --target-size {nearest}"
        )));
    };
    Ok(best)
}

fn spelled_out(items: &[Item], chosen: &[usize], ask: &Ask<'_>) -> Recipe {
    let rule = |(item, &choice): (&Item, &usize)| {
        let alternative = item.alternatives.get(choice).filter(|_| !ask.per_expert);
        Rule {
            tensor: item.group.pattern(item.part),
            codec: CODECS.get(choice).copied().unwrap_or_default().to_owned(),
            bits: None,
            bytes: alternative.map(|a| a.bytes),
            expected_loss: alternative.map(|a| a.loss),
        }
    };
    ask.recipe(items.iter().zip(chosen).map(rule).collect())
}

/// What each codec makes of one projection of a layer: bytes of one matrix, and the relative squared error.
type Samples = Vec<(u64, f64)>;

fn items(model: &Model, ask: &Ask<'_>, codecs: &[CodecRef]) -> Result<Vec<Item>> {
    let layers = model.spec().moe_layers();
    let places =
        layers.flat_map(|(l, moe)| moe.matrices().iter().map(move |&part| ((l, moe.n_experts), part)));
    let places: Vec<_> = places.collect();
    let sampled = places
        .par_iter()
        .map(|&((layer, n), part)| Ok(((layer, part), sample(model, codecs, layer, n, part)?)));
    let sampled = sampled.collect::<Result<Vec<((usize, Part), (u64, Samples))>>>()?;
    let mut items = Vec::new();
    for group in groups(model, ask.per_expert) {
        for part in MATRICES {
            let Some((_, (weights, samples))) = sampled.iter().find(|(at, _)| *at == (group.layer, part))
            else {
                continue;
            };
            let sensitivity = group.sensitivity(ask, part, group.len() * weights);
            let alternative = |&(bytes, error): &(u64, f64)| Alternative {
                bytes: bytes * group.len(),
                loss: error * sensitivity,
            };
            let alternatives = samples.iter().map(alternative).collect();
            items.push(Item { group: group.clone(), part, alternatives });
        }
    }
    Ok(items)
}

/// Weights of one matrix, and what each codec makes of it.
fn sample(
    model: &Model,
    codecs: &[CodecRef],
    layer: usize,
    n_experts: usize,
    part: Part,
) -> Result<(u64, Samples)> {
    let mut sums = vec![SquareSums::default(); codecs.len()];
    let (mut rows, mut cols) = (0, 0);
    for expert in sampled(n_experts) {
        let coded = model.expert(layer, expert)?;
        let stored =
            coded.part(part).ok_or_else(|| Error::bad_data(format!("an expert without {}", part.name())))?;
        (rows, cols) = (stored.rows, stored.cols);
        let w = stored.decode(Isa::get())?;
        let n_rows = rows.min(SAMPLE_ROWS);
        let sample = Matrix { rows: n_rows, cols, data: w.get(..n_rows * cols).unwrap_or_default() };
        for (sums, codec) in sums.iter_mut().zip(codecs) {
            sums.add(&loss(codec, sample)?);
        }
    }
    let of_codec = |(sums, codec): (&SquareSums, &CodecRef)| {
        let mut bytes = 0;
        for plane in codec.planes(rows, cols)? {
            bytes += plane.bytes()?;
        }
        Ok((bytes, sums.relative()))
    };
    let samples = sums.iter().zip(codecs).map(of_codec).collect::<Result<_>>()?;
    Ok(((rows * cols) as u64, samples))
}

fn loss(codec: &CodecRef, sample: Matrix<'_>) -> Result<SquareSums> {
    let isa = Isa::get();
    let planes = codec.encode(isa, sample, None)?;
    let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
    let mut decoded = vec![0.0; sample.data.len()];
    codec.decode(isa, &planes, sample.rows, sample.cols, 0, &mut decoded)?;
    Ok(SquareSums::of(isa, sample.data, &decoded))
}

/// A few experts, spread over the layer.
fn sampled(n_experts: usize) -> impl Iterator<Item = usize> {
    let n = n_experts.min(SAMPLE_EXPERTS);
    (0..n).map(move |i| i * n_experts / n.max(1))
}
