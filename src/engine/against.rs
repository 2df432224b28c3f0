//! A bundle against the checkpoint it was made from: what was kept is the same to the bit, experts that were quantized are
//! within the error that the manifest records, and trunk matrices are what coding them once more gives.

use moepack_convert::spec::Part;
use moepack_convert::{CodedExpert, Model, TrunkTensor};
use moepack_format::check::Damage;
use moepack_format::{Error, Result};
use moepack_quant::Isa;
use moepack_verify::drift::SquareSums;
use moepack_verify::forward::ordered;

use crate::engine::trunk::Trunk;
use crate::recipe::{Choice, Choices, Recipe, TrunkRule, matrix_name, moe_layers};
use crate::session::Session;

/// The recorded error is a sum in another order; this much more is rounding.
const ERROR_SLACK: f64 = 1e-6;
/// Bytes of a trunk tensor compared at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// Everything in which the bundle differs from the checkpoint.
///
/// # Errors
/// What cannot be read; a requested stop.
pub fn against(session: &Session, bundle: &Model, checkpoint: &Model) -> Result<Vec<Damage>> {
    let mut damage = Vec::new();
    let coded = Trunk::of(checkpoint, &trunk_choice(bundle)?)?;
    for tensor in checkpoint.trunk_tensors().iter().filter(|t| !coded.leaves_out(&t.name)) {
        session.stop.check()?;
        damage.extend(trunk(bundle, checkpoint, &coded, tensor)?);
    }
    if moe_layers(bundle.spec()) != moe_layers(checkpoint.spec()) {
        damage.push(difference("manifest.json", None, "the checkpoint has other layers or experts".into()));
        return Ok(damage);
    }
    let choices = choices(bundle)?;
    for layer in moe_layers(checkpoint.spec()) {
        damage.extend(experts(session, bundle, checkpoint, layer, choices.as_ref())?);
    }
    Ok(damage)
}

/// What the bundle's recipe says of experts; a manifest may have none that this version reads.
fn choices(bundle: &Model) -> Result<Option<Choices>> {
    let recipe = bundle.bundle().and_then(|b| b.manifest.recipe.get("recipe").cloned());
    let recipe: Option<Recipe> = recipe.and_then(|r| serde_json::from_value(r).ok());
    recipe.map(|r| Choices::of(&r, bundle.spec())).transpose().map_err(|e| {
        Error::bad_data(format!("the recipe does not fit the model: {}", e.what())).in_file(bundle.root())
    })
}

/// What the bundle's recipe says of the trunk.
fn trunk_choice(bundle: &Model) -> Result<Choice> {
    let Some(manifest) = bundle.bundle().map(|b| &b.manifest) else { return Ok(Choice::Native) };
    if manifest.trunk_codecs.is_empty() {
        return Ok(Choice::Native);
    }
    let rule = manifest.recipe.get("recipe").and_then(|r| r.get("trunk")).cloned().unwrap_or_default();
    serde_json::from_value::<TrunkRule>(rule)
        .map_err(|e| {
            Error::bad_data(format!("trunk matrices are coded, but the recipe does not say how: {e}"))
        })
        .and_then(|rule| rule.choice())
        .map_err(|e| e.in_file(bundle.root()))
}

fn trunk(
    bundle: &Model,
    checkpoint: &Model,
    coded: &Trunk<'_>,
    tensor: &TrunkTensor,
) -> Result<Option<Damage>> {
    let damage = |byte, what: String| {
        let tensor = Some(tensor.name.clone());
        Some(Damage { tensor, byte, ..difference("trunk", None, what) })
    };
    let Some(kept) = bundle.trunk_tensors().iter().find(|t| t.name == tensor.name) else {
        return Ok(damage(None, "the checkpoint has it, the bundle does not".into()));
    };
    match (bundle.trunk_codec(kept), coded.encoded(checkpoint, tensor)?) {
        (None, None) => {}
        (Some(_), Some(planes)) if bundle.trunk_planes(kept)? == planes => return Ok(None),
        (Some(codec), Some(_)) => {
            let recorded = bundle.bundle().and_then(|b| b.manifest.trunk_errors.get(&tensor.name).copied());
            let found = || trunk_error(bundle, checkpoint, tensor);
            let what = match recorded {
                None => format!("is not what coding the checkpoint's as {codec} gives"),
                Some(recorded) => match too_large(found()?, recorded) {
                    Some(what) => what,
                    None => return Ok(None),
                },
            };
            return Ok(damage(None, what));
        }
        (found, _) => {
            let found = found.unwrap_or_else(|| "released".to_owned());
            return Ok(damage(None, format!("stored as {found}, which is not what the recipe says")));
        }
    }
    if (kept.dtype, &kept.shape) != (tensor.dtype, &tensor.shape) {
        let what = format!(
            "{} {:?}, the checkpoint has {} {:?}",
            kept.dtype.name(),
            kept.shape,
            tensor.dtype.name(),
            tensor.shape
        );
        return Ok(damage(None, what));
    }
    let (mut a, mut b) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut at = 0;
    while at < tensor.bytes {
        let n = usize::try_from(tensor.bytes - at).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let (a, b) = (a.get_mut(..n).unwrap_or_default(), b.get_mut(..n).unwrap_or_default());
        bundle.read_raw(kept, at, a)?;
        checkpoint.read_raw(tensor, at, b)?;
        if let Some(i) = a.iter().zip(b.iter()).position(|(x, y)| x != y) {
            return Ok(damage(Some(at + i as u64), "differs from the checkpoint".into()));
        }
        at += n as u64;
    }
    Ok(None)
}

