//! A recipe: which codec each matrix of each expert gets, as text that a person may edit.
//!
//! ```toml
//! schema = 1
//! solver = "rtn"
//! align = 16384
//!
//! [[rule]]
//! tensor = "layers.*.experts.*.*"
//! codec = "int4-g64"
//!
//! [[rule]]
//! tensor = "layers.3.experts.*.down_proj"
//! codec = "int6-g64"
//! ```
//!
//! Rules are read in order and the last one that matches a matrix wins. `*` stands for any characters except a dot, and
//! `4-17` for the numbers from 4 to 17. A rule that matches nothing is an error, and so is a matrix that no rule matches.
//! A table `[trunk]` with a `codec`, and `bits` where its rate is free, has the trunk's matrices coded too (`trunk.rs` of the
//! engine says which); without it the trunk is kept as released.
//!
//! `bits` says the rate of a codec that has no fixed one, all planes counted: `codec = "tcq256"`, `bits = 3.06`.

use std::path::Path;

use moepack_convert::{ModelSpec, Part};
use moepack_format::bank::check_align;
use moepack_format::{Context, Error, Result};
use moepack_quant::CodecRef;
use moepack_quant::codec::codec;
use moepack_verify::text::utf8;
use serde::{Deserialize, Serialize};

/// The codec name that keeps a matrix as it was released, bit for bit.
pub const NATIVE: &str = "native";

/// Version of the text.
pub const SCHEMA: u32 = 1;

/// A bundle is filled up until no more than one part in so many lacks.
const FILLED_TO: u64 = 2000;

/// Bytes of a recipe file: a rule for each matrix of the largest models takes less.
const RECIPE_BYTES_MAX: u64 = 64 << 20;

/// Bits per weight that may be asked of a codec whose rate is free. Tables of the trellis end at about 6.97.
pub const BITS: std::ops::RangeInclusive<f64> = 1.0..=6.9;

pub use moepack_format::ALIGN_DEFAULT;

/// A recipe as a person writes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Version of the text, 1.
    pub schema: u32,
    /// How levels are chosen: a name of `moepack_quant::solve::SOLVERS`.
    pub solver: String,
    /// Alignment of records in bytes, a power of two of at least 4096.
    #[serde(default = "align_default")]
    pub align: u64,
    /// Bytes of the bundle that allocation was asked for. What records, which grow by `align` at a time, leave of it is
    /// filled up in the manifest to within a twentieth of a percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_bytes: Option<u64>,
    /// Codec of the trunk's matrices; none, and the trunk is kept as released.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trunk: Option<TrunkRule>,
    /// Rules in order; the last that matches wins.
    #[serde(rename = "rule")]
    pub rules: Vec<Rule>,
}

/// What becomes of the trunk's matrices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrunkRule {
    /// Codec, or `native`.
    pub codec: String,
    /// Bits per weight, for codecs whose rate can be chosen; they write at most so many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<f64>,
}

impl TrunkRule {
    /// What it means.
    ///
    /// # Errors
    /// An unknown codec, or bits that it does not have.
    pub fn choice(&self) -> Result<Choice> {
        named_choice(&self.codec, self.bits)
    }
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Pattern of matrices, `layers.<layer>.experts.<expert>.<gate_proj|up_proj|down_proj>`.
    pub tensor: String,
    /// Codec, or `native`.
    pub codec: String,
    /// Bits per weight, for codecs whose rate can be chosen; they write at most so many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<f64>,
    /// What a plan expects these matrices to take; not read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// What allocation expects these matrices to lose: relative squared error × weights, each counted by how sensitive
    /// the model is where that was measured; not read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_loss: Option<f64>,
}

fn align_default() -> u64 {
    ALIGN_DEFAULT
}

/// What becomes of one matrix.
#[derive(Clone, Debug)]
pub enum Choice {
    /// Kept as released.
    Native,
    /// Quantized.
    Codec(CodecRef),
}

