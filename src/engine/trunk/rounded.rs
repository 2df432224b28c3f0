//! A model with its trunk's matrices as rounding them to nearest leaves them.

use std::ops::Range;

use moepack_convert::spec::ModelSpec;
use moepack_convert::tensor::{Expert, Tensor};
use moepack_convert::{Model, Role};
use moepack_format::Result;
use moepack_quant::{Isa, Matrix};
use moepack_verify::forward::Weights;

use super::{CodedPiece, Trunk};
use crate::recipe::Choice;

/// A model with its trunk's matrices as rounding them to nearest leaves them.
#[derive(Debug)]
pub struct Rounded<'a> {
    model: &'a Model,
    trunk: Trunk<'a>,
}

impl<'a> Rounded<'a> {
    /// With the trunk coded by `choice`; `None` where that codes nothing.
    ///
    /// # Errors
    /// A size beyond 64 bits.
    pub fn of(model: &'a Model, choice: &Choice) -> Result<Option<Rounded<'a>>> {
        let trunk = Trunk::of(model, choice)?;
        Ok((trunk.cols_max() > 0).then_some(Rounded { model, trunk }))
    }

    fn coded(&self, layer: Option<usize>, role: Role) -> Option<&CodedPiece> {
        let piece = self.trunk.pieces.iter().find(|p| (p.tensor.layer, p.tensor.role) == (layer, role));
        piece.and_then(|p| p.coded.as_ref())
    }
}

impl CodedPiece {
    /// Codes a matrix and takes what that leaves of it.
    fn round(&self, data: &mut [f32]) -> Result<()> {
        let isa = Isa::get();
        let planes = self.codec.encode(isa, Matrix { rows: self.rows, cols: self.cols, data }, None)?;
        let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
        self.codec.decode(isa, &planes, self.rows, self.cols, 0, data)
    }
}

impl Weights for Rounded<'_> {
    fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    fn trunk(&self, layer: Option<usize>, role: Role) -> Result<Tensor> {
        let mut whole = self.model.trunk(layer, role)?;
        if let Some(coded) = self.coded(layer, role) {
            coded.round(&mut whole.data)?;
        }
        Ok(whole)
    }

    fn trunk_rows(&self, layer: Option<usize>, role: Role, rows: Range<usize>) -> Result<Tensor> {
        let Some(coded) = self.coded(layer, role) else { return self.model.trunk_rows(layer, role, rows) };
        let whole = self.trunk(layer, role)?.data;
        let data = whole.get(rows.start * coded.cols..rows.end * coded.cols).unwrap_or_default().to_vec();
        Ok(Tensor { shape: vec![rows.len(), coded.cols], data })
    }

    fn trunk_table(&self, layer: Option<usize>, role: Role) -> Result<Vec<u32>> {
        self.model.trunk_table(layer, role)
    }

    fn trunk_integers(&self, layer: Option<usize>, role: Role) -> Result<Vec<i64>> {
        self.model.trunk_integers(layer, role)
    }

    fn expert(&self, layer: usize, expert: usize) -> Result<Expert> {
        Weights::expert(self.model, layer, expert)
    }
}
