//! Baseline files: what a checkpoint predicted, so that CI can measure a bundle's drift without the checkpoint.
//!
//! ```text
//!  0        8         12      16      20          24          32         40           48           56        64
//! +--------+---------+-------+-------+-----------+-----------+----------+------------+------------+---------+
//! | magic  | version | vocab | top_k | n_samples | n_windows | n_tokens | meta_bytes | file_bytes | 0       |
//! +--------+---------+-------+-------+-----------+-----------+----------+------------+------------+---------+
//! | meta (JSON) | window lengths (u32) | token ids (u16, u32) | rows | SHA-256 of everything before             |
//! +-------------+----------------------+----------------------+------+------------------------------------------+
//! ```
//!
//! Little-endian. `BASELINE.md` beside this crate has the rows, the refusals and the mathematics. The windows are in
//! the file, so a bundle is measured on exactly the tokens that the checkpoint saw, without text or tokenizer.

use std::path::Path;

use moepack_format::atomic::AtomicFile;
use moepack_format::file::InputFile;
use moepack_format::{Context, Error, Result, storage};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::tokens::{TOKENS_MAX, WINDOW_TOKENS_MAX, WINDOW_TOKENS_MIN, Windows};

mod compare;
mod row;
#[cfg(test)]
mod tests;

pub use row::{Row, RowFormat};

/// First bytes of the file.
pub const MAGIC: [u8; 8] = *b"MOEPKBAS";
/// Version that this code writes and reads.
pub const VERSION: u32 = 1;
/// Bytes of the fixed header.
pub const HEADER_BYTES: u64 = 64;
/// Bytes of the SHA-256 at the end.
pub const DIGEST_BYTES: u64 = 32;
/// Largest vocabulary; real ones have less than 300 000.
pub const VOCAB_MAX: u32 = 1 << 24;
/// Most tokens kept a position.
pub const TOP_K_MAX: u32 = 4096;
/// Most samples of the tail a position.
pub const SAMPLES_MAX: u32 = 256;
/// Longest meta block.
pub const META_BYTES_MAX: u64 = 1 << 16;

/// Where a baseline comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Program and version that wrote it.
    pub tool: String,
    /// Name of the checkpoint's directory.
    pub model: String,
    /// Its family.
    pub family: String,
    /// SHA-256 of its config.json, which a bundle carries along.
    pub config_sha256: String,
    /// SHA-256 of the text, if the windows were cut from one.
    #[serde(default)]
    pub text_sha256: Option<String>,
    /// Whether each window begins with the BOS token.
    #[serde(default)]
    pub bos: bool,
}

/// A baseline file, open and checked; rows are read window by window.
#[derive(Debug)]
pub struct Baseline {
    file: InputFile,
    layout: Layout,
    meta: Meta,
    windows: Windows,
}

impl Baseline {
    /// Opens a file, checks every number in it against its length, and its SHA-256.
    ///
    /// # Errors
    /// `BadData` with the byte offset for everything that is not as `BASELINE.md` says.
    pub fn open(path: &Path) -> Result<Baseline> {
        Baseline::read(InputFile::open(path)?).in_file(path)
    }

    /// Whether the file begins as a baseline does: tells one from a checkpoint.
    pub fn is_baseline(path: &Path) -> bool {
        let mut magic = [0; MAGIC.len()];
        let read = storage::is_file(path)
            .then(|| InputFile::open(path).and_then(|f| f.read_exact_at(0, &mut magic)));
        matches!(read, Some(Ok(()))) && magic == MAGIC
    }

    fn read(file: InputFile) -> Result<Baseline> {
        let mut header = [0; HEADER_BYTES as usize];
        if file.len() < HEADER_BYTES + DIGEST_BYTES {
            let what = format!("{} bytes, too few for a baseline", file.len());
            return Err(
                Error::bad_data(what).hint("it may be cut short; write it again with `moepack baseline`")
            );
        }
        file.read_exact_at(0, &mut header)?;
        let layout = Layout::parse(&header, file.len())?;
        check_digest(&file, &layout)?;
        let meta = serde_json::from_slice(&section(&file, HEADER_BYTES, layout.lens_offset)?)
            .map_err(|e| Error::bad_data(format!("meta block: {e}")).at_byte(HEADER_BYTES))?;
        let windows = layout.windows(
            &section(&file, layout.lens_offset, layout.tokens_offset)?,
            &section(&file, layout.tokens_offset, layout.rows_offset)?,
        )?;
        Ok(Baseline { file, layout, meta, windows })
    }

