//! Options that several commands share.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use moepack_convert::checkpoint::Lenient;
use moepack_convert::{Model, OpenOptions};
use moepack_format::{Error, Kind, Result};
use moepack_quant::Isa;
use moepack_quant::codec::CODECS;
use moepack_quant::solve::{SOLVERS, solver};

use moepack_verify::tokens::Windows;

use crate::engine::allocation::trunk::{TRUNK_CODED, Trade};
use crate::engine::allocation::{Ask, Candidates, Limit, SHORTFALL, check_met, recipe_within};
use crate::engine::coder::Coder;
use crate::engine::prediction::Plan;
use crate::engine::sensitivity::{FirstPass, Sensitivity, first_pass};
use crate::engine::sizes::{CalibrationSize, Sizes};
use crate::engine::trunk::Trunk;
use crate::output::{say, warn};
use crate::recipe::{ALIGN_DEFAULT, BITS, Choices, NATIVE, Recipe, TrunkRule, moe_layers};
use crate::session::Session;

/// The codec where none is asked for: the smallest loss that most engines can run.
pub const CODEC_DEFAULT: &str = "int4-g64";

/// Bits of the shortest numbers that stand for themselves, BF16 and F16.
const FLOAT_BITS: f64 = 16.0;

/// The codec that meets a budget where none is asked for: the nearest to the limit of what bits can do.
const CODEC_OF_BUDGETS: &str = "tcq256";

/// What `--codec` says for all integer codecs of fixed rate, among which a budget chooses.
const FIXED_RATES: &str = "int";

/// How a model is opened.
#[derive(Args, Clone, Copy, Debug)]
pub struct OpenArgs {
    /// What is only odd about the model is an error too
    #[arg(long)]
    pub strict: bool,
    /// A tensor that is in two weight files is read once, if it is the same byte for byte
    #[arg(long)]
    pub allow_duplicate_identical: bool,
    /// What becomes of weights that are NaN or infinite; a bundle's manifest says so
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = NanPolicy::Refuse)]
    pub nan_policy: NanPolicy,
}

/// What becomes of weights that are NaN or infinite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NanPolicy {
    /// The checkpoint is refused
    Refuse,
    /// They are read as 0
    Zero,
}

impl OpenArgs {
    /// Opens a model and passes its warnings on.
    ///
    /// # Errors
    /// Whatever is wrong with it.
    pub fn open(&self, path: &Path) -> Result<Model> {
        self.open_with(path, false)
    }

    /// The same; a checkpoint of which only config.json and the index are there will do.
    ///
    /// # Errors
    /// Whatever is wrong with it.
    pub fn open_to_plan(&self, path: &Path) -> Result<Model> {
        let model = self.open_with(path, true)?;
        if model.is_names_alone() {
            warn("no weight file is there: planned from config.json and the index, on normal numbers");
        }
        Ok(model)
    }

    /// Refuses what workers of a plan cannot be told.
    ///
    /// # Errors
    /// Kind `Usage`.
    pub fn refuse_lenient(&self) -> Result<()> {
        if self.allow_duplicate_identical || self.nan_policy == NanPolicy::Zero {
            let what =
                "a plan for several machines takes no --nan-policy zero and no --allow-duplicate-identical";
            return Err(Error::usage(what).hint("mend the checkpoint, or quantize on one machine"));
        }
        Ok(())
    }

    fn open_with(self, path: &Path, names_alone: bool) -> Result<Model> {
        let lenient = Lenient {
            same_twice: self.allow_duplicate_identical,
            zero_non_finite: self.nan_policy == NanPolicy::Zero,
        };
        let model = Model::open(path, &OpenOptions { strict: self.strict, names_alone, lenient })?;
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
    /// Mean bits per weight of the routed experts; allocation shares them out
    #[arg(long, value_name = "BITS", value_parser = bits, conflicts_with_all = ["recipe", "target_size"])]
    pub bits: Option<f64>,
    /// Bytes of the whole bundle, such as 96GiB; allocation shares them out
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse_arg, conflicts_with = "recipe")]
    pub target_size: Option<u64>,
    /// Allocation gives each expert bits of its own, by how much it is used (needs --calibrate)
    #[arg(long, conflicts_with = "recipe")]
    pub per_expert: bool,
    /// Codec of the matrices of attention, dense MLPs and shared experts, or native; everything else of the trunk is always
    /// kept. Default: native, but with --target-size int8-g64 where that is expected to lose less
    #[arg(long, value_name = "NAME", conflicts_with = "recipe")]
    pub trunk_codec: Option<String>,
    /// Bits per weight of the trunk's matrices, for a --trunk-codec whose rate is free, such as tcq256
    #[arg(long, value_name = "BITS", value_parser = bits, requires = "trunk_codec")]
    pub trunk_bits: Option<f64>,
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
    /// What was measured on the calibration text.
    pub first: Option<FirstPass>,
}

