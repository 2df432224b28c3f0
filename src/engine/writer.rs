//! Writing the files of a bundle: banks, side files, manifest. The trunk is written by `trunk/write.rs`.

use std::collections::BTreeMap;
use std::path::Path;

use moepack_convert::Model;
use moepack_format::bank::{BankSummary, BankWriter, PartBytes, PartSpec, bank_name};
use moepack_format::manifest::{
    BLOCK_BYTES, BUNDLE_FORMAT, FORMAT_VERSION, FileEntry, LayerEntry, LeftOut, Manifest, PartCodecs,
    PerExpert, ProjectionEntry, Provenance, Tool, Totals, TrunkEntry, four_digits,
};
use moepack_format::trunk::FileSummary;
use moepack_format::{Context, Error, InputFile, Result, atomic};

use moepack_verify::drift::SquareSums;

use crate::engine::coder::{Coded, MatrixNote};
use crate::engine::evidence::Source;
use crate::recipe::Recipe;

/// The solver that codes what another codes worse.
const FALLBACK: &str = "rtn";

/// A bank being written, or a part of one, with what the manifest wants to know of it.
#[derive(Debug)]
pub struct BankSink {
    writer: BankWriter,
    facts: Vec<ExpertFacts>,
}

/// What the manifest wants to know of an expert.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ExpertFacts {
    /// Name and codec of each part.
    codecs: Vec<(String, String)>,
    /// What coding lost.
    sums: SquareSums,
    /// How its matrices were coded.
    notes: Vec<MatrixNote>,
}

/// What it wants to know of consecutive experts of a layer.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct BankFacts {
    /// In order.
    pub experts: Vec<ExpertFacts>,
    /// How many calibration tokens each saw.
    pub usage: Option<Vec<u64>>,
}

impl BankFacts {
    /// Adds those of the experts behind these.
    pub fn append(&mut self, later: BankFacts) {
        self.usage = match (self.usage.take(), later.usage) {
            (Some(mut usage), Some(more)) => {
                usage.extend(more);
                Some(usage)
            }
            (None, more) if self.experts.is_empty() => more,
            _ => None,
        };
        self.experts.extend(later.experts);
    }
}

/// A bank's file and its experts.
pub type Written = (BankSummary, BankFacts);

impl BankSink {
    /// Starts a file of `n_experts` experts of a layer.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(
        path: &Path,
        layer: usize,
        n_experts: usize,
        align: u64,
        n_planes: usize,
    ) -> Result<BankSink> {
        let too_many =
            |_| Error::bad_data(format!("layer {layer} with {n_experts} experts does not fit a bank"));
        let (layer, n) =
            (u32::try_from(layer).map_err(too_many)?, u32::try_from(n_experts).map_err(too_many)?);
        let writer = BankWriter::create(path, layer, n, align, n_planes)?;
        Ok(BankSink { writer, facts: Vec::new() })
    }

    /// Appends an expert; experts come in order.
    ///
    /// # Errors
    /// A failed write.
    pub fn write(&mut self, coded: &Coded) -> Result<()> {
        let mut parts = Vec::with_capacity(coded.expert.parts.len());
        for part in &coded.expert.parts {
            let specs = part.codec.planes_of(part.rows, part.cols, &part.planes)?;
            let planes = specs.into_iter().zip(part.planes.iter().map(Vec::as_slice)).collect();
            let (name, codec) = (part.part.name().to_owned(), part.codec.name());
            let spec = PartSpec { name, codec, rows: part.rows as u64, cols: part.cols as u64 };
            parts.push(PartBytes { spec, planes });
        }
        let codecs = parts.iter().map(|p| (p.spec.name.clone(), p.spec.codec.clone())).collect();
        self.append(&parts, ExpertFacts { codecs, sums: coded.sums, notes: coded.notes.clone() })
    }

    /// Gives the bank its name, if it is as it is known to have been.
    ///
    /// # Errors
    /// Another SHA-256, a failed write.
    pub fn finish_as(self, sha256: &str) -> Result<()> {
        self.writer.finish_as(Some(sha256)).map(drop)
    }

    /// Appends an expert whose planes are known.
    ///
    /// # Errors
    /// A failed write.
    pub fn append(&mut self, parts: &[PartBytes<'_>], facts: ExpertFacts) -> Result<()> {
        self.writer.write_expert(u32::try_from(self.facts.len()).unwrap_or(u32::MAX), parts)?;
        self.facts.push(facts);
        Ok(())
    }

    /// Gives the file its name. `usage` is how many calibration tokens each expert saw.
    ///
    /// # Errors
    /// A failed write.
    pub fn finish(self, usage: Option<Vec<u64>>) -> Result<Written> {
        Ok((self.writer.finish()?, BankFacts { experts: self.facts, usage }))
    }
}

