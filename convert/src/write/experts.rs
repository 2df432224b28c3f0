//! The routed experts of an export.

use moepack_format::{Dtype, Error, PlaneSpec, Result};

use super::scheme::Scheme;
use super::{Chunk, Content, Export, Form, Item, Slice, compressed, mlx};
use crate::model::StoredPart;
use crate::spec::Part;

impl Export<'_> {
    /// Adds the experts, layer by layer, behind the trunk.
    pub(super) fn plan_experts(&mut self) -> Result<()> {
        let layers: Vec<(usize, usize)> =
            self.data.spec().moe_layers().map(|(layer, moe)| (layer, moe.n_experts)).collect();
        for (layer, n_experts) in layers {
            let items = match self.form {
                Form::Released | Form::Plain => self.pieces(layer, n_experts)?,
                Form::Compressed => self.per_expert(layer, n_experts)?,
                Form::Mlx => self.stacks(layer, n_experts)?,
                Form::Gguf => Vec::new(),
            };
            self.items.extend(items);
        }
        Ok(())
    }

    /// The tensors of the release: those that hold all experts, then those of each.
    fn pieces(&self, layer: usize, n_experts: usize) -> Result<Vec<Item>> {
        let mut items = Vec::new();
        let mut own = Vec::new();
        for piece in 0..self.headers().n_pieces(layer)? {
            let found = self.piece(layer, 0, piece)?;
            if found.1 {
                let content = Content::Stacked { layer, piece };
                items.push(Item { tensors: found.0, n_slices: n_experts, content });
            } else {
                own.push(piece);
            }
        }
        for expert in (0..n_experts).filter(|_| !own.is_empty()) {
            let tensors = own.iter().map(|&piece| Ok(self.piece(layer, expert, piece)?.0));
            let tensors: Vec<Vec<PlaneSpec>> = tensors.collect::<Result<_>>()?;
            let content = Content::Expert { layer, expert, pieces: own.clone() };
            items.push(Item { tensors: tensors.concat(), n_slices: 1, content });
        }
        Ok(items)
    }

    /// The tensors of a piece, and whether they hold all experts.
    fn piece(&self, layer: usize, expert: usize, piece: usize) -> Result<(Vec<PlaneSpec>, bool)> {
        let headers = self.headers();
        let found = match self.form {
            Form::Released => headers.released_piece(layer, expert, piece)?,
            _ => headers.plain_piece(layer, expert, piece)?,
        };
        Ok((found.tensors, found.is_stacked))
    }

    pub(super) fn expert(&self, layer: usize, expert: usize, pieces: &[usize]) -> Result<Slice> {
        let coded = self.data.expert(layer, expert)?;
        let bytes = pieces.iter().map(|&piece| self.piece_bytes(layer, expert, piece, &coded));
        let bytes: Vec<Vec<Vec<u8>>> = bytes.collect::<Result<_>>()?;
        Ok(Slice { n_experts: 1, ..Slice::whole(bytes.concat()) })
    }

    pub(super) fn stacked(&self, layer: usize, piece: usize, expert: usize) -> Result<Slice> {
        let coded = self.data.expert(layer, expert)?;
        let bytes = self.piece_bytes(layer, expert, piece, &coded)?;
        Ok(Slice { n_experts: u64::from(piece == 0), ..at_expert(bytes, expert) })
    }

    fn piece_bytes(
        &self,
        layer: usize,
        expert: usize,
        piece: usize,
        coded: &crate::coded::CodedExpert,
    ) -> Result<Vec<Vec<u8>>> {
        let headers = self.headers();
        match self.form {
            Form::Released => headers.released_bytes(layer, expert, piece, coded),
            _ => headers.plain_bytes(layer, expert, piece, coded),
        }
    }

    /// compressed-tensors: each expert's parts one by one.
    fn per_expert(&self, layer: usize, n_experts: usize) -> Result<Vec<Item>> {
        let mut items = Vec::new();
        for expert in 0..n_experts {
            let mut tensors = Vec::new();
            for part in self.written_parts(layer, expert)? {
                let stem = self.stem_of(layer, expert, part.part)?;
                let scheme = known(&part)?;
                tensors.extend(match part.part.is_matrix() {
                    true => compressed::tensors(&scheme, &stem, [part.rows as u64, part.cols as u64]),
                    false => vec![bias(&scheme, &stem, &[part.cols as u64])],
                });
            }
            items.push(Item { tensors, n_slices: 1, content: Content::Parts { layer, expert } });
        }
        Ok(items)
    }

    pub(super) fn parts(&self, layer: usize, expert: usize) -> Result<Slice> {
        let (coded, errors) = self.coded(layer, expert, &Part::ALL)?;
        let mut bytes = Vec::new();
        for part in &coded.parts {
            let made = if part.part.is_matrix() { compressed::bytes(part) } else { Ok(part.planes.clone()) };
            bytes.extend(made.map_err(|e| part.source.locate(e))?);
        }
        Ok(Slice { errors, n_experts: 1, ..Slice::whole(bytes) })
    }

    /// MLX: each part of all experts.
    fn stacks(&self, layer: usize, n_experts: usize) -> Result<Vec<Item>> {
        let mut items = Vec::new();
        for part in self.written_parts(layer, 0)? {
            let stem = self.mlx_stem(layer, part.part)?;
            let scheme = known(&part)?;
            let n = n_experts as u64;
            let tensors = match part.part.is_matrix() {
                true => mlx::tensors(&scheme, &stem, Some(n), [part.rows as u64, part.cols as u64]),
                false => vec![bias(&scheme, &stem, &[n, part.cols as u64])],
            };
            let content = Content::Stack { layer, part: part.part };
            items.push(Item { tensors, n_slices: n_experts, content });
        }
        Ok(items)
    }

    pub(super) fn stack(&self, layer: usize, part: Part, expert: usize) -> Result<Slice> {
        let (coded, errors) = self.coded(layer, expert, &[part])?;
        let found = coded.part(part).ok_or_else(|| Error::bad_data("a part is missing"))?;
        let bytes = if part.is_matrix() { mlx::bytes(found) } else { Ok(found.planes.clone()) };
        let bytes = bytes.map_err(|e| found.source.locate(e))?;
        Ok(Slice { errors, n_experts: u64::from(part == Part::Gate), ..at_expert(bytes, expert) })
    }

    /// The parts of an expert as they will be: in the codec that they have, or the one that is asked for.
    pub(super) fn written_parts(&self, layer: usize, expert: usize) -> Result<Vec<StoredPart>> {
        let mut parts = self.data.expert_parts(layer, expert)?;
        for part in parts.iter_mut().filter(|p| p.part.is_matrix()) {
            if let Some(codec) = &self.wish.requantize {
                part.codec = codec.clone();
            }
        }
        Ok(parts)
    }

    /// The module that a part of an expert belongs to in the hub's layout: `model.layers.3.mlp.experts.7.gate_proj`.
    pub(super) fn stem_of(&self, layer: usize, expert: usize, part: Part) -> Result<String> {
        let (name, is_stacked) = self.holder(layer, expert, part)?;
        match name.split_once(EXPERTS).filter(|_| is_stacked) {
            Some((before, _)) => Ok(format!("{before}{EXPERTS}{expert}.{}", matrix_of(part))),
            None => Ok(stem(&name).to_owned()),
        }
    }

    /// The module that a part of all experts belongs to in mlx-lm.
    pub(super) fn mlx_stem(&self, layer: usize, part: Part) -> Result<String> {
        let (name, _) = self.holder(layer, 0, part)?;
        let before = name.split_once(EXPERTS).map_or(&*name, |(before, _)| before);
        let own = mlx::experts_name(self.data.family().name());
        Ok(format!("{before}.{own}.{}", matrix_of(part)))
    }

    /// The name of the tensor that holds a part, and whether it holds all experts.
    fn holder(&self, layer: usize, expert: usize, part: Part) -> Result<(String, bool)> {
        let headers = self.headers();
        for piece in 0..headers.n_pieces(layer)? {
            let found = headers.released_piece(layer, expert, piece)?;
            if let Some(first) = found.tensors.first().filter(|_| found.parts.contains(&part)) {
                return Ok((first.name.clone(), found.is_stacked));
            }
        }
        Err(Error::bad_data(format!("no tensor for {} of layer {layer}", part.name())))
    }
}

