//! From a budget to a recipe: what loses least within the bytes.
//!
//! The drift of a model grows in proportion to the relative squared error of its weights, so the sum that is minimised
//! is that error times a sensitivity. Sensitivities are measured where there is a calibration text ([`Sensitivity`]);
//! without one each weight counts the same. [`free`] is for codecs whose rate can be chosen freely and meets a budget
//! to the byte, or to the unit in which records grow; [`fixed`] chooses among codecs that have one rate each.

use moepack_convert::Model;
use moepack_convert::spec::Part;
use moepack_format::{Error, Result};

use crate::engine::sensitivity::Sensitivity;
use crate::engine::sizes::{CalibrationSize, Sizes};
use crate::output::say;
use crate::recipe::{
    Choices, MATRICES, Recipe, Rule, SCHEMA, TrunkRule, matrix_name, matrix_pattern, moe_layers,
};

pub mod fixed;
pub mod free;
pub mod trunk;
mod units;

/// What a bundle may take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// Mean bits per weight of the routed experts, padding not counted.
    Bits(f64),
    /// Every byte of the bundle.
    BundleBytes(u64),
}

/// Between what allocation may choose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Candidates {
    /// One codec whose rate is free, by name.
    Free(String),
    /// The integer codecs of fixed rate.
    Fixed,
}

/// What is asked of allocation.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    /// The budget.
    pub limit: Limit,
    /// Between what to choose.
    pub candidates: Candidates,
    /// Solver of the recipe.
    pub solver: &'a str,
    /// What becomes of the trunk.
    pub trunk: Option<&'a TrunkRule>,
    /// Alignment of records.
    pub align: u64,
    /// What the model is sensitive to, where that was measured.
    pub sensitivity: Option<&'a Sensitivity>,
    /// Whether each expert gets bits of its own.
    pub per_expert: bool,
    /// What calibration will add to the manifest.
    pub calibrated: Option<CalibrationSize>,
}

impl Ask<'_> {
    fn recipe(&self, rules: Vec<Rule>) -> Recipe {
        let target_bytes = match self.limit {
            Limit::Bits(_) => None,
            Limit::BundleBytes(bytes) => Some(bytes),
        };
        let (solver, trunk) = (self.solver.to_owned(), self.trunk.cloned());
        Recipe { schema: SCHEMA, solver, align: self.align, target_bytes, trunk, rules }
    }
}

/// What a quotient may be beyond the number that it was made for.
const ROUNDING: f64 = 1e-9;
/// Shortfall that is worth a word.
pub const SHORTFALL: f64 = 1e-3;

/// The recipe that loses least within the limit.
///
/// # Errors
/// A limit that cannot be met (kind `Plan`, with the smallest possible); weights that cannot be read.
pub fn recipe_within(model: &Model, ask: &Ask<'_>) -> Result<Recipe> {
    match &ask.candidates {
        Candidates::Free(codec) => free::recipe(model, ask, codec),
        Candidates::Fixed => fixed::recipe(model, ask),
    }
}

/// Compares a recipe with what was asked for, and says so where it stays below.
///
/// # Errors
/// A recipe that does not fit the model, or takes more than was asked for: matrices of a few rows take what they take.
pub fn check_met(model: &Model, recipe: &Recipe, ask: &Ask<'_>) -> Result<()> {
    let sizes = sizes(model, recipe, ask)?;
    let (asked, met) = match ask.limit {
        Limit::Bits(bits) => (bits, sizes.bits_each()),
        Limit::BundleBytes(bytes) => (bytes as f64, sizes.bundle_bytes() as f64),
    };
    if met > asked * (1.0 + ROUNDING) {
        let (what, least) = match ask.limit {
            Limit::Bits(bits) => (format!("{bits} bits a weight"), format!("{met:.4} bits")),
            Limit::BundleBytes(bytes) => (format!("{bytes} bytes"), format!("{met} bytes")),
        };
        return Err(Error::plan(format!(
            "{what} are too few for matrices as small as this model's: the least is {least}"
        ))
        .hint("allow more, or name a codec of fixed rate"));
    }
    if met < asked * (1.0 - SHORTFALL) {
        say(&shortfall(ask, asked, met));
    }
    Ok(())
}