impl LayerNote {
    /// What is known of a whole bank.
    pub fn of(layer: usize, (summary, facts): Written) -> LayerNote {
        let mut sums = SquareSums::default();
        let (mut codecs, mut notes) = (BTreeMap::<_, Vec<_>>::new(), BTreeMap::<String, Vec<_>>::new());
        for expert in facts.experts {
            sums.add(&expert.sums);
            expert.codecs.into_iter().for_each(|(part, codec)| codecs.entry(part).or_default().push(codec));
            let named = expert.notes.into_iter().map(|note| (note.part.name().to_owned(), note));
            named.for_each(|(part, note)| notes.entry(part).or_default().push(note));
        }
        let entry = LayerEntry {
            layer: u32::try_from(layer).unwrap_or(u32::MAX),
            bank: summary.file.clone(),
            n_experts: summary.n_experts,
            record_stride: summary.stride,
            max_record_bytes: summary.max_record_bytes,
            payload_bytes: summary.payload_bytes,
            padding_bytes: summary.padding_bytes,
            usage: facts.usage,
            codecs: codecs.into_iter().map(|(part, each)| (part, PartCodecs::folded(each))).collect(),
            error: (sums.reference > 0.0).then(|| sums.relative()),
            header_crc32c: summary.header_crc32c.clone(),
            experts: notes.into_iter().map(|(part, notes)| (part, projection(&notes))).collect(),
        };
        LayerNote { summary, entry }
    }
}

/// The name of a layer's bank.
pub fn bank_file(layer: usize) -> String {
    bank_name(u32::try_from(layer).unwrap_or(u32::MAX))
}

/// What the manifest says of a projection: a column for each figure, short enough for models of many experts.
fn projection(notes: &[MatrixNote]) -> ProjectionEntry {
    let error = |of: fn(&MatrixNote) -> Option<f64>| notes.iter().map(|n| of(n).map(four_digits)).collect();
    let name = |of: fn(&MatrixNote) -> Option<&'static str>| {
        PerExpert::folded(notes.iter().map(|n| of(n).map(str::to_owned)).collect())
    };
    ProjectionEntry {
        bits: PerExpert::folded(notes.iter().map(|n| four_digits(n.bits)).collect()),
        hessian_source: name(|n| n.hessian_source.map(Source::name)),
        heldout_error: PerExpert::folded(error(|n| n.heldout_error)),
        heldout_error_rtn: PerExpert::folded(error(|n| n.heldout_error_rtn)),
        fallback: name(|n| n.fell_back.then_some(FALLBACK)),
    }
}

/// What is known of a finished bank.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LayerNote {
    /// The file.
    pub summary: BankSummary,
    /// Its line in the manifest.
    pub entry: LayerEntry,
}

/// The name of a layer's note.
pub fn layer_note(layer: usize) -> String {
    format!("experts-{layer:05}")
}

/// Copies the side files to `dir`; gives their entries.
///
/// # Errors
/// What cannot be read or written.
pub fn write_side_files(model: &Model, dir: &Path, notes: &mut Vec<String>) -> Result<Vec<FileEntry>> {
    let mut entries = Vec::new();
    for side in model.side_files(notes)? {
        let target = dir.join(&side.name);
        let mut bytes = vec![0; usize::try_from(side.bytes).unwrap_or(0)];
        InputFile::open(&side.path)?.read_exact_at(0, &mut bytes)?;
        atomic::write_file(&target, &bytes)?;
        let sha256 = InputFile::open(&target)?.sha256(&|| false).in_file(&target)?;
        entries.push(FileEntry { path: side.name, bytes: side.bytes, sha256 });
    }
    Ok(entries)
}

