//! Models for other people's programs: what a checkpoint or bundle becomes, as a list of tensors that are made piece by piece.
//!
//! An [`Export`] knows every tensor before the first byte is read, so files can be laid out, split and written in any
//! order, on many threads, with memory for a few experts. A move never rounds: what a target cannot hold is refused by
//! name, unless quantizing anew is asked for; only `safetensors` decodes, which is what it is for.

use moepack_format::{Dtype, Error, PlaneSpec, Result};
use moepack_quant::{CodecRef, Isa, Matrix};

use crate::coded::{CodedExpert, CodedPart};
use crate::gguf::tensors::Planned;
use crate::model::Model;
use crate::spec::Part;

mod card;
mod compressed;
mod config;
mod experts;
mod gguf;
mod mlx;
mod refuse;
mod scheme;
mod shard;
mod trunk;

pub(crate) use scheme::{Int, Scheme};
pub(crate) use trunk::COPY_BYTES;

pub use card::card;
pub use shard::Shard;

/// What a model can be written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// As it was released: the same tensors, or BF16 under their names.
    Safetensors,
    /// For vLLM and transformers.
    CompressedTensors,
    /// For MLX.
    Mlx,
    /// For llama.cpp.
    Gguf,
}

/// The table of targets: name on the command line, and what it is.
pub const TARGETS: &[(Target, &str, &str)] = &[
    (Target::Safetensors, "safetensors", "the release: its own bytes where they were kept, else BF16"),
    (
        Target::CompressedTensors,
        "compressed-tensors",
        "INT, FP8 blocks, MXFP4, NVFP4 for vLLM and transformers",
    ),
    (Target::Mlx, "mlx", "stacked experts, affine or MXFP4, for mlx-lm"),
    (Target::Gguf, "gguf", "one file or several with tokenizer and all, in ggml's types, for llama.cpp"),
];

impl Target {
    /// The target of that name.
    pub fn named(name: &str) -> Option<Target> {
        TARGETS.iter().find(|(_, n, _)| *n == name).map(|(target, _, _)| *target)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        TARGETS.iter().find(|(target, _, _)| *target == self).map_or("", |(_, name, _)| name)
    }
}

/// What licences' files begin with.
const LICENSE: &str = "LICENSE";

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The target.
    pub target: Target,
    /// BF16 even where the bytes of the release are there.
    pub dequantize: bool,
    /// Code every expert matrix that is in another codec anew.
    pub requantize: Option<CodecRef>,
    /// What the model is called inside of files, and what files are called that have its name.
    pub name: String,
}

/// How a model will be written.
#[derive(Debug)]
pub struct Export<'a> {
    data: &'a Model,
    /// Headers of the checkpoint that a bundle was made from.
    released: Option<Model>,
    wish: Wish,
    form: Form,
    items: Vec<Item>,
    /// What a GGUF file says of itself.
    keys: Vec<(String, crate::gguf::Value)>,
    notes: Vec<String>,
}

/// What becomes of the experts, and with them of the trunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Released,
    Plain,
    Compressed,
    Mlx,
    Gguf,
}

/// Tensors that are made together and lie in one file.
#[derive(Clone, Debug)]
pub struct Item {
    /// In the order of the file.
    pub tensors: Vec<PlaneSpec>,
    /// How many slices make them.
    pub n_slices: usize,
    content: Content,
}

/// What an item is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    /// Trunk tensor, copied.
    Copied(usize),
    /// Trunk tensor, decoded to BF16; so many rows at a time.
    Decoded { at: usize, shape: [usize; 2], rows: usize },
    /// Trunk matrix in the words of the target.
    Moved { at: usize },
    /// Pieces that hold one expert.
    Expert { layer: usize, expert: usize, pieces: Vec<usize> },
    /// A piece that holds all experts of a layer.
    Stacked { layer: usize, piece: usize },
    /// All parts of an expert in the words of the target.
    Parts { layer: usize, expert: usize },
    /// One part of all experts of a layer in the words of the target.
    Stack { layer: usize, part: Part },
    /// A tensor of a GGUF file.
    Gguf(Planned),
}

/// Some bytes of an item.
#[derive(Debug)]
pub struct Chunk {
    /// Which of its tensors.
    pub tensor: usize,
    /// Where in the tensor.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// One slice of an item.
#[derive(Debug, Default)]
pub struct Slice {
    /// Bytes and where they go.
    pub chunks: Vec<Chunk>,
    /// What coding anew lost.
    pub errors: Vec<MatrixError>,
    /// The expert that this was, for progress.
    pub n_experts: u64,
}

/// What coding a matrix anew added.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct MatrixError {
    /// As recipes name it.
    pub tensor: String,
    /// The codec that it had.
    pub from: String,
    /// The codec that it has now.
    pub to: String,
    /// Relative squared error of the new numbers against the old.
    pub error: f64,
}

