//! The tokenizer of a GGUF file, from tokenizer.json: BPE over bytes, or over characters with bytes to fall back on.

use std::collections::BTreeMap;

use moepack_format::error::Context;
use moepack_format::{Error, Kind, Result};
use serde_json::Value as Json;

use super::pretokenizer;
use super::sentencepiece;
use super::value::{self, Value};
use crate::json;
use crate::limits::{JSON_VALUES_MAX, SIDE_FILE_BYTES_MAX};
use crate::model::Model;

const TOKENIZER: &str = "tokenizer.json";
const TEMPLATE: &str = "chat_template.jinja";
/// Squares of the lengths of all tokens together; a vocabulary of 200 thousand has some 10 million.
const PARTS_MAX: u64 = 1 << 28;

pub(super) const NORMAL: i32 = 1;
pub(super) const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
pub(super) const BYTE: i32 = 6;

/// The keys `tokenizer.*`; a model without tokenizer.json gets none, and runs on token ids only.
///
/// # Errors
/// A tokenizer that is no BPE or cuts texts as llama.cpp does not, ids twice or beyond the embedding, a file that cannot
/// be read.
pub(crate) fn keys(model: &Model, notes: &mut Vec<String>) -> Result<Vec<(String, Value)>> {
    let text = |t: &str| Value::String(t.to_owned());
    let Some(tokenizer) = side_json(model, TOKENIZER)? else {
        notes.push("there is no tokenizer.json: the file has no vocabulary and runs on token ids".to_owned());
        return Ok(vec![("tokenizer.ggml.model".to_owned(), text("no_vocab"))]);
    };
    let path = model.root().join(TOKENIZER);
    let config = side_json(model, "tokenizer_config.json")?;
    let mut tokens = Tokens::of(&tokenizer, model.spec().vocab).in_file(&path)?;
    let mut keys = match sentencepiece::is_one(&tokenizer) {
        true => sentencepiece::keys(&tokenizer, &mut tokens).in_file(&path)?,
        false => byte_level(&tokenizer, &tokens, notes).in_file(&path)?,
    };
    keys.push(("tokenizer.ggml.tokens".to_owned(), Value::strings(tokens.texts.iter().cloned())));
    keys.push(("tokenizer.ggml.token_type".to_owned(), tokens.kinds()));
    for (key, end) in [("add_bos_token", End::First), ("add_eos_token", End::Last)] {
        let said = config.as_ref().and_then(|c| c.get(key)?.as_bool());
        let adds = said.unwrap_or_else(|| adds_special(&tokenizer, end));
        keys.push((format!("tokenizer.ggml.{key}"), Value::Bool(adds)));
    }
    keys.extend(special(model, config.as_ref(), &tokens)?);
    let templates = templates(model, config.as_ref())?.into_iter();
    keys.extend(templates.map(|(name, template)| (name, Value::String(template))));
    Ok(keys)
}

/// BPE over bytes.
fn byte_level(tokenizer: &Json, tokens: &Tokens, notes: &mut Vec<String>) -> Result<Vec<(String, Value)>> {
    let text = |t: &str| Value::String(t.to_owned());
    let name = pretokenizer::id(tokenizer)?;
    notes.extend(pretokenizer::differs(name).map(str::to_owned));
    let pairs = merges(tokenizer)?;
    if pretokenizer::ignores_merges(tokenizer) {
        tokens.check_lengths()?;
        let normal = tokens.texts.iter().zip(&tokens.kinds).filter(|(_, kind)| **kind == NORMAL);
        if let Some(token) = unreachable(normal.map(|(text, _)| text.as_str()), &pairs) {
            let what = format!(
                "ignore_merges is set and no merges lead to {token:?}, which llama.cpp's {name} then never finds"
            );
            return Err(pretokenizer::refusal(what));
        }
    }
    // The runtime wants one merge at least; where there is none, one that joins nothing.
    let pairs = if pairs.is_empty() { vec![("a".to_owned(), "b".to_owned())] } else { pairs };
    Ok(vec![
        ("tokenizer.ggml.model".to_owned(), text("gpt2")),
        ("tokenizer.ggml.pre".to_owned(), text(name)),
        ("tokenizer.ggml.merges".to_owned(), Value::strings(pairs.iter().map(|(a, b)| format!("{a} {b}")))),
    ])
}

/// A token that merging its characters does not give.
fn unreachable<'a>(tokens: impl Iterator<Item = &'a str>, pairs: &[(String, String)]) -> Option<&'a str> {
    let ranks: BTreeMap<(&str, &str), usize> =
        pairs.iter().enumerate().map(|(rank, (a, b))| ((a.as_str(), b.as_str()), rank)).collect();
    let merged = |token: &&str| {
        // Where each part ends.
        let mut ends: Vec<usize> = token.char_indices().map(|(at, c)| at + c.len_utf8()).collect();
        loop {
            let starts = std::iter::once(0).chain(ends.iter().copied());
            let spans: Vec<(usize, usize)> = starts.zip(ends.iter().copied()).collect();
            let rank = |two: &[(usize, usize)]| match two {
                [a, b] => ranks.get(&(token.get(a.0..a.1)?, token.get(b.0..b.1)?)).copied(),
                _ => None,
            };
            let best = spans.windows(2).enumerate().filter_map(|(i, two)| Some((rank(two)?, i))).min();
            match best {
                Some((_, at)) => drop(ends.remove(at)),
                None => return ends.len() > 1,
            }
        }
    };
    let mut tokens = tokens;
    tokens.find(merged)
}