/// Everything the manifest is made of.
#[derive(Debug)]
pub struct Pieces {
    /// Trunk files in order.
    pub trunk: Vec<FileSummary>,
    /// Codec of each trunk matrix that is coded.
    pub trunk_codecs: BTreeMap<String, String>,
    /// Relative squared error of each, where calibration decided how it was coded.
    pub trunk_errors: BTreeMap<String, f64>,
    /// What is left out because of that.
    pub left_out: Vec<LeftOut>,
    /// Banks in order of layers.
    pub layers: Vec<LayerNote>,
    /// Side files.
    pub side: Vec<FileEntry>,
    /// Source files with their hashes.
    pub sources: Vec<FileEntry>,
    /// The recipe and what else decided the bytes.
    pub recipe: serde_json::Value,
    /// Alignment of records.
    pub align: u64,
}

/// The manifest of a bundle made from `model`.
pub fn manifest(model: &Model, pieces: Pieces) -> Manifest {
    let file = |path: &str, bytes, sha256: &str| FileEntry {
        path: path.to_owned(),
        bytes,
        sha256: sha256.to_owned(),
    };
    let mut files = pieces.side;
    files.extend(pieces.trunk.iter().map(|t| file(&t.file, t.bytes, &t.sha256)));
    files.extend(pieces.layers.iter().map(|l| file(&l.summary.file, l.summary.bytes, &l.summary.sha256)));
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let mut sources = pieces.sources;
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    let left_out = model.catalog().left_out.iter();
    let layers: Vec<LayerEntry> = pieces.layers.into_iter().map(|l| l.entry).collect();
    let trunk: Vec<_> = pieces.trunk.iter().map(trunk_entry).collect();
    let (expert_weights, trunk_weights) = (model.spec().expert_weights(), model.trunk_weights());
    Manifest {
        format: BUNDLE_FORMAT.to_owned(),
        format_version: FORMAT_VERSION,
        features_required: Vec::new(),
        features_optional: Vec::new(),
        tool: Tool { name: "moepack".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() },
        align: pieces.align,
        family: model.spec().family.to_owned(),
        provenance: Provenance { sources, expert_tensors: model.expert_tensors() },
        recipe: pieces.recipe,
        totals: Totals::sum(&files, &layers, &trunk, expert_weights, trunk_weights),
        files,
        layers,
        trunk,
        trunk_codecs: pieces.trunk_codecs,
        trunk_errors: pieces.trunk_errors,
        left_out: left_out
            .map(|(name, reason)| LeftOut { name: name.clone(), reason: reason.clone() })
            .chain(pieces.left_out)
            .collect(),
        crc32c: String::new(),
        sha256: String::new(),
    }
}

fn trunk_entry(file: &FileSummary) -> TrunkEntry {
    let FileSummary { file, header_crc32c, crc32c, .. } = file.clone();
    TrunkEntry { file, header_crc32c, crc32c }
}

/// Fills the manifest up with spaces until the bundle takes what its recipe was made for.
///
/// # Errors
/// A manifest that cannot be written.
pub fn fill_up(manifest: &mut Manifest, recipe: &Recipe) -> Result<()> {
    let bytes = manifest.totals.bundle_bytes.saturating_add(manifest.to_text()?.len() as u64);
    let fill = usize::try_from(recipe.fill_bytes(bytes)).unwrap_or(0);
    // The manifest's own checksums grow with it.
    let fill = fill.checked_sub(FILL_KEY_BYTES + 8 * (fill / BLOCK_BYTES + 1));
    if let (Some(spaces), Some(kept)) = (fill, manifest.recipe.as_object_mut()) {
        kept.insert("fill".to_owned(), " ".repeat(spaces).into());
    }
    Ok(())
}

/// What the key takes beside the spaces: a comma, a line break, the name and quotes.
const FILL_KEY_BYTES: usize = ",\n    \"fill\": \"\"".len();

/// Bits for each of `weights`; 0 where there are none.
pub fn bits_each(bytes: u64, weights: u64) -> f64 {
    if weights == 0 { 0.0 } else { bytes as f64 * 8.0 / weights as f64 }
}
