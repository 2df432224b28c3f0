//! The tensors of a file and what each is made from: names, sizes and types as llama.cpp wants them.
//!
//! A tensor keeps its numbers where ggml has a type that holds them; what lies in one dimension, routers, and whatever a
//! graph adds or mixes streams with becomes F32, as llama.cpp wants it. Experts of a layer are one tensor for each projection.

use moepack_format::{Dtype, Error, Result};

use super::arch::{Arch, Move, order_of};
use super::codes::{Fit, Way, fit};
use super::{TensorInfo, Type};
use crate::catalog::TrunkTensor;
use crate::model::{Model, StoredPart};
use crate::names::is_of_activations;
use crate::spec::{Attention, Part, Role};
use crate::write::COPY_BYTES;

/// Numbers decoded at a time.
const DECODED_MAX: usize = 8 << 20;

/// A tensor of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    pub info: TensorInfo,
    pub data: Data,
    /// Pieces that it is made of, in order, one after the other.
    pub n_slices: usize,
}

/// What a tensor is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    /// The bytes of a trunk tensor, so many at a time.
    Copied(usize),
    /// The planes of a trunk matrix that a bundle coded; in heads of so many rows, where those are rearranged.
    Planes { at: usize, head: Option<usize> },
    /// Numbers of a trunk tensor, some rows at a time.
    Rows { at: usize, rows: Rows },
    /// A trunk tensor of integers.
    Integers(usize),
    /// A part of all experts of a layer, one at a time.
    Experts { layer: usize, part: Part },
}

/// Which rows of a trunk matrix come in which piece, and in what order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    /// As they lie in the file.
    pub how: Move,
    /// Rows of the matrix from the beginning of one head to the next.
    pub head: usize,
    /// The rows of a head that are taken: the first of them, and how many.
    pub taken: [usize; 2],
    /// Heads of a piece.
    pub heads: usize,
    /// Heads of the matrix.
    pub n_heads: usize,
}

/// What a model is written as.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub tensors: Vec<Planned>,
    /// Matrices that are decoded because ggml has no type for their codec.
    pub n_decoded: usize,
    /// Trunk tensors that no graph has a place for.
    pub left_out: Vec<String>,
}

/// Every tensor of the file in its order: what stands outside of layers, then layer after layer. `parts` says how experts
/// will be coded; `bf16` wants BF16 of what ggml cannot hold, which rounds, else it becomes F32.
///
/// # Errors
/// A tensor that the architecture has no name for.
pub(crate) fn plan(
    model: &Model,
    arch: &Arch,
    bf16: bool,
    parts: impl Fn(usize) -> Result<Vec<StoredPart>>,
) -> Result<Plan> {
    let mut plan = Plan::default();
    let mut found = Vec::new();
    for (at, tensor) in model.trunk_tensors().iter().enumerate().filter(|(_, t)| !t.is_scale) {
        if tensor.role == Role::Carried || is_of_activations(&tensor.name) {
            plan.left_out.push(tensor.name.clone());
            continue;
        }
        if tensor.role == Role::LmHead && model.spec().tied_head {
            continue;
        }
        let names = arch.names_of(tensor.role);
        if names.is_empty() {
            let what = format!("{:?} has no name in llama.cpp's {}", tensor.role, model.family().gguf);
            return Err(Error::plan(what).in_tensor(&tensor.name));
        }
        for (word, how) in names {
            let (made, decoded) = trunk(model, (at, tensor), word, how, bf16)?;
            plan.n_decoded += usize::from(decoded);
            found.push((tensor.layer.map_or(0, |l| l + 1), order_of(tensor.role), made));
        }
    }
    for (layer, moe) in model.spec().moe_layers() {
        for part in parts(layer)? {
            let way = fit(&part.codec.name(), bf16).map(|f| f.way);
            plan.n_decoded +=
                if way == Some(Way::Decoded) && part.part.is_matrix() { moe.n_experts } else { 0 };
            let order = usize::MAX - Part::ALL.len() + part.part as usize;
            found.push((layer + 1, order, experts(layer, moe.n_experts, &part, bf16)?));
        }
    }
    found.sort_by_key(|(layer, order, _)| (*layer, *order));
    plan.tensors = found.into_iter().map(|(_, _, made)| made).collect();
    Ok(plan)
}

/// A trunk tensor, and whether it is decoded because nothing holds it.
fn trunk(
    model: &Model,
    (at, tensor): (usize, &TrunkTensor),
    word: &str,
    how: Move,
    bf16: bool,
) -> Result<(Planned, bool)> {
    let name = tensor.layer.map_or(word.to_owned(), |l| format!("blk.{l}.{word}"));
    let mut dims: Vec<u64> = tensor.decoded.iter().rev().copied().collect();
    while dims.len() > 1 && dims.last() == Some(&1) {
        dims.pop();
    }
    if tensor.role.is_table() {
        let info = TensorInfo { name, dims, kind: named("i32")? };
        return Ok((Planned { info, data: Data::Integers(at), n_slices: 1 }, false));
    }
    let cols = dims.first().copied().unwrap_or(1);
    let is_matrix = dims.len() > 1 && !is_f32(tensor.role);
    let held = is_matrix.then(|| holder(model, tensor, cols)).flatten();
    let rows = rows(model, tensor, &mut dims, how)?;
    let data = match (held, model.trunk_codec(tensor)) {
        (Some(_), None) if how == Move::Same => Data::Copied(at),
        (Some(_), Some(_)) if how == Move::Same => Data::Planes { at, head: None },
        (Some(_), Some(_)) if how == Move::Interleaved => Data::Planes { at, head: Some(rows.head) },
        // Blocks cannot be turned.
        _ => Data::Rows { at, rows },
    };
    let turned = matches!(data, Data::Rows { .. }) && model.trunk_codec(tensor).is_some();
    let (kind, decoded) = match held.filter(|_| !turned) {
        Some(kind) => (kind, false),
        None if is_matrix => (decoded_as(model, tensor, bf16)?, true),
        None => (named("f32")?, false),
    };
    let n_slices = match data {
        Data::Copied(_) => usize::try_from(tensor.bytes.div_ceil(COPY_BYTES)).unwrap_or(usize::MAX),
        Data::Rows { .. } => rows.n_heads.div_ceil(rows.heads),
        _ => 1,
    };
    Ok((Planned { info: TensorInfo { name, dims, kind }, data, n_slices }, decoded))
}