impl<'a> Export<'a> {
    /// Works out how `model` will be written.
    ///
    /// # Errors
    /// Kind `Plan` with every matrix that the target cannot hold; a wish that makes no sense (`Usage`).
    pub fn of(model: &'a Model, wish: Wish) -> Result<Export<'a>> {
        let released = model.released()?;
        let items = Vec::new();
        let (keys, notes) = (Vec::new(), Vec::new());
        let mut this = Export { data: model, released, form: Form::Plain, wish, items, keys, notes };
        this.form = this.form()?;
        this.refuse()?;
        if this.form == Form::Gguf {
            this.plan_gguf()?;
            return Ok(this);
        }
        this.plan_trunk()?;
        this.plan_experts()?;
        this.note_scales()?;
        Ok(this)
    }

    /// What is written, in order.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// What people should know.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What it is, in a few words.
    pub fn kind(&self) -> &'static str {
        match self.form {
            Form::Released => "the bytes of the release",
            Form::Plain => "BF16",
            Form::Compressed => "compressed-tensors",
            Form::Mlx => "MLX",
            Form::Gguf => "GGUF",
        }
    }

    /// Whether a file beside the model is written too: not where a file holds everything, tokenizer and configuration
    /// included.
    pub fn takes(&self, side: &str) -> bool {
        self.form != Form::Gguf || [LICENSE, "NOTICE"].iter().any(|name| side.starts_with(name))
    }

    /// Whether every byte is as it was released.
    pub fn is_released(&self) -> bool {
        self.form == Form::Released
    }

    /// One slice of an item.
    ///
    /// # Errors
    /// What cannot be read, decoded or coded anew.
    pub fn slice(&self, item: &Item, at: usize) -> Result<Slice> {
        match &item.content {
            Content::Copied(tensor) => self.copied(*tensor, at),
            Content::Decoded { at: tensor, shape, rows } => self.decoded(*tensor, *shape, *rows, at),
            Content::Moved { at: tensor } => self.moved(*tensor),
            Content::Expert { layer, expert, pieces } => self.expert(*layer, *expert, pieces),
            Content::Stacked { layer, piece } => self.stacked(*layer, *piece, at),
            Content::Parts { layer, expert } => self.parts(*layer, *expert),
            Content::Stack { layer, part } => self.stack(*layer, *part, at),
            Content::Gguf(made) => self.gguf_slice(made, at),
        }
    }

    /// Runtimes that compute in another type than that of the scales must be told.
    fn note_scales(&mut self) -> Result<()> {
        let scheme = self.experts_scheme()?.filter(|_| self.form == Form::Compressed);
        if matches!(scheme, Some((Scheme::Int(Int { scales: Dtype::F16, .. }), _))) {
            self.notes.push(
                "scales are F16: transformers decompresses experts to that type, so load with \
                 dtype=torch.float16 or cast the model after loading"
                    .to_owned(),
            );
        }
        Ok(())
    }

    /// The headers of the release.
    fn headers(&self) -> &Model {
        self.released.as_ref().unwrap_or(self.data)
    }

    fn form(&self) -> Result<Form> {
        match self.wish.target {
            Target::CompressedTensors => return Ok(Form::Compressed),
            Target::Mlx => return Ok(Form::Mlx),
            Target::Gguf => return Ok(Form::Gguf),
            Target::Safetensors => {}
        }
        if self.wish.requantize.is_some() {
            return Err(Error::usage("safetensors holds numbers as they are, nothing is coded anew")
                .hint("choose another target, or quantize the checkpoint"));
        }
        let coded_trunk = self.data.trunk_tensors().iter().any(|t| self.data.trunk_codec(t).is_some());
        if self.wish.dequantize || coded_trunk {
            return Ok(Form::Plain);
        }
        let headers = self.headers();
        for (layer, moe) in headers.spec().moe_layers() {
            for expert in 0..moe.n_experts {
                if !headers.keeps_released(self.data, layer, expert)? {
                    return Ok(Form::Plain);
                }
            }
        }
        Ok(Form::Released)
    }

    /// An expert, matrices coded anew where that is asked for.
    fn coded(&self, layer: usize, expert: usize, wanted: &[Part]) -> Result<(CodedExpert, Vec<MatrixError>)> {
        let mut coded = self.data.expert(layer, expert)?;
        coded.parts.retain(|part| wanted.contains(&part.part));
        let mut errors = Vec::new();
        let Some(codec) = &self.wish.requantize else { return Ok((coded, errors)) };
        let other = |p: &&mut CodedPart| p.part.is_matrix() && p.codec.name() != codec.name();
        for part in coded.parts.iter_mut().filter(other) {
            let name = format!("layers.{layer}.experts.{expert}.{}", part.part.name());
            errors.push(recode(part, codec, name.clone()).map_err(|e| e.in_tensor(name))?);
        }
        Ok((coded, errors))
    }
}

/// Codes a matrix anew, each number rounded to nearest.
fn recode(part: &mut CodedPart, codec: &CodecRef, tensor: String) -> Result<MatrixError> {
    let isa = Isa::get();
    let before = part.decode(isa)?; // [rows, cols]
    let w = Matrix { rows: part.rows, cols: part.cols, data: &before };
    let (from, planes) = (part.codec.name(), codec.encode(isa, w, None)?);
    (part.codec, part.planes) = (codec.clone(), planes);
    let after = part.decode(isa)?;
    let square = |d: f64| d * d;
    let difference: f64 = before.iter().zip(&after).map(|(a, b)| square(f64::from(*b) - f64::from(*a))).sum();
    let reference: f64 = before.iter().map(|a| square(f64::from(*a))).sum();
    let error = if reference > 0.0 { difference / reference } else { 0.0 };
    Ok(MatrixError { tensor, from, to: codec.name(), error })
}
