//! The small JSON files of a workspace, and how two descriptions of work differ.

use std::path::Path;

use moepack_format::{Context, Error, InputFile, Kind, Result, atomic, storage};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A file that [`write_json`] wrote, if it is there.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if !storage::exists(path)? {
        return Ok(None);
    }
    let file = InputFile::open(path)?;
    let mut text = vec![0; usize::try_from(file.len()).unwrap_or(0)];
    file.read_exact_at(0, &mut text)?;
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|e| {
            Error::bad_data(format!("not what this program wrote: {e}")).hint("remove the .partial directory")
        })
        .in_file(path)
}

/// Writes a value so that it is there whole or not at all.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text =
        serde_json::to_vec_pretty(value).map_err(|e| Error::new(Kind::Io, e.to_string())).in_file(path)?;
    atomic::write_file(path, &text)
}

/// The leaves in which two descriptions differ, for people.
pub(super) fn differences(at: &str, earlier: &Value, now: &Value) -> Vec<String> {
    match (earlier, now) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys().filter(|k| !a.contains_key(*k))).collect();
            keys.sort();
            let join = |key: &str| if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") };
            let null = Value::Null;
            keys.iter()
                .flat_map(|k| differences(&join(k), a.get(*k).unwrap_or(&null), b.get(*k).unwrap_or(&null)))
                .collect()
        }
        _ if earlier == now => Vec::new(),
        _ => vec![format!("{at}: was {}, is {}", short(earlier), short(now))],
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 120 { text } else { text.chars().take(117).collect::<String>() + "..." }
}
