//! SentencePiece's BPE as tokenizer.json tells it: characters, spaces as `▁`, bytes to fall back on. llama.cpp's `llama`.
//!
//! tokenizer.json has pairs and their ranks, llama.cpp a score for each token: of two neighbours whose text together is a
//! token, those are joined first whose token has the best score. That comes to the same where every such pair has a rank,
//! and where pairs that give one token stand together; else the model is refused.

use std::collections::{BTreeMap, BTreeSet};

use moepack_format::{Error, Result};
use serde_json::Value as Json;

use super::pretokenizer::{kind, refusal};
use super::value::{self, Value};
use super::vocabulary::{BYTE, NORMAL, Tokens, UNKNOWN, merges};

/// What stands for a space.
const SPACE: &str = "\u{2581}";

/// Whether this is SentencePiece's BPE.
pub(super) fn is_one(tokenizer: &Json) -> bool {
    let falls_back = tokenizer.get("model").and_then(|m| m.get("byte_fallback"));
    falls_back.and_then(Json::as_bool) == Some(true)
}

/// Its keys; bytes and the unknown token get their kinds.
///
/// # Errors
/// `Plan` for texts that are changed or joined otherwise than llama.cpp does it.
pub(super) fn keys(tokenizer: &Json, tokens: &mut Tokens) -> Result<Vec<(String, Value)>> {
    let text = |t: &str| Value::String(t.to_owned());
    let prefixed = is_prefixed(tokenizer).ok_or_else(|| {
        let (changed, cut) = (tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer"));
        let show = |v: Option<&Json>| v.map_or_else(|| "nothing".to_owned(), Json::to_string);
        let what = format!("texts are changed by {} and cut by {}", show(changed), show(cut));
        refusal(format!("{what}, which llama.cpp does not do with SentencePiece's vocabulary"))
    })?;
    let unknown = tokenizer.get("model").and_then(|m| m.get("unk_token")).and_then(Json::as_str);
    let mut n_bytes = 0;
    for (text, kind) in tokens.texts.iter().zip(&mut tokens.kinds) {
        if is_byte(text) {
            (*kind, n_bytes) = (BYTE, n_bytes + 1);
        } else if Some(text.as_str()) == unknown {
            *kind = UNKNOWN;
        }
    }
    if n_bytes != 256 {
        return Err(refusal(format!("{n_bytes} tokens stand for bytes, expected 256")));
    }
    let scores = scores(tokens, &merges(tokenizer)?)?;
    Ok(vec![
        ("tokenizer.ggml.model".to_owned(), text("llama")),
        ("tokenizer.ggml.pre".to_owned(), text("default")),
        ("tokenizer.ggml.scores".to_owned(), scores),
        ("tokenizer.ggml.add_space_prefix".to_owned(), Value::Bool(prefixed)),
    ])
}

/// Whether a space is put in front of texts; `None` for other ways of changing them.
fn is_prefixed(tokenizer: &Json) -> Option<bool> {
    let there = |key: &str| tokenizer.get(key).filter(|v| !v.is_null());
    match (there("normalizer"), there("pre_tokenizer")) {
        (Some(normalizer), None) => {
            let steps = match kind(normalizer)? {
                "Sequence" => normalizer.get("normalizers")?.as_array()?.as_slice(),
                _ => std::slice::from_ref(normalizer),
            };
            match steps {
                [replace] => is_replace(replace).then_some(false),
                [prepend, replace] => {
                    let first = kind(prepend)? == "Prepend" && prepend.get("prepend")? == SPACE;
                    (first && is_replace(replace)).then_some(true)
                }
                _ => None,
            }
        }
        (None, Some(cut)) => {
            let whole = kind(cut)? == "Metaspace" && cut.get("replacement")? == SPACE;
            let whole = whole && cut.get("split").and_then(Json::as_bool) == Some(false);
            let scheme = cut.get("prepend_scheme").and_then(Json::as_str)?;
            whole.then_some(scheme != "never")
        }
        _ => None,
    }
}

fn is_replace(step: &Json) -> bool {
    let from = step.get("pattern").and_then(|p| p.get("String"));
    kind(step) == Some("Replace")
        && from.is_some_and(|f| f == " ")
        && step.get("content").is_some_and(|c| c == SPACE)
}

fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    digits
        .is_some_and(|d| d.len() == 2 && d.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b)))
}

