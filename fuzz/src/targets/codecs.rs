//! The decoder of every codec, with planes that an encoder made and with any others.
//!
//! ```text
//!  byte 0      1       3      11     19      23       27
//!       +------+-------+------+------+-------+--------+--------------------------------+
//!       | mode | codec | rows | cols | first | n_rows | planes: length u32, bytes; …   |
//!       +------+-------+------+------+-------+--------+--------------------------------+
//! ```
//!
//! An odd mode gives each plane the length that the codec asks for, so that numbers are what is tried; an even one leaves
//! planes as they are.

use std::path::Path;

use moepack_format::{Error, Result};
use moepack_quant::codec::CODECS;
use moepack_quant::{CodecRef, Isa, Matrix, Planes};

use super::Ready;
use crate::corpus::Seed;
use crate::random::Random;

/// Values that are decoded at most: what is tried are numbers, not memory.
const VALUES_MAX: usize = 1 << 16;
/// Bytes that a plane is filled up to at most.
const PLANE_BYTES_MAX: u64 = 1 << 20;

/// All examples of all codecs.
pub(super) fn codecs(_: &Path) -> Result<Ready> {
    let all = all();
    let mut seeds = Vec::new();
    for (n, codec) in all.iter().enumerate() {
        for (rows, cols) in [(3, 256), (16, 512), (128, 128)] {
            seeds.extend(seed(n, codec, rows, cols));
        }
    }
    Ready::new(seeds, move |_, bytes| read(&all, bytes))
}

fn all() -> Vec<CodecRef> {
    CODECS.iter().flat_map(|family| family.examples.iter().filter_map(|name| (family.parse)(name))).collect()
}

/// An encoded matrix; `None` where the codec does not take this shape.
fn seed(n: usize, codec: &CodecRef, rows: usize, cols: usize) -> Option<Seed> {
    let mut random = Random::of(1, "codecs", n as u64);
    // A sum of four is near enough to normal.
    let mut value = || (0..4).map(|_| random.number() as i32 as f32 / 2e9).sum::<f32>();
    let data: Vec<f32> = (0..rows * cols).map(|_| value()).collect();
    let planes = codec.encode(Isa::get(), Matrix { rows, cols, data: &data }, None).ok()?;
    let mut bytes = vec![(rows % 2) as u8];
    bytes.extend((n as u16).to_le_bytes());
    bytes.extend((rows as u64).to_le_bytes());
    bytes.extend((cols as u64).to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend((rows as u32).to_le_bytes());
    for plane in planes {
        bytes.extend((plane.len() as u32).to_le_bytes());
        bytes.extend(plane);
    }
    Some(Seed::new(codec.name(), bytes))
}

fn read(all: &[CodecRef], bytes: &[u8]) -> Result<()> {
    let mut rest = bytes;
    let mode = take(&mut rest, 1);
    let at = take(&mut rest, 2) as usize % all.len().max(1);
    let codec = all.get(at).ok_or_else(|| Error::usage("no codec"))?;
    let (rows, cols) = (take(&mut rest, 8) as usize, take(&mut rest, 8) as usize);
    let (first, n_rows) = (take(&mut rest, 4) as usize, take(&mut rest, 4) as usize);
    let mut planes = planes(rest);
    let specs = codec.planes(rows, cols)?;
    codec.bits_per_weight(rows, cols)?;
    if mode % 2 == 1 {
        planes.resize(specs.len(), Vec::new());
        for (plane, spec) in planes.iter_mut().zip(&specs) {
            fill(plane, spec.bytes()?.min(PLANE_BYTES_MAX) as usize);
        }
    }
    let n = n_rows.checked_mul(cols).filter(|&n| n <= VALUES_MAX).unwrap_or(cols.min(VALUES_MAX));
    let mut out = vec![0.0; n];
    let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
    codec.decode(Isa::get(), &planes, rows, cols, first, &mut out)
}

/// A little-endian number of at most 8 bytes; what is missing is zero.
fn take(rest: &mut &[u8], width: usize) -> u64 {
    let (head, tail) = rest.split_at(width.min(rest.len()));
    *rest = tail;
    head.iter().enumerate().map(|(i, &b)| u64::from(b) << (8 * i)).sum()
}

fn planes(mut rest: &[u8]) -> Planes {
    let mut planes = Vec::new();
    while !rest.is_empty() {
        let n = take(&mut rest, 4) as usize;
        let (plane, tail) = rest.split_at(n.min(rest.len()));
        planes.push(plane.to_vec());
        rest = tail;
    }
    planes
}

/// Repeats a plane's bytes, or cuts them.
fn fill(plane: &mut Vec<u8>, bytes: usize) {
    if plane.is_empty() {
        plane.push(0x5a);
    }
    while plane.len() < bytes {
        plane.extend_from_within(..plane.len().min(bytes - plane.len()));
    }
    plane.truncate(bytes);
}
