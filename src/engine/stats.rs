//! Stats: what calibration learnt about the inputs of each expert, and the file that keeps it.
//!
//! The file is a safetensors file that stock readers open. `about` is JSON; for each MoE layer L there are
//! `layers.L.tokens` (I64, `[n_experts]`), `layers.L.input` (F32, `[n_experts, hidden]`, mean squares of what goes into
//! gate and up) and `layers.L.inner` (F32, `[n_experts, inter]`, of what goes into down). Means are over the tokens routed
//! to the expert, each weighted with its squared routing weight, by which the expert's error reaches the output.
//! `layers.L.input_plain` and `layers.L.inner_plain` are the same means without weights, as llama.cpp takes them.
//!
//! [`Stats`] is what a run is given: such a file, or an importance matrix of llama.cpp.

use std::path::Path;

use moepack_convert::Model;
use moepack_convert::spec::Part;
use moepack_format::trunk::TrunkWriter;
use moepack_format::{Context, Dtype, Error, Header, InputFile, PlaneSpec, Result};
use moepack_quant::stats::ColumnStats;
use moepack_verify::tokens::Windows;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::engine::calibration::Observed;

mod export;
mod given;
mod importance;

pub use export::{Exported, export_imatrix};
pub use given::Stats;

/// What an expert's inputs were like.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertStats {
    /// Inputs of gate and up.
    pub input: ColumnStats,
    /// Inputs of down.
    pub inner: ColumnStats,
}

impl ExpertStats {
    /// The stats of the inputs of one matrix.
    pub fn of(&self, part: Part) -> &ColumnStats {
        if part == Part::Down { &self.inner } else { &self.input }
    }
}

/// What a stats file says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// `moepack.stats/1`
    pub schema: String,
    /// Family of the model.
    pub family: String,
    /// SHA-256 of the model's config.json, so that stats of another model are noticed.
    pub config_sha256: String,
    /// Tokens of the calibration text.
    pub n_tokens: u64,
    /// [`tokens_sha256`] of the calibration text.
    pub tokens_sha256: String,
    /// Tokens of the longest window of it; earlier versions did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_tokens: Option<u64>,
}

/// The schema this code reads and writes.
pub const SCHEMA: &str = "moepack.stats/1";
const ABOUT: &str = "about";
const INPUT_PLAIN: &str = "input_plain";
const INNER_PLAIN: &str = "inner_plain";

/// SHA-256 of a model's config.json.
///
/// # Errors
/// The file cannot be read.
pub fn config_sha256(model: &Model) -> Result<String> {
    InputFile::open(&model.root().join("config.json"))?.sha256(&|| false)
}

/// SHA-256 of window lengths and token ids.
pub fn tokens_sha256(windows: &Windows) -> String {
    let mut hash = Sha256::new();
    windows.lens.iter().for_each(|&l| hash.update((l as u64).to_le_bytes()));
    windows.tokens.iter().for_each(|t| hash.update(t.to_le_bytes()));
    moepack_format::file::hex(&hash.finalize())
}

/// A stats file being written: layers come in order.
#[derive(Debug)]
pub struct StatsWriter {
    writer: TrunkWriter,
    dims: Vec<(usize, Dims)>,
}

/// What a stats file has of a layer: counts, then the means of each side, weighted and plain.
pub fn layer_bytes(experts: &[Observed]) -> Vec<u8> {
    let counts = experts.iter().flat_map(|e| (e.weighted.input.n_tokens as i64).to_le_bytes());
    let mut bytes: Vec<u8> = counts.collect();
    let sides: [fn(&Observed) -> &ColumnStats; 4] =
        [|e| &e.weighted.input, |e| &e.weighted.inner, |e| &e.plain.input, |e| &e.plain.inner];
    for side in sides {
        bytes.extend(experts.iter().flat_map(|e| &side(e).second_moment).flat_map(|m| m.to_le_bytes()));
    }
    bytes
}

