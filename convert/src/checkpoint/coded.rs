//! Matrices of a bundle's trunk that are stored in the planes of a codec. Among the tensors each stands under its own
//! name and shape, as the f32 matrix that it decodes to, and its planes are no tensors any more.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use moepack_format::trunk::{Shapes, TrunkFile};
use moepack_format::{Dtype, Error, Result};
use moepack_quant::{CodecRef, codec};

use super::{Checkpoint, Place, SourceTensor};

/// How a matrix of the trunk is stored.
#[derive(Clone, Debug)]
pub struct CodedTensor {
    /// The codec of its planes.
    pub codec: CodecRef,
    /// In the codec's order.
    pub planes: Vec<SourceTensor>,
}

impl Checkpoint {
    /// The trunk files of a bundle in `dir`, as if they were a checkpoint without experts. `codecs` are those of the
    /// matrices that are coded.
    ///
    /// # Errors
    /// As [`Checkpoint::of_files`]; an unknown codec, a matrix without its shape or one of its planes.
    pub fn of_trunk(dir: &Path, names: Vec<String>, codecs: &BTreeMap<String, String>) -> Result<Checkpoint> {
        let mut this = Checkpoint::of_files(Place::find(dir)?, names, Vec::new())?;
        if codecs.is_empty() {
            return Ok(this);
        }
        let mut shapes = Shapes::new();
        for file in &this.files {
            shapes.extend(TrunkFile::open(&file.path)?.shapes()?);
        }
        let join = |(name, codec): (&String, &String)| {
            let joined = this.join(name, codec, shapes.get(name).copied());
            joined.map_err(|e| e.in_tensor(name.as_str()).in_file(dir))
        };
        let joined = codecs.iter().map(join).collect::<Result<Vec<_>>>()?;
        let planes = joined.iter().flat_map(|(_, coded)| &coded.planes);
        let planes: BTreeSet<Box<str>> = planes.map(|plane| plane.name.clone()).collect();
        this.tensors.retain(|t| !planes.contains(&t.name));
        for (tensor, coded) in joined {
            this.coded.insert(tensor.name.clone(), coded);
            this.tensors.push(tensor);
        }
        this.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        this.check_unique()?;
        Ok(this)
    }

    /// How this tensor is stored, if it is coded.
    pub fn coded(&self, name: &str) -> Option<&CodedTensor> {
        self.coded.get(name)
    }

    /// A matrix made of its planes.
    fn join(
        &self,
        name: &str,
        codec_name: &str,
        shape: Option<[u64; 2]>,
    ) -> Result<(SourceTensor, CodedTensor)> {
        let codec = codec(codec_name).map_err(|e| {
            Error::bad_data(e.what()).hint("a later version of moepack may have written this")
        })?;
        let no_shape = || Error::bad_data(format!("stored as {codec_name}, but no trunk file has its shape"));
        let shape = shape.ok_or_else(no_shape)?;
        let [Ok(rows), Ok(cols)] = shape.map(usize::try_from) else {
            return Err(Error::bad_data(format!("a matrix {shape:?} is larger than memory can be")));
        };
        // The lengths of planes are compared by the decoder, since some codecs have none that shapes tell.
        let specs = codec.planes(rows, cols).map_err(|e| Error::bad_data(e.what()))?;
        let planes = specs.iter().map(|spec| {
            let plane = format!("{name}.{}", spec.name);
            let found =
                self.find(&plane).and_then(|at| self.tensors.get(at)).filter(|t| t.dtype == spec.dtype);
            found.cloned().ok_or_else(|| {
                let dtype = spec.dtype.name();
                Error::bad_data(format!("stored as {codec_name}, but there is no {plane} of {dtype}"))
            })
        });
        let planes = planes.collect::<Result<Vec<SourceTensor>>>()?;
        let bytes = planes.iter().fold(0, |n: u64, plane| n.saturating_add(plane.bytes()));
        let (file, start) = planes.first().map_or((0, 0), |plane| (plane.file, plane.start));
        let tensor = SourceTensor {
            name: name.into(),
            dtype: Dtype::F32,
            file,
            shape: shape.into(),
            start,
            end: start.saturating_add(bytes),
        };
        Ok((tensor, CodedTensor { codec, planes }))
    }
}
