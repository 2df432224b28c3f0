//! Coding one expert: each matrix by its codec and solver, everything else as it was released.

use std::ops::Range;

use moepack_convert::{CodedExpert, CodedPart, FiniteCheck, Part};
use moepack_format::{Context, Result};
use moepack_quant::solve::Solver;
use moepack_quant::stats::ColumnStats;
use moepack_quant::{CodecRef, Inputs, Isa, Matrix, Planes};
use moepack_verify::drift::SquareSums;

use crate::engine::evidence::{Evidence, ExpertEvidence, Needs, Source};
use crate::engine::heldout::{Loss, loss};
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

/// What calibration says about an expert.
#[derive(Clone, Copy, Debug)]
pub enum Learnt<'a> {
    /// Nothing: there was none.
    Nothing,
    /// The mean squares of its inputs.
    Stats(&'a ExpertStats),
    /// Hessians of its inputs, and inputs to judge by.
    Evidence(&'a ExpertEvidence<'a>),
}

/// A coded expert and what coding lost.
#[derive(Debug)]
pub struct Coded {
    /// The new parts, in record order.
    pub expert: CodedExpert,
    /// Squares of error and weights over all quantized matrices.
    pub sums: SquareSums,
    /// One for each matrix.
    pub notes: Vec<MatrixNote>,
}

/// How a matrix was coded.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct MatrixNote {
    /// Which.
    pub part: Part,
    /// Bits per weight, all planes counted.
    pub bits: f64,
    /// Where the solver's Hessian came from, if it had one.
    pub hessian_source: Option<Source>,
    /// Relative squared error of the output over held-out inputs, if there were any.
    pub heldout_error: Option<f64>,
    /// The same if it had been rounded to nearest.
    pub heldout_error_rtn: Option<f64>,
    /// Whether it was, since that is better on held-out inputs.
    pub fell_back: bool,
}

