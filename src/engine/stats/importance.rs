//! An importance matrix of llama.cpp as stats of a model's experts.
//!
//! llama.cpp counts every token alike, where stats weigh it with its squared routing weight; both say which columns are
//! large. Gate and up have the same inputs, and so one entry is enough: gate's, else up's, else that of both in one tensor.

use std::path::Path;

use moepack_convert::Model;
use moepack_convert::imatrix::{CHUNK_TOKENS, Form, Imatrix};
use moepack_format::{Error, Result};
use moepack_quant::stats::ColumnStats;
use serde_json::{Value, json};

use super::{Dims, ExpertStats, dims};

/// Names of tensors whose inputs are those of gate and up, and of down.
const INPUT: &[&str] = &["ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"];
const INNER: &[&str] = &["ffn_down_exps"];

/// An opened imatrix that fits a model.
#[derive(Debug)]
pub(super) struct Importance {
    imatrix: Imatrix,
    sha256: String,
    warnings: Vec<String>,
}

/// The name of an entry.
pub(super) fn entry_name(layer: usize, tensor: &str) -> String {
    format!("blk.{layer}.{tensor}.weight")
}

impl Importance {
    /// Opens an imatrix and compares its entries with the model's experts.
    ///
    /// # Errors
    /// No imatrix; entries of other sizes, of layers that have no experts, or of none of the model's experts.
    pub(super) fn open(path: &Path, model: &Model) -> Result<Importance> {
        let imatrix = Imatrix::open(path)?;
        let mut absent = Vec::new();
        let mut found = 0;
        for (layer, dims) in dims(model) {
            for (tensors, cols) in [(INPUT, dims.hidden), (INNER, dims.inter)] {
                let present = present(&imatrix, layer, tensors);
                present.iter().try_for_each(|name| imatrix.check(name, dims.n_experts, cols))?;
                if present.is_empty() {
                    absent.push(entry_name(layer, tensors.first().copied().unwrap_or_default()));
                }
                found += usize::from(!present.is_empty());
            }
        }
        refuse_foreign(&imatrix, model, found)?;
        let warnings = match &absent[..] {
            [] => Vec::new(),
            [first, ..] => vec![format!(
                "the imatrix has nothing for {} of {} tensors of experts, such as {first}; they are rounded plainly",
                absent.len(),
                absent.len() + found
            )],
        };
        let sha256 = imatrix.file().sha256(&|| false)?;
        Ok(Importance { imatrix, sha256, warnings })
    }

    pub(super) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    pub(super) fn n_tokens(&self) -> u64 {
        let about = self.imatrix.about();
        about.n_chunks.saturating_mul(about.chunk_tokens.unwrap_or(CHUNK_TOKENS))
    }

    pub(super) fn provenance(&self) -> Value {
        let known = self.imatrix.about().chunk_tokens.map(|_| self.n_tokens());
        let form = if self.imatrix.form() == Form::Gguf { "gguf" } else { "dat" };
        json!({"imatrix_sha256": self.sha256, "form": form, "chunks": self.imatrix.about().n_chunks, "tokens": known})
    }

    pub(super) fn layer(&self, model: &Model, layer: usize) -> Result<Vec<ExpertStats>> {
        let Some((_, dims)) = dims(model).find(|(l, _)| *l == layer) else { return Ok(Vec::new()) };
        let input = self.columns(layer, INPUT, &dims, dims.hidden)?;
        let inner = self.columns(layer, INNER, &dims, dims.inter)?;
        Ok(input.into_iter().zip(inner).map(|(input, inner)| ExpertStats { input, inner }).collect())
    }

    /// All that is there is looked at, the first is taken. What is not there was seen by nobody.
    fn columns(&self, layer: usize, tensors: &[&str], dims: &Dims, cols: usize) -> Result<Vec<ColumnStats>> {
        let mut taken = None;
        for name in present(&self.imatrix, layer, tensors) {
            let columns = self.imatrix.columns(&name, dims.n_experts, cols)?;
            taken.get_or_insert(columns);
        }
        let unseen = || vec![ColumnStats { n_tokens: 0, second_moment: vec![0.0; cols] }; dims.n_experts];
        Ok(taken.unwrap_or_else(unseen))
    }
}

fn present(imatrix: &Imatrix, layer: usize, tensors: &[&str]) -> Vec<String> {
    tensors.iter().map(|t| entry_name(layer, t)).filter(|name| imatrix.has(name)).collect()
}

/// An imatrix that is of another model by its names: none of the model's, or experts in a layer that has none.
fn refuse_foreign(imatrix: &Imatrix, model: &Model, found: usize) -> Result<()> {
    let refuse = |what: String| Error::bad_data(what).in_file(imatrix.file().path());
    if found == 0 {
        let what = "the imatrix has no entry of any expert of the model".to_owned();
        return Err(refuse(what)
            .hint("make one from a GGUF of this very model, with its experts in one tensor a layer"));
    }
    let dense = |l: &usize| model.spec().layers.get(*l).is_some_and(|layer| layer.mlp.moe().is_none());
    for name in imatrix.names() {
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let of_experts = layer.filter(|(_, tensor)| tensor.ends_with("_exps.weight"));
        if let Some(l) = of_experts.and_then(|(l, _)| l.parse().ok()).filter(dense) {
            let what = format!("an entry of experts, but layer {l} of the model has none");
            return Err(refuse(what).in_tensor(name).hint("the imatrix is of another model"));
        }
    }
    Ok(())
}
