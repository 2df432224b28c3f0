//! How a tokenizer cuts text before byte pairs are joined, as llama.cpp names it: `tokenizer.ggml.pre`.
//!
//! A wrong name is no error there, only other tokens. So the name follows from the patterns in tokenizer.json, never from
//! the family, and a tokenizer whose patterns are not in the table is refused.

use moepack_format::{Error, Result};
use serde_json::Value as Json;

/// The pattern of a `ByteLevel` that cuts by itself: GPT-2's. Source: tokenizers, `pre_tokenizers/byte_level.rs`.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// That of Qwen2 and what came after it.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Those of DeepSeek V3, one after the other: digits by threes, Han and kana, the rest. Line ends are the characters themselves.
const DEEPSEEK_V3: &[&str] = &[
    r"\p{N}{1,3}",
    "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"##,
        "\r\n",
        r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[",
        "\r\n",
        r"]*|\s*[",
        "\r\n",
        r"]+|\s+(?!\S)|\s+"
    ),
];
/// That of GPT-4o and gpt-oss.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Patterns and the names under which llama.cpp has them, where they join by merges alone. Source: llama.cpp,
/// `src/llama-vocab.cpp` as of August 2026 (`olmo` is the pattern of `gpt-2`).
const NAMES: &[(&[&str], &str)] =
    &[(&[GPT2], "gpt-2"), (&[QWEN2], "qwen2"), (DEEPSEEK_V3, "deepseek-v3"), (&[GPT4O], "gpt-4o")];

/// What changes how bytes are joined, and must be off.
const JOINS: &[&str] = &["continuing_subword_prefix", "end_of_word_suffix"];

/// The name of the pre-tokenizer of a tokenizer.json.
///
/// # Errors
/// `Plan` for a way of cutting, changing or joining text that llama.cpp has no name for, or that is not known here.
pub(super) fn id(tokenizer: &Json) -> Result<&'static str> {
    let cut = tokenizer.get("pre_tokenizer").unwrap_or(&Json::Null);
    let name = patterns(cut).and_then(|found| NAMES.iter().find(|(p, _)| *p == found));
    let Some((_, name)) = name else {
        return Err(refusal(format!("texts are cut by {cut}, which has no known name in llama.cpp")));
    };
    // llama.cpp composes no characters, and its converter leaves that out too.
    let normalizer = tokenizer.get("normalizer").filter(|n| !n.is_null() && !composes(n));
    if let Some(normalizer) = normalizer {
        return Err(refusal(format!("texts are changed by {normalizer}, which llama.cpp does not do")));
    }
    let join = |key: &&&str| tokenizer.get("model").and_then(|m| m.get(**key)).is_some_and(is_on);
    match JOINS.iter().find(join) {
        Some(key) => Err(refusal(format!("{key} is set, which llama.cpp's {name} does not do"))),
        None => Ok(name),
    }
}

/// Whether a normalizer does nothing but compose characters, if that.
fn composes(normalizer: &Json) -> bool {
    match (kind(normalizer), normalizer.get("normalizers").and_then(Json::as_array)) {
        (Some("Sequence"), Some(steps)) => steps.iter().all(composes),
        (kind, _) => kind == Some("NFC"),
    }
}

/// What llama.cpp is known to cut otherwise under a name.
pub(super) fn differs(name: &str) -> Option<&'static str> {
    (name == "gpt-4o").then_some(
        "llama.cpp's gpt-4o cuts words before combining marks, as in Hindi or Thai, where this tokenizer does not: such texts \
         get other tokens there",
    )
}

/// Whether a word that is a token is taken whole, whatever the merges say.
pub(super) fn ignores_merges(tokenizer: &Json) -> bool {
    tokenizer.get("model").and_then(|m| m.get("ignore_merges")).is_some_and(is_on)
}

pub(super) fn refusal(what: String) -> Error {
    Error::plan(what).hint("without tokenizer.json beside it a model is exported too, and runs on token ids")
}

