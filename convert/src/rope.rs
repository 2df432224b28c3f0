//! Rotary frequencies, with the scaling rule of config.json worked in.
//!
//! The order of operations and the points where a value becomes f32 are those of transformers'
//! `modeling_rope_utils.py` (5.23.0), so that frequencies agree to the last bit or two. Powers and logarithms
//! are taken in f64 by the `libm` crate and rounded once.
//!
//! ```text
//! default   f_i = theta^(-2i/r),  i in 0 .. r/2
//! linear    f_i / factor
//! proportional  f_i / factor for the first share of i, 0 for the others
//! llama3    f_i for short waves, f_i / factor for long ones, a blend in between
//! yarn      f_i · (1 - ramp_i) + f_i / factor · ramp_i;
//!           ramp from 0 at dimension c(beta_fast) to 1 at dimension c(beta_slow),
//!           c(b) = r · ln(L / 2πb) / (2 ln theta), rounded outwards unless `truncate` is false;
//!           cos and sin are multiplied by the attention factor
//! ```

mod source;

use std::f64::consts::PI;

use moepack_format::Result;

use crate::hparams::{Config, Section};
use crate::spec::{LongRope, Pairing, Rope};

pub use source::Source;

/// What a family says about its rotary encoding; the rest is in config.json.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeRule {
    /// `rope_theta` where config.json has none: `default_theta` of the configuration class in transformers.
    pub theta: f64,
    /// Key of the theta of layers with a window, where theirs is another.
    pub window_theta: Option<(&'static str, f64)>,
    /// Share of a head's dimensions that rotate, where config.json does not say it.
    pub partial: f64,
    /// Scaling where config.json has no section at all; only gpt-oss's class has one.
    pub scaling: Option<Yarn>,
    /// YaRN's factor of cos and sin where config.json does not say it; else it follows from the extension.
    pub attention_factor: Option<f64>,
    /// Layers with and without a window have each a part of `rope_parameters`, which must be there.
    pub by_layers: bool,
}

impl RopeRule {
    /// Llama's.
    pub const PLAIN: RopeRule = RopeRule {
        theta: 1e4,
        window_theta: None,
        partial: 1.0,
        scaling: None,
        attention_factor: None,
        by_layers: false,
    };
}

/// Parameters of YaRN (Peng et al. 2023, arXiv 2309.00071).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// Extension of the context.
    pub factor: f64,
    /// Context before extension.
    pub original_positions: f64,
    /// Rotations above which a dimension is left alone.
    pub beta_fast: f64,
    /// Rotations below which a dimension is interpolated in full.
    pub beta_slow: f64,
    /// The ramp starts and ends on whole dimensions.
    pub truncate: bool,
    /// Factor of cos and sin, where it is given.
    pub attention_factor: Option<f64>,
    /// Scales the attention factor, with the next.
    pub mscale: f64,
    /// Scales the attention factor; multi-head latent attention scales its logits by it as well.
    pub mscale_all_dim: f64,
}

impl Yarn {
    /// transformers' values where a key is missing.
    pub const DEFAULT: Yarn = Yarn {
        factor: 1.0,
        original_positions: 0.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        attention_factor: None,
        mscale: 0.0,
        mscale_all_dim: 0.0,
    };

    /// m(factor, scale) of the paper: 0.1 · scale · ln(factor) + 1.
    fn mscale(&self, scale: f64) -> f64 {
        if self.factor <= 1.0 { 1.0 } else { 0.1 * scale * libm::log(self.factor) + 1.0 }
    }

    /// Factor of cos and sin.
    fn amplitude(&self) -> f64 {
        match self.attention_factor {
            Some(given) => given,
            None if self.mscale != 0.0 && self.mscale_all_dim != 0.0 => {
                self.mscale(self.mscale) / self.mscale(self.mscale_all_dim)
            }
            None => self.mscale(1.0),
        }
    }

    /// First and last dimension of the ramp for `dim` rotating dimensions.
    fn ramp(&self, theta: f64, dim: usize) -> (f64, f64) {
        let dim = dim as f64;
        let at = |rotations: f64| {
            dim * libm::log(self.original_positions / (rotations * 2.0 * PI)) / (2.0 * libm::log(theta))
        };
        let (low, high) = (at(self.beta_fast), at(self.beta_slow));
        let (low, high) = if self.truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        (low, if low == high { high + 0.001 } else { high })
    }
}

/// A rotary encoding and what multi-head latent attention multiplies its logits by.
#[derive(Clone, Debug, PartialEq)]
pub struct Scaled {
    /// The encoding.
    pub rope: Rope,
    /// mscale² of YaRN, else 1.
    pub logit_factor: f64,
}

