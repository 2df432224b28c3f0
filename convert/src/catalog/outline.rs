//! The tensors of a checkpoint whose weight files are not there, as config.json and the names say they must be: enough to
//! plan by.
//!
//! What stands beside the numbers tells how they are stored, as it does when headers are there; where headers would leave
//! no choice and names do, config.json decides, and what it leaves open is what releases do.

use std::borrow::Cow;

use moepack_format::{Dtype, Error, Result};

use super::{Claim, Claims, Source, matrix};
use crate::checkpoint::SourceTensor;
use crate::encoding::{BITS_DEFAULT, Encoded, Hints, MX_COLS, NV_COLS, words_of};
use crate::family::{AttentionRule, Rule};
use crate::names::{Companion, is_blocks, is_packed};
use crate::spec::Role;

/// What config.json says of storage beside [`Hints`].
#[derive(Clone, Copy, Debug)]
pub struct Storage {
    /// Of what is not quantized (`dtype`, `torch_dtype`).
    pub plain: Dtype,
    /// Routed experts are FP4 pairs in bytes (`expert_dtype: fp4`).
    pub fp4_experts: bool,
    /// Scales are powers of two (`scale_fmt: ue8m0`).
    pub e8m0: bool,
    /// How scales of FP8 lie where `weight_block_size` is missing.
    pub scales: Scales,
    /// Integers have a byte each (`format: int-quantized`).
    pub int_bytes: bool,
    /// Bytes of all tensors, as the index says.
    pub total_bytes: Option<u64>,
}

/// How scales of FP8 lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// One a row, in F32.
    Rows,
    /// One a row, as compressed-tensors has them: of the dtype of what is not quantized.
    OfRows,
    /// One for so many rows and columns, of the same dtype.
    Blocks([u64; 2]),
    /// One for 32 columns, powers of two.
    Mx,
    /// One a matrix, a vector of one number.
    One,
    /// One a matrix, a scalar.
    Scalar,
}

/// The tensors of `source.checkpoint`, of which only names are known, with dtypes and shapes.
///
/// # Errors
/// Names in an encoding that only headers tell.
pub(crate) fn outline(source: Source<'_>, storage: Storage) -> Result<Vec<SourceTensor>> {
    let claims = Claims::of(source);
    let mut all = source.checkpoint.tensors().to_vec();
    let mut carried = None;
    for (at, claim, tensor) in claims.each().filter(|(at, _, _)| !claims.is_scale(*at)) {
        let Some(held) = claims.held(claim, tensor, storage.plain) else {
            carried = carried.or(matches!(claim, Claim::Carried(_)).then_some(at));
            set(&mut all, &tensor.name, Dtype::U8, &[0]);
            continue;
        };
        for (name, dtype, shape) in stored(&claims.encoded(tensor), &held, source.hints, storage)? {
            set(&mut all, &name, dtype, &shape);
        }
    }
    drop_companions_of_carried(&claims, &mut all);
    // What nobody knows the shape of is what the index has beyond the rest.
    let known: u64 = all.iter().map(SourceTensor::bytes).sum();
    if let (Some(at), Some(total)) = (carried, storage.total_bytes) {
        let name = source.checkpoint.tensors().get(at).map(|t| t.name.clone()).unwrap_or_default();
        set(&mut all, &name, Dtype::U8, &[total.saturating_sub(known)]);
    }
    Ok(all)
}

/// What a tensor holds.
struct Held {
    /// Matrices along the first axis.
    n: Option<u64>,
    /// Lengths of what it decodes to.
    shape: Vec<u64>,
    dtype: Dtype,
    is_expert: bool,
}

