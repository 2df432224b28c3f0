//! A model as GGUF: names, keys and bytes as llama.cpp wants them, nothing rounded.
//!
//! A tensor keeps its bytes where GGUF has a type for its codec, or for its BF16, F16 or F32 numbers. What lies in one
//! dimension, and routers, become F32, as llama.cpp wants them; so does what GGUF cannot hold (FP8 blocks of the trunk).
//! Experts of a layer are one tensor for each projection, streamed one expert at a time.

use std::path::{Path, PathBuf};

use moepack_format::{Dtype, Error, Result};
use moepack_quant::codec::ggml::mxfp4;

use super::arch;
use super::file::{Sink, write};
use super::{TensorInfo, Type, vocabulary};
use crate::catalog::TrunkTensor;
use crate::model::Model;
use crate::spec::{Part, Role};

/// Bytes that are moved at a time.
const CHUNK_BYTES: usize = 4 << 20;

/// What was written.
#[derive(Debug)]
pub struct Written {
    /// The files, in order.
    pub files: Vec<PathBuf>,
    /// Tensors that GGUF has no place for, with the reason.
    pub left_out: Vec<String>,
}

/// Writes `model`, a checkpoint or a bundle, as `dir/NAME.gguf`, or as files of at most `split_bytes_max` bytes of data.
///
/// # Errors
/// `Plan` for a family or a kind of layer that llama.cpp, or this export, does not have, and for experts whose codecs
/// GGUF cannot hold, with their places; what reading the model or writing the files says.
pub fn export(model: &Model, dir: &Path, name: &str, split_bytes_max: Option<u64>) -> Result<Written> {
    arch::check(model)?;
    let mut metadata = arch::keys(model, name)?;
    metadata.extend(vocabulary::keys(model)?);
    let (sources, left_out) = sources(model)?;
    let infos: Vec<TensorInfo> = sources.iter().map(|s| s.info.clone()).collect();
    let hand_over = |i: usize, sink: &mut Sink<'_>| match sources.get(i) {
        Some(source) => source.data.read(model, sink),
        None => Ok(()),
    };
    let files = write(dir, name, &metadata, &infos, split_bytes_max, hand_over)?;
    Ok(Written { files, left_out })
}

/// A tensor of the file and where its bytes come from.
struct Source<'a> {
    info: TensorInfo,
    data: Data<'a>,
}