/// What calibration a run has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Given<'a> {
    /// Text that runs through the model now.
    pub text: Option<&'a Windows>,
    /// Tokens that stats of an earlier run were made from.
    pub stats_tokens: Option<u64>,
}

impl Given<'_> {
    fn size(&self) -> Option<CalibrationSize> {
        let text = self.text.map(|w| CalibrationSize { n_tokens: w.tokens.len() as u64, by_text: true });
        text.or(self.stats_tokens.map(|n_tokens| CalibrationSize { n_tokens, by_text: false }))
    }
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
    /// What is to be predicted of a run with these texts.
    pub fn plan<'a>(
        &'a self,
        model: &'a Model,
        calibration: Option<&'a Windows>,
        evaluation: Option<&'a Windows>,
        started: Instant,
    ) -> Plan<'a> {
        let (choices, sizes) = (&self.choices, &self.sizes);
        let first = self.first.as_ref();
        Plan { model, choices, sizes, first, calibration, evaluation, started }
    }

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
                let what = format!("solver {name} needs Hessians, and imatrix and stats files have none");
                let hint = "give --calibrate TEXT instead of --stats, or say --solver weighted";
                Err(Error::usage(what).hint(hint))
            }
            _ => Ok(()),
        }
    }
}

impl RecipeArgs {
    /// Works the recipe out for a model; calibration decides the solver where none is asked for, and how a budget is
    /// shared out.
    ///
    /// # Errors
    /// A recipe that cannot be read, does not fit the model, or asks for the impossible.
    pub fn prepare(&self, session: &Session, model: &Model, given: Given<'_>) -> Result<Prepared> {
        let limit = self.bits.map(Limit::Bits).or(self.target_size.map(Limit::BundleBytes));
        if self.per_expert && (limit.is_none() || given.text.is_none()) {
            return Err(Error::usage("--per-expert shares out a budget by what a calibration text shows")
                .hint("give --bits or --target-size, and --calibrate TEXT"));
        }
        let choices_of = |recipe: &Recipe| {
            recipe.validate()?;
            Choices::of(recipe, model.spec())
        };
        // A budget that decides what becomes of the trunk is first shared out as if it were coded.
        let is_open = self.is_trunk_open() && codes_trunk(model)?;
        let mut trunk = if is_open { Some(coded_trunk()) } else { self.trunk()? };
        let mut recipe = match &self.recipe {
            Some(path) => Recipe::read(path)?,
            None => self.made(model, limit, &given, None, trunk.as_ref())?,
        };
        let mut choices = choices_of(&recipe)?;
        let mut first = None;
        if let Some(text) = given.text {
            let coder = Coder { isa: Isa::get(), choices: &choices, solver: solver(&recipe.solver)? };
            let tried = recipe.trunk_choice()?;
            let pass = || first_pass(session, model, text, &coder, limit.is_some(), &tried);
            first = Some(session.in_pool(pass)?);
        }
        if is_open && let Some(rates) = self.keeps_trunk(model, limit, &given, &recipe, first.as_ref())? {
            trunk = None;
            first = first.map(|first| FirstPass { trunk_kld: None, ..first.at_rate(rates) });
        }
        let sensitivity = first.as_ref().and_then(|first| first.sensitivity.as_ref());
        if self.recipe.is_none() && (sensitivity.is_some() || trunk != recipe.trunk) {
            recipe = self.made(model, limit, &given, sensitivity, trunk.as_ref())?;
            choices = choices_of(&recipe)?;
        }
        let sizes = Sizes::of(model, &recipe, &choices, given.size())?;
        Ok(Prepared { recipe, choices, sizes, first })
    }

    /// Whether the budget decides what becomes of the trunk.
    fn is_trunk_open(&self) -> bool {
        self.recipe.is_none() && self.target_size.is_some() && self.trunk_codec.is_none()
    }

    /// Whether less is lost with the trunk as released, `coded` being the recipe with it coded; if so, the experts' bits a weight
    /// with it coded and as released.
    fn keeps_trunk(
        &self,
        model: &Model,
        limit: Option<Limit>,
        given: &Given<'_>,
        coded: &Recipe,
        first: Option<&FirstPass>,
    ) -> Result<Option<[f64; 2]>> {
        let sizes =
            |recipe: &Recipe| Sizes::of(model, recipe, &Choices::of(recipe, model.spec())?, given.size());
        let released = match self.made(model, limit, given, None, None) {
            Ok(recipe) => sizes(&recipe)?,
            // Only a coded trunk leaves experts enough.
            Err(e) if e.kind() == Kind::Plan => return Ok(None),
            Err(e) => return Err(e),
        };
        let coded = sizes(coded)?;
        let rates = [coded.bits_each(), released.bits_each()];
        let trade = Trade::of(rates, first);
        // Or experts cannot take what the trunk gives back.
        let is_short = coded.bundle_bytes() as f64 * (1.0 + SHORTFALL) < released.bundle_bytes() as f64;
        if is_short || !trade.is_for_coding() {
            return Ok(Some(rates));
        }
        say(&format!(
            "note: trunk in {TRUNK_CODED}: mean KLD {:.1e} is expected, {:.1e} with it as released; --trunk-codec says otherwise",
            trade.coded, trade.released
        ));
        Ok(None)
    }