/// The rotary encoding of `dim` dimensions. `theta` overrides what the section says.
///
/// # Errors
/// `BadData` for an unknown rule or a parameter that makes no frequencies.
pub fn rope(
    source @ Source { config, section }: Source<'_>,
    rule: RopeRule,
    theta: Option<f64>,
    pairing: Pairing,
    dim: usize,
    positions: usize,
) -> Result<Scaled> {
    let theta = theta.or(source.theta()?).unwrap_or(rule.theta);
    if theta <= 1.0 {
        return Err(config.error(format!("rope_theta is {theta}, expected more than 1")));
    }
    let plain = frequencies(theta, dim);
    let kind = match section {
        Some(s) => s.string_opt(&["rope_type", "type"])?.unwrap_or("default"),
        None => "default",
    };
    let mut scaled = Scaled {
        rope: Rope { inv_freq: Vec::new(), pairing, amplitude: 1.0, long: None },
        logit_factor: 1.0,
    };
    scaled.rope.inv_freq = match (kind, section) {
        ("default", None) => match rule.scaling {
            Some(yarn) => scaled_by_yarn(&yarn, theta, dim, &mut scaled),
            None => plain,
        },
        ("default" | "mrope", Some(_)) => plain,
        ("linear", Some(s)) => {
            let factor = positive(&s, "factor")? as f32;
            plain.iter().map(|f| f / factor).collect()
        }
        ("dynamic", Some(s)) if s.find(&["alpha"]).is_some() => ntk(&s, theta, dim)?,
        ("proportional", Some(s)) => {
            let factor = s.number_opt("factor")?.unwrap_or(1.0) as f32;
            let n = (source.partial()?.unwrap_or(1.0) * dim as f64 / 2.0) as usize;
            plain.iter().enumerate().map(|(i, f)| if i < n { f / factor } else { 0.0 }).collect()
        }
        ("llama3", Some(s)) => llama3(&s, config, &plain, positions)?,
        ("longrope", Some(s)) => longrope(&s, config, &plain, positions, &mut scaled)?,
        ("yarn", Some(s)) => {
            let yarn = yarn(&s, config, positions)?;
            let attention_factor = yarn.attention_factor.or(rule.attention_factor);
            scaled_by_yarn(&Yarn { attention_factor, ..yarn }, theta, dim, &mut scaled)
        }
        (other, _) => {
            let known = "known are default, linear, llama3, longrope and yarn";
            return Err(config.error(format!("rope type {other:?} is not supported; {known}")));
        }
    };
    Ok(scaled)
}

/// The base, and YaRN's parameters if it is YaRN that stretches; `None` for other rules.
///
/// # Errors
/// As [`rope`].
pub(crate) fn base_and_yarn(
    source @ Source { config, section }: Source<'_>,
    rule: RopeRule,
    positions: usize,
) -> Result<Option<(f64, Option<Yarn>)>> {
    let theta = source.theta()?.unwrap_or(rule.theta);
    let kind = section.map(|s| s.string_opt(&["rope_type", "type"])).transpose()?.flatten();
    Ok(match (kind.unwrap_or("default"), section) {
        ("default", None) => Some((theta, rule.scaling)),
        ("default" | "mrope", Some(_)) => Some((theta, None)),
        ("yarn", Some(s)) => Some((theta, Some(yarn(&s, config, positions)?))),
        _ => None,
    })
}

/// theta^(-2i/dim), `[dim / 2]`.
pub(crate) fn frequencies(theta: f64, dim: usize) -> Vec<f32> {
    wavelengths(theta, dim).map(|w| 1.0 / w).collect()
}

/// theta^(2i/dim) in f32, the exponent rounded to f32 first, as transformers does.
fn wavelengths(theta: f64, dim: usize) -> impl Iterator<Item = f32> {
    let base = f64::from(theta as f32);
    (0..dim).step_by(2).map(move |i| libm::pow(base, f64::from(i as f32 / dim as f32)) as f32)
}

/// Frequencies under YaRN; amplitude and logit factor go into `scaled`.
fn scaled_by_yarn(yarn: &Yarn, theta: f64, dim: usize, scaled: &mut Scaled) -> Vec<f32> {
    let (low, high) = yarn.ramp(theta, dim);
    let (low, width, factor) = (low as f32, (high - low) as f32, yarn.factor as f32);
    let inv_freq = wavelengths(theta, dim).enumerate().map(|(i, wave)| {
        let keep = 1.0 - ((i as f32 - low) / width).clamp(0.0, 1.0);
        1.0 / (factor * wave) * (1.0 - keep) + 1.0 / wave * keep
    });
    let logit_factor = if yarn.mscale_all_dim == 0.0 { 1.0 } else { yarn.mscale(yarn.mscale_all_dim) };
    scaled.logit_factor = logit_factor * logit_factor;
    scaled.rope.amplitude = yarn.amplitude() as f32;
    inv_freq.collect()
}

