//! Writing a model for other people's programs: file by file, each by all threads, each appearing whole.
//!
//! Every tensor's place is known before anything is read, so slices are made in any order and written where they belong.
//! A finished file leaves a note; a killed run goes on with the next.

use std::path::Path;

use moepack_convert::Model;
use moepack_convert::write::{Export, Item, MatrixError, Shard, card};
use moepack_format::manifest::FileEntry;
use moepack_format::{AtomicFile, Error, InputFile, Result, atomic};
use moepack_verify::forward::ordered;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::engine::quantize::sources;
use crate::engine::workspace::{EXPORT, EXPORT_FORMAT, Workspace};
use crate::progress::Progress;
use crate::session::Session;

/// Side files that say how released numbers were stored, or that are written anew.
const WRITTEN_ANEW: &[&str] = &["config.json", "README.md"];
const STORAGE_FILE: &str = "hf_quant_config.json";
/// The longest card of a base model that metadata is taken from.
const CARD_BYTES_MAX: u64 = 4 << 20;
const CARD: &str = "README.md";
const INDEX: &str = "model.safetensors.index.json";
/// The note about side files in a workspace.
const SIDE_NOTE: &str = "side-files";

/// What is to be written.
#[derive(Debug)]
pub struct Job<'a> {
    /// Checkpoint or bundle.
    pub model: &'a Model,
    /// What it becomes.
    pub export: &'a Export<'a>,
    /// Its files.
    pub shards: &'a [Shard],
    /// Where it goes.
    pub target: &'a Path,
    /// Whether an export there is replaced.
    pub overwrite: bool,
    /// Repository of the base model on the hub.
    pub base_model: Option<&'a str>,
    /// What else decides the bytes: another value, and unfinished work is not ours.
    pub options: Value,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// Every file, sorted by name.
    pub files: Vec<FileEntry>,
    /// What coding anew added.
    pub errors: Vec<MatrixError>,
    /// Whether earlier work went on.
    pub resumed: bool,
    /// What was noted on the way.
    pub notes: Vec<String>,
}

/// A file so far: of a killed run, what is durable.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Progressed {
    n_slices: usize,
    errors: Vec<MatrixError>,
}

/// A finished file.
#[derive(Debug, Serialize, Deserialize)]
struct ShardNote {
    file: FileEntry,
    errors: Vec<MatrixError>,
}

/// Does the job.
///
/// # Errors
/// Whatever is wrong with input or output; nothing half-written is left but what the same command can go on with.
pub fn export(session: &Session, job: &Job<'_>) -> Result<Outcome> {
    job.model.check_trunk_scales()?;
    let sources = sources(job.model);
    let manifest = job.model.bundle().map(|b| b.manifest.sha256.clone());
    let work = json!({"version": env!("CARGO_PKG_VERSION"), "work": job.options, "sources": sources, "bundle": manifest});
    let workspace = Workspace::open(job.target, job.overwrite, &work)?;
    match run(session, job, &workspace) {
        Ok(outcome) => workspace.publish().map(|()| outcome),
        Err(e) => Err(workspace.give_up(e)),
    }
}

