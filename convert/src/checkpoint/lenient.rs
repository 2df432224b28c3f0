//! What is refused unless somebody asks for it: one tensor in two files, numbers that are none.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use moepack_format::{Dtype, Result};

use super::index::Index;
use super::{Checkpoint, SourceTensor};
use crate::names::numbers_of;

/// What may pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lenient {
    /// A tensor that is in two files, if it is the same byte for byte.
    pub same_twice: bool,
    /// NaN and infinity among weights, which are read as 0. Not among scales: they say nothing of one number only.
    pub zero_non_finite: bool,
}

impl Checkpoint {
    /// Of tensors that are in several files and the same byte for byte, keeps the one that the index names, or the first.
    pub(super) fn drop_same(&mut self, index: Option<&Index>) -> Result<()> {
        let mut gone = Vec::new();
        for (at, pair) in self.tensors.windows(2).enumerate() {
            let [a, b] = pair else { continue };
            if a.name == b.name && self.is_same(a, b)? {
                let named = index.and_then(|index| index.file_of(&a.name));
                gone.push(if named == Some(b.file) { at } else { at.saturating_add(1) });
            }
        }
        let Some(&first) = gone.first() else { return Ok(()) };
        let name = self.tensors.get(first).map_or("", |t| &*t.name);
        let what = format!("{} tensors are in two files, the same byte for byte, such as {name}", gone.len());
        self.warnings.push(what);
        let mut places = 0_usize..;
        self.tensors.retain(|_| places.next().is_none_or(|at| gone.binary_search(&at).is_err()));
        Ok(())
    }

    /// Whether two tensors have the same type, shape and bytes.
    ///
    /// # Errors
    /// What cannot be read.
    pub fn is_same(&self, a: &SourceTensor, b: &SourceTensor) -> Result<bool> {
        const CHUNK_BYTES: u64 = 1 << 20;
        if a.dtype != b.dtype || a.shape != b.shape || a.bytes() != b.bytes() {
            return Ok(false);
        }
        let mut at = 0_u64;
        while at < a.bytes() {
            let n = a.bytes().saturating_sub(at).min(CHUNK_BYTES);
            let (mut x, mut y) = (vec![0; n as usize], vec![0; n as usize]);
            self.read(a, at, &mut x)?;
            self.read(b, at, &mut y)?;
            if x != y {
                return Ok(false);
            }
            at = at.saturating_add(n);
        }
        Ok(true)
    }

    /// Whether NaN and infinity are read as 0.
    pub fn zeroes(&self) -> bool {
        self.zeroed.is_some()
    }

    /// Tensors in which numbers were read as 0 so far, and how many.
    pub fn zeroed(&self) -> BTreeMap<Box<str>, u64> {
        let mut sums: BTreeMap<Box<str>, u64> = BTreeMap::new();
        let Some(zeroed) = &self.zeroed else { return sums };
        for ((name, _), n) in zeroed.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let sum = sums.entry(name.clone()).or_default();
            *sum = sum.saturating_add(*n);
        }
        sums
    }
}

/// How many numbers were read as 0, by tensor and by place of what was read: the same bytes may be read again.
#[derive(Debug, Default)]
pub(super) struct Zeroed(Mutex<BTreeMap<(Box<str>, u64), u64>>);

impl Zeroed {
    /// Writes 0 in place of what is no number.
    pub(super) fn apply(&self, tensor: &SourceTensor, offset: u64, bytes: &mut [u8]) {
        if numbers_of(&tensor.name).next().is_some() {
            return;
        }
        let n = zero(tensor.dtype, bytes);
        if n > 0 {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.insert((tensor.name.clone(), offset), n);
        }
    }
}

fn zero(dtype: Dtype, bytes: &mut [u8]) -> u64 {
    match dtype {
        Dtype::Bf16 => each(bytes, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        Dtype::F16 => each(bytes, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        Dtype::F32 => each(bytes, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::F64 => each(bytes, |b| !f64::from_le_bytes(b).is_finite()),
        Dtype::F8E4m3 => each(bytes, |[b]: [u8; 1]| b & 0x7f == 0x7f),
        Dtype::F8E5m2 => each(bytes, |[b]: [u8; 1]| b & 0x7c == 0x7c),
        _ => 0,
    }
}

fn each<const N: usize>(bytes: &mut [u8], odd: impl Fn([u8; N]) -> bool) -> u64 {
    let mut n = 0_u64;
    for number in bytes.as_chunks_mut().0.iter_mut().filter(|number| odd(**number)) {
        *number = [0; N];
        n = n.saturating_add(1);
    }
    n
}
