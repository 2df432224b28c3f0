//! The trunk of an export: copied, decoded to BF16, or, where a bundle coded it, moved into the words of the target.

use moepack_format::{Dtype, Error, PlaneSpec, Result};
use moepack_quant::minifloat::f32_to_bf16;

use super::scheme::Scheme;
use super::{Chunk, Content, Export, Form, Item, Slice, compressed, mlx};
use crate::catalog::TrunkTensor;
use crate::coded::{CodedPart, Origin};
use crate::model::FiniteCheck;
use crate::names::is_of_activations;
use crate::spec::Part;

/// Bytes copied at a time; whole numbers of any type.
pub(crate) const COPY_BYTES: u64 = 4 << 20;
/// Numbers decoded at a time.
const DECODED_MAX: usize = 8 << 20;

impl Export<'_> {
    /// Adds the trunk's tensors: those outside layers first, then layer by layer.
    pub(super) fn plan_trunk(&mut self) -> Result<()> {
        let mut order: Vec<usize> = (0..self.data.trunk_tensors().len()).collect();
        order.sort_by_key(|&at| self.tensor(at).map(|t| (t.layer, at)));
        let (mut n_decoded, mut n_static) = (0, 0);
        for at in order {
            let Some(tensor) = self.tensor(at) else { continue };
            if self.form != Form::Released && is_of_activations(&tensor.name) {
                n_static += 1;
                continue;
            }
            let encoded = self.data.trunk_encoded(tensor).filter(|_| self.form != Form::Released);
            let item = match encoded {
                Some(shape) if self.scheme_of(tensor)?.is_some() => self.moved_item(at, shape)?,
                Some(shape) => decoded_item(at, tensor, shape)?,
                // The scales of what is decoded.
                None if tensor.is_scale && self.form != Form::Released => continue,
                None => copied_item(at, tensor),
            };
            n_decoded += usize::from(matches!(item.content, Content::Decoded { .. }));
            self.items.push(item);
        }
        if n_decoded > 0 {
            self.notes.push(format!("{n_decoded} trunk tensors are decoded to BF16, which rounds"));
        }
        if n_static > 0 {
            self.notes.push(format!("{n_static} static scales of activations and caches are left out"));
        }
        Ok(())
    }

    /// How a trunk matrix that a bundle coded is written by this target, if it is.
    pub(super) fn scheme_of(&self, tensor: &TrunkTensor) -> Result<Option<Scheme>> {
        let (Some(codec), Some([rows, cols])) =
            (self.data.trunk_codec(tensor), self.data.trunk_encoded(tensor))
        else {
            return Ok(None);
        };
        let scheme = Scheme::of(&codec);
        let held = match self.form {
            Form::Compressed => compressed::refuses(scheme.as_ref(), [rows, cols]).is_none(),
            Form::Mlx => mlx::refuses(scheme.as_ref(), [rows, cols]).is_none(),
            _ => false,
        };
        Ok(scheme.filter(|_| held))
    }

    pub(super) fn tensor(&self, at: usize) -> Option<&TrunkTensor> {
        self.data.trunk_tensors().get(at)
    }

    pub(super) fn known(&self, at: usize) -> Result<&TrunkTensor> {
        self.tensor(at).ok_or_else(|| Error::bad_data("no such trunk tensor"))
    }

    fn moved_item(&self, at: usize, [rows, cols]: [u64; 2]) -> Result<Item> {
        let tensor = self.known(at)?;
        let codec = self.data.trunk_codec(tensor).unwrap_or_default();
        let stem = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
        let tensors = match (self.form, Scheme::of(&codec)) {
            (Form::Mlx, Some(scheme)) => mlx::tensors(&scheme, stem, None, [rows, cols]),
            (_, Some(scheme)) => compressed::tensors(&scheme, stem, [rows, cols]),
            _ => Vec::new(),
        };
        Ok(Item { tensors, n_slices: 1, content: Content::Moved { at } })
    }

    /// A coded trunk matrix like a part of an expert.
    pub(super) fn trunk_part(&self, at: usize) -> Result<CodedPart> {
        let tensor = self.known(at)?;
        let (codec, shape) = (self.data.trunk_codec(tensor), self.data.trunk_encoded(tensor));
        let [rows, cols] = shape.unwrap_or_default().map(|n| usize::try_from(n).unwrap_or(0));
        Ok(CodedPart {
            part: Part::Gate,
            codec: moepack_quant::codec(&codec.unwrap_or_default())?,
            rows,
            cols,
            planes: self.data.trunk_planes(tensor)?,
            source: Origin::default(),
        })
    }

    pub(super) fn moved(&self, at: usize) -> Result<Slice> {
        let (tensor, part) = (self.known(at)?, self.trunk_part(at)?);
        let bytes = if self.form == Form::Mlx { mlx::bytes(&part) } else { compressed::bytes(&part) };
        Ok(Slice::whole(bytes.map_err(|e| self.data.at_trunk(tensor, e))?))
    }

    pub(super) fn copied(&self, at: usize, slice: usize) -> Result<Slice> {
        let tensor = self.known(at)?;
        let offset = slice as u64 * COPY_BYTES;
        let n = tensor.bytes.saturating_sub(offset).min(COPY_BYTES);
        let mut bytes = vec![0; usize::try_from(n).unwrap_or(0)];
        self.data.read_raw(tensor, offset, &mut bytes)?;
        let mut finite = FiniteCheck::new(tensor.dtype);
        finite.look(&bytes);
        finite.finish().map_err(|e| self.data.at_trunk(tensor, e))?;
        Ok(Slice { chunks: vec![Chunk { tensor: 0, offset, bytes }], ..Slice::default() })
    }

    pub(super) fn decoded(
        &self,
        at: usize,
        [n_rows, cols]: [usize; 2],
        rows: usize,
        slice: usize,
    ) -> Result<Slice> {
        let first = slice.saturating_mul(rows);
        let last = first.saturating_add(rows).min(n_rows);
        let values = self.data.decode_trunk(self.known(at)?, first..last)?;
        let bytes = values.iter().flat_map(|v| f32_to_bf16(*v).to_le_bytes()).collect();
        let offset = 2 * first as u64 * cols as u64;
        Ok(Slice { chunks: vec![Chunk { tensor: 0, offset, bytes }], ..Slice::default() })
    }
}

