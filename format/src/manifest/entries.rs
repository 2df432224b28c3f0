//! What a manifest is made of.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::mend::CRC_DIGITS;

/// Version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormatVersion {
    /// Another one cannot be read.
    pub major: u32,
    /// A larger one adds what may be ignored.
    pub minor: u32,
}

/// A program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// What a bundle was made from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// The files of the checkpoint, sorted by path, relative to it.
    pub sources: Vec<FileEntry>,
    /// How the checkpoint stored its routed experts, so that it can be written again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expert_tensors: Vec<TensorPattern>,
}

/// Tensors of a checkpoint that differ in the numbers of layer and expert only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorPattern {
    /// Their name, `{L}` for the layer and, where each expert has its own, `{E}` for the expert.
    pub name: String,
    /// Element type as in a safetensors header.
    pub dtype: String,
    /// Lengths, outermost first.
    pub shape: Vec<u64>,
    /// Layers, as first and last of each run.
    pub layers: Vec<[u32; 2]>,
    /// Experts, in the same way; empty where a tensor holds all of them.
    pub experts: Vec<[u32; 2]>,
}

/// A file with what identifies its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Name in the bundle, or path in the checkpoint.
    pub path: String,
    /// Length.
    pub bytes: u64,
    /// SHA-256, 64 lower-case hex digits.
    pub sha256: String,
}

/// The routed experts of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerEntry {
    /// The layer.
    pub layer: u32,
    /// Name of its bank, one of `files`.
    pub bank: String,
    /// Number of experts.
    pub n_experts: u32,
    /// Distance of records if it is the same for all, else null.
    pub record_stride: Option<u64>,
    /// Padded bytes of the largest record.
    pub max_record_bytes: u64,
    /// Bytes of all planes of all experts.
    pub payload_bytes: u64,
    /// Bytes of all pads of the bank.
    pub padding_bytes: u64,
    /// How many tokens of the calibration text each expert saw, if there was one.
    pub usage: Option<Vec<u64>>,
    /// Codec of each part.
    pub codecs: BTreeMap<String, PartCodecs>,
    /// Relative squared error of the layer's expert weights against the checkpoint, if it was measured.
    pub error: Option<f64>,
    /// CRC-32C of the bank's header and index, 8 hex digits; earlier versions had none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub header_crc32c: String,
    /// How the experts' matrices were coded, by projection.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub experts: BTreeMap<String, ProjectionEntry>,
}

/// The codec of one part of a layer's experts.
pub type PartCodecs = PerExpert<String>;

/// Something that each expert of a layer has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PerExpert<T> {
    /// All experts have this one.
    Same(T),
    /// One for each expert.
    Each(Vec<T>),
}

/// How one projection of a layer's experts was coded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProjectionEntry {
    /// Bits per weight, every scale and table counted.
    pub bits: PerExpert<f64>,
    /// Whose inputs the solver's Hessian was made of: `own`, `shrunk` or `pooled`. Null where it had none.
    #[serde(default, skip_serializing_if = "PerExpert::is_nothing")]
    pub hessian_source: PerExpert<Option<String>>,
    /// Squared error of the output over held-out inputs, relative to the output. Null where nothing was held out.
    #[serde(default, skip_serializing_if = "PerExpert::is_nothing")]
    pub heldout_error: PerExpert<Option<f64>>,
    /// The same of plain rounding with the same codec.
    #[serde(default, skip_serializing_if = "PerExpert::is_nothing")]
    pub heldout_error_rtn: PerExpert<Option<f64>>,
    /// The solver that was used instead, because it was better on held-out inputs.
    #[serde(default, skip_serializing_if = "PerExpert::is_nothing")]
    pub fallback: PerExpert<Option<String>>,
}

impl<T: PartialEq> PerExpert<T> {
    /// From one for each expert.
    pub fn folded(mut each: Vec<T>) -> PerExpert<T> {
        match each.split_first() {
            Some((first, rest)) if rest.iter().all(|v| v == first) => PerExpert::Same(each.swap_remove(0)),
            _ => PerExpert::Each(each),
        }
    }
}

