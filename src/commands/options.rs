//! Options that several commands share.

use std::path::{Path, PathBuf};

use clap::Args;
use moepack_convert::{Model, OpenOptions};
use moepack_format::{Error, Result};
use moepack_quant::codec::CODECS;
use moepack_quant::solve::{SOLVERS, solver};

use crate::engine::allocation::{Limit, recipe_within};
use crate::engine::sizes::Sizes;
use crate::output::warn;
use crate::recipe::{ALIGN_DEFAULT, Choices, NATIVE, Recipe, moe_layers};

/// The codec where none is asked for: the smallest loss that most engines can run.
pub const CODEC_DEFAULT: &str = "int4-g64";

/// How a model is opened.
#[derive(Args, Clone, Copy, Debug)]
pub struct OpenArgs {
    /// What is only odd about the model is an error too
    #[arg(long)]
    pub strict: bool,
}

impl OpenArgs {
    /// Opens a model and passes its warnings on.
    ///
    /// # Errors
    /// Whatever is wrong with it.
    pub fn open(&self, path: &Path) -> Result<Model> {
        let model = Model::open(path, &OpenOptions { strict: self.strict })?;
        model.warnings().iter().for_each(|w| warn(w));
        Ok(model)
    }
}

/// Which codec each matrix gets.
#[derive(Args, Clone, Debug)]
pub struct RecipeArgs {
    /// One codec for all routed experts.
    #[arg(long, value_name = "NAME", conflicts_with = "recipe", help = codec_help())]
    pub codec: Option<String>,
    /// Mean bits per weight of the routed experts; allocation chooses the codecs
    #[arg(long, value_name = "BITS", value_parser = bits, conflicts_with_all = ["codec", "recipe", "target_size"])]
    pub bits: Option<f64>,
    /// Bytes of the whole bundle, such as 96GiB; allocation chooses the codecs
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse_arg, conflicts_with_all = ["codec", "recipe"])]
    pub target_size: Option<u64>,
    /// Recipe file (TOML), as `plan -o` writes it
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// How levels are chosen.
    #[arg(long, value_name = "NAME", conflicts_with = "recipe", help = solver_help())]
    pub solver: Option<String>,
    /// Records start at multiples of this many bytes [default: 16384]
    #[arg(long, value_name = "BYTES", value_parser = crate::size::parse_arg, conflicts_with = "recipe")]
    pub align: Option<u64>,
}

/// A recipe worked out for a model.
#[derive(Debug)]
pub struct Prepared {
    /// As a person would write it.
    pub recipe: Recipe,
    /// For every matrix.
    pub choices: Choices,
    /// In bytes.
    pub sizes: Sizes,
}

/// What a solver will have to work with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calibrated {
    /// Nothing.
    Not,
    /// The mean squares of a stats file.
    ByStats,
    /// A text, and so Hessians.
    ByText,
}

impl Calibrated {
    /// What these options give.
    pub fn by(text: bool, stats: bool) -> Calibrated {
        match (text, stats) {
            (true, _) => Calibrated::ByText,
            (false, true) => Calibrated::ByStats,
            (false, false) => Calibrated::Not,
        }
    }

    /// The solver where none is asked for: the one that makes most of it.
    fn solver(self) -> &'static str {
        match self {
            Calibrated::Not => "rtn",
            Calibrated::ByStats => "weighted",
            Calibrated::ByText => "gptq",
        }
    }
}

impl Prepared {
    /// Refuses a solver that does not have what it works with.
    ///
    /// # Errors
    /// Kind `Usage`.
    pub fn check_calibrated(&self, calibrated: Calibrated) -> Result<()> {
        let name = &self.recipe.solver;
        let solver = solver(name)?;
        match calibrated {
            Calibrated::Not if solver.needs_stats() => {
                let way = if solver.needs_hessian() { "" } else { " or --stats FILE" };
                Err(Error::usage(format!("solver {name} needs calibration"))
                    .hint(format!("give --calibrate TEXT{way}")))
            }
            Calibrated::ByStats if solver.needs_hessian() => {
                Err(Error::usage(format!("solver {name} needs Hessians, and stats files have none"))
                    .hint("give --calibrate TEXT instead of --stats, or say --solver weighted"))
            }
            _ => Ok(()),
        }
    }
}

impl RecipeArgs {
    /// Works the recipe out for a model; `calibrated` decides the solver where none is asked for.
    ///
    /// # Errors
    /// A recipe that cannot be read, does not fit the model, or asks for the impossible.
    pub fn prepare(&self, model: &Model, calibrated: Calibrated) -> Result<Prepared> {
        let recipe = match &self.recipe {
            Some(path) => Recipe::read(path)?,
            None => self.made(model, calibrated)?,
        };
        recipe.validate()?;
        let choices = Choices::new(&recipe, &moe_layers(model.spec()))?;
        let sizes = Sizes::of(model, &choices, recipe.align)?;
        Ok(Prepared { recipe, choices, sizes })
    }

    /// A recipe from options alone.
    fn made(&self, model: &Model, calibrated: Calibrated) -> Result<Recipe> {
        let solver_name = self.solver.as_deref().unwrap_or(calibrated.solver());
        solver(solver_name)?;
        let align = self.align.unwrap_or(ALIGN_DEFAULT);
        let limit = self.bits.map(Limit::Bits).or(self.target_size.map(Limit::BundleBytes));
        if let Some(limit) = limit {
            return recipe_within(model, limit, solver_name, align);
        }
        let codec = self.codec.as_deref().unwrap_or(CODEC_DEFAULT);
        if codec != NATIVE {
            moepack_quant::codec(codec)?;
        }
        Ok(Recipe::uniform(codec, solver_name, align))
    }
}

/// The tables tell the names, so that a new row is in the help.
fn codec_help() -> String {
    let known: Vec<&str> = CODECS.iter().map(|family| family.pattern).collect();
    format!("One codec for all routed experts: {NATIVE}, {} [default: {CODEC_DEFAULT}]", known.join(", "))
}

fn solver_help() -> String {
    let known: Vec<String> = SOLVERS.iter().map(|s| format!("{} ({})", s.name(), s.doc())).collect();
    format!(
        "How levels are chosen: {} [default: gptq with --calibrate, weighted with --stats]",
        known.join(", ")
    )
}

fn bits(text: &str) -> std::result::Result<f64, String> {
    let bits = text.parse::<f64>().ok().filter(|b| (0.1..=64.0).contains(b));
    bits.ok_or_else(|| format!("{text:?} is no number of bits from 0.1 to 64"))
}
