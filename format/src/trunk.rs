//! Trunk files: every tensor that is no routed expert, in plain safetensors files that may be mapped.
//!
//! Each tensor starts at a multiple of 256; gaps are tensors `__pad__.N`. Names, types and shapes are known before
//! the first byte, so the header is written first and everything is written and hashed in one pass.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::PlaneSpec;
use crate::atomic::AtomicFile;
use crate::bank::{FILE_VERSION, INDEX, check_file_version};
use crate::error::{Context, Error, Result};
use crate::file::{InputFile, check_sha256, hex};
use crate::layout::{TENSOR_ALIGN, TensorList, align_up, header_bytes, is_pad};
use crate::limits::DIMS_MAX;
use crate::safetensors::{Header, METADATA, check_name};

/// Shapes `[rows, cols]` of the matrices whose planes a trunk file has, by tensor name.
pub type Shapes = BTreeMap<String, [u64; 2]>;

/// The key of the string table that has them, as JSON; absent where there are none.
const SHAPES: &str = "shapes";

/// What `format` says in a trunk file's string table.
pub const TRUNK_FORMAT: &str = "moepack.trunk";

/// Where a trunk is split unless something else is asked for: what hubs like to serve.
pub const TRUNK_BYTES_DEFAULT: u64 = 5_000_000_000;

