//! Files of llama.cpp.

use std::path::{Path, PathBuf};

use moepack_convert::Model;
use moepack_convert::gguf::{Gguf, TensorInfo, Type, Value, file as gguf_file, set as gguf_set, value};
use moepack_convert::imatrix::Imatrix;
use moepack_format::{Error, Result};

use super::models::{all_layers, model};
use super::{Ready, put};
use crate::corpus::{Seed, fixture};

/// A model as one file.
pub(super) fn file(dir: &Path) -> Result<Ready> {
    let [path, ..] = &*written(dir, None)? else { return Err(Error::bad_data("no file")) };
    let seeds =
        vec![Seed::file("model", path)?, Seed::file("imatrix", &fixture("goldens/imatrix/imatrix.gguf"))?];
    let path = path.clone();
    Ready::new(seeds, move |_, bytes| {
        put(&path, bytes)?;
        let outline = Gguf::outline(&path);
        let whole = Gguf::open(&path)?;
        for (tensor, start) in &whole.tensors {
            let end = tensor.bytes()?.checked_add(*start);
            assert!(end.is_some_and(|end| end <= bytes.len() as u64), "no tensor ends behind the file");
        }
        let outline = outline?;
        assert_eq!(outline.alignment(), whole.alignment(), "an outline says the same");
        assert!(whole.metadata.keys().all(|key| outline.array_len(key) == whole.array_len(key)));
        Ok(())
    })
}

/// One of several files; the others are there.
pub(super) fn set(dir: &Path) -> Result<Ready> {
    let paths = written(dir, Some(100))?;
    let seed = |path: &PathBuf| Seed::file(path.display().to_string(), path);
    let seeds = paths.iter().map(seed).collect::<Result<Vec<_>>>()?;
    let others = seeds.clone();
    Ready::new(seeds, move |of, bytes| {
        put(Path::new(of), bytes)?;
        let found = gguf_set::open_all(Path::new(of)).map(drop);
        let whole = others.iter().find(|seed| seed.name == of);
        whole.map_or(Ok(()), |seed| put(Path::new(of), &seed.bytes))?;
        found
    })
}

/// Keys of every kind and three tensors.
fn written(dir: &Path, split_bytes: Option<u64>) -> Result<Vec<PathBuf>> {
    let kind = |name: &str| Type::of_codec(name).ok_or_else(|| Error::bad_data("no such type"));
    let tensor = |name: &str, dims: &[u64], codec: &str| {
        Ok(TensorInfo { name: name.to_owned(), dims: dims.to_vec(), kind: kind(codec)? })
            as Result<TensorInfo>
    };
    let tensors = [
        tensor("token_embd.weight", &[32, 2], "q8_0")?,
        tensor("blk.0.ffn_up_exps.weight", &[256, 2, 3], "q4_k")?,
        tensor("output_norm.weight", &[4], "f32")?,
    ];
    gguf_file::write(dir, "model", &metadata(), &tensors, split_bytes, |i, sink| {
        let bytes = tensors.get(i).map_or(Ok(0), TensorInfo::bytes)?;
        sink(&vec![i as u8; usize::try_from(bytes).unwrap_or(0)])
    })
}

fn metadata() -> Vec<(String, Value)> {
    let text = |t: &str| Value::String(t.to_owned());
    let values = [
        ("general.architecture", text("qwen3moe")),
        ("general.alignment", Value::U32(32)),
        ("qwen3moe.block_count", Value::U32(2)),
        ("a.u8", Value::U8(1)),
        ("a.i8", Value::I8(-1)),
        ("a.u16", Value::U16(2)),
        ("a.i16", Value::I16(-2)),
        ("a.i32", Value::I32(-3)),
        ("a.f32", Value::F32(0.5)),
        ("a.bool", Value::Bool(true)),
        ("a.u64", Value::U64(4)),
        ("a.i64", Value::I64(-4)),
        ("a.f64", Value::F64(0.25)),
        ("a.floats", Value::Array(value::F32, vec![Value::F32(1.0); 20])),
        ("tokenizer.ggml.tokens", Value::strings(["x".to_owned(), String::new(), "yy".to_owned()])),
    ];
    values.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// An importance matrix of the model, alone and as its stats.
pub(super) fn imatrix(dir: &Path) -> Result<Ready> {
    of_model(dir.join("imatrix.gguf"), "imatrix.gguf")
}

/// The earlier form.
pub(super) fn imatrix_dat(dir: &Path) -> Result<Ready> {
    of_model(dir.join("imatrix.dat"), "imatrix.dat")
}

fn of_model(path: PathBuf, golden: &str) -> Result<Ready> {
    let model = model()?;
    let seeds = vec![Seed::file("golden", &fixture("goldens/imatrix").join(golden))?];
    Ready::new(seeds, move |_, bytes| {
        put(&path, bytes)?;
        Imatrix::looks_like(&path);
        let alone = Imatrix::open(&path).map(|found| columns(&found, &model));
        let as_stats = all_layers(&path, &model);
        alone?;
        as_stats
    })
}

/// The values of every entry, as many as a matrix of the model's width has.
fn columns(found: &Imatrix, model: &Model) -> usize {
    let hidden = model.spec().hidden;
    found
        .names()
        .filter(|name| found.columns(name, 1, hidden).is_ok() || found.columns(name, 4, hidden).is_ok())
        .count()
}