impl StatsWriter {
    /// Starts the stats file of a model.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path, model: &Model, about: &About) -> Result<StatsWriter> {
        let about = serde_json::to_vec(about).map_err(|e| Error::bad_data(e.to_string()))?;
        let mut specs = vec![PlaneSpec::new(ABOUT, Dtype::U8, &[about.len() as u64])];
        for (layer, dims) in dims(model) {
            specs.extend(dims.specs(layer));
            specs.extend(dims.plain_specs(layer));
        }
        let mut writer = TrunkWriter::create(path, &specs)?;
        writer.write(ABOUT, &about)?;
        Ok(StatsWriter { writer, dims: dims(model).collect() })
    }

    /// Appends a layer: bytes that [`layer_bytes`] made.
    ///
    /// # Errors
    /// Other bytes than the layer has, or a failed write.
    pub fn write(&mut self, layer: usize, mut bytes: &[u8]) -> Result<()> {
        let Some((_, dims)) = self.dims.iter().find(|(l, _)| *l == layer) else {
            return Err(Error::bad_data(format!("layer {layer} has no routed experts")));
        };
        for spec in dims.specs(layer).into_iter().chain(dims.plain_specs(layer)) {
            let n = usize::try_from(spec.bytes()?).unwrap_or(usize::MAX);
            let (tensor, rest) = bytes.split_at_checked(n).ok_or_else(|| {
                Error::bad_data(format!("{} bytes, expected {n}", bytes.len())).in_tensor(&spec.name)
            })?;
            self.writer.write(&spec.name, tensor)?;
            bytes = rest;
        }
        match bytes.len() {
            0 => Ok(()),
            n => Err(Error::bad_data(format!("{n} bytes more than layer {layer} has"))),
        }
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// A layer is missing, or a failed write.
    pub fn finish(self) -> Result<()> {
        self.writer.finish().map(|_| ())
    }
}

/// An opened stats file, whose layers are read when they are asked for.
#[derive(Debug)]
pub struct StatsFile {
    file: InputFile,
    header: Header,
    about: About,
    sha256: String,
}

impl StatsFile {
    /// Opens a stats file and compares it with the model it is to be used for.
    ///
    /// # Errors
    /// No such file, no stats file, or stats of another model.
    pub fn open(path: &Path, model: &Model, config_sha256: &str) -> Result<StatsFile> {
        let file = StatsFile::open_alone(path)?;
        if file.about.config_sha256 != config_sha256 {
            return Err(Error::bad_data("stats of another model: its config.json had another sha256")
                .in_file(path)
                .hint(format!("they are of a {} model; calibrate this one", file.about.family)));
        }
        for (layer, dims) in dims(model) {
            dims.specs(layer).iter().try_for_each(|spec| file.check(spec))?;
        }
        Ok(file)
    }

    /// Opens a stats file of any model.
    ///
    /// # Errors
    /// No such file, or no stats file.
    pub fn open_alone(path: &Path) -> Result<StatsFile> {
        let file = InputFile::open(path)?;
        let header = Header::read(&file)?;
        let about = read_about(&file, &header).in_file(path)?;
        let sha256 = file.sha256(&|| false)?;
        Ok(StatsFile { file, header, about, sha256 })
    }

    /// Refuses a tensor that is not there, or is another.
    fn check(&self, spec: &PlaneSpec) -> Result<()> {
        let found = self.header.get(&spec.name);
        match found.filter(|t| t.dtype == spec.dtype && t.shape[..] == spec.shape[..]) {
            Some(_) => Ok(()),
            None => {
                let what = format!("expected {} of shape {:?}", spec.dtype.name(), spec.shape);
                Err(Error::bad_data(what).in_file(self.file.path()).in_tensor(&spec.name))
            }
        }
    }

    /// What the file says about itself.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// SHA-256 of the file.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The stats of every expert of a layer.
    ///
    /// # Errors
    /// A failed read; counts or means that are impossible.
    pub fn layer(&self, model: &Model, layer: usize) -> Result<Vec<ExpertStats>> {
        let Some((_, dims)) = dims(model).find(|(l, _)| *l == layer) else { return Ok(Vec::new()) };
        let counts = self.counts(layer)?;
        let input = self.bytes(&name(layer, "input"))?;
        let inner = self.bytes(&name(layer, "inner"))?;
        let rows = input.chunks_exact(4 * dims.hidden).zip(inner.chunks_exact(4 * dims.inter));
        let stats = |(n, (input, inner))| {
            Ok(ExpertStats { input: column_stats(n, input)?, inner: column_stats(n, inner)? })
        };
        let experts = counts.into_iter().zip(rows).map(stats).collect::<Result<_>>();
        experts.map_err(|e| e.in_file(self.file.path()).in_tensor(format!("layers.{layer}")))
    }

