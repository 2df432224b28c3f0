//! Coding one expert: each matrix by its codec and solver, everything else as it was released.

use moepack_convert::{CodedExpert, CodedPart};
use moepack_format::{Context, Result};
use moepack_quant::solve::Solver;
use moepack_quant::stats::ColumnStats;
use moepack_quant::{Codec, CodecRef, Inputs, Isa, Matrix};
use moepack_verify::drift::SquareSums;

use crate::engine::stats::ExpertStats;
use crate::recipe::{Choice, Choices, matrix_name};

/// How experts are coded.
#[derive(Clone, Copy)]
pub struct Coder<'a> {
    /// Instruction set of the kernels.
    pub isa: Isa,
    /// Codec of each matrix.
    pub choices: &'a Choices,
    /// How levels are chosen.
    pub solver: &'a dyn Solver,
}

/// A coded expert and what coding lost.
#[derive(Debug)]
pub struct Coded {
    /// The new parts, in record order.
    pub expert: CodedExpert,
    /// Squares of error and weights over all quantized matrices.
    pub sums: SquareSums,
}

impl Coder<'_> {
    /// Codes an expert. `stats` are those of its inputs, where calibration has any.
    ///
    /// # Errors
    /// A matrix that the codec cannot hold, NaN or infinity in it; the matrix is named.
    pub fn code(
        &self,
        layer: usize,
        index: usize,
        source: CodedExpert,
        stats: Option<&ExpertStats>,
    ) -> Result<Coded> {
        let mut coded = Coded { expert: CodedExpert { parts: Vec::new() }, sums: SquareSums::default() };
        for part in source.parts {
            let new = match self.choices.of_part(layer, index, part.part)? {
                Choice::Native => part,
                Choice::Codec(codec) => {
                    let stats = stats.map(|s| s.of(part.part));
                    self.recode(&part, codec, stats, &mut coded.sums)
                        .in_tensor(&matrix_name(layer, index, part.part))?
                }
            };
            coded.expert.parts.push(new);
        }
        Ok(coded)
    }

    fn recode(
        &self,
        part: &CodedPart,
        codec: &CodecRef,
        stats: Option<&ColumnStats>,
        sums: &mut SquareSums,
    ) -> Result<CodedPart> {
        let w = part.decode(self.isa)?; // [rows, cols]
        let (rows, cols) = (part.rows, part.cols);
        let planes = self.solver.solve(
            self.isa,
            Matrix { rows, cols, data: &w },
            codec.as_ref(),
            Inputs { stats, hessian: None },
        )?;
        let new = CodedPart {
            part: part.part,
            codec: codec.clone(),
            rows,
            cols,
            planes,
            source: part.source.clone(),
        };
        sums.add(&error_squares(self.isa, codec.as_ref(), &new, &w)?);
        Ok(new)
    }
}

/// Σ (w − ŵ)² and Σ w², decoding a few rows at a time so that no second matrix is held.
fn error_squares(isa: Isa, codec: &dyn Codec, part: &CodedPart, w: &[f32]) -> Result<SquareSums> {
    /// Values decoded at a time: they stay in the L2 cache.
    const BLOCK_VALUES: usize = 1 << 15;
    let planes: Vec<&[u8]> = part.planes.iter().map(Vec::as_slice).collect();
    let cols = part.cols.max(1);
    let block_rows = (BLOCK_VALUES / cols).max(1);
    let mut decoded = vec![0.0; block_rows * cols];
    let mut sums = SquareSums::default();
    for (i, block) in w.chunks(block_rows * cols).enumerate() {
        let out = decoded.get_mut(..block.len()).unwrap_or_default();
        codec.decode(isa, &planes, part.rows, part.cols, i * block_rows, out)?;
        sums.add(&SquareSums::of(isa, block, out));
    }
    Ok(sums)
}
