//! What a GGUF file is, or a model split into several: architecture, tensors, types, keys.

use std::collections::BTreeMap;
use std::path::Path;

use moepack_convert::gguf::value::kind_name;
use moepack_convert::gguf::{self, Gguf, TensorInfo, Value};
use moepack_format::error::printable;
use moepack_format::{Error, Result, storage};
use serde::{Serialize, Serializer};

use super::Arguments;
use crate::engine::writer::bits_each;
use crate::output::{print, print_json, table};
use crate::session::Session;
use crate::size::human;

/// Characters of a string value that are shown; chat templates have thousands.
const TEXT_CHARS: usize = 60;
/// The same in JSON.
const JSON_CHARS: usize = 1000;

/// Whether a path is to be read as GGUF: by what it begins with, or what it is called.
pub fn is_gguf(path: &Path) -> bool {
    let named = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    gguf::set::is_gguf(path) || named && storage::is_file(path)
}

/// Prints what the file is.
///
/// # Errors
/// A file that version 3 of GGUF does not allow; files of a split model that do not fit together.
pub fn run(args: &Arguments, session: &Session) -> Result<()> {
    if args.experts {
        let what =
            "--experts is for checkpoints and bundles; GGUF keeps the experts of a layer in one tensor";
        return Err(Error::usage(what).in_file(&args.model).hint("--tensors lists these"));
    }
    let files = gguf::set::open_all(&args.model)?;
    let report = Report::of(&args.model, &files, args.tensors);
    if session.json { print_json(&report) } else { print(&report.text()) }
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    model: String,
    kind: &'static str,
    version: u32,
    alignment: u64,
    architecture: Option<&'a str>,
    name: Option<&'a str>,
    /// `general.type`: model, imatrix, adapter …
    holds: Option<&'a str>,
    n_layers: Option<u64>,
    n_experts: Option<u64>,
    n_experts_used: Option<u64>,
    n_keys: usize,
    n_tensors: usize,
    weights: u64,
    /// Those in stacked experts.
    expert_weights: u64,
    tensor_bytes: u64,
    expert_bytes: u64,
    /// Of all files.
    total_bytes: u64,
    bpw_experts: f64,
    bpw_total: f64,
    /// In order of ggml's numbers.
    types: Vec<TypeRow>,
    files: Vec<FileRow>,
    /// Of the first file; in order of names.
    keys: Vec<KeyRow<'a>>,
    /// With `--tensors`, in the order of the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<TensorRow<'a>>>,
}

#[derive(Debug, Serialize)]
struct TypeRow {
    #[serde(rename = "type")]
    name: &'static str,
    tensors: u64,
    weights: u64,
    bytes: u64,
    bpw: f64,
}

#[derive(Debug, Serialize)]
struct FileRow {
    path: String,
    bytes: u64,
    n_tensors: usize,
}

#[derive(Debug, Serialize)]
struct KeyRow<'a> {
    key: &'a str,
    #[serde(rename = "type")]
    kind: String,
    /// Elements of an array, of which the first few are in `value`.
    #[serde(skip_serializing_if = "Option::is_none")]
    length: Option<u64>,
    value: Shown<'a>,
}

#[derive(Debug, Serialize)]
struct TensorRow<'a> {
    name: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    /// The one whose numbers lie side by side first.
    dims: &'a [u64],
    bytes: u64,
    /// Which of `files`, from 0.
    file: usize,
    /// Of its first byte in that file.
    offset: u64,
}

