//! Laying tensors out in a safetensors file with alignment: every gap becomes a tensor of zeros.
//!
//! A stock reader wants the data without holes, a paged reader wants them aligned; tensors named `__pad__.N`
//! reconcile the two.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::PlaneSpec;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::safetensors::METADATA;

/// Planes and trunk tensors start at multiples of this: the widest vector and cache line pair there is.
pub const TENSOR_ALIGN: u64 = 256;

const PAD: &str = "__pad__.";

/// The name of the `n`-th pad of a file.
pub fn pad_name(n: u64) -> String {
    format!("{PAD}{n}")
}

/// Whether a tensor of this name only fills a gap.
pub fn is_pad(name: &str) -> bool {
    name.strip_prefix(PAD).is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// The smallest multiple of `align`, a power of two, that is not below `n`.
///
/// # Errors
/// A result beyond 64 bits.
pub fn align_up(n: u64, align: u64) -> Result<u64> {
    let up = n.checked_add(align.saturating_sub(1)).map(|n| n & !align.saturating_sub(1));
    up.ok_or_else(|| Error::bad_data(format!("{n} aligned to {align} is beyond 2^64")))
}

/// The tensors of a file that is being laid out, offsets counted from the end of the header.
#[derive(Debug, Default)]
pub(crate) struct TensorList {
    tensors: Vec<(PlaneSpec, u64, u64)>,
    n_pads: u64,
    end: u64,
    padding_bytes: u64,
}

impl TensorList {
    /// Adds a tensor at the end.
    pub(crate) fn push(&mut self, spec: PlaneSpec) -> Result<()> {
        let start = self.end;
        let end =
            spec.bytes().and_then(|n| start.checked_add(n).ok_or_else(|| Error::bad_data("beyond 2^64")));
        self.end = end.map_err(|e| e.in_tensor(&spec.name))?;
        self.tensors.push((spec, start, self.end));
        Ok(())
    }

    /// Fills up to a multiple of `align`; returns the bytes of the pad.
    pub(crate) fn pad_to(&mut self, align: u64) -> Result<u64> {
        let gap = align_up(self.end, align)?.saturating_sub(self.end);
        if gap > 0 {
            self.push(PlaneSpec::new(&pad_name(self.n_pads), Dtype::U8, &[gap]))?;
            self.n_pads = self.n_pads.saturating_add(1);
            self.padding_bytes = self.padding_bytes.saturating_add(gap);
        }
        Ok(gap)
    }

    /// First byte behind the last tensor.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Bytes of all pads together.
    pub(crate) fn padding_bytes(&self) -> u64 {
        self.padding_bytes
    }

    /// Tensors with their first byte and the first behind, in order, pads among them.
    pub(crate) fn tensors(&self) -> &[(PlaneSpec, u64, u64)] {
        &self.tensors
    }

    /// The header's JSON without padding.
    pub(crate) fn json(&self, metadata: &BTreeMap<String, String>) -> Result<String> {
        let mut out = format!("{{{}:{}", text(METADATA)?, text(metadata)?);
        for (spec, start, end) in &self.tensors {
            let (name, dtype, shape) = (text(&spec.name)?, spec.dtype.name(), text(&spec.shape)?);
            let entry = format_args!(
                r#",{name}:{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#
            );
            // Writing to a String cannot fail.
            let _ = out.write_fmt(entry);
        }
        out.push('}');
        Ok(out)
    }
}

/// The eight bytes of length and the JSON, padded with spaces so that data start at `data_offset`.
///
/// # Errors
/// A JSON that does not fit.
pub(crate) fn header_bytes(json: &str, data_offset: u64) -> Result<Vec<u8>> {
    let fits = usize::try_from(data_offset).ok().filter(|&n| json.len().saturating_add(8) <= n);
    let total = fits.ok_or_else(|| Error::bad_data("the header does not fit in front of the data"))?;
    let mut out = data_offset.saturating_sub(8).to_le_bytes().to_vec();
    out.extend_from_slice(json.as_bytes());
    out.resize(total, b' ');
    Ok(out)
}

fn text(value: impl serde::Serialize) -> Result<String> {
    serde_json::to_string(&value).map_err(|e| Error::bad_data(format!("cannot write JSON: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safetensors::Header;

    #[test]
    fn up_to_the_next_multiple() {
        assert_eq!(align_up(0, 256), Ok(0));
        assert_eq!(align_up(1, 256), Ok(256));
        assert_eq!(align_up(256, 256), Ok(256));
        assert!(align_up(u64::MAX, 256).is_err());
    }

    #[test]
    fn pads_are_told_from_tensors() {
        assert!(is_pad("__pad__.0") && is_pad("__pad__.17"));
        assert!(!is_pad("__pad__.") && !is_pad("__pad__.x") && !is_pad("pad.0"));
    }

    #[test]
    fn what_is_laid_out_can_be_read() {
        let mut list = TensorList::default();
        list.push(PlaneSpec::new("odd \"name\"\n", Dtype::U8, &[3])).unwrap();
        assert_eq!(list.pad_to(256), Ok(253));
        assert_eq!(list.pad_to(256), Ok(0));
        list.push(PlaneSpec::new("b", Dtype::F32, &[2, 2])).unwrap();
        let meta = BTreeMap::from([("k".to_owned(), "v".to_owned())]);
        let bytes = header_bytes(&list.json(&meta).unwrap(), 512).unwrap();
        assert_eq!(bytes.len(), 512);
        let header = Header::parse(&bytes[8..], 512, 512 + list.end()).unwrap();
        assert_eq!(header.metadata, meta);
        let names: Vec<_> = header.tensors.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["odd \"name\"\n", "__pad__.0", "b"]);
        assert!(header_bytes("{}      ", 15).is_err());
    }
}
