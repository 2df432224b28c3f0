//! Texts: tokenizers, token lists, recipes.

use std::path::{Path, PathBuf};

use moepack::recipe::{Choices, Recipe, Rule, TrunkRule};
use moepack_convert::write::{Export, Target, Wish};
use moepack_convert::{Model, OpenOptions};
use moepack_format::{Error, Result};
use moepack_verify::text::{Tokenizer, utf8};
use moepack_verify::tokens::Windows;

use super::models::model;
use super::{Ready, copy, put};
use crate::corpus::{Seed, fixture};

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// What the tokenizers are tried on.
const TEXT: &str = "Zwei  Bücher, 1234 words\n\n and don't <s>\u{65e5}\u{672c} \u{1f600}\u{301}</s>\taaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!";

/// Small tokenizers of every kind, one for each file of `fuzz/seeds/tokenizer`.
fn tokenizers() -> Result<Vec<Seed>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds/tokenizer");
    let list = std::fs::read_dir(&dir).map_err(|e| Error::io(&e, "list", &dir))?;
    let mut paths: Vec<PathBuf> = list.flatten().map(|e| e.path()).collect();
    paths.sort();
    let name =
        |path: &PathBuf| path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    paths.iter().map(|path| Seed::file(name(path), path)).collect()
}

/// A tokenizer, and what it makes of a text.
pub(super) fn tokenizer(_: &Path) -> Result<Ready> {
    Ready::new(tokenizers()?, |_, bytes| Tokenizer::parse(bytes)?.encode(TEXT).map(drop))
}

/// A tokenizer as the vocabulary of a GGUF file.
pub(super) fn vocabulary(dir: &Path) -> Result<Ready> {
    let dir = with_tokenizer(dir)?;
    Ready::new(tokenizers()?, move |_, bytes| {
        put(&dir.join(TOKENIZER), bytes)?;
        to_gguf(&dir)
    })
}

/// What tokenizer_config.json says of special tokens and templates.
pub(super) fn tokenizer_config(dir: &Path) -> Result<Ready> {
    let dir = with_tokenizer(dir)?;
    let more = br#"{"add_bos_token": true, "add_eos_token": false, "bos_token": {"content": "<s>"}, "eos_token": "</s>",
        "chat_template": [{"name": "default", "template": "{{ x }}"}, {"name": "tool_use", "template": "{% y %}"}]}"#;
    let seeds = vec![
        Seed::file("tiny", &fixture("tiny-deepseek-v3").join(TOKENIZER_CONFIG))?,
        Seed::new("more", &more[..]),
    ];
    Ready::new(seeds, move |_, bytes| {
        put(&dir.join(TOKENIZER_CONFIG), bytes)?;
        to_gguf(&dir)
    })
}

/// A model that llama.cpp knows, with a tokenizer.
fn with_tokenizer(dir: &Path) -> Result<PathBuf> {
    copy(&fixture("tiny-deepseek-v3"), dir)?;
    let seeds = tokenizers()?;
    let bytes = seeds.iter().find(|s| s.name == "byte_level").map(|s| &s.bytes);
    put(&dir.join(TOKENIZER), bytes.ok_or_else(|| Error::missing("no tokenizer"))?)?;
    Ok(dir.to_path_buf())
}

fn to_gguf(dir: &Path) -> Result<()> {
    let model = Model::open(dir, &OpenOptions::default())?;
    let wish = Wish { target: Target::Gguf, dequantize: false, requantize: None, name: "m".to_owned() };
    Export::of(&model, wish)?.shards(u64::MAX).map(drop)
}

/// A list of token windows.
pub(super) fn tokens(_: &Path) -> Result<Ready> {
    let seeds = ["[[1,15,9],[4,2]]", "[[0,1]]", "[[ 1 ,2,3,4,5,6,7,8,9,10,11,12,13,14,15]]"];
    let seeds = seeds.iter().enumerate().map(|(n, s)| Seed::new(n.to_string(), *s)).collect();
    Ready::new(seeds, |_, bytes| {
        let windows = Windows::from_json(bytes, 100)?;
        windows.check_vocab(100)?;
        assert_eq!(windows.lens.iter().sum::<usize>(), windows.tokens.len(), "windows add up");
        Ok(())
    })
}

/// A recipe as text, worked out for a model.
pub(super) fn recipe(_: &Path) -> Result<Ready> {
    let model = model()?;
    let mut rich = Recipe::uniform("int4-g64", "gptq", 16384);
    rich.target_bytes = Some(1 << 20);
    rich.trunk = Some(TrunkRule { codec: "tcq256".to_owned(), bits: Some(4.5) });
    let rule = |tensor: &str, codec: &str, bits| {
        let (tensor, codec) = (tensor.to_owned(), codec.to_owned());
        Rule { tensor, codec, bits, bytes: Some(7), expected_loss: Some(0.5) }
    };
    rich.rules.push(rule("layers.0-1.experts.2-3.down_proj", "int8-g32-asym", None));
    rich.rules.push(rule("layers.1.experts.*.gate_proj", "tcq256", Some(3.06)));
    rich.rules.push(rule("layers.*.experts.0.*_proj", "native", None));
    let plain = Recipe::uniform("mxfp4", "rtn", 4096);
    let seeds = vec![Seed::new("plain", plain.to_toml()?), Seed::new("rich", rich.to_toml()?)];
    Ready::new(seeds, move |_, bytes| {
        let recipe = Recipe::parse(utf8(bytes)?)?;
        Choices::of(&recipe, model.spec())?;
        recipe.fill_bytes(77);
        recipe.to_toml().map(drop)
    })
}
