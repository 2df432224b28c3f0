//! The files of an export: which item goes where, and the headers of plain safetensors files.

use std::collections::BTreeMap;
use std::ops::Range;

use moepack_format::{Context, Error, Result};
use serde_json::{Map, Value, json};

use super::{Export, Form, Item};
use crate::gguf::write::file_name;

/// Where files are split unless something else is asked for: what hubs like to serve.
const SHARD_BYTES: u64 = 5_000_000_000;
/// The same of GGUF, which people like in one file: what hubs take at most, nearly.
const GGUF_BYTES: u64 = 48_000_000_000;
/// Headers are filled up so that numbers start at multiples of this.
const DATA_ALIGN: usize = 8;

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Its items.
    pub items: Range<usize>,
    /// Everything before the first number.
    pub header: Vec<u8>,
    /// Where each tensor starts in the file, a list for each item.
    pub offsets: Vec<Vec<u64>>,
    /// Its length.
    pub bytes: u64,
}

impl Export<'_> {
    /// Bytes of a file unless something else is asked for.
    pub fn shard_bytes(&self) -> u64 {
        if self.form == Form::Gguf { GGUF_BYTES } else { SHARD_BYTES }
    }

    /// Its files, in order, of at most `bytes_max` of tensors each; an item that is larger gets its own.
    ///
    /// # Errors
    /// Sizes beyond 64 bits, names said twice.
    pub fn shards(&self, bytes_max: u64) -> Result<Vec<Shard>> {
        match self.form {
            Form::Gguf => self.gguf_shards(bytes_max),
            _ => shards(&self.items, bytes_max),
        }
    }

    /// The name of the `nth` file, from 1, of `count`.
    pub fn shard_name(&self, nth: usize, count: usize) -> String {
        match self.form {
            Form::Gguf => file_name(&self.wish.name, nth, count),
            _ => shard_name(nth, count),
        }
    }

    /// The index of several files, where the target has one.
    ///
    /// # Errors
    /// Sizes beyond 64 bits.
    pub fn index(&self, shards: &[Shard]) -> Result<Option<String>> {
        if self.form == Form::Gguf { Ok(None) } else { index_json(&self.items, shards) }
    }
}

fn shards(items: &[Item], bytes_max: u64) -> Result<Vec<Shard>> {
    let mut ranges = Vec::new();
    let (mut first, mut total) = (0, 0_u64);
    for (i, item) in items.iter().enumerate() {
        let bytes = item_bytes(item)?;
        if i > first && total.saturating_add(bytes) > bytes_max {
            ranges.push(first..i);
            (first, total) = (i, 0);
        }
        total = total.saturating_add(bytes);
    }
    ranges.push(first..items.len());
    ranges.into_iter().map(|range| shard(items, range)).collect()
}

fn shard_name(nth: usize, count: usize) -> String {
    if count == 1 {
        "model.safetensors".to_owned()
    } else {
        format!("model-{nth:05}-of-{count:05}.safetensors")
    }
}

/// The index of several files; `None` where there is one.
fn index_json(items: &[Item], shards: &[Shard]) -> Result<Option<String>> {
    if shards.len() < 2 {
        return Ok(None);
    }
    let mut map = BTreeMap::new();
    let mut total: u64 = 0;
    for (n, shard) in shards.iter().enumerate() {
        for item in items.get(shard.items.clone()).unwrap_or_default() {
            total = total.saturating_add(item_bytes(item)?);
            map.extend(item.tensors.iter().map(|t| (t.name.clone(), shard_name(n + 1, shards.len()))));
        }
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    let text = serde_json::to_string_pretty(&index).map_err(|e| Error::bad_data(e.to_string()))?;
    Ok(Some(text + "\n"))
}

fn item_bytes(item: &Item) -> Result<u64> {
    item.tensors.iter().try_fold(0u64, |n, t| Ok(n.saturating_add(t.bytes().in_tensor(&t.name)?)))
}

fn shard(items: &[Item], range: Range<usize>) -> Result<Shard> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut offsets = Vec::new();
    let mut at: u64 = 0;
    for item in items.get(range.clone()).unwrap_or_default() {
        let mut starts = Vec::with_capacity(item.tensors.len());
        for tensor in &item.tensors {
            let bytes = tensor.bytes().in_tensor(&tensor.name)?;
            let end = at.checked_add(bytes).ok_or_else(|| Error::bad_data("beyond 2^64 bytes"))?;
            let entry =
                json!({"dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [at, end]});
            if header.insert(tensor.name.clone(), entry).is_some() {
                return Err(Error::bad_data("two tensors would have this name").in_tensor(&tensor.name));
            }
            starts.push(at);
            at = end;
        }
        offsets.push(starts);
    }
    let mut json = serde_json::to_vec(&Value::Object(header)).map_err(|e| Error::bad_data(e.to_string()))?;
    json.resize(json.len().next_multiple_of(DATA_ALIGN), b' ');
    let header = [&(json.len() as u64).to_le_bytes()[..], &json].concat();
    let start = header.len() as u64;
    offsets.iter_mut().flatten().for_each(|offset| *offset += start);
    Ok(Shard { items: range, header, offsets, bytes: start.saturating_add(at) })
}