impl Choice {
    /// The name in a recipe.
    pub fn name(&self) -> String {
        match self {
            Choice::Native => NATIVE.to_owned(),
            Choice::Codec(codec) => codec.name(),
        }
    }
}

impl Recipe {
    /// The recipe that treats every matrix alike.
    pub fn uniform(codec: &str, solver: &str, align: u64) -> Recipe {
        let rule = Rule {
            tensor: "layers.*.experts.*.*".into(),
            codec: codec.into(),
            bits: None,
            bytes: None,
            expected_loss: None,
        };
        Recipe {
            schema: SCHEMA,
            solver: solver.into(),
            align,
            target_bytes: None,
            trunk: None,
            rules: vec![rule],
        }
    }

    /// Reads a recipe file.
    ///
    /// # Errors
    /// The file cannot be read, is no such TOML, or asks for the impossible (kind `Plan`).
    pub fn read(path: &Path) -> Result<Recipe> {
        let bytes = crate::text::read(path, RECIPE_BYTES_MAX)?;
        utf8(&bytes).and_then(Recipe::parse).in_file(path)
    }

    /// Reads the text of a recipe.
    ///
    /// # Errors
    /// No such TOML, or values out of range (kind `Plan`).
    pub fn parse(text: &str) -> Result<Recipe> {
        let recipe: Recipe = toml::from_str(text).map_err(|e| Error::plan(format!("not a recipe: {e}")))?;
        if recipe.schema != SCHEMA {
            return Err(Error::plan(format!("recipe schema {}, this program reads {SCHEMA}", recipe.schema)));
        }
        recipe.validate()?;
        Ok(recipe)
    }

    /// Bytes that fill up a bundle of `bundle_bytes` to what was asked for: none where more lacks than a record's step and what
    /// the manifest was estimated too long,
    /// or so little that nobody minds.
    pub fn fill_bytes(&self, bundle_bytes: u64) -> u64 {
        let Some(target) = self.target_bytes else { return 0 };
        let lacking = target.saturating_sub(bundle_bytes);
        if lacking < 2 * self.align { lacking.saturating_sub(target / FILLED_TO) } else { 0 }
    }

    /// Checks what does not depend on a model: solver, alignment, codec names, patterns.
    ///
    /// # Errors
    /// The first thing that is wrong (kind `Plan`).
    pub fn validate(&self) -> Result<()> {
        moepack_quant::solve::solver(&self.solver).map_err(as_plan)?;
        check_align(self.align).map_err(as_plan)?;
        for rule in &self.rules {
            choice(rule).map_err(|e| as_plan(e).in_tensor(rule.tensor.clone()))?;
        }
        self.trunk_choice().map_err(as_plan)?;
        Ok(())
    }

    /// What becomes of the trunk's matrices.
    ///
    /// # Errors
    /// An unknown codec, or bits that it does not have.
    pub fn trunk_choice(&self) -> Result<Choice> {
        self.trunk.as_ref().map_or(Ok(Choice::Native), TrunkRule::choice)
    }

    /// The text.
    ///
    /// # Errors
    /// A value TOML cannot hold (kind `Plan`).
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::plan(format!("cannot write the recipe: {e}")))
    }
}

fn as_plan(e: Error) -> Error {
    Error::plan(e.what())
}

fn choice(rule: &Rule) -> Result<Choice> {
    named_choice(&rule.codec, rule.bits)
}

fn named_choice(codec_name: &str, bits: Option<f64>) -> Result<Choice> {
    match (codec_name, bits) {
        (NATIVE, None) => Ok(Choice::Native),
        (NATIVE, Some(_)) => Err(fixed_rate(NATIVE)),
        (name, None) => codec(name).map(Choice::Codec),
        (name, Some(bits)) => at_rate(name, bits).map(Choice::Codec),
    }
}

