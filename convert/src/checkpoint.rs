//! An upstream checkpoint: its weight files and every tensor in them, validated before anything else is read.
//!
//! Headers are the truth; an index is compared with them. What is merely odd becomes a warning, a value for
//! the caller to print; what two readers could understand in two ways is refused. No tensor data is read
//! here.
#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use moepack_format::{Bundle, Dtype, Error, Fingerprint, Header, InputFile, Result, TensorInfo, is_pad};

use crate::limits::{LISTED_MAX, OPEN_FILES_MAX, TENSORS_MAX};

mod coded;
mod hub;
mod index;
mod lenient;
mod place;
mod side;
#[cfg(test)]
mod tests;

pub use coded::CodedTensor;
pub use hub::recorded_sha256;
pub use lenient::Lenient;
pub use place::Place;
pub use side::SideFile;

use index::Index;
use lenient::Zeroed;

/// A checkpoint whose files and headers have been checked.
#[derive(Debug)]
pub struct Checkpoint {
    place: Place,
    files: Vec<SourceFile>,
    /// Sorted by name.
    tensors: Vec<SourceTensor>,
    /// Those of them that a bundle has coded, by name.
    coded: BTreeMap<Box<str>, CodedTensor>,
    warnings: Vec<String>,
    /// The files read last, most recent last.
    open: Mutex<Vec<(u32, Arc<InputFile>)>>,
    /// Where numbers that are none are read as 0.
    zeroed: Option<Zeroed>,
}

/// A weight file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Name inside the checkpoint.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Length and time of change when it was opened first.
    pub fingerprint: Fingerprint,
}

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceTensor {
    /// Its name.
    pub name: Box<str>,
    /// Element type.
    pub dtype: Dtype,
    /// Which of [`Checkpoint::files`] holds it.
    pub file: u32,
    /// Lengths, outermost first.
    pub shape: Box<[u64]>,
    /// First byte in the file.
    pub start: u64,
    /// Byte after the last.
    pub end: u64,
}

impl SourceTensor {
    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

impl Checkpoint {
    /// Opens the checkpoint in `path`: a directory with config.json and safetensors files, or a Hugging Face
    /// cache directory `models--org--name` (or a snapshot in it).
    ///
    /// # Errors
    /// `Missing` if there are no weights or some are not there, `BadData` for whatever is wrong with them.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        Checkpoint::open_with(path, Lenient::default())
    }