/// What stands between a layer's prefix and the expert's number.
const EXPERTS: &str = ".experts.";

/// Bytes at the place of an expert in tensors that hold all of them.
fn at_expert(tensors: Vec<Vec<u8>>, expert: usize) -> Slice {
    let chunk = |(tensor, bytes): (usize, Vec<u8>)| {
        let offset = expert as u64 * bytes.len() as u64;
        Chunk { tensor, offset, bytes }
    };
    Slice { chunks: tensors.into_iter().enumerate().map(chunk).collect(), ..Slice::default() }
}

fn known(part: &StoredPart) -> Result<Scheme> {
    let name = part.codec.name();
    Scheme::of(&name).ok_or_else(|| Error::plan(format!("{name} has no place in this target")))
}

fn bias(scheme: &Scheme, stem: &str, shape: &[u64]) -> PlaneSpec {
    let dtype = if let Scheme::Plain(dtype) = scheme { *dtype } else { Dtype::F32 };
    PlaneSpec::new(&format!("{stem}.bias"), dtype, shape)
}

/// The matrix that a bias belongs to, as bundles call it.
fn matrix_of(part: Part) -> &'static str {
    part.name().trim_end_matches("_bias")
}

/// The module of a tensor.
fn stem(name: &str) -> &str {
    const ENDINGS: &[&str] = &[".weight_packed", ".qweight", ".weight", ".bias"];
    ENDINGS.iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(name)
}