fn run(session: &Session, job: &Job<'_>, workspace: &Workspace) -> Result<Outcome> {
    let n_experts = job.model.spec().moe_layers().map(|(_, moe)| moe.n_experts as u64).sum();
    let bytes = job.shards.iter().map(|s| s.bytes).sum();
    let progress = session.progress("convert", bytes, n_experts);
    let (mut files, mut errors, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    for (n, shard) in job.shards.iter().enumerate() {
        let name = job.export.shard_name(n + 1, job.shards.len());
        let note = match workspace.note::<ShardNote>(&name)? {
            Some(note) => {
                progress.add(shard.bytes, 0);
                note
            }
            None => write_shard(session, job, (workspace, &name), shard, &progress)?,
        };
        files.push(note.file);
        errors.extend(note.errors);
    }
    job.model.check_unchanged()?;
    files.extend(side_files(job, workspace, &mut notes)?);
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let about = json!({"format": EXPORT_FORMAT, "tool": {"name": "moepack", "version": env!("CARGO_PKG_VERSION")},
        "work": job.options, "files": files});
    let text = serde_json::to_string_pretty(&about).map_err(|e| Error::bad_data(e.to_string()))? + "\n";
    if !workspace.is_published()? {
        atomic::write_file(&workspace.dir().join(EXPORT), text.as_bytes())?;
    }
    Ok(Outcome { files, errors, resumed: workspace.resumed(), notes })
}

/// Writes one file, slices on all threads.
fn write_shard(
    session: &Session,
    job: &Job<'_>,
    (workspace, name): (&Workspace, &str),
    shard: &Shard,
    progress: &Progress,
) -> Result<ShardNote> {
    let items = job.export.items().get(shard.items.clone()).unwrap_or_default();
    let slices: Vec<(usize, usize)> =
        items.iter().enumerate().flat_map(|(i, item)| (0..item.n_slices).map(move |at| (i, at))).collect();
    let (mut file, mut done) = begin_shard(workspace, name, shard)?;
    let n_before = done.n_slices;
    let slice_of = |n: usize| {
        let slice = slices.get(n_before.saturating_add(n));
        slice.copied().ok_or_else(|| Error::bad_data("no such slice"))
    };
    let work = |n: usize| {
        session.stop.check()?;
        let (item, at) = slice_of(n)?;
        job.export.slice(known(items, item)?, at)
    };
    let mut undurable = 0;
    ordered(slices.len().saturating_sub(n_before), work, |n, slice| {
        let (item, _) = slice_of(n)?;
        let mut bytes = 0;
        for chunk in &slice.chunks {
            let start =
                place(shard, known(items, item)?, item, chunk.tensor, chunk.offset, chunk.bytes.len())?;
            file.write_at(start, &chunk.bytes)?;
            bytes += chunk.bytes.len() as u64;
        }
        done.errors.extend(slice.errors);
        done.n_slices += 1;
        progress.add(bytes, slice.n_experts);
        undurable += bytes;
        if undurable >= checkpoint_bytes(shard.bytes) {
            file.checkpoint()?;
            workspace.leave_note(&progressed(name), &done)?;
            undurable = 0;
        }
        Ok(())
    })?;
    let sha256 = file.sha256()?;
    file.commit()?;
    let file = FileEntry { path: name.to_owned(), bytes: shard.bytes, sha256 };
    let note = ShardNote { file, errors: done.errors };
    workspace.leave_note(name, &note)?;
    Ok(note)
}

/// The file as an earlier run left it, or one that is empty but for its header.
fn begin_shard(workspace: &Workspace, name: &str, shard: &Shard) -> Result<(AtomicFile, Progressed)> {
    let path = workspace.dir().join(name);
    if let Some(done) = workspace.note::<Progressed>(&progressed(name))? {
        if let Some(file) = AtomicFile::grow_on(&path, shard.bytes)? {
            return Ok((file, done));
        }
        // The file got its name and the run was killed before it could say so. What is begun now is not what the
        // note is about.
        workspace.leave_note(&progressed(name), &Progressed::default())?;
    }
    let mut file = AtomicFile::grow(&path)?;
    // The last byte first: what is not written between tensors and behind them is zero.
    file.write_at(shard.bytes.saturating_sub(1), &[0])?;
    file.write_at(0, &shard.header)?;
    Ok((file, Progressed::default()))
}

fn progressed(name: &str) -> String {
    format!("{name}.progress")
}

/// How much is lost at most when a run is killed: an eighth of a file, but neither next to nothing nor hours.
fn checkpoint_bytes(file_bytes: u64) -> u64 {
    (file_bytes / 8).clamp(1 << 20, 1 << 30)
}

fn known(items: &[Item], item: usize) -> Result<&Item> {
    items.get(item).ok_or_else(|| Error::bad_data("no such item"))
}

/// Where a chunk goes, which lies within its tensor.
fn place(shard: &Shard, made: &Item, item: usize, tensor: usize, offset: u64, bytes: usize) -> Result<u64> {
    let start = shard.offsets.get(item).and_then(|starts| starts.get(tensor));
    let spec = made.tensors.get(tensor);
    let (Some(start), Some(spec)) = (start, spec) else { return Err(Error::bad_data("no such tensor")) };
    match offset.checked_add(bytes as u64) {
        Some(end) if end <= spec.bytes()? => Ok(start + offset),
        _ => Err(Error::bad_data(format!("{bytes} bytes at {offset} do not fit")).in_tensor(&spec.name)),
    }
}

/// Index, configuration, card, and what is copied.
fn side_files(job: &Job<'_>, workspace: &Workspace, notes: &mut Vec<String>) -> Result<Vec<FileEntry>> {
    let sides = job.model.side_files(notes)?;
    if let Some(done) = workspace.note(SIDE_NOTE)? {
        return Ok(done);
    }
    let mut files = Vec::new();
    let mut write = |name: &str, bytes: &[u8]| {
        let path = workspace.dir().join(name);
        atomic::write_file(&path, bytes)?;
        let sha256 = InputFile::open(&path)?.sha256(&|| false)?;
        files.push(FileEntry { path: name.to_owned(), bytes: bytes.len() as u64, sha256 });
        Ok(()) as Result<()>
    };
    if let Some(index) = job.export.index(job.shards)? {
        write(INDEX, index.as_bytes())?;
    }
    if job.export.takes("config.json") {
        write("config.json", &job.export.config()?)?;
    }
    let mut has_card = false;
    for side in sides {
        let as_it_was = job.export.is_released() && side.name != "config.json";
        if !as_it_was && (WRITTEN_ANEW.contains(&&*side.name) || side.name == STORAGE_FILE) {
            continue;
        }
        if !job.export.takes(&side.name) {
            continue;
        }
        has_card |= side.name == CARD;
        let mut bytes = vec![0; usize::try_from(side.bytes).unwrap_or(0)];
        InputFile::open(&side.path)?.read_exact_at(0, &mut bytes)?;
        write(&side.name, &bytes)?;
    }
    if !has_card {
        let original = job.model.side_file(CARD, CARD_BYTES_MAX).ok();
        let original = original.as_deref().map(String::from_utf8_lossy);
        write(CARD, card(job.export, job.base_model, original.as_deref()).as_bytes())?;
    }
    workspace.leave_note(SIDE_NOTE, &files)?;
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_about_the_file_that_is_growing() {
        let dir = tempfile::tempdir().unwrap();
        let workspace = Workspace::open(&dir.path().join("out"), false, &json!(1)).unwrap();
        let shard = Shard { bytes: 64, header: vec![b'h'; 8], items: 0..0, offsets: Vec::new() };
        let begin = || begin_shard(&workspace, "a", &shard).unwrap();
        let (file, mut done) = begin();
        done.n_slices = 5;
        file.checkpoint().unwrap();
        workspace.leave_note(&progressed("a"), &done).unwrap();
        drop(file);
        let (file, done) = begin();
        assert_eq!(done.n_slices, 5, "killed while it grew");
        file.commit().unwrap();
        let (file, done) = begin();
        assert_eq!(done.n_slices, 0, "killed after it got its name");
        drop(file);
        assert_eq!(begin().1.n_slices, 0, "and again before anything of it was durable");
    }
}
