//! The GGUF form.

use std::collections::BTreeMap;
use std::path::Path;

use moepack_format::error::Context;
use moepack_format::{Error, Result};

use super::{About, COUNT_MAX, Counts, Place};
use crate::gguf::{Gguf, TensorInfo, Value};

/// What each entry of a file has of the two tensors: place and numbers.
type Pair = [Option<(u64, u64)>; 2];

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

/// Where everything lies. Other tensors, such as sums of inputs, are passed over.
///
/// # Errors
/// As [`Gguf::open`]; a file that holds something else; one tensor without the other; other numbers than f32.
pub(super) fn entries(path: &Path) -> Result<(About, BTreeMap<String, Place>)> {
    let gguf = Gguf::outline(path)?;
    let holds = gguf.metadata.get("general.type").and_then(Value::as_str);
    if holds != Some("imatrix") {
        let what = format!(
            "general.type is {}, expected \"imatrix\"",
            holds.map_or("not there".to_owned(), |t| format!("{t:?}"))
        );
        return Err(Error::bad_data(what).in_file(path).hint("`moepack inspect` shows what the file holds"));
    }
    let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
    for (info, offset) in &gguf.tensors {
        for (which, ending) in [SUMS, COUNTS].into_iter().enumerate() {
            if let Some(name) = info.name.strip_suffix(ending) {
                let n = numbers(info).in_file(path)?;
                let pair = pairs.entry(name.to_owned()).or_default();
                pair.iter_mut().skip(which).take(1).for_each(|place| *place = Some((*offset, n)));
            }
        }
    }
    let entries = pairs.into_iter().map(|(name, pair)| place(&name, pair).map(|place| (name, place)));
    Ok((about(&gguf)?, entries.collect::<Result<_>>().in_file(path)?))
}

fn numbers(info: &TensorInfo) -> Result<u64> {
    match info.kind.name {
        "f32" => Ok(info.bytes()? / 4),
        other => Err(Error::bad_data(format!("numbers of {other}, expected f32")).in_tensor(&info.name)),
    }
}

fn place(name: &str, pair: Pair) -> Result<Place> {
    let missing = |ending: &str| Error::bad_data("not there").in_tensor(format!("{name}{ending}"));
    let [sums, counts] = pair;
    let (values_offset, n_values) = sums.ok_or_else(|| missing(SUMS))?;
    let (offset, n) = counts.ok_or_else(|| missing(COUNTS))?;
    Ok(Place { values_offset, n_values, counts: Counts::Stored { offset, n } })
}

fn about(gguf: &Gguf) -> Result<About> {
    let number = |key: &str| match gguf.metadata.get(key) {
        None => Ok(None),
        Some(value) => value.as_u64().filter(|&n| n <= COUNT_MAX).map(Some).ok_or_else(|| {
            Error::bad_data(format!("key {key:?} is {value:?}, expected an unsigned count"))
                .in_file(&gguf.path)
        }),
    };
    let datasets = match gguf.metadata.get("imatrix.datasets") {
        Some(Value::Array(_, texts)) => texts.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    };
    let chunk_tokens = number("imatrix.chunk_size")?.filter(|&n| n > 0);
    Ok(About { n_chunks: number("imatrix.chunk_count")?.unwrap_or(0), chunk_tokens, datasets })
}