/// The patterns by which text is cut, one after the other, if bytes come next and nothing else does.
fn patterns(cut: &Json) -> Option<Vec<&str>> {
    let steps = match kind(cut)? {
        "Sequence" => cut.get("pretokenizers")?.as_array()?.as_slice(),
        _ => std::slice::from_ref(cut),
    };
    match steps {
        [bytes] => cuts_by_itself(bytes)?.then(|| vec![GPT2]),
        [splits @ .., bytes] if cuts_by_itself(bytes) == Some(false) => {
            splits.iter().map(split_pattern).collect()
        }
        _ => None,
    }
}

/// Whether a `ByteLevel` cuts too; `None` for anything else, and for one that puts a space in front.
fn cuts_by_itself(step: &Json) -> Option<bool> {
    let is_plain = kind(step)? == "ByteLevel" && step.get("add_prefix_space")? == &Json::Bool(false);
    is_plain.then(|| step.get("use_regex").and_then(Json::as_bool).unwrap_or(true))
}

/// The pattern of a `Split` that keeps every piece.
fn split_pattern(step: &Json) -> Option<&str> {
    let keeps = kind(step)? == "Split" && step.get("behavior")? == "Isolated";
    let is_plain = keeps && step.get("invert").is_none_or(|invert| !is_on(invert));
    step.get("pattern")?.get("Regex")?.as_str().filter(|_| is_plain)
}

pub(super) fn kind(step: &Json) -> Option<&str> {
    step.get("type")?.as_str()
}

/// Neither null, false nor an empty text.
fn is_on(value: &Json) -> bool {
    !(value.is_null() || value == &Json::Bool(false) || value.as_str() == Some(""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn bytes(cuts: bool) -> Json {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": cuts})
    }

    fn sequence(pattern: &str) -> Json {
        let split =
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
    }

    #[test]
    fn the_name_follows_from_the_pattern() {
        let found = |cut: Json| id(&json!({"pre_tokenizer": cut, "normalizer": {"type": "NFC"}})).unwrap();
        assert_eq!(found(bytes(true)), "gpt-2");
        assert_eq!(found(sequence(QWEN2)), "qwen2");
        assert_eq!(found(sequence(GPT2)), "gpt-2");
        assert_eq!(found(sequence(GPT4O)), "gpt-4o");
        let none = json!({"type": "Sequence", "normalizers": []});
        assert!(id(&json!({"pre_tokenizer": bytes(true), "normalizer": none})).is_ok());
        let splits = DEEPSEEK_V3.iter().map(|p| sequence(p)["pretokenizers"][0].clone());
        let steps: Vec<Json> = splits.chain([bytes(false)]).collect();
        assert_eq!(found(json!({"type": "Sequence", "pretokenizers": steps})), "deepseek-v3");
    }

    #[test]
    fn what_llama_cpp_does_otherwise_is_refused() {
        let cut = |cut: Json| json!({"pre_tokenizer": cut});
        let with = |key: &str, value: Json| json!({"pre_tokenizer": bytes(true), "model": {key: value}});
        let space = json!({"type": "ByteLevel", "add_prefix_space": true, "use_regex": true});
        let cases = [
            (json!({}), "cut by null"),
            (cut(bytes(false)), "cut by"),
            (cut(space), "cut by"),
            (cut(sequence(r"\p{N}{1,3}")), r"\\p{N}{1,3}"),
            (cut(json!({"type": "Metaspace", "replacement": "_"})), "Metaspace"),
            (json!({"pre_tokenizer": bytes(true), "normalizer": {"type": "Lowercase"}}), "Lowercase"),
            (with("end_of_word_suffix", json!("</w>")), "end_of_word_suffix is set"),
        ];
        for (tokenizer, expected) in cases {
            let e = id(&tokenizer).unwrap_err();
            assert!(e.kind() == moepack_format::Kind::Plan && e.what().contains(expected), "{expected}: {e}");
        }
        assert!(id(&with("end_of_word_suffix", json!(""))).is_ok());
    }
}
