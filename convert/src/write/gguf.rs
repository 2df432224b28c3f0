//! GGUF: the tensors of `gguf::tensors`, made piece by piece, and the files they lie in.

use moepack_format::{Dtype, Error, PlaneSpec, Result};

use super::{Chunk, Content, Export, Item, Shard, Slice};
use crate::catalog::TrunkTensor;
use crate::gguf::arch::{Arch, Move};
use crate::gguf::codes;
use crate::gguf::tensors::{Data, Planned, Rows, plan};
use crate::gguf::{TensorInfo, Type, Value, vocabulary, write};
use crate::spec::Part;

/// Tensor names that a note lists.
const SHOWN: usize = 3;

impl Export<'_> {
    /// All of the file: keys and tensors.
    pub(super) fn plan_gguf(&mut self) -> Result<()> {
        let arch = Arch::of(self.data)?;
        let mut notes = Vec::new();
        self.keys = arch.keys(self.data, &self.wish.name, &mut notes)?;
        self.keys.extend(vocabulary::keys(self.data, &mut notes)?);
        self.keys.extend(self.imatrix());
        let made = plan(self.data, arch, self.wish.dequantize, |layer| self.written_parts(layer, 0))?;
        if made.n_decoded > 0 {
            let to = if self.wish.dequantize { "BF16, which rounds" } else { "BF16 or F32, which hold them" };
            notes.push(format!("{} matrices that ggml has no type for become {to}", made.n_decoded));
        }
        if let [first, ..] = &*made.left_out {
            let n = made.left_out.len();
            let names = made.left_out.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
            let what = if n > SHOWN { format!("{n} tensors, {first} … ") } else { names };
            notes.push(format!("left out, no part of the forward pass: {what}"));
        }
        self.items = made.tensors.into_iter().map(item).collect::<Result<_>>()?;
        self.notes.extend(notes);
        Ok(())
    }

    /// What a bundle was calibrated on, as llama-quantize says it: the dataset by its hash.
    fn imatrix(&self) -> Vec<(String, Value)> {
        let recipe = self.data.bundle().map(|b| &b.manifest.recipe);
        let hash = |key: &str| recipe?.get("calibration")?.get(key)?.as_str().map(str::to_owned);
        let Some(hash) = hash("tokens_sha256").or_else(|| hash("stats_sha256")) else { return Vec::new() };
        let key =
            |name: &str, value: &str| (format!("quantize.imatrix.{name}"), Value::String(value.to_owned()));
        vec![key("file", "moepack"), key("dataset", &format!("sha256:{hash}"))]
    }

    /// A piece of a tensor.
    pub(super) fn gguf_slice(&self, made: &Planned, at: usize) -> Result<Slice> {
        match made.data {
            Data::Copied(tensor) => self.copied(tensor, at),
            Data::Planes { at: tensor, head } => self.planes_to_gguf(tensor, head, made.info.kind),
            Data::Rows { at: tensor, rows } => {
                self.rows_to_gguf(self.known(tensor)?, rows, made.info.kind, at)
            }
            Data::Integers(tensor) => self.integers_to_gguf(self.known(tensor)?),
            Data::Experts { layer, part } => self.expert_to_gguf(layer, part, made, at),
        }
    }

    fn planes_to_gguf(&self, at: usize, head: Option<usize>, kind: &Type) -> Result<Slice> {
        let part = self.trunk_part(at)?;
        let bytes = codes::bytes(&part, kind, false).map_err(|e| match self.tensor(at) {
            Some(tensor) => self.data.at_trunk(tensor, e),
            None => e,
        })?;
        let Some(head) = head else { return Ok(Slice::whole(vec![bytes])) };
        let row_bytes = bytes.len() / part.rows.max(1);
        let order = (0..part.rows).map(|row| interleaved(row, head));
        let rows =
            order.flat_map(|row| bytes.get(row * row_bytes..(row + 1) * row_bytes).unwrap_or_default());
        Ok(Slice::whole(vec![rows.copied().collect()]))
    }

    /// Some heads, or some rows: each piece has the numbers of all before it in front.
    fn rows_to_gguf(&self, tensor: &TrunkTensor, rows: Rows, kind: &Type, at: usize) -> Result<Slice> {
        let first = at * rows.heads;
        let n = rows.heads.min(rows.n_heads.saturating_sub(first));
        let [skip, taken] = rows.taken;
        let decoded =
            self.data.trunk_rows(tensor.layer, tensor.role, first * rows.head..(first + n) * rows.head)?;
        let cols = decoded.data.len() / (n * rows.head).max(1);
        let mut values = Vec::with_capacity(n * taken * cols);
        for head in decoded.data.chunks_exact((rows.head * cols).max(1)) {
            let row = |r: usize| head.get((skip + r) * cols..(skip + r + 1) * cols).unwrap_or_default();
            match rows.how {
                Move::Same | Move::ValuesOfHeads => (0..taken).for_each(|r| values.extend(row(r))),
                Move::Interleaved => (0..taken).for_each(|r| values.extend(row(interleaved(r, taken)))),
                Move::KeysOfHeads => {
                    (0..cols).for_each(|c| values.extend((0..taken).filter_map(|r| row(r).get(c))));
                }
            }
        }
        let bytes =
            codes::numbers(&values, kind, self.wish.dequantize).map_err(|e| self.data.at_trunk(tensor, e))?;
        let offset = (first * taken * cols) as u64 * kind.block_bytes;
        Ok(Slice { chunks: vec![Chunk { tensor: 0, offset, bytes }], ..Slice::default() })
    }

    fn integers_to_gguf(&self, tensor: &TrunkTensor) -> Result<Slice> {
        let numbers = self.data.trunk_integers(tensor.layer, tensor.role)?;
        let small = |n: i64| i32::try_from(n).map_err(|_| Error::bad_data(format!("{n} is beyond 32 bits")));
        let numbers = numbers.into_iter().map(small).collect::<Result<Vec<_>>>();
        let numbers = numbers.map_err(|e| self.data.at_trunk(tensor, e))?;
        Ok(Slice::whole(vec![numbers.iter().flat_map(|n| n.to_le_bytes()).collect()]))
    }

    fn expert_to_gguf(&self, layer: usize, part: Part, made: &Planned, expert: usize) -> Result<Slice> {
        let (coded, errors) = self.coded(layer, expert, &[part])?;
        let found = coded.part(part).ok_or_else(|| Error::bad_data("a part is missing"))?;
        let bytes = match part.is_matrix() {
            true => codes::bytes(found, made.info.kind, self.wish.dequantize),
            false => found
                .decode(moepack_quant::Isa::get())
                .and_then(|v| codes::numbers(&v, made.info.kind, false)),
        };
        let bytes = bytes.map_err(|e| found.source.locate(e))?;
        let each = made.info.bytes()? / made.n_slices.max(1) as u64;
        if bytes.len() as u64 != each {
            let what = format!("{} bytes of an expert, expected {each}", bytes.len());
            return Err(found.source.locate(Error::bad_data(what)));
        }
        let offset = expert as u64 * each;
        let chunks = vec![Chunk { tensor: 0, offset, bytes }];
        Ok(Slice { chunks, errors, n_experts: u64::from(part == Part::Up) })
    }

    /// The files, of at most `bytes_max` of data each.
    pub(super) fn gguf_shards(&self, bytes_max: u64) -> Result<Vec<Shard>> {
        let infos: Vec<TensorInfo> = self.items.iter().filter_map(|i| i.info().cloned()).collect();
        let files = write::split(&infos, bytes_max)?;
        let n_files = files.len();
        let shard = |(n, items): (usize, std::ops::Range<usize>)| {
            let keys = write::keys_of(&self.keys, n, n_files, infos.len())?;
            let laid = write::layout(&keys, infos.get(items.clone()).unwrap_or_default())?;
            let offsets = laid.offsets.into_iter().map(|start| vec![start]).collect();
            Ok(Shard { items, header: laid.header, offsets, bytes: laid.bytes })
        };
        files.into_iter().enumerate().map(shard).collect()
    }
}

impl Item {
    fn info(&self) -> Option<&TensorInfo> {
        if let Content::Gguf(made) = &self.content { Some(&made.info) } else { None }
    }
}

/// Its bytes are all that the rest of an export asks for.
fn item(made: Planned) -> Result<Item> {
    let bytes = made.info.bytes()?;
    let tensors = vec![PlaneSpec::new(&made.info.name, Dtype::U8, &[bytes])];
    Ok(Item { tensors, n_slices: made.n_slices, content: Content::Gguf(made) })
}

/// The row that comes at `row`, where the halves of each head are interleaved.
fn interleaved(row: usize, head: usize) -> usize {
    let within = row % head.max(1);
    row - within + within / 2 + within % 2 * (head / 2)
}

/// Why GGUF cannot hold such a matrix, if it cannot.
pub(super) fn refuses(codec: &str, [_, cols]: [u64; 2], bf16: bool) -> Option<String> {
    let Some(found) = codes::fit(codec, bf16) else { return Some("has no type in ggml".to_owned()) };
    let (block, name) = (found.kind.block, found.kind.name);
    (!cols.is_multiple_of(block))
        .then(|| format!("{cols} columns are no whole blocks of {block}, as {name} has them"))
}

#[cfg(test)]
mod tests;
