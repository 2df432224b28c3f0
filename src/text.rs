//! The tokens a command runs over: a text and the model's tokenizer, or a JSON list of token windows.

use std::path::{Path, PathBuf};

use clap::Args;
use moepack_convert::Model;
use moepack_format::{Context, Error, InputFile, Result, storage};
use moepack_verify::forward::no_forward;
use moepack_verify::text::{TEXT_BYTES_MAX, TOKENIZER_BYTES_MAX, Tokenizer, utf8};
use moepack_verify::tokens::Windows;

/// Window length where none is given: that of the models' reference figures.
pub const CTX_DEFAULT: usize = 256;

const TOKENIZER: &str = "tokenizer.json";

/// How text becomes windows.
#[derive(Args, Clone, Debug)]
pub struct WindowArgs {
    /// Tokens of a window; windows do not overlap and each starts afresh
    #[arg(long, value_name = "N", default_value_t = CTX_DEFAULT)]
    pub ctx: usize,
    /// Begin each window with the model's BOS token
    #[arg(long)]
    pub bos: bool,
}

/// A text, or token windows.
#[derive(Args, Clone, Debug)]
#[group(id = "input", required = true, multiple = false)]
pub struct InputArgs {
    /// UTF-8 text
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// JSON list of windows (lists of token ids) instead of a text; taken whole, no tokenizer is needed
    #[arg(long, value_name = "FILE")]
    pub tokens: Option<PathBuf>,
}

impl InputArgs {
    /// The windows that the arguments ask for.
    ///
    /// # Errors
    /// A file that cannot be read or makes no window; see [`windows_of_text`].
    pub fn windows(&self, model: &Model, args: &WindowArgs) -> Result<Windows> {
        check_forward(model)?;
        match (&self.text, &self.tokens) {
            (Some(text), _) => windows_of_text(model, text, args),
            (None, Some(tokens)) => {
                Windows::from_json(&read(tokens, TEXT_BYTES_MAX)?, model.spec().vocab).in_file(tokens)
            }
            (None, None) => Err(Error::usage("neither --text nor --tokens is given")),
        }
    }
}

/// Whoever asks for tokens has a forward pass in mind.
fn check_forward(model: &Model) -> Result<()> {
    match model.spec().has_forward() {
        true => Ok(()),
        false => Err(no_forward(model.spec()).in_file(model.root())),
    }
}

/// Tokenizes a text file with the model's tokenizer and cuts it into windows.
///
/// # Errors
/// A missing tokenizer (kind `Missing`), a text that is empty or no UTF-8, ids beyond the vocabulary.
pub fn windows_of_text(model: &Model, text: &Path, args: &WindowArgs) -> Result<Windows> {
    check_forward(model)?;
    let bytes = read(text, TEXT_BYTES_MAX)?;
    let text_str = utf8(&bytes).in_file(text)?;
    if text_str.is_empty() {
        let empty = Error::bad_data("the text is empty").in_file(text);
        return Err(empty.hint("give a text of a few thousand words"));
    }
    let path = model.root().join(TOKENIZER);
    if !storage::exists(&path)? {
        return Err(Error::missing("the model has no tokenizer.json")
            .in_file(model.root())
            .hint("give token ids with --tokens instead of a text"));
    }
    let tokenizer = Tokenizer::parse(&model.side_file(TOKENIZER, TOKENIZER_BYTES_MAX)?).in_file(&path)?;
    let ids = tokenizer.encode(text_str).in_file(&path)?;
    let bos = if args.bos { Some(bos_token(model)?) } else { None };
    let windows = Windows::cut(&ids, args.ctx, bos).in_file(text)?;
    windows.check_vocab(model.spec().vocab).in_file(&path)?;
    Ok(windows)
}

/// The BOS token that config.json names.
fn bos_token(model: &Model) -> Result<u32> {
    let id = model.config().uint_opt(&["bos_token_id"], 0, model.spec().vocab.saturating_sub(1))?;
    let none = || Error::usage("--bos, but config.json has no bos_token_id").in_file(model.root());
    id.and_then(|id| u32::try_from(id).ok()).ok_or_else(none)
}

/// A whole file, if it is not larger than `bytes_max`.
///
/// # Errors
/// As [`InputFile::open`]; a larger file.
pub fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let file = InputFile::open(path)?;
    if file.len() > bytes_max {
        return Err(
            Error::bad_data(format!("{} bytes, at most {bytes_max} are read", file.len())).in_file(path)
        );
    }
    let mut bytes = vec![0; usize::try_from(file.len()).unwrap_or(0)];
    file.read_exact_at(0, &mut bytes)?;
    Ok(bytes)
}
