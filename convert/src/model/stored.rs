//! A stored matrix read as the planes of its codec, with everything that gives its numbers meaning looked at.

use moepack_format::Result;
use moepack_quant::Planes;

use super::{Model, to_usize};
use crate::checkpoint::{SourceTensor, zeroed};
use crate::encoding::{Encoded, Encoding, Holding, check_contents};
use crate::names::Companion;
use crate::packing::{Packing, Raw};

/// Bytes looked at at a time; whole elements of any width.
const CHUNK_BYTES: u64 = 4 << 20;

impl Model {
    /// The planes of a matrix; of expert `which` where tensors hold several. Rows and columns are as they are stored.
    pub(super) fn planes(
        &self,
        encoded: &Encoded<'_>,
        encoding: &Encoding<'_>,
        holding: Holding,
        which: usize,
    ) -> Result<Planes> {
        let (rows, cols) = (to_usize(holding.rows)?, to_usize(holding.cols)?);
        self.check_companions(encoded, Some((encoding, holding)), which)?;
        let raw = encoding.sources.iter().map(|tensor| self.slice(tensor, holding.n, which));
        let planes = raw.collect::<Result<Planes>>()?;
        if encoding.packing == Packing::AsPlanes {
            return Ok(planes);
        }
        let (n, asym) = (n_groups(encoding, rows, cols)?, encoded.get(Companion::Zero).is_some());
        let scale_bytes = encoding.sources.get(1).map_or(0, |s| s.dtype.bits() as usize / 8);
        encoding.packing.planes(Raw { planes, rows, cols, n, asym, scale_bytes })
    }

    /// Looks at the scales, group indices and shapes beside a tensor's numbers.
    ///
    /// # Errors
    /// The first that gives them no meaning, with tensor, file and place.
    pub(super) fn check_companions(
        &self,
        encoded: &Encoded<'_>,
        known: Option<(&Encoding<'_>, Holding)>,
        which: usize,
    ) -> Result<()> {
        let n = known.and_then(|(_, holding)| holding.n);
        let shape = known.map(|(_, holding)| [holding.rows, holding.cols]);
        let groups = match known {
            Some((encoding, h)) if encoding.packing != Packing::AsPlanes => {
                Some(n_groups(encoding, to_usize(h.rows)?, to_usize(h.cols)?)? as u64)
            }
            _ => None,
        };
        for (companion, tensor) in encoded.companions() {
            self.chunks(tensor, n, which, |first, bytes| {
                check_contents(*companion, tensor, (first, bytes), groups, shape)
                    .map_err(|e| e.in_file(self.checkpoint.path_of(tensor)))
            })?;
        }
        Ok(())
    }

    /// The elements of a slice in pieces that memory holds: the scales of a table may be longer than that.
    fn chunks(
        &self,
        tensor: &SourceTensor,
        n: Option<u64>,
        which: usize,
        mut look: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let bytes = tensor.bytes() / n.unwrap_or(1).max(1);
        let width = (tensor.dtype.bits() / 8).max(1);
        let start = if n.is_some() { bytes * which as u64 } else { 0 };
        let mut at = 0;
        while at < bytes {
            let mut chunk = zeroed(to_usize((bytes - at).min(CHUNK_BYTES))?)?;
            self.checkpoint.read(tensor, start + at, &mut chunk)?;
            look((start + at) / width, &chunk)?;
            at += chunk.len() as u64;
        }
        Ok(())
    }

    /// The bytes of one of `n` equal slices of a tensor, or of all of it.
    fn slice(&self, tensor: &SourceTensor, n: Option<u64>, which: usize) -> Result<Vec<u8>> {
        let Some(n) = n else { return self.checkpoint.bytes(tensor) };
        let bytes = tensor.bytes() / n.max(1);
        let mut slice = zeroed(to_usize(bytes)?).map_err(|e| e.in_tensor(&*tensor.name))?;
        self.checkpoint.read(tensor, bytes * which as u64, &mut slice)?;
        Ok(slice)
    }
}

/// Groups of a row: columns of the codec's second plane.
fn n_groups(encoding: &Encoding<'_>, rows: usize, cols: usize) -> Result<usize> {
    let planes = encoding.codec.planes(rows, cols)?;
    to_usize(planes.get(1).and_then(|p| p.shape.get(1)).copied().unwrap_or(0))
}
