//! Architectures of llama.cpp that models are exported to: the keys and names of each, and what its graph lacks.
//!
//! A new one is a file in `arch/` with one constant, and a line in [`ARCHES`]. Its name is the family's,
//! [`crate::Family::gguf`]. Sources: llama.cpp, `src/models/*.cpp`, `src/llama-arch.cpp` and `conversion/*.py`, b10605 of
//! August 2026; run with b11549 of October 2026.

use moepack_format::{Error, Result};

use super::Value;
use crate::model::Model;
use crate::spec::{LayerSpec, ModelSpec, Role};

mod common;
mod deepseek2;
mod deepseek4;
mod gpt_oss;
mod keys;
mod llama;
mod qwen;

use keys::Keys;

/// Families that are exported.
pub const ARCHES: &[&Arch] = &[
    &deepseek2::V2,
    &deepseek2::V3,
    &deepseek4::ARCH,
    &gpt_oss::ARCH,
    &llama::MIXTRAL,
    &qwen::OLMOE,
    &qwen::QWEN2_MOE,
    &qwen::QWEN3_MOE,
];

/// How a family becomes an architecture of llama.cpp.
#[derive(Debug)]
pub struct Arch {
    /// `model_type` of the family.
    pub family: &'static str,
    /// Names of trunk tensors that are not those of [`NAMES`].
    names: &'static [Name],
    /// Whether its graph computes what a layer computes.
    fits: fn(&ModelSpec, &LayerSpec) -> bool,
    /// What else is in the way of a model.
    refuses: fn(&Model) -> Option<String>,
    /// Its own keys, behind those that all have.
    keys: fn(&Model, &mut Keys<'_>) -> Result<()>,
}

/// The tensor that a role becomes, in a layer after `blk.N.`, and how its rows are arranged.
pub type Name = (Role, &'static str, Move);

/// How the rows of a trunk matrix lie in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// As here.
    Same,
    /// In each head, dimensions that rotate together side by side, not half a head apart.
    Interleaved,
    /// Of MLA's `kv_b`, what makes keys: a matrix a head, transposed, so that queries pass through it.
    KeysOfHeads,
    /// Of MLA's `kv_b`, what makes values: a matrix a head.
    ValuesOfHeads,
}

/// Names that most architectures have.
const NAMES: &[Name] = &[
    (Role::Embed, "token_embd.weight", Move::Same),
    (Role::FinalNorm, "output_norm.weight", Move::Same),
    (Role::LmHead, "output.weight", Move::Same),
    (Role::AttnNorm, "attn_norm.weight", Move::Same),
    (Role::Q, "attn_q.weight", Move::Same),
    (Role::K, "attn_k.weight", Move::Same),
    (Role::V, "attn_v.weight", Move::Same),
    (Role::O, "attn_output.weight", Move::Same),
    (Role::QBias, "attn_q.bias", Move::Same),
    (Role::KBias, "attn_k.bias", Move::Same),
    (Role::VBias, "attn_v.bias", Move::Same),
    (Role::OBias, "attn_output.bias", Move::Same),
    (Role::QNorm, "attn_q_norm.weight", Move::Same),
    (Role::KNorm, "attn_k_norm.weight", Move::Same),
    (Role::Sinks, "attn_sinks.weight", Move::Same),
    (Role::QA, "attn_q_a.weight", Move::Same),
    (Role::QANorm, "attn_q_a_norm.weight", Move::Same),
    (Role::QB, "attn_q_b.weight", Move::Same),
    (Role::KvA, "attn_kv_a_mqa.weight", Move::Same),
    (Role::KvANorm, "attn_kv_a_norm.weight", Move::Same),
    (Role::KvB, "attn_k_b.weight", Move::KeysOfHeads),
    (Role::KvB, "attn_v_b.weight", Move::ValuesOfHeads),
    (Role::MlpNorm, "ffn_norm.weight", Move::Same),
    (Role::DenseGate, "ffn_gate.weight", Move::Same),
    (Role::DenseUp, "ffn_up.weight", Move::Same),
    (Role::DenseDown, "ffn_down.weight", Move::Same),
    (Role::Router, "ffn_gate_inp.weight", Move::Same),
    (Role::RouterBias, "ffn_gate_inp.bias", Move::Same),
    (Role::RouterCorrection, "exp_probs_b.bias", Move::Same),
    (Role::RouterTable, "ffn_gate_tid2eid.weight", Move::Same),
    (Role::SharedGate, "ffn_gate_shexp.weight", Move::Same),
    (Role::SharedUp, "ffn_up_shexp.weight", Move::Same),
    (Role::SharedDown, "ffn_down_shexp.weight", Move::Same),
    (Role::SharedRouter, "ffn_gate_inp_shexp.weight", Move::Same),
];

impl Arch {
    /// The architecture of a model.
    ///
    /// # Errors
    /// `Plan` if there is none for it, or if the model has what its graph does not.
    pub(crate) fn of(model: &Model) -> Result<&'static Arch> {
        let (spec, name) = (model.spec(), model.family().gguf);
        let refusal = |what: String| Error::plan(what).in_file(model.root());
        let Some(arch) = ARCHES.iter().find(|a| a.family == spec.family) else {
            let known: Vec<_> = ARCHES.iter().map(|a| a.family).collect();
            let what = format!("{} is not exported to GGUF, {} are", spec.family, known.join(" "));
            return Err(refusal(what));
        };
        if let Some((n, _)) = spec.layers.iter().enumerate().find(|(_, layer)| !(arch.fits)(spec, layer)) {
            return Err(refusal(format!("layer {n} is not as llama.cpp's {name} computes it")));
        }
        match (arch.refuses)(model) {
            Some(why) => Err(refusal(format!("{why}, which llama.cpp's {name} does not take"))),
            None => Ok(arch),
        }
    }

    /// The tensors that a trunk tensor becomes; none where the architecture has no place for it.
    pub(crate) fn names_of(&self, role: Role) -> Vec<(&'static str, Move)> {
        let of = |names: &[Name]| -> Vec<(&'static str, Move)> {
            names.iter().filter(|(r, ..)| *r == role).map(|&(_, name, how)| (name, how)).collect()
        };
        let own = of(self.names);
        if own.is_empty() { of(NAMES) } else { own }
    }

    /// `general.*` and the architecture's own keys; what people should know is added to `notes`.
    ///
    /// # Errors
    /// Layers that differ in what a file says once; RoPE that is stretched otherwise than llama.cpp does.
    pub(crate) fn keys(
        &self,
        model: &Model,
        name: &str,
        notes: &mut Vec<String>,
    ) -> Result<Vec<(String, Value)>> {
        let mut keys = Keys::new(model.family().gguf, notes);
        common::general(model, name, &mut keys)?;
        (self.keys)(model, &mut keys)?;
        Ok(keys.list)
    }
}

/// Where tensors of a role stand among those of their layer.
pub(crate) fn order_of(role: Role) -> usize {
    NAMES.iter().position(|(r, ..)| *r == role).unwrap_or(NAMES.len())
}

/// Nothing more is in the way.
fn nothing(_: &Model) -> Option<String> {
    None
}
