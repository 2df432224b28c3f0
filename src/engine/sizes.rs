//! What a recipe makes of a model, in bytes, from shapes alone: nothing is read but headers.

use moepack_convert::Model;
use moepack_convert::spec::Part;
use moepack_format::bank::{PLANE_HEADER_BYTES, TABLE_HEADER_BYTES};
use moepack_format::index::ROW_BYTES;
use moepack_format::{Context, Error, Kind, PlaneSpec, Result, TENSOR_ALIGN};

use crate::recipe::{Choice, Choices, MATRICES, matrix_name, moe_layers};

/// Manifest bytes, and those of a file, a layer, and an expert: its usage count, and for each of three matrices bits, two
/// errors, source and fallback.
const MANIFEST_BYTES: [u64; 4] = [4096, 400, 1100, 8 + 3 * 44];

/// Bytes of a whole bundle.
#[derive(Clone, Debug, Default)]
pub struct Sizes {
    /// Bytes to be read: trunk and experts.
    pub source_bytes: u64,
    /// Bytes of the trunk's tensors.
    pub trunk_bytes: u64,
    /// Number of these tensors.
    n_trunk_tensors: u64,
    /// Bytes of the side files.
    pub side_bytes: u64,
    n_side_files: u64,
    n_sources: u64,
    align: u64,
    /// MoE layers, ascending.
    pub layers: Vec<LayerSizes>,
    /// Largest expert as released, in bytes.
    pub expert_source_bytes_max: u64,
    /// Largest expert as coded, in bytes.
    pub expert_coded_bytes_max: u64,
}

/// Bytes of one bank.
#[derive(Clone, Debug, Default)]
pub struct LayerSizes {
    /// The layer.
    pub layer: usize,
    /// Routed experts.
    pub n_experts: usize,
    /// Bytes of the experts as released.
    pub source_bytes: u64,
    /// Bytes of all planes.
    pub payload_bytes: u64,
    /// Bytes of all records with their padding.
    pub record_bytes: u64,
    /// Number of planes.
    pub n_planes: usize,
    /// Gate, up and down.
    pub parts: Vec<PartSizes>,
}

/// Bytes of one projection over all experts of a layer.
#[derive(Clone, Debug)]
pub struct PartSizes {
    /// Which.
    pub part: Part,
    /// Codec, or `mixed`.
    pub codec: String,
    /// Weights.
    pub weights: u64,
    /// Bytes of all planes.
    pub bytes: u64,
}

impl Sizes {
    /// Works out a recipe for a model.
    ///
    /// # Errors
    /// A matrix that its codec cannot hold; all of them are listed (kind `Plan`).
    pub fn of(model: &Model, choices: &Choices, align: u64) -> Result<Sizes> {
        let side = model.side_files(&mut Vec::new())?;
        let mut sizes = Sizes {
            align,
            trunk_bytes: model.trunk_tensors().iter().map(|t| t.bytes).sum(),
            n_trunk_tensors: model.trunk_tensors().len() as u64,
            side_bytes: side.iter().map(|f| f.bytes).sum(),
            n_side_files: side.len() as u64,
            n_sources: model.files().len() as u64,
            ..Sizes::default()
        };
        let mut impossible = Vec::new();
        for layer in moe_layers(model.spec()) {
            let layer_sizes = sizes.layer(model, choices, layer, align, &mut impossible)?;
            sizes.layers.push(layer_sizes);
        }
        refuse(&impossible)?;
        sizes.source_bytes = sizes.trunk_bytes + sizes.layers.iter().map(|l| l.source_bytes).sum::<u64>();
        Ok(sizes)
    }

    fn layer(
        &mut self,
        model: &Model,
        choices: &Choices,
        (layer, n_experts): (usize, usize),
        align: u64,
        impossible: &mut Vec<Error>,
    ) -> Result<LayerSizes> {
        let mut sizes = LayerSizes { layer, n_experts, ..LayerSizes::default() };
        sizes.parts =
            MATRICES.map(|part| PartSizes { part, codec: String::new(), weights: 0, bytes: 0 }).to_vec();
        for expert in 0..n_experts {
            let (mut source, mut coded, mut record) = (0, 0, 0_u64);
            for stored in model.expert_parts(layer, expert)? {
                source += plane_bytes(&stored.codec.planes(stored.rows, stored.cols)?)?;
                let choice = choices.of_part(layer, expert, stored.part)?;
                let codec = if let Choice::Codec(codec) = choice { codec } else { &stored.codec };
                let planes = match codec.planes(stored.rows, stored.cols) {
                    Ok(planes) => planes,
                    Err(e) => {
                        impossible.push(e.in_tensor(matrix_name(layer, expert, stored.part)));
                        continue;
                    }
                };
                sizes.n_planes += planes.len();
                for plane in &planes {
                    record = record.next_multiple_of(TENSOR_ALIGN) + plane.bytes()?;
                }
                let bytes = plane_bytes(&planes)?;
                coded += bytes;
                sizes.add(stored.part, &codec.name(), (stored.rows * stored.cols) as u64, bytes);
            }
            sizes.source_bytes += source;
            sizes.payload_bytes += coded;
            sizes.record_bytes += record.next_multiple_of(align);
            self.expert_source_bytes_max = self.expert_source_bytes_max.max(source);
            self.expert_coded_bytes_max = self.expert_coded_bytes_max.max(coded);
        }
        Ok(sizes)
    }