/// The earlier a token's pairs come, the better its score.
fn scores(tokens: &Tokens, pairs: &[(String, String)]) -> Result<Value> {
    let mut order = BTreeMap::new();
    let mut last = None;
    for (a, b) in pairs {
        let joined = format!("{a}{b}");
        if last.as_ref() != Some(&joined) {
            if order.insert(joined.clone(), order.len()).is_some() {
                return Err(refusal(format!(
                    "pairs that give {joined:?} stand apart, so no score says their ranks"
                )));
            }
            last = Some(joined);
        }
    }
    tokens.check_lengths()?;
    check_pairs(tokens, pairs)?;
    let score = |text: &String| order.get(text).map_or(0.0, |&n| -(n as f32) - 1.0);
    Ok(Value::Array(value::F32, tokens.texts.iter().map(|t| Value::F32(score(t))).collect()))
}

/// Refuses two tokens that are one together, but are not joined.
fn check_pairs(tokens: &Tokens, pairs: &[(String, String)]) -> Result<()> {
    let normal =
        || tokens.texts.iter().zip(&tokens.kinds).filter(|(_, k)| **k == NORMAL).map(|(t, _)| t.as_str());
    let known: BTreeSet<&str> = normal().collect();
    let joined: BTreeSet<(&str, &str)> = pairs.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let splits = |token: &'_ str| -> Vec<usize> { token.char_indices().skip(1).map(|(at, _)| at).collect() };
    let mut all = normal().flat_map(|token| splits(token).into_iter().map(move |at| (token, at)));
    let apart = all.find_map(|(token, at)| {
        let (a, b) = token.split_at_checked(at)?;
        (known.contains(a) && known.contains(b) && !joined.contains(&(a, b))).then_some((a, b))
    });
    match apart {
        Some((a, b)) => Err(refusal(format!("{a:?} and {b:?} are a token together, but no pair joins them"))),
        None if order_fits(tokens) => Ok(()),
        None => Err(Error::plan("more tokens than scores tell apart")),
    }
}

/// f32 counts exactly so far.
fn order_fits(tokens: &Tokens) -> bool {
    tokens.texts.len() < 1 << 24
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Bytes, then `a b c ▁`, then what pairs give.
    fn made(pairs: Json, joined: &[&str]) -> (Json, Tokens) {
        let mut texts: Vec<String> = (0..256).map(|b| format!("<0x{b:02X}>")).collect();
        texts.extend(["<unk>", "a", "b", "c", SPACE].map(str::to_owned));
        texts.extend(joined.iter().map(|t| (*t).to_owned()));
        let kinds = vec![NORMAL; texts.len()];
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
        let steps = [json!({"type": "Prepend", "prepend": SPACE}), replace];
        let normalizer = json!({"type": "Sequence", "normalizers": steps});
        let model = json!({"type": "BPE", "byte_fallback": true, "unk_token": "<unk>", "merges": pairs});
        (json!({"normalizer": normalizer, "pre_tokenizer": null, "model": model}), Tokens { texts, kinds })
    }

    #[test]
    fn ranks_become_scores() {
        let (tokenizer, mut tokens) = made(json!([["a", "b"], "ab c", "a bc", "b c"]), &["ab", "bc", "abc"]);
        assert!(is_one(&tokenizer));
        let keys: BTreeMap<String, Value> = keys(&tokenizer, &mut tokens).unwrap().into_iter().collect();
        assert_eq!(keys["tokenizer.ggml.add_space_prefix"], Value::Bool(true));
        let Value::Array(_, scores) = &keys["tokenizer.ggml.scores"] else { panic!("no scores") };
        assert_eq!(scores[261..], [-1.0, -3.0, -2.0].map(Value::F32));
        assert_eq!((tokens.kinds[7], tokens.kinds[256], tokens.kinds[257]), (BYTE, UNKNOWN, NORMAL));
    }

    #[test]
    fn what_scores_cannot_say_is_refused() {
        let refused = |pairs: Json, joined: &[&str]| {
            let (tokenizer, mut tokens) = made(pairs, joined);
            keys(&tokenizer, &mut tokens).unwrap_err().what().to_owned()
        };
        let apart = refused(json!([["a", "b"], ["b", "c"], ["ab", "c"]]), &["ab", "bc", "abc"]);
        assert!(apart.contains("\"a\" and \"bc\" are a token together"), "{apart}");
        let scattered = json!([["a", "b"], ["ab", "c"], ["b", "c"], ["a", "bc"]]);
        let scattered = refused(scattered, &["ab", "bc", "abc"]);
        assert!(scattered.contains("pairs that give \"abc\" stand apart"), "{scattered}");
        let (mut tokenizer, mut tokens) = made(json!([]), &[]);
        tokenizer["normalizer"] = json!({"type": "NFKC"});
        let e = keys(&tokenizer, &mut tokens).unwrap_err();
        assert!(e.what().contains("NFKC"), "{e}");
    }
}