/// Experts of a layer: those kept bit by bit, those quantized by the error of all of them.
fn experts(
    session: &Session,
    bundle: &Model,
    checkpoint: &Model,
    (layer, n_experts): (usize, usize),
    choices: Option<&Choices>,
) -> Result<Vec<Damage>> {
    let id = u32::try_from(layer).unwrap_or(u32::MAX);
    let entry = bundle.bundle().and_then(|b| b.manifest.layer(id));
    let entry = entry.ok_or_else(|| Error::bad_data(format!("the bundle has no layer {layer}")))?;
    let mut damage = Vec::new();
    let mut sums = SquareSums::default();
    let work = |e: usize| {
        session.stop.check()?;
        let is_native =
            |part| choices.is_some_and(|c| matches!(c.of_part(layer, e, part), Ok(Choice::Native)));
        compare(&bundle.expert(layer, e)?, &checkpoint.expert(layer, e)?, is_native)
    };
    ordered(n_experts, work, |e, (differing, error): (Vec<Part>, SquareSums)| {
        sums.add(&error);
        damage.extend(differing.into_iter().map(|part| Damage {
            expert: u32::try_from(e).ok(),
            tensor: Some(matrix_name(layer, e, part)),
            ..difference(&entry.bank, Some(id), "kept as released, but differs from the checkpoint".into())
        }));
        Ok(())
    })?;
    let what = too_large(sums.relative(), entry.error.unwrap_or(0.0));
    damage.extend(what.map(|what| difference(&entry.bank, Some(id), what)));
    Ok(damage)
}

/// Relative squared error of a coded trunk matrix.
fn trunk_error(bundle: &Model, checkpoint: &Model, tensor: &TrunkTensor) -> Result<f64> {
    let of = |model: &Model| model.trunk(tensor.layer, tensor.role);
    Ok(SquareSums::of(Isa::get(), &of(checkpoint)?.data, &of(bundle)?.data).relative())
}

/// What is wrong with an error above the one that the manifest records.
fn too_large(found: f64, recorded: f64) -> Option<String> {
    let is_larger = found > recorded * (1.0 + ERROR_SLACK) || found.is_nan();
    is_larger.then(|| {
        format!("relative squared error {found:e} against the checkpoint, the manifest records {recorded:e}")
    })
}

fn difference(file: &str, layer: Option<u32>, what: String) -> Damage {
    Damage { file: file.to_owned(), layer, expert: None, tensor: None, byte: None, end: None, what }
}

/// Parts that were kept and differ, bit by bit where the recipe says `native`; error of those that were not kept.
fn compare(
    kept: &CodedExpert,
    released: &CodedExpert,
    is_native: impl Fn(Part) -> bool,
) -> Result<(Vec<Part>, SquareSums)> {
    let isa = Isa::get();
    let (mut differing, mut sums) = (Vec::new(), SquareSums::default());
    for part in &released.parts {
        match kept.part(part.part) {
            Some(k) if k.codec.name() == part.codec.name() && k.planes == part.planes => {}
            Some(_) if is_native(part.part) => differing.push(part.part),
            Some(k) if part.part.is_matrix() && k.codec.name() != part.codec.name() => {
                sums.add(&SquareSums::of(isa, &part.decode(isa)?, &k.decode(isa)?));
            }
            // The same codec may have been asked for by name and rounded anew; its error tells.
            Some(k) if part.part.is_matrix() => {
                let error = SquareSums::of(isa, &part.decode(isa)?, &k.decode(isa)?);
                if error.difference > 0.0 {
                    differing.push(part.part);
                }
            }
            _ => differing.push(part.part),
        }
    }
    Ok((differing, sums))
}