    /// Where it comes from.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// The windows that the checkpoint saw.
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// Size of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.layout.rows.vocab as usize
    }

    /// What a row holds.
    pub fn row_format(&self) -> RowFormat {
        self.layout.rows
    }

    /// Refuses a model with another vocabulary.
    ///
    /// # Errors
    /// `BadData` with both sizes.
    pub fn check_vocab(&self, vocab: usize) -> Result<()> {
        if vocab == self.vocab() {
            return Ok(());
        }
        let what = format!("the baseline has {} tokens in its vocabulary, the bundle {vocab}", self.vocab());
        let hint = format!("it was made from {:?}; make one from this bundle's checkpoint", self.meta.model);
        Err(Error::bad_data(what).in_file(self.file.path()).hint(hint))
    }

    /// The rows of the scored positions of window `window`, in order.
    ///
    /// # Errors
    /// No such window, a read that fails, or a row that is not as `BASELINE.md` says.
    pub fn rows(&self, window: usize) -> Result<Vec<Row>> {
        let Some(len) = self.windows.lens.get(window) else {
            let what = format!("window {window}, the baseline has {}", self.windows.n_windows());
            return Err(Error::usage(what).in_file(self.file.path()));
        };
        let before: usize = self.windows.lens.iter().take(window).map(|len| len - 1).sum();
        let format = self.layout.rows;
        let start = self.layout.rows_offset + before as u64 * format.bytes();
        let end = start + (*len as u64 - 1) * format.bytes();
        let bytes = section(&self.file, start, end)?;
        let rows = bytes.chunks_exact(format.bytes() as usize).enumerate().map(|(i, row)| {
            let at = start + i as u64 * format.bytes();
            Row::decode(format, row).map_err(|e| offset(e, at).in_file(self.file.path()))
        });
        rows.collect()
    }
}

/// Moves an error's offset within a row to one within the file.
fn offset(error: Error, start: u64) -> Error {
    let at = error.byte().map_or(start, |b| start + b);
    let moved = Error::new(error.kind(), error.what()).at_byte(at);
    moved.hint("the file was not written by `moepack baseline`")
}

/// Writes a baseline, window by window; it appears under its name when finished.
#[derive(Debug)]
pub struct BaselineWriter {
    file: AtomicFile,
    hash: Sha256,
    format: RowFormat,
    /// Rows of each window still to come.
    lens: std::vec::IntoIter<usize>,
}

impl BaselineWriter {
    /// Starts a file for these windows of a model with `vocab` tokens.
    ///
    /// # Errors
    /// More of something than the format allows, an id beyond the vocabulary, or a file that cannot be created.
    pub fn create(path: &Path, meta: &Meta, windows: &Windows, vocab: usize) -> Result<BaselineWriter> {
        let format = RowFormat::for_vocab(vocab)?;
        windows.check_vocab(vocab)?;
        check_lens(windows)?;
        let meta = serde_json::to_vec(meta).map_err(|e| Error::bad_data(format!("meta block: {e}")))?;
        let head = header(format, windows, meta.len() as u64)?;
        let mut writer = BaselineWriter {
            file: AtomicFile::create(path)?,
            hash: Sha256::new(),
            format,
            lens: windows.lens.clone().into_iter(),
        };
        writer.append(&head)?;
        writer.append(&meta)?;
        writer
            .append(&windows.lens.iter().flat_map(|&len| (len as u32).to_le_bytes()).collect::<Vec<u8>>())?;
        let mut ids = Vec::with_capacity(windows.tokens.len() * format.id_bytes());
        windows.tokens.iter().for_each(|&id| format.put_id(&mut ids, id));
        writer.append(&ids)?;
        Ok(writer)
    }

    /// What a row holds; rows are encoded with it on any thread.
    pub fn row_format(&self) -> RowFormat {
        self.format
    }

    /// Appends the encoded rows of the next window.
    ///
    /// # Errors
    /// Another number of rows than the window has scored positions, or a failed write.
    pub fn push_window(&mut self, rows: &[u8]) -> Result<()> {
        let expected = self.lens.next().map(|len| (len as u64 - 1) * self.format.bytes());
        if expected != Some(rows.len() as u64) {
            let what = format!("{} bytes of rows for a window that takes {expected:?}", rows.len());
            return Err(Error::usage(what).in_file(self.file.path()));
        }
        self.append(rows)
    }