impl Claims<'_> {
    fn held(&self, claim: Claim, tensor: &SourceTensor, plain: Dtype) -> Option<Held> {
        match claim {
            Claim::Trunk(rule, ..) => {
                let compressed = matches!(self.source.family.attention, AttentionRule::Compressed(_));
                let dtype = match rule.role {
                    role if role.is_table() => Dtype::I64,
                    // gpt-oss has them as everything else.
                    Role::Sinks if !compressed => plain,
                    role => dtype_of(role, plain),
                };
                Some(Held {
                    n: None,
                    shape: self.decoded(claim, &self.with_rows(claim, tensor))?,
                    dtype,
                    is_expert: false,
                })
            }
            Claim::Expert { piece, layer, .. } => {
                let moe = self.source.spec.moe(layer)?;
                let n = piece.n_stacked(moe.n_experts);
                let lengths = piece.lengths(piece.dims(moe, self.source.spec.hidden), piece.transposed);
                let (n, shape) = match piece.flat {
                    true => (None, piece.stacked(n, &lengths)),
                    false => (n, lengths),
                };
                Some(Held { n, shape, dtype: plain, is_expert: true })
            }
            _ => None,
        }
    }

    /// The tensor with as many rows as only config.json's arithmetic says, where that is so.
    fn with_rows<'t>(&self, claim: Claim, tensor: &'t SourceTensor) -> Cow<'t, SourceTensor> {
        let Claim::Trunk(Rule { role: Role::NgramPart(_), .. }, Some(layer), part) = claim else {
            return Cow::Borrowed(tensor);
        };
        let ngrams = self.source.spec.layers.get(layer).and_then(|l| l.ngrams.as_ref());
        let rows = ngrams.map(|n| n.rows_of_part(part.unwrap_or(0)));
        Cow::Owned(SourceTensor { shape: rows.into_iter().collect(), ..tensor.clone() })
    }
}

/// Puts the axis of experts before a shape.
type Stacked<'a> = &'a dyn Fn(&[u64]) -> Vec<u64>;

/// A tensor's name, dtype and shape.
type Stored = (String, Dtype, Vec<u64>);

/// The numbers and what stands beside them.
fn stored(encoded: &Encoded<'_>, held: &Held, hints: Hints, storage: Storage) -> Result<Vec<Stored>> {
    let name = encoded.tensor.name.to_string();
    let beside = |what| encoded.get(what).map(|t: &SourceTensor| t.name.to_string());
    let stacked = |shape: &[u64]| held.n.into_iter().chain(shape.iter().copied()).collect::<Vec<u64>>();
    let (rows, cols) = matrix(&held.shape);
    let plain = |dtype, shape: &[u64]| vec![(name.clone(), dtype, stacked(shape))];
    let Some(scale) = beside(Companion::Scale) else { return Ok(plain(held.dtype, &held.shape)) };
    if is_blocks(&name) {
        let levels = plain(Dtype::U8, &[rows, cols / MX_COLS, MX_COLS / 2]);
        return Ok([levels, vec![(scale, Dtype::U8, stacked(&[rows, cols / MX_COLS]))]].concat());
    }
    if name.ends_with(".qweight") {
        let what = "GPTQ and AWQ name their tensors alike, and only headers tell them apart";
        return Err(Error::missing(what)
            .in_tensor(name)
            .hint("fetch the weight files, or the first of them"));
    }
    if is_packed(&name) {
        return Ok(packed(
            encoded,
            (rows, cols),
            (hints, storage.plain),
            (plain(Dtype::U8, &[rows, cols / 2]), scale, &stacked),
        ));
    }
    if held.is_expert && storage.fp4_experts {
        let levels = plain(Dtype::I8, &[rows, cols / 2]);
        return Ok([levels, vec![(scale, Dtype::F8E8m0, stacked(&[rows, cols / MX_COLS]))]].concat());
    }
    if let Some(global) = beside(Companion::Global) {
        let levels = plain(Dtype::U8, &[rows, cols / 2]);
        let scales = (scale, Dtype::F8E4m3, stacked(&[rows, cols / NV_COLS]));
        return Ok([levels, vec![scales, (global, Dtype::F32, stacked(&[]))]].concat());
    }
    if storage.int_bytes {
        let groups = [rows, hints.group.map_or(1, |g| cols.div_ceil(g.max(1)))];
        let mut all =
            [plain(Dtype::I8, &[rows, cols]), vec![(scale, storage.plain, stacked(&groups))]].concat();
        all.extend(beside(Companion::Zero).map(|name| (name, Dtype::I8, stacked(&groups))));
        return Ok(all);
    }
    let (dtype, shape) = fp8_scales(&scale, (rows, cols), hints, storage);
    Ok([plain(Dtype::F8E4m3, &[rows, cols]), vec![(scale, dtype, stacked(&shape))]].concat())
}