fn shortfall(ask: &Ask<'_>, asked: f64, met: f64) -> String {
    let share = (1.0 - met / asked) * 100.0;
    let why = match ask.candidates {
        Candidates::Fixed => "codecs of fixed rate come no nearer; tcq256, whose rate is free, does",
        Candidates::Free(_) => "the codec takes no more",
    };
    format!("note: the budget is missed by {share:.2} % from below: {why}")
}

fn sizes(model: &Model, recipe: &Recipe, ask: &Ask<'_>) -> Result<Sizes> {
    let choices = Choices::of(recipe, model.spec())?;
    Sizes::of(model, recipe, &choices, ask.calibrated)
}

/// Experts that are treated alike: a whole layer's, or one.
#[derive(Clone, Debug)]
struct Group {
    layer: usize,
    experts: std::ops::Range<usize>,
    /// Whether these are all experts of the layer.
    whole: bool,
}

impl Group {
    fn len(&self) -> u64 {
        self.experts.len() as u64
    }

    /// The pattern of a projection of these experts.
    fn pattern(&self, part: Part) -> String {
        if self.whole {
            return matrix_pattern(self.layer, part);
        }
        let (first, last) = (self.experts.start, self.experts.end.saturating_sub(1));
        let name = matrix_name(self.layer, first, part);
        if first == last {
            return name;
        }
        name.replacen(&format!("experts.{first}."), &format!("experts.{first}-{last}."), 1)
    }

    /// By how much a relative squared error of a projection of these experts counts: the fourth root of what was
    /// measured for each weight. The full value asks for rates so far apart that models came out worse than with one
    /// rate for all: the error of low rates is not white (levels shrink weights, all three projections alike) and
    /// costs more than in proportion. A quarter of the differences measured best (docs/allocation.md).
    fn sensitivity(&self, ask: &Ask<'_>, part: Part, weights: u64) -> f64 {
        let n = weights as f64;
        let Some(measured) = ask.sensitivity else { return n };
        let whole = measured.of_part(self.layer, part) * measured.share(self.layer, self.experts.clone());
        n * (whole / n.max(1.0)).sqrt().sqrt()
    }
}

fn groups(model: &Model, per_expert: bool) -> Vec<Group> {
    let of_layer = |(layer, n): (usize, usize)| -> Vec<Group> {
        if per_expert {
            (0..n).map(|e| Group { layer, experts: e..e + 1, whole: n == 1 }).collect()
        } else {
            vec![Group { layer, experts: 0..n, whole: true }]
        }
    };
    moe_layers(model.spec()).into_iter().flat_map(of_layer).collect()
}

/// How the experts of a layer are stored: matrices as `[rows, cols]`, none of a gate that is not there, and the planes of
/// what is kept as it is.
#[derive(Clone, Debug)]
struct Shapes {
    matrices: [(usize, usize); 3],
    kept: Vec<moepack_format::PlaneSpec>,
}

fn shapes(model: &Model, layer: usize) -> Result<Shapes> {
    let parts = model.expert_parts(layer, 0)?;
    let matrix = |part: Part| {
        let found = parts.iter().find(|p| p.part == part).map(|p| (p.rows, p.cols));
        found.ok_or_else(|| Error::bad_data("an expert without it").in_tensor(matrix_name(layer, 0, part)))
    };
    let [gate, up, down] = MATRICES;
    let has_gate = model.spec().moe(layer).is_some_and(|moe| moe.matrices().contains(&gate));
    let matrices = [if has_gate { matrix(gate)? } else { (0, 0) }, matrix(up)?, matrix(down)?];
    let mut kept = Vec::new();
    for part in parts.iter().filter(|p| !p.part.is_matrix()) {
        kept.extend(part.codec.planes(part.rows, part.cols)?);
    }
    Ok(Shapes { matrices, kept })
}