    /// Seals the file and gives it its name; returns its length in bytes.
    ///
    /// # Errors
    /// Windows that were not written, or a failed write.
    pub fn finish(mut self) -> Result<u64> {
        if self.lens.len() > 0 {
            let what = format!("{} windows of the baseline were not written", self.lens.len());
            return Err(Error::usage(what).in_file(self.file.path()));
        }
        let digest = self.hash.finalize_reset();
        self.file.append(&digest)?;
        let bytes = self.file.position();
        self.file.commit()?;
        Ok(bytes)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.file.append(bytes)
    }
}

/// Refuses windows that no reader would take.
fn check_lens(windows: &Windows) -> Result<()> {
    let possible = WINDOW_TOKENS_MIN..=WINDOW_TOKENS_MAX;
    match windows.lens.iter().position(|len| !possible.contains(len)) {
        Some(w) => Err(Error::usage(format!("window {w} does not have {possible:?} tokens"))),
        None if windows.lens.iter().sum::<usize>() != windows.tokens.len() => {
            Err(Error::usage(format!("windows that do not add up to {} tokens", windows.tokens.len())))
        }
        None => Ok(()),
    }
}

/// The fixed header, with the length the file will have.
fn header(format: RowFormat, windows: &Windows, meta_bytes: u64) -> Result<Vec<u8>> {
    let mut head = Vec::with_capacity(HEADER_BYTES as usize);
    head.extend(MAGIC);
    for field in [VERSION, format.vocab, format.top_k, format.n_samples] {
        head.extend(field.to_le_bytes());
    }
    let (n_windows, n_tokens) = (windows.n_windows() as u64, windows.tokens.len() as u64);
    for field in [n_windows, n_tokens, meta_bytes, 0, 0] {
        head.extend(field.to_le_bytes());
    }
    let layout = Layout::sizes(format, n_windows, n_tokens, meta_bytes)?;
    head.splice(48..56, layout.file_bytes.to_le_bytes());
    // What is written must be readable: the same checks, and no others.
    head.as_slice()
        .try_into()
        .map_err(|_| Error::usage("header"))
        .and_then(|h| Layout::parse(h, layout.file_bytes))?;
    Ok(head)
}

/// Where the sections lie. Built only from a header that holds.
#[derive(Clone, Copy, Debug)]
struct Layout {
    rows: RowFormat,
    n_windows: u64,
    lens_offset: u64,
    tokens_offset: u64,
    rows_offset: u64,
    digest_offset: u64,
    file_bytes: u64,
}

impl Layout {
    /// The law of the header: every count under its cap, and all of them together as long as the file is.
    fn parse(header: &[u8; HEADER_BYTES as usize], file_len: u64) -> Result<Layout> {
        let bytes = |at: usize| header.get(at..at + 8).and_then(|b| b.try_into().ok()).unwrap_or([0; 8]);
        let u64_at = |at: usize| u64::from_le_bytes(bytes(at));
        let u32_at = |at: usize| (u64_at(at) & 0xffff_ffff) as u32;
        let refuse = |at: u64, what: String| Err(Error::bad_data(what).at_byte(at));
        if bytes(0) != MAGIC {
            return refuse(
                0,
                format!(
                    "begins with {:?}, no baseline",
                    header.get(..8).unwrap_or(&[]).escape_ascii().to_string()
                ),
            );
        }
        if u32_at(8) != VERSION {
            let error =
                Error::bad_data(format!("baseline version {}, this program reads {VERSION}", u32_at(8)));
            return Err(error.at_byte(8).hint("use the program that wrote it, or a newer one"));
        }
        let rows = RowFormat { vocab: u32_at(12), top_k: u32_at(16), n_samples: u32_at(20) };
        let (n_windows, n_tokens, meta_bytes) = (u64_at(24), u64_at(32), u64_at(40));
        let caps = [
            (12, "vocab", u64::from(rows.vocab), 1, u64::from(VOCAB_MAX)),
            (16, "top_k", u64::from(rows.top_k), 1, u64::from(TOP_K_MAX.min(rows.vocab))),
            (20, "n_samples", u64::from(rows.n_samples), 0, u64::from(SAMPLES_MAX)),
            (24, "n_windows", n_windows, 1, n_tokens / WINDOW_TOKENS_MIN as u64),
            (32, "n_tokens", n_tokens, WINDOW_TOKENS_MIN as u64, TOKENS_MAX as u64),
            (40, "meta_bytes", meta_bytes, 2, META_BYTES_MAX),
            (56, "the reserved field", u64_at(56), 0, 0),
        ];
        for (at, name, value, min, max) in caps {
            if !(min..=max).contains(&value) {
                return refuse(at, format!("{name} is {value}, allowed is {min} to {max}"));
            }
        }
        let layout = Layout::sizes(rows, n_windows, n_tokens, meta_bytes)?;
        if u64_at(48) != layout.file_bytes {
            return refuse(
                48,
                format!("file_bytes is {}, the counts make {}", u64_at(48), layout.file_bytes),
            );
        }
        if file_len != layout.file_bytes {
            let what = format!("{file_len} bytes, the header says {}", layout.file_bytes);
            return Err(
                Error::bad_data(what).hint("it may be cut short; write it again with `moepack baseline`")
            );
        }
        Ok(layout)
    }