impl<T> PerExpert<T> {
    /// That of one expert; `None` beyond the last of a list.
    pub fn of(&self, expert: usize) -> Option<&T> {
        match self {
            PerExpert::Same(value) => Some(value),
            PerExpert::Each(each) => each.get(expert),
        }
    }

    /// Entries of the list, if it is one.
    pub(super) fn n_listed(&self) -> Option<usize> {
        match self {
            PerExpert::Same(_) => None,
            PerExpert::Each(each) => Some(each.len()),
        }
    }
}

impl<T> PerExpert<Option<T>> {
    fn is_nothing(&self) -> bool {
        matches!(self, PerExpert::Same(None))
    }
}

impl<T> Default for PerExpert<Option<T>> {
    fn default() -> Self {
        PerExpert::Same(None)
    }
}

/// A measured number with the four significant digits that a manifest keeps.
pub fn four_digits(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap_or(value)
}

/// A trunk file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrunkEntry {
    /// Its name, one of `files`.
    pub file: String,
    /// CRC-32C of its header, 8 hex digits; earlier versions had none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub header_crc32c: String,
    /// CRC-32C of each of its tensors that is no pad, in the order of their bytes, 8 hex digits each.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub crc32c: String,
}

impl TrunkEntry {
    /// Tensors whose checksum it has.
    pub(crate) fn n_tensors(&self) -> u32 {
        u32::try_from(self.crc32c.len() / CRC_DIGITS).unwrap_or(u32::MAX)
    }

    /// The checksums of its tensors in order.
    pub fn tensor_crc32cs(&self) -> impl Iterator<Item = Option<u32>> {
        self.crc32c.as_bytes().chunks(CRC_DIGITS).map(|digits| crc_of_hex(std::str::from_utf8(digits).ok()?))
    }
}

/// The number that 8 hex digits stand for.
pub(crate) fn crc_of_hex(digits: &str) -> Option<u32> {
    u32::from_str_radix(digits, 16).ok().filter(|_| digits.len() == CRC_DIGITS)
}

/// A tensor that was not carried over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Its name in the checkpoint.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// Sums over a bundle.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Weights of all routed experts.
    pub expert_weights: u64,
    /// Weights of everything else.
    pub trunk_weights: u64,
    /// Bytes of all planes of all experts.
    pub expert_payload_bytes: u64,
    /// Bytes of all pads of all banks.
    pub padding_bytes: u64,
    /// Bytes of the trunk files.
    pub trunk_bytes: u64,
    /// Bytes of all files but the manifest.
    pub bundle_bytes: u64,
    /// Bits per weight of the routed experts: `expert_payload_bytes` over `expert_weights`.
    pub bpw_experts: f64,
    /// Bits per weight of the model: `expert_payload_bytes` and `trunk_bytes` over all weights.
    pub bpw_total: f64,
}

impl Totals {
    /// The sums, from what the manifest lists.
    pub fn sum(
        files: &[FileEntry],
        layers: &[LayerEntry],
        trunk: &[TrunkEntry],
        expert_weights: u64,
        trunk_weights: u64,
    ) -> Totals {
        let bytes_of = |name: &str| files.iter().find(|f| f.path == name).map_or(0, |f| f.bytes);
        // Numbers of a stranger's manifest come here too, so sums saturate.
        let sum = |all: &mut dyn Iterator<Item = u64>| all.fold(0, u64::saturating_add);
        let expert_payload_bytes = sum(&mut layers.iter().map(|l| l.payload_bytes));
        let trunk_bytes = sum(&mut trunk.iter().map(|t| bytes_of(&t.file)));
        let bpw = |bytes: u64, weights: u64| {
            if weights == 0 { 0.0 } else { bytes as f64 * 8.0 / weights as f64 }
        };
        Totals {
            expert_weights,
            trunk_weights,
            expert_payload_bytes,
            padding_bytes: sum(&mut layers.iter().map(|l| l.padding_bytes)),
            trunk_bytes,
            bundle_bytes: sum(&mut files.iter().map(|f| f.bytes)),
            bpw_experts: bpw(expert_payload_bytes, expert_weights),
            bpw_total: bpw(
                expert_payload_bytes.saturating_add(trunk_bytes),
                expert_weights.saturating_add(trunk_weights),
            ),
        }
    }
}
