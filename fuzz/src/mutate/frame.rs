//! What stands around a change: lengths of headers and checksums, made to fit so that a reader goes on to look inside.

use sha2::{Digest, Sha256};

use super::{Edit, Field, Kind, Shape, json, slice};

/// Bytes of a row of a bank's index, and the widths of the numbers in it; `format/SPEC.md` has the table.
const ROW_BYTES: usize = 64;
const ROW: [usize; 18] = [8, 8, 8, 4, 4, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 4, 4];

/// The file with a change in it, sealed.
pub(super) fn apply(shape: Shape, file: &[u8], edit: &Edit) -> Vec<u8> {
    let tail = slice(file, &(edit.range.end..file.len()));
    let mut new = [slice(file, &(0..edit.range.start)), &edit.with, tail].concat();
    if matches!(shape, Shape::Safetensors | Shape::Bank)
        && let Some(end) = header_end(file).filter(|&end| edit.range.end <= end)
    {
        new = refit(new, end, end + edit.with.len() - edit.range.len());
    }
    seal(shape, new)
}

/// Writes the checksums anew.
pub(super) fn seal(shape: Shape, file: Vec<u8>) -> Vec<u8> {
    match shape {
        Shape::Manifest => seal_manifest(file),
        Shape::Baseline => seal_baseline(file),
        Shape::Bank => seal_records(file),
        _ => file,
    }
}

/// Fields of the JSON of a safetensors file.
pub(super) fn header_fields(file: &[u8]) -> Vec<Field> {
    let end = header_end(file).unwrap_or(0);
    json::fields(slice(file, &(0..end)), 8)
}

/// Numbers of a bank's index, which is the first tensor.
pub(super) fn index_fields(file: &[u8]) -> Vec<Field> {
    let Some(start) = header_end(file) else { return Vec::new() };
    let row = |r: usize| {
        let mut at = start + r * ROW_BYTES;
        ROW.map(|width| {
            at += width;
            Field { kind: Kind::Number, range: at - width..at }
        })
    };
    (0..n_rows(file)).flat_map(row).collect()
}

fn header_end(file: &[u8]) -> Option<usize> {
    let length = u64::from_le_bytes(*file.first_chunk()?);
    usize::try_from(length).ok()?.checked_add(8).filter(|&end| end <= file.len())
}

/// A header that ended at `was` and ends at `is` gets its old length by spaces, or one that is a multiple of as much.
fn refit(mut file: Vec<u8>, was: usize, is: usize) -> Vec<u8> {
    let spaces = slice(&file, &(0..is)).iter().rev().take_while(|&&b| b == b' ').count();
    let json_end = is - spaces;
    let align = 1 << was.trailing_zeros().min(14);
    let end = if json_end <= was { was } else { json_end.next_multiple_of(align) };
    file.splice(json_end..is, vec![b' '; end - json_end]);
    let length = (end as u64).saturating_sub(8).to_le_bytes();
    file.splice(0..8.min(file.len()), length);
    file
}

/// Rows of the index, as the shape of the tensor says in the seed: the places of records are looked up, so a wrong
/// number of them does no harm.
fn n_rows(file: &[u8]) -> usize {
    let end = header_end(file).unwrap_or(0);
    let header: serde_json::Value = serde_json::from_slice(slice(file, &(8..end))).unwrap_or_default();
    let n = header.pointer("/__index__/shape/0").and_then(serde_json::Value::as_u64);
    usize::try_from(n.unwrap_or(0)).unwrap_or(0).min(64)
}

fn seal_records(mut file: Vec<u8>) -> Vec<u8> {
    let Some(start) = header_end(&file) else { return file };
    for row in 0..n_rows(&file) {
        let at = start + row * ROW_BYTES;
        let number = |i: usize| {
            let bytes = slice(&file, &(at + 8 * i..at + 8 * i + 8)).first_chunk().copied();
            usize::try_from(u64::from_le_bytes(bytes.unwrap_or_default())).unwrap_or(0)
        };
        let (offset, bytes) = (number(0), number(1));
        let Some(record) = offset.checked_add(bytes).and_then(|end| file.get(offset..end)) else { continue };
        let crc = crc32c::crc32c(record).to_le_bytes();
        if let Some(place) = file.get_mut(at + 24..at + 28) {
            place.copy_from_slice(&crc);
        }
    }
    file
}

fn seal_baseline(mut file: Vec<u8>) -> Vec<u8> {
    let Some((body, _)) = file.split_last_chunk::<32>() else { return file };
    let hash = Sha256::digest(body);
    let at = body.len();
    file.truncate(at);
    file.extend(hash);
    file
}

/// The last field is the SHA-256 of the text with 64 zeros in its place.
fn seal_manifest(mut file: Vec<u8>) -> Vec<u8> {
    const BEHIND: usize = b"\"\n}\n".len();
    let Some(start) = file.len().checked_sub(BEHIND + 64) else { return file };
    let digits = start..start + 64;
    file.splice(digits.clone(), [b'0'; 64]);
    let hash = moepack_format::file::hex(&Sha256::digest(&file));
    file.splice(digits, hash.into_bytes());
    file
}