    fn sizes(rows: RowFormat, n_windows: u64, n_tokens: u64, meta_bytes: u64) -> Result<Layout> {
        let sizes = || {
            let lens_offset = HEADER_BYTES.checked_add(meta_bytes)?;
            let tokens_offset = n_windows.checked_mul(4)?.checked_add(lens_offset)?;
            let rows_offset = n_tokens.checked_mul(rows.id_bytes() as u64)?.checked_add(tokens_offset)?;
            let n_rows = n_tokens.checked_sub(n_windows)?;
            let digest_offset = n_rows.checked_mul(rows.bytes())?.checked_add(rows_offset)?;
            let file_bytes = digest_offset.checked_add(DIGEST_BYTES)?;
            Some(Layout {
                rows,
                n_windows,
                lens_offset,
                tokens_offset,
                rows_offset,
                digest_offset,
                file_bytes,
            })
        };
        sizes().ok_or_else(|| Error::bad_data("the header's counts make more than 2^64 bytes"))
    }

    /// The windows, from the bytes of their lengths and ids.
    fn windows(&self, lens: &[u8], ids: &[u8]) -> Result<Windows> {
        let mut windows = Windows { tokens: Vec::new(), lens: Vec::with_capacity(self.n_windows as usize) };
        let n_tokens = ids.len() / self.rows.id_bytes();
        let mut left = n_tokens;
        for (i, len) in lens.as_chunks::<4>().0.iter().enumerate() {
            let len = u32::from_le_bytes(*len) as usize;
            if !(WINDOW_TOKENS_MIN..=WINDOW_TOKENS_MAX).contains(&len) || len > left {
                let what = format!("window {i} has {len} tokens, {left} are left in the file");
                return Err(Error::bad_data(what).at_byte(self.lens_offset + 4 * i as u64));
            }
            left -= len;
            windows.lens.push(len);
        }
        if left > 0 {
            let what = format!("{left} tokens of {n_tokens} are in no window");
            return Err(Error::bad_data(what).at_byte(self.lens_offset));
        }
        windows.tokens = ids.chunks_exact(self.rows.id_bytes()).map(|b| self.rows.id(b)).collect();
        windows.check_vocab(self.rows.vocab as usize).at_byte(self.tokens_offset)?;
        Ok(windows)
    }
}

/// Bytes `start..end`, which `Layout::parse` has found to be in the file.
fn section(file: &InputFile, start: u64, end: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; (end - start) as usize];
    file.read_exact_at(start, &mut bytes)?;
    Ok(bytes)
}

fn check_digest(file: &InputFile, layout: &Layout) -> Result<()> {
    let mut hash = Sha256::new();
    file.chunks(|at, chunk| {
        let hashed = layout.digest_offset.saturating_sub(at).min(chunk.len() as u64) as usize;
        hash.update(chunk.get(..hashed).unwrap_or(chunk));
        Ok(())
    })?;
    let found = hash.finalize();
    if found.as_slice() == section(file, layout.digest_offset, layout.file_bytes)? {
        return Ok(());
    }
    let error = Error::bad_data("SHA-256 of the content is not the one at the end: the file is damaged");
    Err(error.at_byte(layout.digest_offset).hint("copy it again, or write it again with `moepack baseline`"))
}
