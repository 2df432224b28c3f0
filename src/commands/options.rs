//! Options that several commands share.

use std::path::{Path, PathBuf};

use clap::Args;
use moepack_convert::{Model, OpenOptions};
use moepack_format::{Error, Result};
use moepack_quant::solve::solver;

use crate::engine::allocation::{Limit, recipe_within};
use crate::engine::sizes::Sizes;
use crate::output::warn;
use crate::recipe::{ALIGN_DEFAULT, Choices, Recipe, moe_layers};

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
    /// One codec for all routed experts: native, bf16, int2..int8[-g32|-g64|-g128][-asym], mxfp4, nvfp4, fp8-block ...
    #[arg(long, value_name = "NAME", conflicts_with = "recipe")]
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
    /// How levels are chosen: rtn, or weighted (by calibration) [default: weighted where there are stats]
    #[arg(long, value_name = "NAME", conflicts_with = "recipe")]
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

impl RecipeArgs {
    /// Works the recipe out for a model; `calibrated` says whether the solver will have stats.
    ///
    /// # Errors
    /// A recipe that cannot be read, does not fit the model, or asks for the impossible.
    pub fn prepare(&self, model: &Model, calibrated: bool) -> Result<Prepared> {
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
    fn made(&self, model: &Model, calibrated: bool) -> Result<Recipe> {
        let default = if calibrated { "weighted" } else { "rtn" };
        let solver_name = self.solver.as_deref().unwrap_or(default);
        if solver(solver_name)?.needs_stats() && !calibrated {
            return Err(Error::usage(format!("solver {solver_name} needs calibration"))
                .hint("give --calibrate TEXT or --stats FILE"));
        }
        let align = self.align.unwrap_or(ALIGN_DEFAULT);
        let limit = self.bits.map(Limit::Bits).or(self.target_size.map(Limit::BundleBytes));
        if let Some(limit) = limit {
            return recipe_within(model, limit, solver_name, align);
        }
        let codec = self.codec.as_deref().unwrap_or(CODEC_DEFAULT);
        if codec != crate::recipe::NATIVE {
            moepack_quant::codec::codec(codec)?;
        }
        Ok(Recipe::uniform(codec, solver_name, align))
    }
}

fn bits(text: &str) -> std::result::Result<f64, String> {
    let bits = text.parse::<f64>().ok().filter(|b| (0.1..=64.0).contains(b));
    bits.ok_or_else(|| format!("{text:?} is no number of bits from 0.1 to 64"))
}