    /// A recipe from options alone.
    fn made(
        &self,
        model: &Model,
        limit: Option<Limit>,
        given: &Given<'_>,
        sensitivity: Option<&Sensitivity>,
        trunk: Option<&TrunkRule>,
    ) -> Result<Recipe> {
        let default = Calibrated::by(given.text.is_some(), given.stats_tokens.is_some()).solver();
        let solver_name = self.solver.as_deref().unwrap_or(default);
        solver(solver_name)?;
        let align = self.align.unwrap_or(ALIGN_DEFAULT);
        let Some(limit) = limit else {
            let codec = match &self.codec {
                Some(codec) => codec,
                None if are_quantized(model)? => NATIVE,
                None => CODEC_DEFAULT,
            };
            if codec != NATIVE {
                moepack_quant::codec(codec)?;
            }
            return Ok(Recipe { trunk: trunk.cloned(), ..Recipe::uniform(codec, solver_name, align) });
        };
        let (candidates, per_expert) = (self.candidates()?, self.per_expert);
        let (solver, calibrated) = (solver_name, given.size());
        let ask = Ask { limit, candidates, solver, trunk, align, sensitivity, per_expert, calibrated };
        let recipe = recipe_within(model, &ask)?;
        // The recipe of the first pass is none that anybody gets.
        if sensitivity.is_some() || given.text.is_none() {
            check_met(model, &recipe, &ask)?;
        }
        Ok(recipe)
    }

    /// What becomes of the trunk; `native` is the same as nothing said.
    fn trunk(&self) -> Result<Option<TrunkRule>> {
        let (Some(name), bits) = (&self.trunk_codec, self.trunk_bits) else { return Ok(None) };
        if name != NATIVE {
            moepack_quant::codec(name)?;
        }
        let rule = TrunkRule { codec: name.clone(), bits };
        Ok(Some(rule).filter(|rule| rule.codec != NATIVE || rule.bits.is_some()))
    }

    /// Between what a budget chooses.
    fn candidates(&self) -> Result<Candidates> {
        let name = self.codec.as_deref().unwrap_or(CODEC_OF_BUDGETS);
        if name == FIXED_RATES {
            return Ok(Candidates::Fixed);
        }
        if name != NATIVE && moepack_quant::codec(name)?.at_rate(*BITS.start()).is_some() {
            return Ok(Candidates::Free(name.to_owned()));
        }
        Err(Error::usage(format!("codec {name} has a fixed rate, so no budget can be asked of it")).hint(
            format!("{CODEC_OF_BUDGETS} meets any; --codec {FIXED_RATES} chooses among integer codecs"),
        ))
    }
}

/// Whether a coded trunk is another than the released one.
fn codes_trunk(model: &Model) -> Result<bool> {
    Ok(Trunk::of(model, &coded_trunk().choice()?)?.coding().n_weights > 0)
}

fn coded_trunk() -> TrunkRule {
    TrunkRule { codec: TRUNK_CODED.to_owned(), bits: None }
}

/// Whether all routed experts were released in fewer bits than a float has, so that coding them anew would only lose.
///
/// # Errors
/// An expert whose tensors do not say how it is stored.
fn are_quantized(model: &Model) -> Result<bool> {
    let mut layers = moe_layers(model.spec()).into_iter().peekable();
    if layers.peek().is_none() {
        return Ok(false);
    }
    for (layer, expert) in layers.flat_map(|(layer, n)| (0..n).map(move |e| (layer, e))) {
        for stored in model.expert_parts(layer, expert)?.iter().filter(|s| s.part.is_matrix()) {
            if stored.codec.bits_per_weight(stored.rows, stored.cols)? >= FLOAT_BITS {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// The tables tell the names, so that a new row is in the help.
fn codec_help() -> String {
    let known: Vec<&str> = CODECS.iter().map(|family| family.pattern).collect();
    format!(
        "One codec for all routed experts: {NATIVE}, {} [default: {NATIVE} where they were released quantized, else \
         {CODEC_DEFAULT}; with a budget {CODEC_OF_BUDGETS}, or {FIXED_RATES} for a choice among integer codecs]",
        known.join(", ")
    )
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