    /// Routed experts of all layers.
    pub fn n_experts(&self) -> u64 {
        self.layers.iter().map(|l| l.n_experts as u64).sum()
    }

    /// Bytes of a layer's experts as released.
    pub fn layer_source_bytes(&self, layer: usize) -> u64 {
        self.layers.iter().find(|l| l.layer == layer).map_or(0, |l| l.source_bytes)
    }

    /// Planes of a layer's bank.
    pub fn layer_planes(&self, layer: usize) -> usize {
        self.layers.iter().find(|l| l.layer == layer).map_or(0, |l| l.n_planes)
    }

    /// Weights of all routed experts.
    pub fn expert_weights(&self) -> u64 {
        self.layers.iter().flat_map(|l| &l.parts).map(|p| p.weights).sum()
    }

    /// Bytes of all planes of all experts.
    pub fn payload_bytes(&self) -> u64 {
        self.layers.iter().map(|l| l.payload_bytes).sum()
    }

    /// Bytes of the bundle, the manifest too; headers and manifest are what they are at most.
    pub fn bundle_bytes(&self) -> u64 {
        // A trunk's header takes less for a tensor than a bank's.
        let banks: u64 = self.layers.iter().map(|l| l.bank_bytes(self.align)).sum();
        let trunk = self.trunk_bytes
            + self.n_trunk_tensors * (PLANE_HEADER_BYTES + TENSOR_ALIGN)
            + TABLE_HEADER_BYTES;
        let n_files = self.layers.len() as u64 + self.n_side_files + self.n_sources + 1;
        let counts = [1, n_files, self.layers.len() as u64, self.n_experts()];
        let manifest: u64 = counts.iter().zip(MANIFEST_BYTES).map(|(n, bytes)| n * bytes).sum();
        banks + trunk + self.side_bytes + manifest
    }
}

impl LayerSizes {
    fn bank_bytes(&self, align: u64) -> u64 {
        let header = TABLE_HEADER_BYTES + self.n_planes as u64 * PLANE_HEADER_BYTES;
        let index = (self.n_experts * ROW_BYTES) as u64;
        header.next_multiple_of(align) + align + index.next_multiple_of(align) + self.record_bytes
    }

    fn add(&mut self, part: Part, codec: &str, weights: u64, bytes: u64) {
        if let Some(sizes) = self.parts.iter_mut().find(|p| p.part == part) {
            match sizes.codec.as_str() {
                "" => codec.clone_into(&mut sizes.codec),
                known if known == codec => {}
                _ => "mixed".clone_into(&mut sizes.codec),
            }
            sizes.weights += weights;
            sizes.bytes += bytes;
        }
    }
}

fn plane_bytes(planes: &[PlaneSpec]) -> Result<u64> {
    planes.iter().map(|p| p.bytes().in_tensor(&p.name)).sum()
}

/// All that is impossible at once, so that a recipe is mended in one go.
fn refuse(impossible: &[Error]) -> Result<()> {
    const LISTED_MAX: usize = 10;
    let Some(first) = impossible.first() else { return Ok(()) };
    let line = |e: &Error| format!("\n    {}: {}", e.tensor().unwrap_or_default(), e.what());
    let mut what = format!("{} matrices do not fit their codec:", impossible.len());
    what.extend(impossible.iter().take(LISTED_MAX).map(line));
    if impossible.len() > LISTED_MAX {
        what.push_str(&format!("\n    and {} more", impossible.len() - LISTED_MAX));
    }
    let hint = first.hint_text().unwrap_or("choose another codec for them in a recipe").to_owned();
    Err(Error::new(Kind::Plan, what).hint(hint))
}
