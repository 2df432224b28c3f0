//! The plan of a job: everything that workers need to know, with an id that changes when any of it would change a byte.

use std::ops::Range;
use std::path::PathBuf;

use moepack_format::file::hex;
use moepack_format::{Context, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::cluster::folder::PlanFolder;
use crate::cluster::source::SourceFile;
use crate::recipe::Recipe;

/// What `schema` says in a plan.
pub const SCHEMA: &str = "moepack.cluster/1";

/// Bytes of a plan: thousands of shards of the largest recipes take less.
const PLAN_BYTES_MAX: u64 = 256 << 20;
/// Shards of a plan: job arrays are shorter.
pub const SHARDS_MAX: usize = 1_000_000;

/// A job cut into shards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// [`SCHEMA`].
    pub schema: String,
    /// SHA-256 over all that decides the bytes, see [`Plan::digest`].
    pub id: String,
    /// Version of the program: another one may write other bytes.
    pub tool_version: String,
    /// The checkpoint, as an absolute path.
    pub checkpoint: PathBuf,
    /// Its weight files.
    pub sources: Vec<SourceFile>,
    /// The files that are copied beside them.
    pub side: Vec<SourceFile>,
    /// The recipe, allocation done.
    pub recipe: Recipe,
    /// What solvers learn from.
    pub calibration: Calibration,
    /// Layers with routed experts, ascending.
    pub layers: Vec<LayerExperts>,
    /// The shards.
    pub shards: Vec<Shard>,
    /// Every byte of the bundle, at most.
    pub bundle_bytes: u64,
    /// Bytes of all stored activations together.
    pub activation_bytes: u64,
    /// Whether `merge` leaves the activations.
    pub keep_activations: bool,
}

/// The routed experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerExperts {
    /// The layer.
    pub layer: usize,
    /// How many it has.
    pub n_experts: usize,
}

/// What solvers learn from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Calibration {
    /// Nothing.
    None,
    /// A text, in the plan as token windows.
    Text {
        /// SHA-256 of window lengths and token ids.
        tokens_sha256: String,
        /// Its windows.
        n_windows: usize,
        /// Its tokens.
        n_tokens: usize,
        /// Windows of each unit: where it begins, and where the next one does.
        units: Vec<[usize; 2]>,
    },
    /// Stats of an earlier calibration, copied into the plan.
    Stats {
        /// SHA-256 of the file.
        sha256: String,
    },
}

/// What one task of a job array does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// In this order.
    pub pieces: Vec<Piece>,
    /// Routed experts.
    pub n_experts: u64,
    /// Bytes that are read of the checkpoint.
    pub source_bytes: u64,
    /// Bytes that are written, at most.
    pub bytes: u64,
    /// Peak memory.
    pub peak_memory_bytes: u64,
    /// How long it takes on the machine that planned.
    pub seconds: f64,
}

/// A part of the bundle that is made as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Piece {
    /// Trunk files and what is copied.
    Trunk,
    /// A layer's bank.
    Bank {
        /// The layer.
        layer: usize,
    },
    /// Some experts of a layer.
    Experts {
        /// The layer.
        layer: usize,
        /// The first expert.
        first: usize,
        /// One beyond the last.
        end: usize,
    },
}

impl Plan {
    /// Reads a plan and checks it: version, id, and that its shards make every piece once.
    ///
    /// # Errors
    /// `Missing` if there is none; `BadData` if it is none of this version, was changed, or contradicts itself.
    pub fn read(folder: &PlanFolder) -> Result<Plan> {
        let path = folder.plan();
        let text = crate::text::read(&path, PLAN_BYTES_MAX)?;
        Plan::parse(&text).in_file(path)
    }

    fn parse(text: &[u8]) -> Result<Plan> {
        check_schema(text)?;
        let plan: Plan =
            serde_json::from_slice(text).map_err(|e| Error::bad_data(format!("no plan: {e}")))?;
        let (found, version) = (&plan.tool_version, env!("CARGO_PKG_VERSION"));
        if found != version {
            return Err(Error::bad_data(format!("a plan of moepack {found}, this is {version}"))
                .hint("use the version that planned, or plan again"));
        }
        let digest = plan.digest()?;
        if plan.id != digest {
            return Err(Error::bad_data(format!(
                "the plan's id is {}, but its content's is {digest}",
                plan.id
            ))
            .hint("the plan was changed or damaged; plan again"));
        }
        plan.check()?;
        Ok(plan)
    }

