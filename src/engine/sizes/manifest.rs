//! How long a manifest will be, before there is a bundle.
//!
//! The manifest is made as the writer makes it, with the widest value wherever the real one is not known yet: token
//! counts, errors. So the length is an upper bound, a few bytes a layer above what comes out.

use std::collections::BTreeMap;

use moepack_convert::Model;
use moepack_format::Result;
use moepack_format::bank::{BankSummary, bank_name};
use moepack_format::manifest::{FileEntry, LayerEntry, PartCodecs, PerExpert, ProjectionEntry};
use moepack_format::trunk::{FileSummary, trunk_name};
use serde_json::{Value, json};

use super::{LayerSizes, Sizes};
use crate::engine::trunk::Trunk;
use crate::engine::writer::{LayerNote, Pieces, manifest};
use crate::recipe::{Choices, Recipe};

/// What calibration adds to a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CalibrationSize {
    /// Tokens of the calibration text.
    pub n_tokens: u64,
    /// Whether they run through the model now, so that counts and held-out errors of each expert are kept.
    pub by_text: bool,
}

/// No relative error is written with more characters.
const WIDEST_ERROR: f64 = 0.000_123_456_789_012_345_67;

/// Four digits, of bits below ten and of errors between a hundred-thousandth and one.
const WIDEST_BITS: f64 = 1.234;
const WIDEST_HELDOUT_ERROR: f64 = 0.000_123_4;

/// Bytes of the manifest, at most.
///
/// # Errors
/// Values that JSON cannot hold.
pub fn manifest_bytes(
    model: &Model,
    recipe: &Recipe,
    choices: &Choices,
    (sizes, coded_trunk): (&Sizes, &Trunk<'_>),
    calibrated: Option<CalibrationSize>,
) -> Result<u64> {
    let hash = || "0".repeat(64);
    let entry = |(path, bytes): (&str, u64)| FileEntry { path: path.to_owned(), bytes, sha256: hash() };
    let n_tensors = coded_trunk.file_tensors()?;
    let trunk =
        sizes.trunk_files.iter().zip(n_tensors).enumerate().map(|(i, (&bytes, n_tensors))| FileSummary {
            file: trunk_name(i + 1, sizes.trunk_files.len()),
            bytes,
            sha256: hash(),
            payload_bytes: 0,
            padding_bytes: 0,
            header_crc32c: crc32c(1),
            crc32c: crc32c(n_tensors),
        });
    let with_hessians = super::has_hessians(recipe, calibrated)?;
    let layers =
        sizes.layers.iter().map(|l| layer_note(model, choices, sizes, l, (calibrated, with_hessians)));
    let calibration =
        calibrated.map_or(Value::Null, |c| json!({ "tokens": c.n_tokens, "tokens_sha256": hash() }));
    let pieces = Pieces {
        trunk: trunk.collect(),
        trunk_codecs: coded_trunk.codecs(),
        trunk_errors: trunk_errors(coded_trunk, with_hessians),
        left_out: coded_trunk.left_out(),
        layers: layers.collect::<Result<_>>()?,
        side: model.side_files(&mut Vec::new())?.iter().map(|f| entry((&f.name, f.bytes))).collect(),
        sources: model.files().iter().map(|f| entry((&f.name, f.fingerprint.bytes))).collect(),
        recipe: json!({ "recipe": recipe, "calibration": calibration }),
        align: recipe.align,
    };
    Ok(manifest(model, pieces).to_text()?.len() as u64)
}

/// The digits of so many checksums.
fn crc32c(n: usize) -> String {
    "0".repeat(8 * n)
}

/// The widest errors of coded matrices of the trunk, where calibration decides how they are coded.
fn trunk_errors(trunk: &Trunk<'_>, with_hessians: bool) -> BTreeMap<String, f64> {
    let names = with_hessians.then(|| trunk.codecs().into_keys());
    names.into_iter().flatten().map(|name| (name, WIDEST_ERROR)).collect()
}

fn layer_note(
    model: &Model,
    choices: &Choices,
    sizes: &Sizes,
    layer: &LayerSizes,
    (calibrated, with_hessians): (Option<CalibrationSize>, bool),
) -> Result<LayerNote> {
    let id = u32::try_from(layer.layer).unwrap_or(u32::MAX);
    let n_experts = u32::try_from(layer.n_experts).unwrap_or(u32::MAX);
    let bank = bank_name(id);
    let mut codecs = BTreeMap::<String, Vec<String>>::new();
    for expert in 0..layer.n_experts {
        for (stored, codec) in super::coded_parts(model, choices, layer.layer, expert)? {
            codecs.entry(stored.part.name().to_owned()).or_default().push(codec.name());
        }
    }
    let bytes = layer.bank_bytes(sizes.align);
    let usage = calibrated.filter(|c| c.by_text).map(|c| vec![c.n_tokens; layer.n_experts]);
    let summary = BankSummary {
        file: bank.clone(),
        bytes,
        sha256: "0".repeat(64),
        stride: None,
        max_record_bytes: layer.record_bytes_max,
        payload_bytes: layer.payload_bytes,
        padding_bytes: 0,
        n_experts,
        header_crc32c: crc32c(1),
    };
    let entry = LayerEntry {
        layer: id,
        bank,
        n_experts,
        record_stride: Some(layer.record_bytes_max),
        max_record_bytes: layer.record_bytes_max,
        payload_bytes: layer.payload_bytes,
        padding_bytes: bytes - layer.payload_bytes,
        usage,
        codecs: codecs.into_iter().map(|(part, each)| (part, PartCodecs::folded(each))).collect(),
        error: Some(WIDEST_ERROR),
        header_crc32c: crc32c(1),
        experts: layer
            .parts
            .iter()
            .map(|sizes| (sizes.part.name().to_owned(), projection(layer.n_experts, with_hessians)))
            .collect(),
    };
    Ok(LayerNote { summary, entry })
}

/// How a projection was coded, with the widest of what the writer may say of each expert.
fn projection(n_experts: usize, with_hessians: bool) -> ProjectionEntry {
    let bits = PerExpert::Each(vec![WIDEST_BITS; n_experts]);
    if !with_hessians {
        return ProjectionEntry {
            bits,
            hessian_source: PerExpert::default(),
            heldout_error: PerExpert::default(),
            heldout_error_rtn: PerExpert::default(),
            fallback: PerExpert::default(),
        };
    }
    let error = || PerExpert::Each(vec![Some(WIDEST_HELDOUT_ERROR); n_experts]);
    let word = |word: &str| PerExpert::Each(vec![Some(word.to_owned()); n_experts]);
    ProjectionEntry {
        bits,
        hessian_source: word("shrunk"),
        heldout_error: error(),
        heldout_error_rtn: error(),
        fallback: word("rtn"),
    }
}
