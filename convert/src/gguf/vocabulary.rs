//! The tokenizer of a GGUF file, from tokenizer.json: byte-level BPE.

use std::collections::BTreeMap;

use moepack_format::error::Context;
use moepack_format::{Error, Kind, Result};
use serde_json::Value as Json;

use super::pretokenizer;
use super::value::{self, Value};
use crate::json;
use crate::limits::{JSON_VALUES_MAX, SIDE_FILE_BYTES_MAX};
use crate::model::Model;

const TOKENIZER: &str = "tokenizer.json";
const TEMPLATE: &str = "chat_template.jinja";

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// The keys `tokenizer.*`; a model without tokenizer.json gets none, and runs on token ids only.
///
/// # Errors
/// A tokenizer that is no BPE or cuts texts as llama.cpp does not, ids twice or beyond the embedding, a file that cannot
/// be read.
pub(super) fn keys(model: &Model) -> Result<Vec<(String, Value)>> {
    let text = |t: &str| Value::String(t.to_owned());
    let Some(tokenizer) = side_json(model, TOKENIZER)? else {
        return Ok(vec![("tokenizer.ggml.model".to_owned(), text("no_vocab"))]);
    };
    let path = model.root().join(TOKENIZER);
    let tokens = Tokens::of(&tokenizer, model.spec().vocab).in_file(&path)?;
    let merges = merges(&tokenizer).in_file(&path)?;
    let config = side_json(model, "tokenizer_config.json")?;
    let adds_bos = config.as_ref().and_then(|c| c.get("add_bos_token")?.as_bool()).unwrap_or(false);
    let mut keys = vec![
        ("tokenizer.ggml.model".to_owned(), text("gpt2")),
        ("tokenizer.ggml.pre".to_owned(), text(pretokenizer::id(&tokenizer).in_file(&path)?)),
        ("tokenizer.ggml.tokens".to_owned(), Value::strings(tokens.texts.iter().cloned())),
        ("tokenizer.ggml.token_type".to_owned(), tokens.kinds()),
        ("tokenizer.ggml.merges".to_owned(), Value::strings(merges)),
        ("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(adds_bos)),
    ];
    keys.extend(config.iter().flat_map(|config| special(config, &tokens)));
    if let Some(template) = template(model, config.as_ref())? {
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
            if *old != UNUSED && slot != text {
                let id = id.unwrap_or_default();
                return Err(Error::bad_data(format!("tokens {slot:?} and {text:?} both have id {id}")));
            }
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
fn special(config: &Json, tokens: &Tokens) -> Vec<(String, Value)> {
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
    names.into_iter().filter_map(key).collect()
}

/// The chat template: a file of its own, or in tokenizer_config.json.
fn template(model: &Model, config: Option<&Json>) -> Result<Option<String>> {
    let Some(bytes) = side_file(model, TEMPLATE)? else {
        return Ok(config.and_then(|c| c.get("chat_template")?.as_str().map(str::to_owned)));
    };
    let text = String::from_utf8(bytes);
    text.map(Some).map_err(|_| Error::bad_data("not UTF-8").in_file(model.root().join(TEMPLATE)))
}

fn side_json(model: &Model, name: &str) -> Result<Option<Json>> {
    let Some(bytes) = side_file(model, name)? else { return Ok(None) };
    json::parse(&bytes, JSON_VALUES_MAX).map(Some).in_file(model.root().join(name))
}

/// A file beside the weights, if it is there.
fn side_file(model: &Model, name: &str) -> Result<Option<Vec<u8>>> {
    match model.side_file(name, SIDE_FILE_BYTES_MAX) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == Kind::Missing => Ok(None),
        Err(e) => Err(e),
    }
}