    /// Tokens that each expert of a layer saw.
    fn counts(&self, layer: usize) -> Result<Vec<u64>> {
        let tokens = self.bytes(&name(layer, "tokens"))?;
        let count = |(e, bytes): (usize, &[u8; 8])| {
            let n = u64::try_from(i64::from_le_bytes(*bytes));
            n.map_err(|_| Error::bad_data(format!("expert {e} has a negative token count")))
        };
        let counts = tokens.as_chunks::<8>().0.iter().enumerate().map(count).collect::<Result<_>>();
        counts.map_err(|e: Error| e.in_file(self.file.path()).in_tensor(name(layer, "tokens")))
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let tensor = self.header.get(name).ok_or_else(|| Error::bad_data("not there").in_tensor(name))?;
        let mut bytes = vec![0; usize::try_from(tensor.end - tensor.start).unwrap_or(0)];
        self.file.read_exact_at(tensor.start, &mut bytes)?;
        Ok(bytes)
    }
}

fn read_about(file: &InputFile, header: &Header) -> Result<About> {
    const ABOUT_BYTES_MAX: u64 = 1 << 16;
    let no = |what: &str| Error::bad_data(format!("not a stats file: {what}"));
    let tensor = header.get(ABOUT).ok_or_else(|| no("it has no tensor `about`"))?;
    let len = tensor.end - tensor.start;
    if len > ABOUT_BYTES_MAX {
        return Err(no("`about` is too long"));
    }
    let mut json = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(tensor.start, &mut json)?;
    let about: About = serde_json::from_slice(&json).map_err(|e| no(&e.to_string()))?;
    if about.schema != SCHEMA {
        return Err(no(&format!("schema {:?}, this program reads {SCHEMA:?}", about.schema)));
    }
    Ok(about)
}

/// Means from little-endian f32, through the checks of `quant`.
fn column_stats(n_tokens: u64, means: &[u8]) -> Result<ColumnStats> {
    let cols = (means.len() / 4) as u64;
    let mut bytes = [n_tokens.to_le_bytes(), cols.to_le_bytes()].concat();
    bytes.extend_from_slice(means);
    ColumnStats::from_bytes(&bytes)
}

#[derive(Clone, Copy, Debug)]
struct Dims {
    n_experts: usize,
    hidden: usize,
    inter: usize,
}

impl Dims {
    fn specs(&self, layer: usize) -> [PlaneSpec; 3] {
        let (n, hidden, inter) = (self.n_experts as u64, self.hidden as u64, self.inter as u64);
        [
            PlaneSpec::new(&name(layer, "tokens"), Dtype::I64, &[n]),
            PlaneSpec::new(&name(layer, "input"), Dtype::F32, &[n, hidden]),
            PlaneSpec::new(&name(layer, "inner"), Dtype::F32, &[n, inter]),
        ]
    }

    fn plain_specs(&self, layer: usize) -> [PlaneSpec; 2] {
        let (n, hidden, inter) = (self.n_experts as u64, self.hidden as u64, self.inter as u64);
        [
            PlaneSpec::new(&name(layer, INPUT_PLAIN), Dtype::F32, &[n, hidden]),
            PlaneSpec::new(&name(layer, INNER_PLAIN), Dtype::F32, &[n, inter]),
        ]
    }
}

fn dims(model: &Model) -> impl Iterator<Item = (usize, Dims)> {
    let hidden = model.spec().hidden;
    let layers = model.spec().moe_layers();
    layers.map(move |(l, moe)| {
        (l, Dims { n_experts: moe.n_experts, hidden: moe.width(hidden), inter: moe.inter })
    })
}

fn name(layer: usize, what: &str) -> String {
    format!("layers.{layer}.{what}")
}
