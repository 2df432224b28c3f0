//! Where in config.json a rotary encoding stands, and how many dimensions it turns.

use moepack_format::Result;

use super::RopeRule;
use crate::hparams::{Config, Section};

/// Where in config.json an encoding stands.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// config.json.
    pub config: &'a Config,
    /// `rope_parameters` or `rope_scaling`, or the part of it that is meant.
    pub section: Option<Section<'a>>,
}

impl<'a> Source<'a> {
    /// `rope_parameters {rope_theta, rope_type, …}` (transformers 5) or `rope_scaling {type | rope_type, …}` beside
    /// `rope_theta`; neither where `rope_theta` stands alone. Where it has parts, the one called `label`.
    ///
    /// # Errors
    /// `BadData` for sections that are no objects.
    pub fn new(config: &'a Config, label: &str) -> Result<Source<'a>> {
        let sections: [&'static [&'static str]; 2] = [&["rope_scaling"], &["rope_parameters"]];
        let mut section = None;
        for keys in sections {
            section = section.or(config.object_opt(keys)?.filter(|s| !s.is_empty()));
        }
        let part = section.map(|s| s.object_opt(label)).transpose()?.flatten();
        Ok(Source { config, section: part.or(section) })
    }

    /// The base of the frequencies, where config.json says it.
    ///
    /// # Errors
    /// `BadData` for anything but a number.
    pub fn theta(&self) -> Result<Option<f64>> {
        let inner = self.section.map(|s| s.number_opt("rope_theta")).transpose()?.flatten();
        Ok(inner.or(self.config.number_opt(&["rope_theta", "attn_config.rope_theta"])?))
    }

    /// Whether this is the part called `label` of a section that has parts.
    pub fn is_part(&self, label: &str) -> bool {
        self.section.is_some_and(|s| s.is_part(label))
    }

    /// Whether all dimensions of a head make pairs, of which only a share rotates.
    ///
    /// # Errors
    /// `BadData` for a type that is no string.
    pub fn is_proportional(&self) -> Result<bool> {
        let kind = self.section.map(|s| s.string_opt(&["rope_type", "type"])).transpose()?.flatten();
        Ok(kind == Some("proportional"))
    }

    /// Share of a head's dimensions that rotate, where config.json says it.
    ///
    /// # Errors
    /// `BadData` for anything but a share.
    pub fn partial(&self) -> Result<Option<f64>> {
        let inner = self.section.map(|s| s.number_opt("partial_rotary_factor")).transpose()?.flatten();
        match inner.or(self.config.number_opt(&["partial_rotary_factor"])?) {
            Some(share) if !(0.0..=1.0).contains(&share) => {
                let what = format!("partial_rotary_factor is {share}, expected a share from 0 to 1");
                Err(self.config.error(what))
            }
            share => Ok(share),
        }
    }

    /// How many of `head_dim` dimensions rotate: by `partial_rotary_factor`, else the number under `dim_key`, else the
    /// family's share.
    ///
    /// # Errors
    /// `BadData` for a number that is not even, or beyond the head.
    pub fn rotary_dim(&self, rule: RopeRule, dim_key: &'static str, head_dim: usize) -> Result<usize> {
        let of = |share: f64| (head_dim as f64 * share) as usize;
        let dim = match self.partial()? {
            Some(share) => of(share),
            None => self.config.uint_opt(&[dim_key], 1, head_dim)?.unwrap_or(of(rule.partial)),
        };
        // transformers makes a pair of the last dimension and the one behind it.
        if dim.next_multiple_of(2) <= head_dim {
            return Ok(dim);
        }
        Err(self.config.error(format!("{dim} of {head_dim} dimensions rotate, expected pairs of them")))
    }
}