/// The codec of that name at `bits` a weight.
///
/// # Errors
/// An unknown codec; one whose rate is fixed; bits that no codec has (kind `Plan`).
pub fn at_rate(name: &str, bits: f64) -> Result<CodecRef> {
    let known = codec(name)?;
    if !BITS.contains(&bits) {
        return Err(Error::plan(format!(
            "{bits} bits for {name}, expected {} to {}",
            BITS.start(),
            BITS.end()
        )));
    }
    known.at_rate(bits).ok_or_else(|| fixed_rate(name))
}

fn fixed_rate(name: &str) -> Error {
    Error::plan(format!("codec {name} has a fixed rate, no bits can be asked of it"))
        .hint("leave the bits away, or choose a codec whose rate is free, such as tcq256")
}

/// The matrices of an expert that a recipe speaks of, in record order; experts without a gate have the others.
pub const MATRICES: [Part; 3] = [Part::Gate, Part::Up, Part::Down];

/// The name of a matrix in recipes, reports and bundles.
pub fn matrix_name(layer: usize, expert: usize, part: Part) -> String {
    format!("layers.{layer}.experts.{expert}.{}", part.name())
}

/// The MoE layers of a model as `(layer, n_experts)`, ascending.
pub fn moe_layers(spec: &ModelSpec) -> Vec<(usize, usize)> {
    spec.moe_layers().map(|(l, moe)| (l, moe.n_experts)).collect()
}

/// The pattern of a projection in all experts of a layer.
pub fn matrix_pattern(layer: usize, part: Part) -> String {
    format!("layers.{layer}.experts.*.{}", part.name())
}

/// A recipe worked out for a model: the choice of every matrix.
#[derive(Clone, Debug)]
pub struct Choices {
    table: Vec<Choice>,
    trunk: Choice,
    layers: Vec<LayerChoices>,
}

#[derive(Clone, Debug)]
struct LayerChoices {
    layer: usize,
    /// `[n_experts][MATRICES]`, indices into the table; [`ABSENT`] for what experts do not have.
    experts: Vec<[u32; 3]>,
}

const ABSENT: u32 = u32::MAX;

impl Choices {
    /// Works the recipe out for a model.
    ///
    /// # Errors
    /// A rule that matches nothing, a matrix that no rule matches (kind `Plan`).
    pub fn of(recipe: &Recipe, spec: &ModelSpec) -> Result<Choices> {
        let layers = spec.moe_layers().map(|(l, moe)| (l, moe.n_experts, moe.matrices()));
        Choices::new(recipe, &layers.collect::<Vec<_>>())
    }

    /// Works the recipe out for MoE layers given as `(layer, n_experts, matrices)`.
    fn new(recipe: &Recipe, moe_layers: &[(usize, usize, &[Part])]) -> Result<Choices> {
        let table = recipe.rules.iter().map(choice).collect::<Result<Vec<_>>>()?;
        let patterns: Vec<Vec<&str>> = recipe.rules.iter().map(|r| r.tensor.split('.').collect()).collect();
        let mut used = vec![false; patterns.len()];
        let mut layers = Vec::new();
        for &(layer, n_experts, parts) in moe_layers {
            // A recipe with a rule for each expert is long, and only a layer's own rules are tried on its experts.
            let name = matrix_name(layer, 0, Part::Gate);
            let own = (0..patterns.len()).filter(|&i| patterns.get(i).is_some_and(|p| same_layer(p, &name)));
            let own: Vec<usize> = own.collect();
            let experts = (0..n_experts)
                .map(|expert| choose(&patterns, &own, &mut used, (layer, expert, parts)))
                .collect::<Result<_>>()?;
            layers.push(LayerChoices { layer, experts });
        }
        match used.iter().position(|u| !u) {
            Some(idle) if !moe_layers.is_empty() => {
                let rule = recipe.rules.get(idle).map(|r| r.tensor.as_str()).unwrap_or_default();
                Err(Error::plan(format!("rule {} ({rule:?}) matches no matrix of this model", idle + 1))
                    .hint("names look like layers.3.experts.17.down_proj; * stands for any characters except a dot"))
            }
            _ => Ok(Choices { table, trunk: recipe.trunk_choice()?, layers }),
        }
    }

