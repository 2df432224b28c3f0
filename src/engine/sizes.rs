//! What a recipe makes of a model, in bytes, from shapes alone: nothing is read but headers.

use moepack_convert::spec::Part;
use moepack_convert::{Model, StoredPart};
use moepack_format::bank::{PLANE_HEADER_BYTES, TABLE_HEADER_BYTES};
use moepack_format::index::ROW_BYTES;
use moepack_format::{Context, Error, Kind, PlaneSpec, Result, TENSOR_ALIGN};
use moepack_quant::CodecRef;
use moepack_quant::solve::solver;

use crate::engine::trunk::{Learning, Trunk};
use crate::recipe::{Choice, Choices, MATRICES, Recipe, matrix_name, moe_layers};

mod manifest;

pub use manifest::CalibrationSize;

/// Bytes of a whole bundle.
#[derive(Clone, Debug, Default)]
pub struct Sizes {
    /// Bytes to be read: trunk and experts.
    pub source_bytes: u64,
    /// Bytes of the trunk's tensors, at most.
    pub trunk_bytes: u64,
    /// Bytes of each trunk file.
    trunk_files: Vec<u64>,
    /// Bytes that coding the largest trunk matrix takes; 0 where none is coded.
    pub trunk_coding_bytes_max: u64,
    /// What coding the trunk by a text takes.
    pub trunk_learning: Learning,
    /// Bytes of the side files.
    pub side_bytes: u64,
    /// Bytes of the manifest, at most.
    pub manifest_bytes: u64,
    /// Bytes by which the manifest is filled up to what the recipe was made for.
    pub fill_bytes: u64,
    align: u64,
    /// MoE layers, ascending.
    pub layers: Vec<LayerSizes>,
    /// Largest expert as released, in bytes.
    pub expert_source_bytes_max: u64,
    /// Largest expert as coded, in bytes.
    pub expert_coded_bytes_max: u64,
    /// What the greediest codec takes beside a matrix and what becomes of it.
    pub coding_bytes_max: u64,
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
    /// Bytes of the largest record with its padding.
    pub record_bytes_max: u64,
    /// Number of planes.
    pub n_planes: usize,
    /// Gate, where there is one, up and down.
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
    pub fn of(
        model: &Model,
        recipe: &Recipe,
        choices: &Choices,
        calibrated: Option<CalibrationSize>,
    ) -> Result<Sizes> {
        let side = model.side_files(&mut Vec::new())?;
        let align = recipe.align;
        let trunk = Trunk::of(model, choices.trunk())?;
        let with_hessians = has_hessians(recipe, calibrated)?;
        let mut sizes = Sizes {
            align,
            trunk_bytes: trunk.bytes()?,
            trunk_files: trunk.file_bytes()?,
            trunk_coding_bytes_max: trunk.coding_bytes_max(),
            trunk_learning: if with_hessians { trunk.learning() } else { trunk.coding() },
            side_bytes: side.iter().map(|f| f.bytes).sum(),
            ..Sizes::default()
        };
        let mut impossible = Vec::new();
        for layer in moe_layers(model.spec()) {
            let layer_sizes = sizes.layer(model, choices, layer, align, &mut impossible)?;
            sizes.layers.push(layer_sizes);
        }
        refuse(&impossible)?;
        let trunk_source: u64 = model.trunk_tensors().iter().map(|t| t.bytes).sum();
        sizes.source_bytes = trunk_source + sizes.layers.iter().map(|l| l.source_bytes).sum::<u64>();
        sizes.manifest_bytes =
            manifest::manifest_bytes(model, recipe, choices, (&sizes, &trunk), calibrated)?;
        sizes.fill_bytes = recipe.fill_bytes(sizes.bundle_bytes());
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
        let matrices = model.spec().moe(layer).map_or(&MATRICES[..], |moe| moe.matrices());
        let nothing = |&part: &Part| PartSizes { part, codec: String::new(), weights: 0, bytes: 0 };
        sizes.parts = matrices.iter().map(nothing).collect();
        for expert in 0..n_experts {
            let (mut source, mut coded, mut record) = (0, 0, 0_u64);
            for (stored, codec) in coded_parts(model, choices, layer, expert)? {
                source += plane_bytes(&stored.codec.planes(stored.rows, stored.cols)?)?;
                let planes = match codec.planes(stored.rows, stored.cols) {
                    Ok(planes) => planes,
                    Err(e) => {
                        impossible.push(e.in_tensor(matrix_name(layer, expert, stored.part)));
                        continue;
                    }
                };
                self.coding_bytes_max =
                    self.coding_bytes_max.max(codec.coding_bytes(stored.rows, stored.cols));
                sizes.n_planes += planes.len();
                record = record_end(record, &planes)?;
                let bytes = plane_bytes(&planes)?;
                coded += bytes;
                sizes.add(stored.part, &codec.name(), (stored.rows * stored.cols) as u64, bytes);
            }
            sizes.source_bytes += source;
            sizes.payload_bytes += coded;
            let record = record.next_multiple_of(align);
            sizes.record_bytes += record;
            sizes.record_bytes_max = sizes.record_bytes_max.max(record);
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

    /// Bits of the routed experts' planes for each of their weights; 0 where there are none.
    pub fn bits_each(&self) -> f64 {
        crate::engine::writer::bits_each(self.payload_bytes(), self.expert_weights())
    }

    /// Bytes of all records with their padding.
    pub fn record_bytes(&self) -> u64 {
        self.layers.iter().map(|l| l.record_bytes).sum()
    }

    /// Bytes of the bundle, the manifest too. What codecs write at most counts, and the widest manifest.
    pub fn bundle_bytes(&self) -> u64 {
        let banks: u64 = self.layers.iter().map(|l| l.bank_bytes(self.align)).sum();
        banks + self.trunk_files.iter().sum::<u64>() + self.side_bytes + self.manifest_bytes + self.fill_bytes
    }

    /// Bytes of the largest file of the bundle.
    pub fn largest_file_bytes(&self) -> u64 {
        let banks = self.layers.iter().map(|l| l.bank_bytes(self.align));
        banks.chain(self.trunk_files.iter().copied()).max().unwrap_or(0)
    }
}

/// Whether matrices are coded by Hessians: those of a text, by a solver that works with them.
fn has_hessians(recipe: &Recipe, calibrated: Option<CalibrationSize>) -> Result<bool> {
    Ok(calibrated.is_some_and(|c| c.by_text) && solver(&recipe.solver)?.needs_hessian())
}

/// How an expert is stored, and by which codec each of its parts will be.
///
/// # Errors
/// No such expert; a matrix that the recipe does not know.
pub fn coded_parts(
    model: &Model,
    choices: &Choices,
    layer: usize,
    expert: usize,
) -> Result<Vec<(StoredPart, CodecRef)>> {
    let with_codec = |stored: StoredPart| {
        let codec = match choices.of_part(layer, expert, stored.part)? {
            Choice::Codec(codec) => codec.clone(),
            Choice::Native => stored.codec.clone(),
        };
        Ok((stored, codec))
    };
    model.expert_parts(layer, expert)?.into_iter().map(with_codec).collect()
}

/// Where a record ends that ended at `end` before these planes were appended.
///
/// # Errors
/// A plane beyond 64 bits.
pub fn record_end(end: u64, planes: &[PlaneSpec]) -> Result<u64> {
    planes.iter().try_fold(end, |end, plane| Ok(end.next_multiple_of(TENSOR_ALIGN) + plane.bytes()?))
}

impl LayerSizes {
    fn bank_bytes(&self, align: u64) -> u64 {
        let header = 8 + TABLE_HEADER_BYTES + self.n_planes as u64 * PLANE_HEADER_BYTES;
        let index = (self.n_experts * ROW_BYTES) as u64;
        header.next_multiple_of(align) + index.next_multiple_of(align) + self.record_bytes
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