/// NTK-aware scaling by a fixed alpha (Hunyuan): theta · alpha^(dim / (dim − 2)).
fn ntk(s: &Section<'_>, theta: f64, dim: usize) -> Result<Vec<f32>> {
    let alpha = positive(s, "alpha")?;
    let exponent = dim as f64 / (dim as f64 - 2.0).max(1.0);
    Ok(frequencies(theta * libm::pow(alpha, exponent), dim))
}

/// LongRoPE (Ding et al. 2024, arXiv 2402.13753) as Phi-3.5-MoE has it: every frequency divided by a factor of its own.
/// transformers takes the short factors at every length, and of the amplitudes the long one beyond the old context.
fn longrope(
    s: &Section<'_>,
    config: &Config,
    plain: &[f32],
    positions: usize,
    scaled: &mut Scaled,
) -> Result<Vec<f32>> {
    let original = original_positions(s, config, positions)?;
    let factors = s.numbers("short_factor", plain.len())?;
    let factor = s.number_opt("factor")?.unwrap_or(positions as f64 / original);
    let grown = if factor <= 1.0 { 1.0 } else { (1.0 + libm::log(factor) / libm::log(original)).sqrt() };
    let usual = s.number_opt("attention_factor")?.unwrap_or(grown);
    scaled.rope.amplitude = s.number_opt("short_mscale")?.unwrap_or(usual) as f32;
    let amplitude = s.number_opt("long_mscale")?.unwrap_or(usual) as f32;
    scaled.rope.long = Some(LongRope { positions: original as usize, amplitude });
    Ok(plain.iter().zip(factors).map(|(f, factor)| f / factor as f32).collect())
}

/// YaRN's parameters from config.json.
fn yarn(s: &Section<'_>, config: &Config, positions: usize) -> Result<Yarn> {
    let original = original_positions(s, config, positions)?;
    let or = |key: &str, default: f64| s.number_opt(key).map(|n| n.filter(|&n| n != 0.0).unwrap_or(default));
    // `"factor": null` means the ratio of the two contexts (DeepSeek-V3 class in transformers).
    let factor = s.number_opt("factor")?.unwrap_or(positions as f64 / original);
    if factor <= 0.0 {
        return Err(s.error("factor", &format!("is {factor}, expected more than 0")));
    }
    let yarn = Yarn {
        factor,
        original_positions: original,
        beta_fast: or("beta_fast", Yarn::DEFAULT.beta_fast)?,
        beta_slow: or("beta_slow", Yarn::DEFAULT.beta_slow)?,
        truncate: s.flag("truncate", Yarn::DEFAULT.truncate)?,
        attention_factor: s.number_opt("attention_factor")?,
        mscale: or("mscale", 0.0)?,
        mscale_all_dim: or("mscale_all_dim", 0.0)?,
    };
    for (key, beta) in [("beta_fast", yarn.beta_fast), ("beta_slow", yarn.beta_slow)] {
        if beta <= 0.0 {
            return Err(s.error(key, &format!("is {beta}, expected more than 0")));
        }
    }
    Ok(yarn)
}

/// Llama 3.1's rule: waves longer than the old context / low_freq_factor are stretched by `factor`, those
/// shorter than the old context / high_freq_factor are left alone.
fn llama3(s: &Section<'_>, config: &Config, plain: &[f32], positions: usize) -> Result<Vec<f32>> {
    let original = original_positions(s, config, positions)? as f32;
    let factor = positive(s, "factor")? as f32;
    let (low, high) = (positive(s, "low_freq_factor")? as f32, positive(s, "high_freq_factor")? as f32);
    let one = |&f: &f32| {
        let wave = (2.0 * PI) as f32 / f;
        if wave > original / low {
            f / factor
        } else if wave < original / high {
            f
        } else {
            let smooth = (original / wave - low) / (high - low);
            (1.0 - smooth) * f / factor + smooth * f
        }
    };
    Ok(plain.iter().map(one).collect())
}

/// The context before extension: at the top of config.json (Phi-3), in the section, or the longest position.
fn original_positions(s: &Section<'_>, config: &Config, positions: usize) -> Result<f64> {
    let key = "original_max_position_embeddings";
    let top = config.number_opt(&["original_max_position_embeddings"])?;
    let n = top.or(s.number_opt(key)?).unwrap_or(positions as f64);
    if n > 0.0 { Ok(n) } else { Err(s.error(key, &format!("is {n}, expected more than 0"))) }
}

fn positive(s: &Section<'_>, key: &str) -> Result<f64> {
    match s.number_opt(key)? {
        Some(n) if n > 0.0 => Ok(n),
        Some(n) => Err(s.error(key, &format!("is {n}, expected more than 0"))),
        None => Err(s.error(key, "is missing")),
    }
}

#[cfg(test)]
mod tests;