/// The file name of the `nth` trunk file, from 1, of `count`.
pub fn trunk_name(nth: usize, count: usize) -> String {
    format!("trunk-{nth:05}-of-{count:05}.safetensors")
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSummary {
    /// File name without directory.
    pub file: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// SHA-256 of the file.
    pub sha256: String,
    /// Bytes of all tensors but the pads.
    pub payload_bytes: u64,
    /// Bytes of all pads.
    pub padding_bytes: u64,
    /// CRC-32C of the header, 8 hex digits.
    #[serde(default)]
    pub header_crc32c: String,
    /// CRC-32C of each tensor that is no pad, in order, 8 hex digits each.
    #[serde(default)]
    pub crc32c: String,
}

/// Splits tensors, in order, into files of at most `bytes_max`; a tensor that is larger gets its own.
///
/// # Errors
/// A size beyond 64 bits.
pub fn split_trunk(tensors: &[PlaneSpec], bytes_max: u64) -> Result<Vec<Range<usize>>> {
    let mut files = Vec::new();
    let (mut first, mut total) = (0, 0_u64);
    for (i, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.bytes().and_then(|n| align_up(n, TENSOR_ALIGN)).in_tensor(&tensor.name)?;
        if i > first && total.saturating_add(bytes) > bytes_max {
            files.push(first..i);
            (first, total) = (i, 0);
        }
        total = total.saturating_add(bytes);
    }
    if first < tensors.len() {
        files.push(first..tensors.len());
    }
    Ok(files)
}

/// A trunk file that is being written. Tensors come in the order in which they were announced.
#[derive(Debug)]
pub struct TrunkWriter {
    file: AtomicFile,
    hash: Sha256,
    list: TensorList,
    data_offset: u64,
    /// Place in `list` of the tensor that is being written.
    current: usize,
    payload_bytes: u64,
    header_crc32c: u32,
    /// Of the current tensor so far.
    crc32c: u32,
    /// Digits of those before.
    crc32cs: String,
}

impl TrunkWriter {
    /// Starts a file of these tensors (a plane's spec is just a name, a dtype and a shape).
    ///
    /// # Errors
    /// Names that are reserved or used twice, impossible shapes, or what the operating system says.
    pub fn create(path: &Path, tensors: &[PlaneSpec]) -> Result<TrunkWriter> {
        TrunkWriter::create_coded(path, tensors, &Shapes::new())
    }

    /// Starts a file some of whose tensors are planes of coded matrices, which have these shapes.
    ///
    /// # Errors
    /// As [`TrunkWriter::create`].
    pub fn create_coded(path: &Path, tensors: &[PlaneSpec], shapes: &Shapes) -> Result<TrunkWriter> {
        let (list, json, data_offset) = head(tensors, shapes).in_file(path)?;
        let file = AtomicFile::create(path)?;
        let header = header_bytes(&json, data_offset)?;
        let mut new = TrunkWriter {
            file,
            hash: Sha256::new(),
            list,
            data_offset,
            current: 0,
            payload_bytes: 0,
            header_crc32c: crc32c::crc32c(&header),
            crc32c: 0,
            crc32cs: String::new(),
        };
        new.append(&header)?;
        new.skip_finished()?;
        Ok(new)
    }

    /// Appends bytes of the tensor `name`, which may come in any number of chunks.
    ///
    /// # Errors
    /// Another tensor is due, more bytes than it has, or a failed write.
    pub fn write(&mut self, name: &str, chunk: &[u8]) -> Result<()> {
        let at = self.file.position();
        let due = self.list.tensors().get(self.current).map(|(t, _, end)| (t.name.as_str(), *end));
        let Some((_, end)) = due.filter(|(due, _)| *due == name) else {
            let what = format!("{name:?} is written, expected {:?}", due.map(|(due, _)| due));
            return Err(Error::bad_data(what).in_file(self.file.path()).at_byte(at));
        };
        let left = end.saturating_add(self.data_offset).saturating_sub(at);
        if chunk.len() as u64 > left {
            let what = format!("{} bytes are written, but {left} are left", chunk.len());
            return Err(Error::bad_data(what).in_file(self.file.path()).in_tensor(name).at_byte(at));
        }
        self.append(chunk)?;
        self.crc32c = crc32c::crc32c_append(self.crc32c, chunk);
        self.payload_bytes = self.payload_bytes.saturating_add(chunk.len() as u64);
        self.skip_finished()
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// Tensors that were not written whole, or a failed write.
    pub fn finish(self) -> Result<FileSummary> {
        self.finish_as(None)
    }

    /// The same; with the SHA-256 that the file is known to have, it appears only if it has that.
    ///
    /// # Errors
    /// As [`TrunkWriter::finish`]; another hash.
    pub fn finish_as(self, sha256: Option<&str>) -> Result<FileSummary> {
        let path = self.file.path();
        if let Some((tensor, ..)) = self.list.tensors().get(self.current) {
            return Err(Error::bad_data("not written whole").in_file(path).in_tensor(&tensor.name));
        }
        let file = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let summary = FileSummary {
            file,
            bytes: self.file.position(),
            sha256: hex(&self.hash.finalize()),
            payload_bytes: self.payload_bytes,
            padding_bytes: self.list.padding_bytes(),
            header_crc32c: hex(&self.header_crc32c.to_be_bytes()),
            crc32c: self.crc32cs,
        };
        check_sha256(&summary.sha256, sha256).in_file(path)?;
        self.file.commit()?;
        Ok(summary)
    }

    /// Moves on to the next tensor that has bytes left to come, writing pads on the way.
    fn skip_finished(&mut self) -> Result<()> {
        while let Some((tensor, start, end)) = self.list.tensors().get(self.current) {
            if is_pad(&tensor.name) {
                let zeros = [0; TENSOR_ALIGN as usize];
                let gap = end.saturating_sub(*start) as usize;
                self.append(zeros.get(..gap).unwrap_or(&zeros))?;
            } else if self.file.position() < end.saturating_add(self.data_offset) {
                return Ok(());
            } else {
                self.crc32cs.push_str(&hex(&self.crc32c.to_be_bytes()));
                self.crc32c = 0;
            }
            self.current = self.current.saturating_add(1);
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.file.append(bytes)
    }
}

/// Bytes of the file that [`TrunkWriter`] makes of these tensors and shapes.
///
/// # Errors
/// Those of [`TrunkWriter::create`], but for the operating system's.
pub fn trunk_file_bytes(tensors: &[PlaneSpec], shapes: &Shapes) -> Result<u64> {
    let (list, _, data_offset) = head(tensors, shapes)?;
    Ok(data_offset.saturating_add(list.end()))
}

/// Where the tensors lie, the header's JSON, and where the data start.
fn head(tensors: &[PlaneSpec], shapes: &Shapes) -> Result<(TensorList, String, u64)> {
    let list = lay_out(tensors)?;
    let entries = [("format", TRUNK_FORMAT), ("format_version", FILE_VERSION)];
    let mut strings: BTreeMap<_, _> = entries.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    if !shapes.is_empty() {
        let json = serde_json::to_string(shapes).map_err(|e| Error::bad_data(format!("shapes: {e}")))?;
        strings.insert(SHAPES.to_owned(), json);
    }
    let json = list.json(&strings)?;
    let data_offset = align_up((json.len() as u64).saturating_add(8), TENSOR_ALIGN)?;
    Ok((list, json, data_offset))
}

fn lay_out(tensors: &[PlaneSpec]) -> Result<TensorList> {
    let mut list = TensorList::default();
    let mut names = BTreeSet::new();
    for (i, tensor) in tensors.iter().enumerate() {
        check_name(&tensor.name, i)?;
        check_tensor(tensor, names.insert(&tensor.name)).in_tensor(&tensor.name)?;
        list.pad_to(TENSOR_ALIGN)?;
        list.push(tensor.clone())?;
    }
    Ok(list)
}

fn check_tensor(tensor: &PlaneSpec, is_new: bool) -> Result<()> {
    let name = &tensor.name;
    if !is_new {
        return Err(Error::bad_data("this name is used twice"));
    }
    if is_pad(name) || name == INDEX || name == METADATA {
        return Err(Error::bad_data("this name is reserved in bundles"));
    }
    let n_dims = tensor.shape.len();
    if n_dims > DIMS_MAX {
        return Err(Error::bad_data(format!("{n_dims} dimensions, expected at most {DIMS_MAX}")));
    }
    Ok(())
}

/// A trunk file, open for reading.
#[derive(Clone, Debug)]
pub struct TrunkFile {
    /// The file.
    pub file: InputFile,
    /// Its header; pads are among the tensors.
    pub header: Header,
}

impl TrunkFile {
    /// Opens and checks a trunk file.
    ///
    /// # Errors
    /// `BadData` if it is none, or of a version that is not ours to read.
    pub fn open(path: &Path) -> Result<TrunkFile> {
        let file = InputFile::open(path)?;
        let header = Header::read(&file)?;
        check_file_version(&header.metadata, TRUNK_FORMAT).in_file(path)?;
        Ok(TrunkFile { file, header })
    }

    /// Shapes of the matrices whose planes the file has.
    ///
    /// # Errors
    /// `BadData` if the string table has no such JSON.
    pub fn shapes(&self) -> Result<Shapes> {
        let Some(text) = self.header.metadata.get(SHAPES) else { return Ok(Shapes::new()) };
        serde_json::from_str(text)
            .map_err(|e| Error::bad_data(format!("{SHAPES:?} of the string table: {e}")))
            .in_file(self.file.path())
    }

    /// Start and end of every pad of the file.
    pub fn pads(&self) -> impl Iterator<Item = (u64, u64)> {
        self.header.tensors.iter().filter(|t| is_pad(&t.name)).map(|t| (t.start, t.end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    fn specs() -> Vec<PlaneSpec> {
        vec![
            PlaneSpec::new("empty", Dtype::F32, &[0, 3]),
            PlaneSpec::new("a", Dtype::U8, &[300]),
            PlaneSpec::new("b", Dtype::F32, &[2, 2]),
            PlaneSpec::new("none", Dtype::F32, &[0]),
            PlaneSpec::new("scalar", Dtype::Bf16, &[]),
            PlaneSpec::new("last", Dtype::F32, &[0]),
        ]
    }

    #[test]
    fn what_is_written_opens_in_the_stock_reader() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(trunk_name(1, 1));
        let mut w = TrunkWriter::create(&path, &specs()).unwrap();
        let a: Vec<u8> = (0..300).map(|i| i as u8).collect();
        w.write("a", &a[..100]).unwrap();
        w.write("a", &a[100..]).unwrap();
        w.write("b", &[7; 16]).unwrap();
        w.write("scalar", &[1, 2]).unwrap();
        let summary = w.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(summary.bytes, bytes.len() as u64);
        assert_eq!(trunk_file_bytes(&specs(), &Shapes::new()), Ok(summary.bytes));
        assert_eq!((summary.payload_bytes, summary.padding_bytes), (318, 212 + 240 + 254));
        let stock = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(stock.tensor("a").unwrap().data(), a);
        assert_eq!(stock.tensor("b").unwrap().shape(), [2, 2]);
        assert_eq!(stock.tensor("scalar").unwrap().data(), [1, 2]);
        assert_eq!(stock.tensor("empty").unwrap().shape(), [0, 3]);
        let ours = TrunkFile::open(&path).unwrap();
        assert_eq!(ours.file.sha256(&|| false).unwrap(), summary.sha256);
        assert!(specs().iter().all(|s| ours.header.get(&s.name).unwrap().start.is_multiple_of(TENSOR_ALIGN)));
        assert_eq!(ours.pads().count(), 3);
    }

    #[test]
    fn shapes_of_coded_matrices_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(trunk_name(1, 1));
        let specs = [PlaneSpec::new("q.codes", Dtype::U8, &[3])];
        let shapes = Shapes::from([("q".to_owned(), [2, 3])]);
        let mut w = TrunkWriter::create_coded(&path, &specs, &shapes).unwrap();
        w.write("q.codes", &[1, 2, 3]).unwrap();
        let summary = w.finish().unwrap();
        assert_eq!(trunk_file_bytes(&specs, &shapes), Ok(summary.bytes));
        assert_eq!(TrunkFile::open(&path).unwrap().shapes(), Ok(shapes));
    }

    #[test]
    fn tensors_come_whole_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        let mut w = TrunkWriter::create(&path, &specs()).unwrap();
        let e = w.write("b", &[0]).unwrap_err();
        assert_eq!(e.what(), r#""b" is written, expected Some("a")"#);
        let e = w.write("a", &[0; 301]).unwrap_err();
        assert_eq!(e.what(), "301 bytes are written, but 300 are left");
        w.write("a", &[0; 299]).unwrap();
        let e = w.finish().unwrap_err();
        assert_eq!((e.what(), e.tensor()), ("not written whole", Some("a")));
        assert!(!path.exists());
    }

    #[test]
    fn names_that_cannot_be_stored() {
        let refuse = |names: &[&str], what: &str| {
            let specs: Vec<_> = names.iter().map(|n| PlaneSpec::new(n, Dtype::U8, &[1])).collect();
            let e = TrunkWriter::create(Path::new("/nowhere/t"), &specs).unwrap_err();
            assert_eq!(e.what(), what);
        };
        refuse(&["a", "b", "a"], "this name is used twice");
        refuse(&["__pad__.7"], "this name is reserved in bundles");
        refuse(&["__metadata__"], "this name is reserved in bundles");
        refuse(&[""], "a tensor without a name");
    }

    #[test]
    fn splits_where_the_limit_is() {
        let t = |n: u64| PlaneSpec::new("t", Dtype::U8, &[n]);
        let tensors = [t(256), t(1), t(256), t(5000), t(1)];
        assert_eq!(split_trunk(&tensors, 512).unwrap(), [0..2, 2..3, 3..4, 4..5]);
        assert_eq!(split_trunk(&tensors, u64::MAX).unwrap().len(), 1);
        assert!(split_trunk(&[], 1).unwrap().is_empty());
    }
}