    /// SHA-256 over what decides the bytes and how the work is cut; not over paths, times and estimates.
    ///
    /// # Errors
    /// Values that JSON cannot hold.
    pub fn digest(&self) -> Result<String> {
        let content = |files: &[SourceFile]| {
            files.iter().map(|f| json!([f.path, f.bytes, f.sha256])).collect::<Vec<_>>()
        };
        let pieces: Vec<_> = self.shards.iter().map(|s| &s.pieces).collect();
        let decisive = json!({
            "schema": self.schema,
            "tool_version": self.tool_version,
            "sources": content(&self.sources),
            "side": content(&self.side),
            "recipe": self.recipe,
            "calibration": self.calibration,
            "layers": self.layers,
            "pieces": pieces,
        });
        let text = serde_json::to_vec(&decisive).map_err(|e| Error::bad_data(e.to_string()))?;
        Ok(hex(&Sha256::digest(&text)))
    }

    /// What must hold in a plan whose id fits.
    fn check(&self) -> Result<()> {
        self.recipe.validate()?;
        if self.shards.is_empty() || self.shards.len() > SHARDS_MAX {
            let what = format!("{} shards, expected 1 to {SHARDS_MAX}", self.shards.len());
            return Err(Error::bad_data(what));
        }
        let mut pieces: Vec<Piece> = self.shards.iter().flat_map(|s| s.pieces.iter().copied()).collect();
        pieces.sort();
        let banks = self.layers.iter().map(|l| (l.layer, 0..l.n_experts));
        let mut expected = banks.peekable();
        let bad = |piece: Option<&Piece>| {
            Error::bad_data(format!("its shards do not make everything once: {piece:?}"))
        };
        if pieces.iter().filter(|p| **p == Piece::Trunk).count() != 1 {
            return Err(bad(Some(&Piece::Trunk)));
        }
        let mut done: Vec<(usize, Range<usize>)> =
            pieces.iter().filter_map(|p| self.experts_of(*p)).collect();
        done.sort_by_key(|(layer, experts)| (*layer, experts.start));
        let mut done = done.into_iter().peekable();
        while let Some((layer, all)) = expected.next() {
            let mut at = 0;
            while let Some((_, experts)) = done.next_if(|(l, e)| *l == layer && e.start == at && e.end > at) {
                at = experts.end;
            }
            let next = expected.peek().map_or(usize::MAX, |(l, _)| *l);
            if at != all.end || next <= layer {
                return Err(bad(Some(&Piece::Bank { layer })));
            }
        }
        if done.next().is_some() {
            return Err(bad(None));
        }
        self.check_units()
    }

    fn check_units(&self) -> Result<()> {
        let Calibration::Text { n_windows, units, .. } = &self.calibration else { return Ok(()) };
        let mut at = 0;
        for &[first, end] in units {
            if first != at || end <= first {
                return Err(Error::bad_data(format!("a unit of windows {first} to {end} behind {at}")));
            }
            at = end;
        }
        let fits = at == *n_windows;
        if fits {
            Ok(())
        } else {
            Err(Error::bad_data(format!("units of {at} windows, expected {n_windows}")))
        }
    }

    /// The layer and the experts of a piece; none of the trunk.
    pub fn experts_of(&self, piece: Piece) -> Option<(usize, Range<usize>)> {
        match piece {
            Piece::Trunk => None,
            Piece::Bank { layer } => Some((layer, 0..self.n_experts(layer))),
            Piece::Experts { layer, first, end } => Some((layer, first..end)),
        }
    }

    /// Routed experts of a layer; 0 where there are none.
    pub fn n_experts(&self, layer: usize) -> usize {
        self.layers.iter().find(|l| l.layer == layer).map_or(0, |l| l.n_experts)
    }

    /// The ranges of a layer that is made in several pieces, ascending; none of one that is made as a whole.
    pub fn ranges_of(&self, layer: usize) -> Vec<Range<usize>> {
        let pieces = self.shards.iter().flat_map(|s| &s.pieces);
        let mut ranges: Vec<_> = pieces
            .filter_map(|piece| match *piece {
                Piece::Experts { layer: l, first, end } if l == layer => Some(first..end),
                _ => None,
            })
            .collect();
        ranges.sort_by_key(|r| r.start);
        ranges
    }

    /// A shard.
    ///
    /// # Errors
    /// There is none of this number (kind `Usage`).
    pub fn shard(&self, index: usize) -> Result<&Shard> {
        self.shards.get(index).ok_or_else(|| {
            let n = self.shards.len();
            Error::usage(format!("shard {index}, but the plan has {n}")).hint(format!(
                "shards are numbered from 0 to {}; --shard-offset is added",
                n.saturating_sub(1)
            ))
        })
    }