    /// The choice of the trunk's matrices.
    pub fn trunk(&self) -> &Choice {
        &self.trunk
    }

    /// The choice of one part: biases are kept, matrices follow the recipe. What experts do not have is kept, too.
    ///
    /// # Errors
    /// A matrix that is not in the model.
    pub fn of_part(&self, layer: usize, expert: usize, part: Part) -> Result<&Choice> {
        if part.is_matrix() { self.get(layer, expert, part) } else { Ok(&Choice::Native) }
    }

    /// Whether all of a layer's experts stay as they are released.
    ///
    /// # Errors
    /// A matrix that is not in the model.
    pub fn is_copied(&self, layer: usize, n_experts: usize) -> Result<bool> {
        for expert in 0..n_experts {
            for part in MATRICES {
                if !matches!(self.get(layer, expert, part)?, Choice::Native) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// The choice of one matrix.
    fn get(&self, layer: usize, expert: usize, part: Part) -> Result<&Choice> {
        let at = MATRICES.iter().position(|&m| m == part);
        let layer_choices = self.layers.iter().find(|l| l.layer == layer);
        layer_choices
            .and_then(|l| l.experts.get(expert)?.get(at?))
            .and_then(|&i| if i == ABSENT { Some(&Choice::Native) } else { self.table.get(i as usize) })
            .ok_or_else(|| {
                Error::plan(format!("the recipe has nothing for {}", matrix_name(layer, expert, part)))
            })
    }
}

fn choose(
    patterns: &[Vec<&str>],
    own: &[usize],
    used: &mut [bool],
    (layer, expert, parts): (usize, usize, &[Part]),
) -> Result<[u32; 3]> {
    let mut chosen = [ABSENT; 3];
    for (slot, part) in chosen.iter_mut().zip(MATRICES).filter(|(_, part)| parts.contains(part)) {
        let name = matrix_name(layer, expert, part);
        let mut last = None;
        for &i in own.iter().filter(|&&i| patterns.get(i).is_some_and(|p| matches(p, &name))) {
            used[i] = true;
            last = u32::try_from(i).ok();
        }
        let none = || Error::plan("no rule of the recipe matches this matrix").in_tensor(&name);
        *slot = last.ok_or_else(none)?;
    }
    Ok(chosen)
}

/// Whether a pattern may match matrices of the layer that `name` is of.
fn same_layer(pattern: &[&str], name: &str) -> bool {
    pattern.iter().zip(name.split('.')).take(2).all(|(p, s)| segment_matches(p, s))
}

fn matches(pattern: &[&str], name: &str) -> bool {
    let mut segments = name.split('.');
    pattern.iter().all(|p| segments.next().is_some_and(|s| segment_matches(p, s)))
        && segments.next().is_none()
}

/// Whether `text` is a number within the range that `pattern` is, such as `4-17`.
fn in_range(pattern: &str, text: &str) -> Option<bool> {
    let (first, last) = pattern.split_once('-')?;
    let range = first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?;
    Some(text.parse().is_ok_and(|n| range.contains(&n)))
}

/// Whether `text` is `pattern` with each `*` standing for any characters, or lies in the range that it is.
fn segment_matches(pattern: &str, text: &str) -> bool {
    if let Some(within) = in_range(pattern, text) {
        return within;
    }
    let mut pieces = pattern.split('*');
    let Some(mut rest) = pieces.next().and_then(|first| text.strip_prefix(first)) else { return false };
    let pieces: Vec<&str> = pieces.collect();
    let Some((last, middle)) = pieces.split_last() else { return rest.is_empty() };
    for piece in middle {
        match rest.find(piece) {
            Some(at) => rest = rest.get(at + piece.len()..).unwrap_or_default(),
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests;