    /// The same, where some of what is wrong may pass.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_with(path: &Path, lenient: Lenient) -> Result<Checkpoint> {
        let place = Place::find(path)?;
        let mut warnings = Vec::new();
        match Index::read(&place)? {
            Some(index) => {
                let names = index.files();
                place.missing(&names)?;
                warnings.extend(place.extra_weights(&names)?);
                let mut this = Checkpoint::gather(place, names, warnings)?.made(lenient, Some(&index))?;
                this.compare(&index)?;
                Ok(this)
            }
            None => {
                let names = place.weights_without_index(&mut warnings)?;
                Checkpoint::gather(place, names, warnings)?.made(lenient, None)
            }
        }
    }

    /// The checkpoint in `path` if it has an index and not one of the weight files that it names: its tensors have names and
    /// nothing else. With it what the index says of its bytes.
    ///
    /// # Errors
    /// An index that is not valid.
    pub fn of_names(path: &Path) -> Result<Option<(Checkpoint, Option<u64>)>> {
        let place = Place::find(path)?;
        let Some(index) = Index::read(&place)? else { return Ok(None) };
        let names = index.files();
        for name in &names {
            if place.has(name)? {
                return Ok(None);
            }
        }
        let fingerprint = Fingerprint { bytes: 0, mtime_ns: 0 };
        let file = |name: String| SourceFile { path: place.root().join(&name), name, fingerprint };
        let files = names.into_iter().map(file).collect();
        let tensor = |(name, file): (&str, u32)| SourceTensor {
            name: name.into(),
            dtype: Dtype::U8,
            file,
            shape: [].into(),
            start: 0,
            end: 0,
        };
        let tensors: Vec<SourceTensor> = index.entries().map(tensor).collect();
        if tensors.len() > TENSORS_MAX {
            return Err(Error::bad_data(format!("more than {TENSORS_MAX} tensors")).in_file(index.path()));
        }
        let (coded, open) = (BTreeMap::new(), Mutex::new(Vec::new()));
        let this = Checkpoint { place, files, tensors, coded, warnings: Vec::new(), open, zeroed: None };
        this.check_unique()?;
        Ok(Some((this, index.total_bytes())))
    }

    /// The same with these tensors.
    #[must_use]
    pub fn with_tensors(self, tensors: Vec<SourceTensor>) -> Checkpoint {
        Checkpoint { tensors, ..self }
    }

    /// The trunk of a bundle, as if it were a checkpoint without experts.
    ///
    /// # Errors
    /// As [`Checkpoint::of_files`].
    pub fn of_bundle(bundle: &Bundle) -> Result<Checkpoint> {
        let names = bundle.manifest.trunk.iter().map(|t| t.file.clone()).collect();
        Checkpoint::of_trunk(&bundle.dir, names, &bundle.manifest.trunk_codecs)
    }

    /// The tensors of exactly these files in `place`; what only fills gaps in a bundle is passed over.
    ///
    /// # Errors
    /// A header that is not valid, a tensor that is in two files, no tensor at all.
    pub fn of_files(place: Place, names: Vec<String>, warnings: Vec<String>) -> Result<Checkpoint> {
        Checkpoint::gather(place, names, warnings)?.made(Lenient::default(), None)
    }

    /// Refuses tensors that are there twice, and none at all.
    fn made(mut self, lenient: Lenient, index: Option<&Index>) -> Result<Checkpoint> {
        if lenient.same_twice {
            self.drop_same(index)?;
        }
        self.check_unique()?;
        if self.tensors.is_empty() {
            return Err(Error::missing("no weights: the safetensors files hold no tensor")
                .in_file(self.place.root())
                .hint("fetch the checkpoint again, all of its .safetensors files"));
        }
        self.zeroed = lenient.zero_non_finite.then(Zeroed::default);
        Ok(self)
    }

    /// Reads all headers.
    fn gather(place: Place, names: Vec<String>, warnings: Vec<String>) -> Result<Checkpoint> {
        let mut files = Vec::with_capacity(names.len());
        let mut tensors: Vec<SourceTensor> = Vec::new();
        for (n, name) in names.into_iter().enumerate() {
            let path = place.resolve(&name)?;
            let file = InputFile::open(&path)?;
            let header = Header::read(&file).map_err(sniffed(&file))?;
            let file_idx = u32::try_from(n).map_err(|_| Error::bad_data("more than 2^32 weight files"))?;
            if tensors.len().saturating_add(header.tensors.len()) > TENSORS_MAX {
                return Err(Error::bad_data(format!("more than {TENSORS_MAX} tensors")).in_file(&path));
            }
            let kept = header.tensors.into_iter().filter(|t| !is_pad(&t.name));
            tensors.extend(kept.map(|t| located(t, file_idx)));
            files.push(SourceFile { name, fingerprint: file.fingerprint()?, path });
        }
        tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name).then(a.file.cmp(&b.file)));
        tensors.shrink_to_fit();
        let (coded, open) = (BTreeMap::new(), Mutex::new(Vec::new()));
        Ok(Checkpoint { place, files, tensors, coded, warnings, open, zeroed: None })
    }

    /// Headers without files: tensors whose names, types and shapes are known from elsewhere. Nothing can be read of it.
    ///
    /// # Errors
    /// A name that is there twice.
    pub(crate) fn of_headers(place: Place, mut tensors: Vec<SourceTensor>) -> Result<Checkpoint> {
        tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let (coded, open, warnings) = (BTreeMap::new(), Mutex::new(Vec::new()), Vec::new());
        let this = Checkpoint { place, files: Vec::new(), tensors, coded, warnings, open, zeroed: None };
        this.check_unique()?;
        Ok(this)
    }

    /// The directory.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Weight files.
    pub fn files(&self) -> &[SourceFile] {
        &self.files
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    /// What was odd, but no reason to stop.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Place of a tensor in [`Checkpoint::tensors`].
    pub fn find(&self, name: &str) -> Option<usize> {
        self.tensors.binary_search_by(|t| (*t.name).cmp(name)).ok()
    }

    /// Fills `buf` with a tensor's bytes from `offset`.
    ///
    /// # Errors
    /// A range beyond the tensor, a tensor that is coded, a file that changed since it was opened, or what the
    /// operating system says; all name file and tensor.
    pub fn read(&self, tensor: &SourceTensor, offset: u64, buf: &mut [u8]) -> Result<()> {
        let inner = |buf: &mut [u8]| {
            if let Some(coded) = self.coded(&tensor.name) {
                let what =
                    format!("stored as {}: it has planes, but no bytes of its own", coded.codec.name());
                return Err(Error::bad_data(what).in_file(self.path_of(tensor)));
            }
            let end = offset.checked_add(buf.len() as u64).filter(|&end| end <= tensor.bytes());
            if end.is_none() {
                let (n, bytes) = (buf.len(), tensor.bytes());
                return Err(Error::bad_data(format!("{n} bytes from {offset} asked of a tensor of {bytes}")));
            }
            self.file(tensor.file)?.read_exact_at(tensor.start.saturating_add(offset), buf)?;
            self.zeroed.iter().for_each(|zeroed| zeroed.apply(tensor, offset, buf));
            Ok(())
        };
        inner(buf).map_err(|e: Error| e.in_tensor(&*tensor.name))
    }

    /// A tensor's bytes.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub fn bytes(&self, tensor: &SourceTensor) -> Result<Vec<u8>> {
        let mut bytes = zeroed(length(tensor)?).map_err(|e| e.in_tensor(&*tensor.name))?;
        self.read(tensor, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// The path of a tensor's file, for messages.
    pub fn path_of(&self, tensor: &SourceTensor) -> &Path {
        self.files.get(tensor.file as usize).map_or(Path::new(""), |f| &f.path)
    }

    /// Compares every file with what it was when the checkpoint was opened.
    ///
    /// # Errors
    /// `BadData` for the first file whose length or time of change differs.
    pub fn check_unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(|f| same(f, &InputFile::open(&f.path)?))
    }

    /// An open file; a few are kept open, because hundreds of shards would need too many descriptors.
    fn file(&self, idx: u32) -> Result<Arc<InputFile>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = open.iter().position(|(i, _)| *i == idx) {
            let hit = open.remove(at);
            let file = Arc::clone(&hit.1);
            open.push(hit);
            return Ok(file);
        }
        let source = self.files.get(idx as usize).ok_or_else(|| Error::bad_data("no such weight file"))?;
        let file = Arc::new(InputFile::open(&source.path)?);
        same(source, &file)?;
        if open.len() == OPEN_FILES_MAX {
            open.remove(0);
        }
        open.push((idx, Arc::clone(&file)));
        Ok(file)
    }

    /// No name twice; within one file the header has seen to it.
    fn check_unique(&self) -> Result<()> {
        let twice = self.tensors.windows(2).find_map(|pair| match pair {
            [a, b] if a.name == b.name => Some((a, b)),
            _ => None,
        });
        let Some((a, b)) = twice else { return Ok(()) };
        let other = self.path_of(a).file_name().unwrap_or_default().to_string_lossy().into_owned();
        Err(Error::bad_data(format!("this tensor is also in {other}"))
            .in_file(self.path_of(b))
            .in_tensor(&*b.name)
            .at_byte(b.start)
            .hint(
                "two releases may be mixed in one directory; fetch the checkpoint into an empty one, or say \
                 --allow-duplicate-identical if both are the same",
            ))
    }

    /// Compares the index with the headers.
    fn compare(&mut self, index: &Index) -> Result<()> {
        let mut wrong = Vec::new();
        for (name, file_idx) in index.entries() {
            let named = index.file(file_idx);
            match self.find(name).and_then(|i| self.tensors.get(i)) {
                Some(t) if t.file == file_idx => {}
                Some(t) => {
                    let really = self.files.get(t.file as usize).map_or("", |f| &f.name);
                    wrong.push(format!("{name} is in {really}, not in {named}"));
                }
                None => wrong.push(format!("{name} is not in {named}, nor in any other file")),
            }
        }
        if !wrong.is_empty() {
            let what = format!("the index is wrong about {} tensors:{}", wrong.len(), listed(&wrong));
            return Err(Error::bad_data(what)
                .in_file(index.path())
                .hint("fetch the index and the shards of the same revision"));
        }
        let unlisted: Vec<String> =
            self.tensors.iter().filter(|t| !index.names(&t.name)).map(|t| t.name.to_string()).collect();
        if !unlisted.is_empty() {
            let n = unlisted.len();
            let what = format!("{n} tensors are in the shards but not in the index:{}", listed(&unlisted));
            self.warnings.push(what);
        }
        Ok(())
    }
}