impl Slice {
    /// Whole tensors, one after the other.
    pub(super) fn whole(tensors: Vec<Vec<u8>>) -> Slice {
        let chunk = |(tensor, bytes)| Chunk { tensor, offset: 0, bytes };
        Slice { chunks: tensors.into_iter().enumerate().map(chunk).collect(), ..Slice::default() }
    }
}

fn copied_item(at: usize, tensor: &TrunkTensor) -> Item {
    let n_slices = usize::try_from(tensor.bytes.div_ceil(COPY_BYTES)).unwrap_or(usize::MAX);
    let tensors = vec![PlaneSpec::new(&tensor.name, tensor.dtype, &tensor.shape)];
    Item { tensors, n_slices, content: Content::Copied(at) }
}

/// Packed numbers have another shape than what they mean; vectors keep theirs.
fn decoded_item(at: usize, tensor: &TrunkTensor, shape: [u64; 2]) -> Result<Item> {
    let too_large = |_| Error::bad_data("larger than memory can be").in_tensor(&tensor.name);
    let [rows, cols] =
        [usize::try_from(shape[0]).map_err(too_large)?, usize::try_from(shape[1]).map_err(too_large)?];
    let at_once = (DECODED_MAX / cols.max(1)).max(1);
    let name = match tensor.name.strip_suffix(".weight_packed").or(tensor.name.strip_suffix(".qweight")) {
        Some(stem) => format!("{stem}.weight"),
        None => tensor.name.clone(),
    };
    let tensors = vec![PlaneSpec::new(&name, Dtype::Bf16, &shape)];
    let content = Content::Decoded { at, shape: [rows, cols], rows: at_once };
    Ok(Item { tensors, n_slices: rows.div_ceil(at_once), content })
}