    /// Windows of each unit of the calibration text.
    pub fn units(&self) -> Vec<Range<usize>> {
        match &self.calibration {
            Calibration::Text { units, .. } => units.iter().map(|&[first, end]| first..end).collect(),
            _ => Vec::new(),
        }
    }
}

/// A plan of another version is refused by name, whatever else is in it.
fn check_schema(text: &[u8]) -> Result<()> {
    #[derive(Deserialize)]
    struct Head {
        schema: Option<String>,
    }
    let head: Head = serde_json::from_slice(text).map_err(|e| Error::bad_data(format!("no plan: {e}")))?;
    match head.schema.as_deref() {
        Some(SCHEMA) => Ok(()),
        found => Err(Error::bad_data(format!("schema {found:?}, expected {SCHEMA:?}"))
            .hint("a plan is what `moepack plan -o PLAN` makes; recipes are TOML")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(pieces: &[&[Piece]]) -> Plan {
        let shard = |pieces: &&[Piece]| Shard {
            pieces: pieces.to_vec(),
            n_experts: 0,
            source_bytes: 0,
            bytes: 0,
            peak_memory_bytes: 0,
            seconds: 0.0,
        };
        let mut plan = Plan {
            schema: SCHEMA.into(),
            id: String::new(),
            tool_version: env!("CARGO_PKG_VERSION").into(),
            checkpoint: "/m".into(),
            sources: Vec::new(),
            side: Vec::new(),
            recipe: Recipe::uniform("int4-g64", "rtn", 16384),
            calibration: Calibration::None,
            layers: [(1, 8), (3, 4)].map(|(layer, n_experts)| LayerExperts { layer, n_experts }).to_vec(),
            shards: pieces.iter().map(shard).collect(),
            bundle_bytes: 0,
            activation_bytes: 0,
            keep_activations: false,
        };
        plan.id = plan.digest().unwrap();
        plan
    }

    fn parsed(plan: &Plan) -> Result<Plan> {
        Plan::parse(&serde_json::to_vec(plan).unwrap())
    }

    const TRUNK: Piece = Piece::Trunk;
    const WHOLE: Piece = Piece::Bank { layer: 1 };

    fn experts(first: usize, end: usize) -> Piece {
        Piece::Experts { layer: 3, first, end }
    }

    #[test]
    fn a_plan_is_read_as_it_was_written() {
        let plan = plan(&[&[TRUNK, experts(2, 4)], &[WHOLE], &[experts(0, 2)]]);
        assert_eq!(parsed(&plan), Ok(plan.clone()));
        assert_eq!(plan.ranges_of(3), [0..2, 2..4]);
        assert!(plan.ranges_of(1).is_empty());
        assert_eq!(plan.shard(3).unwrap_err().kind().exit_code(), 2);
    }

    #[test]
    fn a_changed_plan_is_refused() {
        let good = plan(&[&[TRUNK], &[WHOLE], &[experts(0, 4)]]);
        let mut changed = good.clone();
        changed.recipe.solver = "weighted".into();
        assert!(parsed(&changed).unwrap_err().what().contains("id is"));
        let moved = Plan { checkpoint: "/n".into(), ..good.clone() };
        assert_eq!(parsed(&moved).map(|p| p.id), Ok(good.id.clone()), "a path decides no byte");
        for (key, value) in [("schema", "moepack.cluster/9"), ("tool_version", "9.9.9")] {
            let mut other = serde_json::to_value(&good).unwrap();
            other[key] = value.into();
            let e = Plan::parse(other.to_string().as_bytes()).unwrap_err();
            assert!(e.what().contains(value) && e.kind().exit_code() == 65, "{e}");
        }
    }

    #[test]
    fn every_expert_is_made_once() {
        let cut: [&[&[Piece]]; 6] = [
            &[&[WHOLE], &[experts(0, 4)]],
            &[&[TRUNK], &[TRUNK], &[WHOLE], &[experts(0, 4)]],
            &[&[TRUNK], &[experts(0, 4)]],
            &[&[TRUNK], &[WHOLE], &[experts(0, 3)]],
            &[&[TRUNK], &[WHOLE], &[experts(0, 3), experts(2, 4)]],
            &[&[TRUNK], &[WHOLE], &[experts(0, 4), experts(4, 5)]],
        ];
        for pieces in cut {
            assert_eq!(parsed(&plan(pieces)).unwrap_err().kind().exit_code(), 65, "{pieces:?}");
        }
    }
}