enum Data<'a> {
    /// Bytes of a trunk tensor as they are.
    Raw(&'a TrunkTensor),
    /// The plane of a trunk matrix that is coded.
    Coded(&'a TrunkTensor),
    /// A trunk tensor as F32.
    Decoded(&'a TrunkTensor),
    /// A projection of all experts of a layer.
    Experts(usize, Part, usize),
}

impl Data<'_> {
    fn read(&self, model: &Model, sink: &mut Sink<'_>) -> Result<()> {
        match *self {
            Data::Raw(tensor) => read_raw(model, tensor, sink),
            Data::Coded(tensor) => plane_bytes(&model.trunk_planes(tensor)?, "", sink),
            Data::Decoded(tensor) => {
                let decoded = model.trunk(tensor.layer, tensor.role)?;
                let bytes: Vec<u8> = decoded.data.iter().flat_map(|v| v.to_le_bytes()).collect();
                sink(&bytes)
            }
            Data::Experts(layer, part, n_experts) => (0..n_experts).try_for_each(|e| {
                let expert = model.expert(layer, e)?;
                let coded = expert.part(part).ok_or_else(|| Error::bad_data("a part is missing"))?;
                plane_bytes(&coded.planes, &coded.codec.name(), sink)
            }),
        }
    }
}

fn read_raw(model: &Model, tensor: &TrunkTensor, sink: &mut Sink<'_>) -> Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut offset = 0;
    while offset < tensor.bytes {
        let n = (tensor.bytes - offset).min(CHUNK_BYTES as u64);
        let part = buffer.get_mut(..n as usize).unwrap_or_default();
        model.read_raw(tensor, offset, part)?;
        sink(part)?;
        offset += n;
    }
    Ok(())
}

/// The bytes of planes as GGUF has them.
fn plane_bytes(planes: &[Vec<u8>], codec: &str, sink: &mut Sink<'_>) -> Result<()> {
    match planes {
        [plane] => sink(plane),
        [blocks, scales] if codec == "mxfp4" => sink(&mxfp4::to_ggml(blocks, scales)),
        _ => Err(Error::bad_data(format!("{} planes of {codec}", planes.len()))),
    }
}

/// Every tensor of the file in its order: what stands outside of layers, then layer after layer.
fn sources(model: &Model) -> Result<(Vec<Source<'_>>, Vec<String>)> {
    let (mut found, mut left_out) = (Vec::new(), Vec::new());
    for tensor in model.trunk_tensors().iter().filter(|t| !t.is_scale) {
        if tensor.role == Role::Carried {
            left_out.push(format!("{}: no part of the forward pass", tensor.name));
        } else if !(tensor.role == Role::LmHead && model.spec().tied_head) {
            found.push(trunk_source(model, tensor)?);
        }
    }
    for (layer, moe) in model.spec().moe_layers() {
        for part in [Part::Gate, Part::Up, Part::Down] {
            found.push(expert_source(model, layer, part, moe.n_experts)?);
        }
    }
    found.sort_by_key(|s| match s.data {
        Data::Raw(t) | Data::Coded(t) | Data::Decoded(t) => {
            (t.layer.map_or(0, |l| l + 1), arch::order_of(t.role))
        }
        Data::Experts(layer, part, _) => (layer + 1, 1000 + part as usize),
    });
    Ok((found, left_out))
}

fn trunk_source<'a>(model: &Model, tensor: &'a TrunkTensor) -> Result<Source<'a>> {
    let Some(word) = arch::name_of(tensor.role) else {
        let what = format!("{:?} has no name in GGUF", tensor.role);
        return Err(Error::plan(what).in_tensor(&tensor.name));
    };
    let name = tensor.layer.map_or(word.to_owned(), |l| format!("blk.{l}.{word}"));
    let mut dims: Vec<u64> = tensor.decoded.iter().rev().copied().collect();
    while dims.len() > 1 && dims.last() == Some(&1) {
        dims.pop();
    }
    let coded = model.trunk_codec(tensor);
    let raw = match tensor.dtype {
        Dtype::Bf16 => Some("bf16"),
        Dtype::F16 => Some("f16"),
        Dtype::F32 => Some("f32"),
        _ => None,
    };
    let plain = dims.len() == 1 || tensor.role == Role::Router;
    let kept = match (&coded, raw) {
        _ if plain => None,
        (Some(codec), _) => {
            Type::of_codec(codec).filter(|t| t.name != "mxfp4").map(|t| (t, Data::Coded(tensor)))
        }
        (None, Some(raw)) => Type::of_codec(raw).map(|t| (t, Data::Raw(tensor))),
        (None, None) => None,
    };
    let (kind, data) = kept.unwrap_or((f32_type()?, Data::Decoded(tensor)));
    Ok(Source { info: TensorInfo { name, dims, kind }, data })
}

fn f32_type() -> Result<&'static Type> {
    Type::of_codec("f32").ok_or_else(|| Error::bad_data("no type for f32"))
}

/// One tensor can have one type only, so all experts of a projection must be coded alike.
fn expert_source(model: &Model, layer: usize, part: Part, n_experts: usize) -> Result<Source<'_>> {
    let word = match part {
        Part::Gate => "ffn_gate_exps",
        Part::Up => "ffn_up_exps",
        _ => "ffn_down_exps",
    };
    let mut alike: Option<(String, u64, u64)> = None;
    for expert in 0..n_experts {
        let parts = model.expert_parts(layer, expert)?;
        let Some(stored) = parts.iter().find(|p| p.part == part) else {
            return Err(Error::bad_data(format!("layer {layer} expert {expert} has no {}", part.name())));
        };
        let this = (stored.codec.name(), stored.cols as u64, stored.rows as u64);
        let first = alike.get_or_insert_with(|| this.clone());
        if *first != this {
            let what = format!(
                "layer {layer}, {}: expert {expert} is {}, expert 0 is {}; GGUF has one type for all",
                part.name(),
                this.0,
                first.0
            );
            return Err(Error::plan(what).hint("quantize with one --codec, such as q4_k"));
        }
    }
    let (codec, cols, rows) = alike.ok_or_else(|| Error::bad_data("a layer without experts"))?;
    let Some(kind) = Type::of_codec(&codec) else {
        let what = format!("layer {layer}, {}: GGUF cannot hold {codec}", part.name());
        return Err(
            Error::plan(what).hint("quantize the checkpoint with --codec q4_k, q8_0 or another of ggml's")
        );
    };
    let dims = vec![cols, rows, n_experts as u64];
    let info = TensorInfo { name: format!("blk.{layer}.{word}.weight"), dims, kind };
    Ok(Source { info, data: Data::Experts(layer, part, n_experts) })
}

#[cfg(test)]
mod tests;