impl<'a> Report<'a> {
    fn of(model: &Path, files: &'a [Gguf], with_tensors: bool) -> Report<'a> {
        let no_keys = BTreeMap::new();
        let first = files.first();
        let keys = first.map_or(&no_keys, |f| &f.metadata);
        let text = |key: &str| first.and_then(|f| f.metadata.get(key)?.as_str());
        let architecture = text("general.architecture");
        let own = |key: &str| keys.get(&format!("{}.{key}", architecture?))?.as_u64();
        let tensors: Vec<TensorRow<'a>> = files.iter().enumerate().flat_map(|(n, f)| rows(n, f)).collect();
        let all = Sum::of(tensors.iter());
        let experts = Sum::of(tensors.iter().filter(|t| t.name.ends_with("_exps.weight")));
        Report {
            schema: "moepack.inspect-gguf/1",
            model: model.display().to_string(),
            kind: "gguf",
            version: gguf::VERSION,
            alignment: first.map_or(gguf::ALIGNMENT, Gguf::alignment),
            architecture,
            name: text("general.name"),
            holds: text("general.type"),
            n_layers: own("block_count"),
            n_experts: own("expert_count"),
            n_experts_used: own("expert_used_count"),
            n_keys: keys.len(),
            n_tensors: tensors.len(),
            weights: all.weights,
            expert_weights: experts.weights,
            tensor_bytes: all.bytes,
            expert_bytes: experts.bytes,
            total_bytes: files.iter().map(|f| f.file_bytes).sum(),
            bpw_experts: bits_each(experts.bytes, experts.weights),
            bpw_total: bits_each(all.bytes, all.weights),
            types: types(&tensors),
            files: files.iter().map(file_row).collect(),
            keys: first.map(key_rows).unwrap_or_default(),
            tensors: with_tensors.then_some(tensors),
        }
    }

    fn text(&self) -> String {
        let line = |name: &str, value: String| format!("{name:<15}{value}\n");
        let number = |n: Option<u64>| n.map_or_else(|| "?".to_owned(), |n| n.to_string());
        let mut text = line("GGUF", printable(&self.model));
        text += &line("version", format!("{}, data at multiples of {}", self.version, self.alignment));
        let said = |what: Option<&str>| what.map_or_else(|| "-".to_owned(), |t| shortened(t, TEXT_CHARS));
        text += &line("architecture", said(self.architecture));
        text += &line("name", said(self.name));
        if self.holds.is_some_and(|holds| holds != "model") {
            text += &line("holds", said(self.holds));
        }
        if self.n_layers.is_some() {
            text += &line("layers", number(self.n_layers));
        }
        if self.n_experts.is_some() {
            let (all, used) = (number(self.n_experts), number(self.n_experts_used));
            text += &line("experts", format!("{all} a layer, {used} used by a token"));
        }
        if self.expert_weights > 0 {
            let (weights, bytes) = (self.expert_weights as f64 / 1e6, human(self.expert_bytes));
            text += &line(
                "expert bytes",
                format!("{bytes}, {weights:.2} M weights, {:.4} bits each", self.bpw_experts),
            );
        }
        let (weights, bytes) = (self.weights as f64 / 1e6, human(self.tensor_bytes));
        let all =
            format!("{}, {weights:.2} M weights, {bytes}, {:.4} bits each", self.n_tensors, self.bpw_total);
        text += &line("tensors", all);
        text += &line("total", format!("{} in {}", human(self.total_bytes), files(self.files.len())));
        text += &format!("\n{}\n{}", self.type_table(), self.key_table());
        if let Some(tensors) = &self.tensors {
            text += &format!("\n{}", tensor_table(tensors));
        }
        text
    }

    fn type_table(&self) -> String {
        let mut rows = vec![["type", "tensors", "weights", "bytes", "bpw"].map(String::from).to_vec()];
        for t in &self.types {
            let weights = format!("{:.2} M", t.weights as f64 / 1e6);
            let bpw = format!("{:.4}", t.bpw);
            rows.push(vec![t.name.to_owned(), t.tensors.to_string(), weights, human(t.bytes), bpw]);
        }
        table(&rows)
    }

    fn key_table(&self) -> String {
        let key = |row: &KeyRow<'_>| printable(&cut(row.key, TEXT_CHARS));
        let width = self.keys.iter().map(|row| key(row).chars().count()).max().unwrap_or(0);
        let line = |key: &str, kind: &str, value: &str| format!("{key:<width$}  {kind:<6}  {value}\n");
        let rows = self.keys.iter().map(|row| line(&key(row), &row.kind, &row.value.text(row.length)));
        std::iter::once(line("key", "type", "value")).chain(rows).collect()
    }
}

fn files(n: usize) -> String {
    if n == 1 { "1 file".to_owned() } else { format!("{n} files") }
}

/// Weights and bytes of some tensors.
#[derive(Default)]
struct Sum {
    tensors: u64,
    weights: u64,
    bytes: u64,
}

impl Sum {
    fn of<'a>(tensors: impl Iterator<Item = &'a TensorRow<'a>>) -> Sum {
        tensors.fold(Sum::default(), |sum, t| Sum {
            tensors: sum.tensors + 1,
            // The reader has multiplied them before, and the data of all lies in files.
            weights: sum.weights.saturating_add(t.dims.iter().product()),
            bytes: sum.bytes.saturating_add(t.bytes),
        })
    }
}