/// Dtype and shape of FP8's scales.
fn fp8_scales(scale: &str, (rows, cols): (u64, u64), hints: Hints, storage: Storage) -> (Dtype, Vec<u64>) {
    let power = storage.e8m0 || scale.ends_with(".scale");
    let usual = if power { Dtype::F8E8m0 } else { Dtype::F32 };
    let blocks = |[r, c]: [u64; 2]| vec![rows.div_ceil(r.max(1)), cols.div_ceil(c.max(1))];
    match (hints.block, storage.scales) {
        (Some(sides), _) => (usual, blocks(sides)),
        (None, Scales::Rows) => (usual, vec![rows, 1]),
        (None, Scales::OfRows) => (storage.plain, vec![rows, 1]),
        (None, Scales::Blocks(sides)) => (storage.plain, blocks(sides)),
        (None, Scales::Mx) if scale.ends_with("_scale") => (Dtype::U8, blocks([1, MX_COLS])),
        (None, Scales::Mx) => (Dtype::F8E8m0, blocks([1, MX_COLS])),
        (None, Scales::One) => (Dtype::F32, vec![1]),
        (None, Scales::Scalar) => (Dtype::F32, Vec::new()),
    }
}

/// `weight_packed`: integers where their shape is beside them, else NVFP4 or MXFP4 (`fp4`).
fn packed(
    encoded: &Encoded<'_>,
    (rows, cols): (u64, u64),
    (hints, dtype): (Hints, Dtype),
    (fp4, scale, stacked): (Vec<Stored>, String, Stacked<'_>),
) -> Vec<Stored> {
    let beside = |what| encoded.get(what).map(|t: &SourceTensor| t.name.to_string());
    let Some(shape) = beside(Companion::Shape) else {
        let Some(divisor) = beside(Companion::Divisor) else {
            return [fp4, vec![(scale, Dtype::U8, stacked(&[rows, cols / MX_COLS]))]].concat();
        };
        let scales = (scale, Dtype::F8E4m3, stacked(&[rows, cols / NV_COLS]));
        return [fp4, vec![scales, (divisor, Dtype::F32, vec![1])]].concat();
    };
    let words = |n: u64| words_of(n, hints.bits.unwrap_or(BITS_DEFAULT));
    let groups = hints.group.map_or(1, |g| cols.div_ceil(g.max(1)));
    let mut all = vec![
        (encoded.tensor.name.to_string(), Dtype::I32, vec![rows, words(cols)]),
        (scale, dtype, vec![rows, groups]),
        (shape, Dtype::I64, vec![2]),
    ];
    all.extend(beside(Companion::Zero).map(|name| (name, Dtype::I32, vec![words(rows), groups])));
    all.extend(beside(Companion::GroupIndex).map(|name| (name, Dtype::I32, vec![cols])));
    all
}

/// What releases keep in F32; everything else is `plain`.
fn dtype_of(role: Role, plain: Dtype) -> Dtype {
    use Role::{
        AttnMix, AttnMixBase, AttnMixScale, CompressBias, HeadMix, HeadMixBase, HeadMixScale,
        IndexCompressBias, MlpMix, MlpMixBase, MlpMixScale, RouterCorrection, Sinks,
    };
    match role {
        AttnMix | AttnMixBase | AttnMixScale | CompressBias | HeadMix | HeadMixBase | HeadMixScale
        | IndexCompressBias | MlpMix | MlpMixBase | MlpMixScale | RouterCorrection | Sinks => Dtype::F32,
        _ => plain,
    }
}

fn set(all: &mut [SourceTensor], name: &str, dtype: Dtype, shape: &[u64]) {
    let at = all.binary_search_by(|t| (*t.name).cmp(name));
    if let Some(t) = at.ok().and_then(|at| all.get_mut(at)) {
        let n = shape.iter().fold(1u64, |n, &len| n.saturating_mul(len));
        (t.dtype, t.shape, t.start) = (dtype, shape.into(), 0);
        t.end = n.saturating_mul(dtype.bits()).div_ceil(8);
    }
}

/// They would be checked against numbers whose shape is not known.
fn drop_companions_of_carried(claims: &Claims<'_>, all: &mut Vec<SourceTensor>) {
    let dropped: Vec<usize> = claims
        .each()
        .filter(|(at, claim, _)| claims.is_scale(*at) && matches!(claim, Claim::Carried(_)))
        .map(|(at, _, _)| at)
        .collect();
    let mut at = 0;
    all.retain(|_| {
        at += 1;
        dropped.binary_search(&(at - 1)).is_err()
    });
}