impl Coder<'_> {
    /// Which of an expert's inputs its coding needs to know.
    ///
    /// # Errors
    /// An expert that the recipe does not know.
    pub fn needs(&self, layer: usize, index: usize) -> Result<Needs> {
        let coded =
            |part| Ok(matches!(self.choices.of_part(layer, index, part)?, Choice::Codec(_))) as Result<bool>;
        Ok(Needs { input: coded(Part::Gate)? || coded(Part::Up)?, inner: coded(Part::Down)? })
    }

    /// Whether the coding of any of these experts of a layer needs Hessians.
    pub fn needs_hessians(&self, layer: usize, mut experts: Range<usize>) -> bool {
        let needed = |e| self.needs(layer, e).is_ok_and(|n| n.input || n.inner);
        self.solver.needs_hessian() && experts.any(needed)
    }

    /// Codes an expert.
    ///
    /// # Errors
    /// A matrix that the codec cannot hold, NaN or infinity in it; the matrix is named.
    pub fn code(&self, layer: usize, index: usize, source: CodedExpert, learnt: Learnt<'_>) -> Result<Coded> {
        let (mut parts, mut sums, mut notes) = (Vec::new(), SquareSums::default(), Vec::new());
        for part in source.parts {
            let mut note = MatrixNote::of(part.part);
            let new = match self.choices.of_part(layer, index, part.part)? {
                Choice::Native => checked(part)?,
                Choice::Codec(codec) => self
                    .recode(part, codec, learnt, &mut note, &mut sums)
                    .in_tensor(&matrix_name(layer, index, note.part))?,
            };
            if new.part.is_matrix() {
                note.bits = 8.0 * new.bytes() as f64 / (new.rows * new.cols) as f64;
                notes.push(note);
            }
            parts.push(new);
        }
        Ok(Coded { expert: CodedExpert { parts }, sums, notes })
    }

    fn recode(
        &self,
        part: CodedPart,
        codec: &CodecRef,
        learnt: Learnt<'_>,
        note: &mut MatrixNote,
        sums: &mut SquareSums,
    ) -> Result<CodedPart> {
        let data = part.decode(self.isa)?; // [rows, cols]
        let w = Matrix { rows: part.rows, cols: part.cols, data: &data };
        let (planes, loss) = match learnt {
            Learnt::Nothing => self.believed(w, codec, None)?,
            Learnt::Stats(stats) => self.believed(w, codec, Some(stats.of(part.part)))?,
            Learnt::Evidence(evidence) => match evidence.of(part.part) {
                Some(evidence) => self.judged(w, codec, evidence, note)?,
                None => self.believed(w, codec, None)?,
            },
        };
        sums.add(&loss.weights);
        Ok(CodedPart { codec: codec.clone(), planes, ..part })
    }

    /// As the solver does it.
    fn believed(
        &self,
        w: Matrix<'_>,
        codec: &CodecRef,
        stats: Option<&ColumnStats>,
    ) -> Result<(Planes, Loss)> {
        let planes = self.solver.solve(self.isa, w, codec.as_ref(), Inputs { stats, hessian: None })?;
        let loss = loss(self.isa, codec.as_ref(), &planes, w, None)?;
        Ok((planes, loss))
    }

    /// As the solver does it, unless rounding to nearest loses less over inputs that the solver did not see.
    ///
    /// # Errors
    /// A matrix that the codec cannot hold, NaN or infinity in it.
    pub fn judged(
        &self,
        w: Matrix<'_>,
        codec: &CodecRef,
        evidence: &Evidence<'_>,
        note: &mut MatrixNote,
    ) -> Result<(Planes, Loss)> {
        let held_out = Some(&evidence.held_out).filter(|h| !h.is_empty());
        let hessian = evidence.hessian();
        let measured = |planes: &Planes| loss(self.isa, codec.as_ref(), planes, w, held_out);
        // For codecs that do not work by columns.
        let stats = hessian.map(|h| ColumnStats { n_tokens: h.n_tokens, second_moment: h.diagonal() });
        let inputs = Inputs { stats: stats.as_ref(), hessian };
        let solved = self.solver.solve(self.isa, w, codec.as_ref(), inputs)?;
        let rounded = codec.encode(self.isa, w, None)?;
        let (solved_loss, rounded_loss) = (measured(&solved)?, measured(&rounded)?);
        // Without held-out inputs, or with a loss that is no number, nothing says that the solver did well.
        let as_good = held_out.is_some() && solved_loss.output <= rounded_loss.output;
        note.fell_back = !as_good && solved != rounded;
        note.hessian_source = hessian.map(|_| evidence.source);
        let (planes, loss) = if note.fell_back { (rounded, rounded_loss) } else { (solved, solved_loss) };
        if let Some(held_out) = held_out {
            let output = held_out.output_squares(self.isa, w);
            let relative = |loss: &Loss| {
                Some(if output > 0.0 { loss.output / output } else { 0.0 }).filter(|e| e.is_finite())
            };
            (note.heldout_error, note.heldout_error_rtn) = (relative(&loss), relative(&rounded_loss));
        }
        Ok((planes, loss))
    }
}

/// A part that is kept, whose planes hold no NaN and no infinity.
fn checked(part: CodedPart) -> Result<CodedPart> {
    let specs = part.codec.planes(part.rows, part.cols)?;
    for (spec, plane) in specs.iter().zip(&part.planes) {
        let mut check = FiniteCheck::new(spec.dtype);
        check.look(plane);
        check.finish().map_err(|e| part.source.locate(e))?;
    }
    Ok(part)
}

impl MatrixNote {
    /// Nothing known yet of a matrix.
    pub fn of(part: Part) -> MatrixNote {
        MatrixNote {
            part,
            bits: 0.0,
            hessian_source: None,
            heldout_error: None,
            heldout_error_rtn: None,
            fell_back: false,
        }
    }
}