fn types(tensors: &[TensorRow<'_>]) -> Vec<TypeRow> {
    let of = |kind: &'static str| {
        let sum = Sum::of(tensors.iter().filter(|t| t.kind == kind));
        let Sum { tensors, weights, bytes } = sum;
        TypeRow { name: kind, tensors, weights, bytes, bpw: bits_each(bytes, weights) }
    };
    gguf::TYPES.iter().map(|t| of(t.name)).filter(|row| row.tensors > 0).collect()
}

fn rows(file_idx: usize, file: &Gguf) -> impl Iterator<Item = TensorRow<'_>> {
    file.tensors.iter().map(move |(TensorInfo { name, dims, kind }, offset)| TensorRow {
        name,
        kind: kind.name,
        dims,
        // The reader has counted them.
        bytes: kind.bytes(dims).unwrap_or(0),
        file: file_idx,
        offset: *offset,
    })
}

fn file_row(file: &Gguf) -> FileRow {
    FileRow { path: file.path.display().to_string(), bytes: file.file_bytes, n_tensors: file.tensors.len() }
}

fn key_rows(file: &Gguf) -> Vec<KeyRow<'_>> {
    file.metadata.iter().map(|(key, value)| key_row(file, key, value)).collect()
}

fn key_row<'a>(file: &Gguf, key: &'a str, value: &'a Value) -> KeyRow<'a> {
    let name = |kind| kind_name(kind).unwrap_or("?");
    let kind = match value {
        Value::Array(of, _) => format!("[{}]", name(*of)),
        _ => name(value.kind()).to_owned(),
    };
    KeyRow { key, kind, length: file.array_len(key), value: Shown(value) }
}

fn tensor_table(tensors: &[TensorRow<'_>]) -> String {
    let mut rows =
        vec![["tensor", "type", "dimensions", "bytes", "file", "offset"].map(String::from).to_vec()];
    for t in tensors {
        let dims: Vec<String> = t.dims.iter().map(u64::to_string).collect();
        rows.push(vec![
            printable(t.name),
            t.kind.to_owned(),
            dims.join(" x "),
            t.bytes.to_string(),
            (t.file + 1).to_string(),
            t.offset.to_string(),
        ]);
    }
    table(&rows)
}

/// A value for people and for programs: long strings are cut.
#[derive(Debug)]
struct Shown<'a>(&'a Value);

impl Shown<'_> {
    fn text(&self, length: Option<u64>) -> String {
        match self.0 {
            Value::Array(_, values) => {
                let shown: Vec<String> = values.iter().take(4).map(|v| Shown(v).text(None)).collect();
                let more = if length > Some(shown.len() as u64) { ", …" } else { "" };
                format!("[{}{more}] of {}", shown.join(", "), length.unwrap_or(0))
            }
            Value::String(text) => shortened(text, TEXT_CHARS),
            Value::U8(v) => v.to_string(),
            Value::I8(v) => v.to_string(),
            Value::U16(v) => v.to_string(),
            Value::I16(v) => v.to_string(),
            Value::U32(v) => v.to_string(),
            Value::I32(v) => v.to_string(),
            Value::U64(v) => v.to_string(),
            Value::I64(v) => v.to_string(),
            Value::F32(v) => v.to_string(),
            Value::F64(v) => v.to_string(),
            Value::Bool(v) => v.to_string(),
        }
    }
}

impl Serialize for Shown<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        match self.0 {
            Value::Array(_, values) => s.collect_seq(values.iter().map(Shown)),
            Value::String(text) => s.collect_str(&cut(text, JSON_CHARS)),
            Value::U8(v) => s.serialize_u8(*v),
            Value::I8(v) => s.serialize_i8(*v),
            Value::U16(v) => s.serialize_u16(*v),
            Value::I16(v) => s.serialize_i16(*v),
            Value::U32(v) => s.serialize_u32(*v),
            Value::I32(v) => s.serialize_i32(*v),
            Value::U64(v) => s.serialize_u64(*v),
            Value::I64(v) => s.serialize_i64(*v),
            Value::F32(v) => s.serialize_f32(*v),
            Value::F64(v) => s.serialize_f64(*v),
            Value::Bool(v) => s.serialize_bool(*v),
        }
    }
}

fn cut(text: &str, chars_max: usize) -> String {
    let mut cut: String = text.chars().take(chars_max).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    cut
}

/// One line of a stranger's text, in quotes.
fn shortened(text: &str, chars_max: usize) -> String {
    format!("\"{}\"", printable(&cut(text, chars_max).replace('\n', "\\n")))
}