/// Where a special token stands.
#[derive(Clone, Copy)]
enum End {
    First,
    Last,
}

/// Whether tokenizer.json itself puts a special token there.
fn adds_special(tokenizer: &Json, end: End) -> bool {
    let after = tokenizer.get("post_processor");
    let mut steps: Vec<&Json> = after.into_iter().collect();
    steps.extend(after.and_then(|p| p.get("processors")).and_then(Json::as_array).into_iter().flatten());
    steps.iter().any(|step| {
        let pieces = step.get("single").and_then(Json::as_array);
        let piece = pieces.and_then(|all| match end {
            End::First => all.first(),
            End::Last => all.last(),
        });
        piece.is_some_and(|p| p.get("SpecialToken").is_some())
    })
}

/// Texts and kinds of all ids of the embedding.
pub(super) struct Tokens {
    pub texts: Vec<String>,
    pub kinds: Vec<i32>,
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

    /// Refuses tokens so long that looking at all their parts would take more than moments.
    pub fn check_lengths(&self) -> Result<()> {
        let work = self.texts.iter().map(|t| (t.len() as u64).saturating_mul(t.len() as u64));
        match work.fold(0u64, u64::saturating_add) {
            work if work > PARTS_MAX => Err(Error::plan("tokens are longer than those of any vocabulary")),
            _ => Ok(()),
        }
    }

    fn kinds(&self) -> Value {
        Value::Array(value::I32, self.kinds.iter().map(|&k| Value::I32(k)).collect())
    }
}

/// Pairs in the order of their ranks.
pub(super) fn merges(tokenizer: &Json) -> Result<Vec<(String, String)>> {
    let pairs = tokenizer.get("model").and_then(|m| m.get("merges")).and_then(Json::as_array);
    let one = |pair: &Json| {
        let both = match pair {
            Json::String(pair) => pair.split_once(' '),
            Json::Array(both) => match both.as_slice() {
                [Json::String(a), Json::String(b)] => Some((a.as_str(), b.as_str())),
                _ => None,
            },
            _ => None,
        };
        let (a, b) = both.ok_or_else(|| Error::bad_data(format!("merge {pair}, expected two tokens")))?;
        Ok((a.to_owned(), b.to_owned()))
    };
    pairs.into_iter().flatten().map(one).collect()
}

/// Ids of special tokens: by the texts of tokenizer_config.json, else by the numbers of config.json.
fn special(model: &Model, config: Option<&Json>, tokens: &Tokens) -> Result<Vec<(String, Value)>> {
    let ids: BTreeMap<&str, usize> = tokens.texts.iter().enumerate().map(|(i, t)| (t.as_str(), i)).collect();
    let by_text = |key: &str| {
        let said = config?.get(key)?;
        let text = said.as_str().or_else(|| said.get("content")?.as_str())?;
        ids.get(text).copied()
    };
    let mut keys = Vec::new();
    for (name, text_key, id_key) in SPECIAL {
        // Several ids, as some releases have for the end, are no id.
        let by_id = model.config().find(&[id_key]).and_then(|(_, id)| usize::try_from(id.as_u64()?).ok());
        let id = by_text(text_key).or(by_id.filter(|&id| id < tokens.texts.len()));
        if let Some(id) = id.and_then(|id| u32::try_from(id).ok()) {
            keys.push((format!("tokenizer.ggml.{name}_token_id"), Value::U32(id)));
        }
    }
    Ok(keys)
}

/// Names in GGUF, in tokenizer_config.json and in config.json.
const SPECIAL: [(&str, &str, &str); 4] = [
    ("bos", "bos_token", "bos_token_id"),
    ("eos", "eos_token", "eos_token_id"),
    ("padding", "pad_token", "pad_token_id"),
    ("unknown", "unk_token", "unk_token_id"),
];

/// The chat templates under their keys: a file of its own, or what tokenizer_config.json has, which may be several with names.
fn templates(model: &Model, config: Option<&Json>) -> Result<Vec<(String, String)>> {
    const KEY: &str = "tokenizer.chat_template";
    if let Some(bytes) = side_file(model, TEMPLATE)? {
        let text = String::from_utf8(bytes);
        let text = text.map_err(|_| Error::bad_data("not UTF-8").in_file(model.root().join(TEMPLATE)))?;
        return Ok(vec![(KEY.to_owned(), text)]);
    }
    let one = |said: &Json| {
        let (name, text) = (said.get("name")?.as_str()?, said.get("template")?.as_str()?);
        let key = if name == "default" { KEY.to_owned() } else { format!("{KEY}.{name}") };
        Some((key, text.to_owned()))
    };
    Ok(match config.and_then(|c| c.get("chat_template")) {
        Some(Json::String(text)) => vec![(KEY.to_owned(), text.clone())],
        Some(Json::Array(several)) => several.iter().filter_map(one).collect(),
        _ => Vec::new(),
    })
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
