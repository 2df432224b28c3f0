//! The stats that a run is given: a file of `calibrate`, or an importance matrix of llama.cpp.

use std::path::Path;

use moepack_convert::Model;
use moepack_convert::imatrix::Imatrix;
use moepack_format::{InputFile, Result};
use serde_json::{Value, json};

use super::importance::Importance;
use super::{ExpertStats, StatsFile, config_sha256};

/// Stats of the inputs of a model's experts.
#[derive(Debug)]
pub struct Stats(Source);

#[derive(Debug)]
enum Source {
    Own(StatsFile),
    Imatrix(Importance),
}

impl Stats {
    /// Opens either and compares it with the model it is to be used for.
    ///
    /// # Errors
    /// No such file, neither of both, or of another model.
    pub fn open(path: &Path, model: &Model) -> Result<Stats> {
        let is_own = InputFile::open(path).is_ok_and(|file| begins_as_safetensors(&file));
        let source = match !is_own && Imatrix::looks_like(path) {
            true => Source::Imatrix(Importance::open(path, model)?),
            false => Source::Own(StatsFile::open(path, model, &config_sha256(model)?)?),
        };
        Ok(Stats(source))
    }

    /// What is odd about it.
    pub fn warnings(&self) -> &[String] {
        match &self.0 {
            Source::Own(_) => &[],
            Source::Imatrix(imatrix) => imatrix.warnings(),
        }
    }

    /// Tokens of the calibration text; of an imatrix that does not say, those of its chunks as llama.cpp usually takes them.
    pub fn n_tokens(&self) -> u64 {
        match &self.0 {
            Source::Own(file) => file.about().n_tokens,
            Source::Imatrix(imatrix) => imatrix.n_tokens(),
        }
    }

    /// What the manifest says of it.
    pub fn provenance(&self) -> Value {
        match &self.0 {
            Source::Own(file) => json!({"stats_sha256": file.sha256(), "tokens": file.about().n_tokens}),
            Source::Imatrix(imatrix) => imatrix.provenance(),
        }
    }

    /// The stats of every expert of a layer.
    ///
    /// # Errors
    /// A failed read; counts or means that are impossible.
    pub fn layer(&self, model: &Model, layer: usize) -> Result<Vec<ExpertStats>> {
        match &self.0 {
            Source::Own(file) => file.layer(model, layer),
            Source::Imatrix(imatrix) => imatrix.layer(model, layer),
        }
    }
}

/// A stats file has a JSON object behind eight bytes of its length; a `.dat` has there what nobody calls a tensor.
fn begins_as_safetensors(file: &InputFile) -> bool {
    let mut head = [0; 9];
    file.read_exact_at(0, &mut head).is_ok() && head[8] == b'{'
}