/// The type that holds a trunk matrix as it is.
fn holder(model: &Model, tensor: &TrunkTensor, cols: u64) -> Option<&'static Type> {
    if let Some(codec) = model.trunk_codec(tensor) {
        return fit(&codec, false)
            .filter(|f| f.way.is_move())
            .map(|f| f.kind)
            .filter(|k| cols.is_multiple_of(k.block));
    }
    match tensor.dtype {
        Dtype::Bf16 => Type::of_codec("bf16"),
        Dtype::F16 => Type::of_codec("f16"),
        Dtype::F32 => Type::of_codec("f32"),
        _ => None,
    }
    .filter(|_| model.trunk_encoded(tensor).is_none())
}

/// The plain type of a matrix that nothing else holds.
fn decoded_as(model: &Model, tensor: &TrunkTensor, bf16: bool) -> Result<&'static Type> {
    let codec = model.trunk_encoding(tensor)?.unwrap_or_default();
    let fit = fit(&codec, bf16).filter(|f| f.way == Way::Decoded);
    fit.map_or_else(|| named(if bf16 { "bf16" } else { "f32" }), |f| Ok(f.kind))
}

/// The pieces of a matrix, and its dimensions after the move.
fn rows(model: &Model, tensor: &TrunkTensor, dims: &mut Vec<u64>, how: Move) -> Result<Rows> {
    let cols = dims.first().copied().unwrap_or(1) as usize;
    // A vector is one row.
    let n_rows = tensor.decoded.split_last().map_or(1, |(_, outer)| outer.iter().product::<u64>()) as usize;
    let of = |head: usize, taken, n_heads: usize| {
        let heads = DECODED_MAX / head.saturating_mul(cols).max(1);
        Rows { how, head, taken, heads: heads.clamp(1, n_heads.max(1)), n_heads }
    };
    let attention = tensor.layer.and_then(|l| model.spec().layers.get(l)).map(|l| &l.attention);
    let bad = || Error::plan("no heads to rearrange").in_tensor(&tensor.name);
    match (how, attention) {
        (Move::Same, _) => Ok(of(1, [0, 1], n_rows)),
        (Move::Interleaved, Some(Attention::Gqa(gqa))) => {
            Ok(of(gqa.head_dim, [0, gqa.head_dim], n_rows / gqa.head_dim.max(1)))
        }
        (Move::KeysOfHeads | Move::ValuesOfHeads, Some(Attention::Mla(mla))) => {
            let (nope, value, n) = (mla.nope_dim, mla.v_dim, mla.n_heads);
            let keys = how == Move::KeysOfHeads;
            let taken = if keys { [0, nope] } else { [nope, value] };
            let matrix = if keys { [nope, mla.kv_lora] } else { [mla.kv_lora, value] };
            *dims = vec![matrix[0] as u64, matrix[1] as u64, n as u64];
            Ok(of(nope + value, taken, n))
        }
        _ => Err(bad()),
    }
}

/// One part of all experts.
fn experts(layer: usize, n_experts: usize, part: &StoredPart, bf16: bool) -> Result<Planned> {
    let word = match part.part {
        Part::Gate => "ffn_gate_exps.weight",
        Part::Up => "ffn_up_exps.weight",
        Part::Down => "ffn_down_exps.weight",
        Part::GateBias => "ffn_gate_exps.bias",
        Part::UpBias => "ffn_up_exps.bias",
        Part::DownBias => "ffn_down_exps.bias",
    };
    let name = format!("blk.{layer}.{word}");
    let (n, cols, rows) = (n_experts as u64, part.cols as u64, part.rows as u64);
    let (kind, dims) = match part.part.is_matrix() {
        true => {
            let codec = part.codec.name();
            let Fit { kind, .. } = fit(&codec, bf16)
                .ok_or_else(|| Error::plan(format!("GGUF cannot hold {codec}")).in_tensor(&name))?;
            (kind, vec![cols, rows, n])
        }
        false => (named("f32")?, vec![cols, n]),
    };
    let data = Data::Experts { layer, part: part.part };
    Ok(Planned { info: TensorInfo { name, dims, kind }, data, n_slices: n_experts })
}

/// Matrices that llama.cpp wants in F32: what chooses, mixes streams, or is added.
fn is_f32(role: Role) -> bool {
    matches!(
        role,
        Role::Router
            | Role::SharedRouter
            | Role::HeadMix
            | Role::AttnMix
            | Role::MlpMix
            | Role::CompressBias
            | Role::IndexCompressBias
    )
}

fn named(name: &str) -> Result<&'static Type> {
    super::TYPES.iter().find(|t| t.name == name).ok_or_else(|| Error::bad_data(format!("no type {name}")))
}
