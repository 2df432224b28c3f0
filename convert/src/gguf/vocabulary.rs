//! The tokenizer of a GGUF file, from tokenizer.json: byte-level BPE.

use std::collections::BTreeMap;

use moepack_format::{Error, Result};
use serde_json::Value as Json;

use super::Value;
use super::value;
use crate::json;
use crate::limits::{JSON_VALUES_MAX, SIDE_FILE_BYTES_MAX};
use crate::model::Model;

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// The keys `tokenizer.*`; a model without tokenizer.json gets none, and runs on token ids only.
///
/// # Errors
/// A tokenizer that is no BPE, ids twice or beyond the embedding, a file that cannot be read.
pub(super) fn keys(model: &Model, pre_tokenizer: &str) -> Result<Vec<(String, Value)>> {
    const FILE: &str = "tokenizer.json";
    let text = |t: &str| Value::String(t.to_owned());
    let bytes = match model.side_file(FILE, SIDE_FILE_BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == moepack_format::Kind::Missing => {
            return Ok(vec![("tokenizer.ggml.model".to_owned(), text("no_vocab"))]);
        }
        Err(e) => return Err(e),
    };
    let path = model.root().join(FILE);
    let tokenizer = json::parse(&bytes, JSON_VALUES_MAX).map_err(|e| e.in_file(&path))?;
    let tokens = Tokens::of(&tokenizer, model.spec().vocab).map_err(|e| e.in_file(&path))?;
    let merges = merges(&tokenizer).map_err(|e| e.in_file(&path))?;
    let mut keys = vec![
        ("tokenizer.ggml.model".to_owned(), text("gpt2")),
        ("tokenizer.ggml.pre".to_owned(), text(pre_tokenizer)),
        ("tokenizer.ggml.tokens".to_owned(), Value::strings(tokens.texts.iter().cloned())),
        ("tokenizer.ggml.token_type".to_owned(), tokens.kinds()),
        ("tokenizer.ggml.merges".to_owned(), Value::strings(merges)),
        ("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(false)),
    ];
    keys.extend(special(model, &tokens)?);
    if let Some(template) = template(model)? {
        keys.push(("tokenizer.chat_template".to_owned(), Value::String(template)));
    }
    Ok(keys)
}

/// Texts and kinds of all ids of the embedding.
struct Tokens {
    texts: Vec<String>,
    kinds: Vec<i32>,
}

impl Tokens {
    fn of(tokenizer: &Json, vocab: usize) -> Result<Tokens> {
        let model = tokenizer.get("model");
        let is_bpe = model.and_then(|m| m.get("type")).and_then(Json::as_str).is_none_or(|t| t == "BPE");
        let table = model.and_then(|m| m.get("vocab")).and_then(Json::as_object).filter(|_| is_bpe);
        let Some(table) = table else {
            return Err(Error::plan("the tokenizer is no BPE, which is all that is exported"));
        };
        let mut texts: Vec<String> = (0..vocab).map(|id| format!("[PAD{id}]")).collect();
        let mut kinds = vec![UNUSED; vocab];
        let mut set = |text: &str, id: Option<u64>, kind: i32| {
            let place = id.and_then(|id| usize::try_from(id).ok());
            let slot = place.and_then(|i| texts.get_mut(i).zip(kinds.get_mut(i)));
            let (slot, old) = slot.ok_or_else(|| {
                Error::bad_data(format!("token {text:?} has id {id:?}, but the embedding has {vocab} rows"))
            })?;
            (*slot, *old) = (text.to_owned(), kind);
            Ok(())
        };
        for (text, id) in table {
            set(text, id.as_u64(), NORMAL)?;
        }
        for added in tokenizer.get("added_tokens").and_then(Json::as_array).into_iter().flatten() {
            let is_special = added.get("special").and_then(Json::as_bool).unwrap_or(false);
            let text = added.get("content").and_then(Json::as_str).unwrap_or_default();
            let kind = if is_special { CONTROL } else { USER_DEFINED };
            set(text, added.get("id").and_then(Json::as_u64), kind)?;
        }
        Ok(Tokens { texts, kinds })
    }

    fn kinds(&self) -> Value {
        Value::Array(value::I32, self.kinds.iter().map(|&k| Value::I32(k)).collect())
    }
}

/// Pairs in the order of their ranks. The runtime wants one at least; where there is none, one that joins nothing.
fn merges(tokenizer: &Json) -> Result<Vec<String>> {
    let pairs = tokenizer.get("model").and_then(|m| m.get("merges")).and_then(Json::as_array);
    let mut found = Vec::new();
    for pair in pairs.into_iter().flatten() {
        let joined = match pair {
            Json::String(pair) => Some(pair.clone()),
            Json::Array(both) => match both.as_slice() {
                [Json::String(a), Json::String(b)] => Some(format!("{a} {b}")),
                _ => None,
            },
            _ => None,
        };
        found.push(joined.ok_or_else(|| Error::bad_data(format!("merge {pair}, expected two tokens")))?);
    }
    Ok(if found.is_empty() { vec!["a b".to_owned()] } else { found })
}

/// Ids of special tokens, by tokenizer_config.json.
fn special(model: &Model, tokens: &Tokens) -> Result<Vec<(String, Value)>> {
    let Some(config) = side_json(model, "tokenizer_config.json")? else { return Ok(Vec::new()) };
    let ids: BTreeMap<&str, usize> = tokens.texts.iter().enumerate().map(|(i, t)| (t.as_str(), i)).collect();
    let names =
        [("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"), ("unknown", "unk_token")];
    let id = |key: &str| {
        let said = config.get(key)?;
        let text = said.as_str().or_else(|| said.get("content")?.as_str())?;
        u32::try_from(*ids.get(text)?).ok()
    };
    let key =
        |(name, key): (&str, &str)| Some((format!("tokenizer.ggml.{name}_token_id"), Value::U32(id(key)?)));
    Ok(names.into_iter().filter_map(key).collect())
}

fn template(model: &Model) -> Result<Option<String>> {
    let bytes = match model.side_file("chat_template.jinja", SIDE_FILE_BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == moepack_format::Kind::Missing => {
            let config = side_json(model, "tokenizer_config.json")?;
            let text = config.as_ref().and_then(|c| c.get("chat_template")?.as_str().map(str::to_owned));
            return Ok(text);
        }
        Err(e) => return Err(e),
    };
    Ok(String::from_utf8(bytes).ok())
}

fn side_json(model: &Model, name: &str) -> Result<Option<Json>> {
    match model.side_file(name, SIDE_FILE_BYTES_MAX) {
        Ok(bytes) => {
            json::parse(&bytes, JSON_VALUES_MAX).map(Some).map_err(|e| e.in_file(model.root().join(name)))
        }
        Err(e) if e.kind() == moepack_format::Kind::Missing => Ok(None),
        Err(e) => Err(e),
    }
}
