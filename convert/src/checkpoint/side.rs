//! The files beside the weights that travel along: configuration, tokenizer, template, licence. Never code.

use std::path::PathBuf;

use moepack_format::{Error, InputFile, Result, storage};

use super::Place;
use crate::limits::SIDE_FILE_BYTES_MAX;

/// A Git LFS pointer is shorter than this, by its specification.
const LFS_POINTER_BYTES_MAX: u64 = 1024;

/// A file to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SideFile {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
}

/// Names that are copied.
const NAMES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "hf_quant_config.json",
    "README.md",
];

/// Beginnings of names that are copied, whatever follows.
const BEGINNINGS: &[&str] = &["LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY"];

impl Place {
    /// The files to copy, sorted by name. What is left behind because it is no regular file or too long is
    /// told in `notes`.
    ///
    /// # Errors
    /// A file that cannot be read, a Git LFS pointer in its place, or a symlink out of the checkpoint.
    pub fn side_files(&self, notes: &mut Vec<String>) -> Result<Vec<SideFile>> {
        let mut files = Vec::new();
        for name in self.entries()?.into_iter().filter(|n| wanted(n)) {
            let path = self.resolve(&name)?;
            let found = storage::metadata(&path).map_err(|e| Error::io(&e, "stat", &path))?;
            if !found.is_file() {
                notes.push(format!("{name} is no regular file and is not copied"));
                continue;
            }
            let bytes = InputFile::open(&path)?.len();
            if bytes > SIDE_FILE_BYTES_MAX {
                notes.push(format!(
                    "{name} has {bytes} bytes, more than {SIDE_FILE_BYTES_MAX}, and is not copied"
                ));
                continue;
            }
            if bytes <= LFS_POINTER_BYTES_MAX {
                // What travels along must be the file itself; `read_small` refuses a pointer to it.
                self.read_small(&name, bytes)?;
            }
            files.push(SideFile { name, path, bytes });
        }
        Ok(files)
    }
}

fn wanted(name: &str) -> bool {
    let code = [".py", ".so", ".sh"].iter().any(|e| name.ends_with(e));
    NAMES.contains(&name) || (BEGINNINGS.iter().any(|b| name.starts_with(b)) && !code)
}