/// Lines of a list for a message, the first [`LISTED_MAX`] and a count of the rest.
pub(crate) fn listed(items: &[String]) -> String {
    let mut text: String = items.iter().take(LISTED_MAX).map(|i| format!("\n    {i}")).collect();
    if let Some(more) = items.len().checked_sub(LISTED_MAX).filter(|&n| n > 0) {
        text.push_str(&format!("\n    and {more} more"));
    }
    text
}

/// Bytes of a tensor as a length in memory.
pub(crate) fn length(tensor: &SourceTensor) -> Result<usize> {
    usize::try_from(tensor.bytes()).map_err(|_| {
        Error::bad_data(format!("{} bytes do not fit memory", tensor.bytes())).in_tensor(&*tensor.name)
    })
}

/// Memory for `n` values. A sparse file may truly be as long as its header says, and still no memory holds
/// it.
pub(crate) fn zeroed<T: Clone + Default>(n: usize) -> Result<Vec<T>> {
    const TRIED_BYTES: usize = 256 << 20;
    let bytes = n.saturating_mul(size_of::<T>());
    if bytes > TRIED_BYTES && Vec::<T>::new().try_reserve_exact(n).is_err() {
        return Err(Error::plan(format!("{bytes} bytes of memory are not to be had"))
            .hint("use a machine with more memory, if this size is what the release has"));
    }
    Ok(vec![T::default(); n])
}

fn located(info: TensorInfo, file: u32) -> SourceTensor {
    let TensorInfo { name, dtype, shape, start, end } = info;
    SourceTensor { name: name.into(), dtype, file, shape: shape.into(), start, end }
}

fn same(source: &SourceFile, file: &InputFile) -> Result<()> {
    let (was, is) = (source.fingerprint, file.fingerprint()?);
    if was == is {
        return Ok(());
    }
    let what = if was.bytes == is.bytes {
        "the source changed while it was being read: it was written again".to_owned()
    } else {
        format!("the source changed while it was being read: it had {} bytes, has {}", was.bytes, is.bytes)
    };
    Err(Error::bad_data(what).in_file(&source.path).hint("wait until the download is done, then run again"))
}

/// What the first bytes of a file that is no safetensors file say.
const MAGIC: &[(&[u8], &str)] = &[
    (
        b"PK\x03\x04",
        "this is a PyTorch pickle; convert it to safetensors elsewhere, it is never unpickled here",
    ),
    (b"GGUF", "this is a GGUF file under another name"),
    (b"<!DOCTYPE", "this is a web page; the download went wrong"),
    (b"<html", "this is a web page; the download went wrong"),
];

/// Adds what the file seems to be to the complaint about its header.
fn sniffed(file: &InputFile) -> impl FnOnce(Error) -> Error + '_ {
    move |error| {
        let mut start = [0; 16];
        let known = file
            .read_exact_at(0, &mut start)
            .ok()
            .and_then(|()| MAGIC.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, hint)| *hint));
        let Some(hint) = known else { return error };
        // What it is says more than what its first bytes would mean as a header length.
        Error::new(error.kind(), error.what()).in_file(file.path()).at_byte(0).hint(hint)
    }
}
