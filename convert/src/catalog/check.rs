//! What must hold of a catalog, and how it is said when it does not.

use std::collections::{BTreeMap, BTreeSet};

use moepack_format::{Dtype, Error, Result};

use super::{Catalog, Claim, Claims, LayerExperts, NONE, PieceTensors};
use crate::checkpoint::{SourceTensor, listed};
use crate::dims;
use crate::encoding::{Encoded, Holding, encoding, not_integers, stored_shape};
use crate::family::{Dim, ExpertLayout, Mtp, Piece};
use crate::limits::LISTED_MAX;
use crate::names;
use crate::spec::Role;

/// Endings of storage schemes that are known but not read.
const FOREIGN: &[(&str, &str)] = &[
    (".absmax", "bitsandbytes weights"),
    (".quant_map", "bitsandbytes weights"),
    (".bitmask", "compressed-tensors sparse weights"),
    (".qscale_weight", "Mistral's own scales"),
    (".meta", "compressed-tensors marlin-24 weights"),
    (".biases", "MLX weights"),
];

impl Claims<'_> {
    /// The layers of the tensors are those of config.json; MTP layers come after them and are marked as such.
    pub(super) fn check_layers(&self) -> Result<()> {
        let n_layers = self.source.spec.layers.len();
        let places = || self.each().filter_map(|(_, c, t)| self.layer_of(c, &t.name));
        let seen: BTreeSet<usize> = places().map(|(l, _)| l).collect();
        let mark = match self.source.family.mtp {
            Mtp::ExtraLayers { mark } => Some(mark),
            Mtp::None => None,
        };
        let mtp: BTreeSet<usize> =
            places().filter(|(_, rest)| Some(&**rest) == mark).map(|(l, _)| l).collect();
        let is_mtp = |l: usize| mtp.contains(&l);
        let found = seen.iter().copied().filter(|&l| l < n_layers || !is_mtp(l)).max().map_or(0, |l| l + 1);
        if found == n_layers {
            return Ok(());
        }
        let row = ("layers".to_owned(), n_layers.to_string(), found.to_string());
        Err(self.contradiction(&[row], 1))
    }

    /// The layer that a name belongs to and what follows, in the family's own spelling.
    fn layer_of(&self, claim: Claim, name: &str) -> Option<(usize, String)> {
        if claim == Claim::Carried(None) {
            return None;
        }
        let name = self.names.canonical(name);
        self.names.layer_of(&name).map(|(layer, rest)| (layer, rest.to_owned()))
    }

    /// No two tensors, in whatever spelling, are for the same.
    pub(super) fn check_twice(&self) -> Result<()> {
        let mut seen = BTreeMap::new();
        for (at, claim, t) in self.each().filter(|(at, _, _)| !self.is_scale(*at)) {
            let what = match claim {
                Claim::Trunk(rule, layer, part) => (rule.name, layer, part),
                Claim::Expert { piece, layer, expert, .. } => (piece.name, Some(layer), expert),
                _ => continue,
            };
            if let Some(other) = seen.insert(what, at).and_then(|other| self.tensor(other)) {
                let what = format!("{} and {} are two spellings of the same tensor", other.name, t.name);
                return Err(self.error(what).hint("two releases may be mixed in one directory"));
            }
        }
        Ok(())
    }

    /// Scales without their weight.
    pub(super) fn check_scales(&self) -> Result<()> {
        let orphans: Vec<String> = self
            .orphans
            .iter()
            .filter_map(|&i| self.tensor(i as usize))
            .map(|t| format!("{} of {}", t.name, names::numbers_of(&t.name).next().unwrap_or_default()))
            .collect();
        if orphans.is_empty() {
            return Ok(());
        }
        let what = format!("{} scales without the numbers they scale:{}", orphans.len(), listed(&orphans));
        Err(self.error(what).hint("the weights may be in a shard that was not fetched"))
    }

    /// Every claimed shape is what config.json says.
    pub(super) fn check_shapes(&self) -> Result<()> {
        let mut rows = Vec::new();
        let mut n_wrong = 0;
        for (_, claim, t) in self.each().filter(|(at, _, _)| !self.is_scale(*at)) {
            let expected = match claim {
                Claim::Trunk(..) => self.decoded(claim, t).map(|decoded| match *decoded {
                    [rows, cols] => stored_shape(t, None, rows, cols, self.source.hints),
                    _ => decoded,
                }),
                Claim::Expert { piece, layer, .. } => self.expert_shape(piece, layer, t),
                _ => continue,
            };
            let Some(expected) = expected.filter(|e| **e != *t.shape) else { continue };
            n_wrong += 1;
            if rows.len() < LISTED_MAX {
                rows.push((t.name.to_string(), format!("{expected:?}"), format!("{:?}", t.shape)));
            }
        }
        if n_wrong == 0 { Ok(()) } else { Err(self.contradiction(&rows, n_wrong)) }
    }

    /// Shape of what a trunk tensor decodes to.
    pub(super) fn decoded(&self, claim: Claim, tensor: &SourceTensor) -> Option<Vec<u64>> {
        let Claim::Trunk(rule, layer, _) = claim else { return None };
        let length = |(at, &dim): (usize, &Dim)| match dim {
            Dim::Any => tensor.shape.get(at).copied(),
            dim => dims::dim(self.source.spec, layer, dim),
        };
        rule.shape.iter().enumerate().map(length).collect()
    }

    /// Shape of the tensor that holds a piece.
    fn expert_shape(&self, piece: &Piece, layer: usize, tensor: &SourceTensor) -> Option<Vec<u64>> {
        let moe = self.source.spec.moe(layer)?;
        let n = piece.n_stacked(moe.n_experts);
        let (rows, cols) = piece.dims(moe, self.source.spec.hidden);
        let lengths = piece.lengths((rows, cols), piece.is_transposed(rows, cols, &tensor.shape));
        Some(match *lengths {
            [rows, cols] if !piece.flat => stored_shape(tensor, n, rows, cols, self.source.hints),
            _ => piece.stacked(n, &lengths),
        })
    }

    /// Which layout each layer's experts are in.
    pub(super) fn layouts(&self) -> Result<Vec<Option<&'static ExpertLayout>>> {
        let n_layers = self.source.spec.layers.len();
        let mut bits = vec![u32::MAX; n_layers];
        for (_, claim, _) in self.each() {
            if let Claim::Expert { layouts, layer, .. } = claim
                && let Some(b) = bits.get_mut(layer)
            {
                *b &= layouts;
            }
        }
        if let Some(layer) = bits.iter().position(|&b| b == 0) {
            let all: Vec<_> = self.source.family.experts.iter().map(|l| l.name).collect();
            let what = format!("layer {layer} has experts in more than one layout: {}", all.join(" and "));
            return Err(self.error(what).hint("two releases may be mixed in one directory"));
        }
        // Without any expert tensor every bit is left, and the first layout names what is missing.
        let first = |b: u32| self.source.family.experts.get(b.trailing_zeros() as usize);
        Ok(bits.into_iter().map(|b| if self.source.in_banks { None } else { first(b) }).collect())
    }

    /// Every layer has exactly the experts that config.json says.
    pub(super) fn check_experts(&self, catalog: &Catalog) -> Result<()> {
        let mut wrong = Vec::new();
        let mut beyond: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for (_, claim, _) in self.each() {
            if let Claim::Expert { layer, expert: Some(e), .. } = claim
                && catalog.layer(layer).is_some_and(|l| e >= l.n_experts)
            {
                beyond.entry(layer).or_default().insert(e);
            }
        }
        for (l, experts) in catalog.experts.iter().enumerate() {
            let Some(experts) = experts else { continue };
            let missing: Vec<usize> = (0..experts.n_experts).filter(|&e| lacks_all(experts, e)).collect();
            let beyond: Vec<usize> = beyond.get(&l).into_iter().flatten().copied().collect();
            let n_found = experts.n_experts - missing.len() + beyond.len();
            let mut says = Vec::new();
            if !missing.is_empty() {
                says.push(format!("missing {}", ranges(&missing)));
            }
            if !beyond.is_empty() {
                says.push(format!("too many {}", ranges(&beyond)));
            }
            if !says.is_empty() {
                wrong.push(format!("layer {l}: {n_found} experts, {}", says.join(", ")));
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        let n = catalog.experts.iter().flatten().map(|l| l.n_experts).max().unwrap_or(0);
        let what = format!(
            "config.json says {n} experts a layer, but {} layers differ:{}",
            wrong.len(),
            listed(&wrong)
        );
        Err(self.error(what).hint("a shard may be missing; compare the files with the release"))
    }

    /// Every tensor that the model needs is there.
    pub(super) fn check_missing(&self, catalog: &Catalog) -> Result<()> {
        let mut missing = Vec::new();
        for rule in self.source.family.rules.iter().copied().flatten() {
            if rule.role.is_global() {
                if !dims::has(self.source.spec, None, rule.role) {
                    continue;
                }
                let tied = rule.role == Role::LmHead && self.source.head_may_be_tied;
                if !tied && catalog.find(None, rule.role).is_none() {
                    missing.push(rule.name.to_owned());
                }
                continue;
            }
            for (l, spec) in self.source.spec.layers.iter().enumerate() {
                if !dims::has(self.source.spec, Some(spec), rule.role) {
                    continue;
                }
                for part in 0..dims::n_parts(spec, rule.role) {
                    if catalog.find(Some(l), rule.role.of_part(Some(part))).is_none() {
                        missing.push(self.full_name(rule.name, l, part));
                    }
                }
            }
        }
        for (l, experts) in catalog.experts.iter().enumerate() {
            for piece in experts.iter().flat_map(|e| &e.pieces) {
                let absent = piece.tensors.iter().enumerate().filter(|(_, t)| **t == NONE);
                missing.extend(absent.map(|(e, _)| self.full_name(piece.piece.name, l, e)));
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let what = format!("{} tensors are missing:{}", missing.len(), listed(&missing));
        Err(self.error(what).hint("a shard may be missing; compare the files with the release"))
    }

    /// No tensor is left over.
    pub(super) fn check_unclaimed(&self) -> Result<()> {
        let mut left = Vec::new();
        let mut foreign = None;
        for (_, claim, t) in self.each() {
            let Claim::Unclaimed(why) = claim else { continue };
            foreign =
                foreign.or(FOREIGN.iter().find(|(ending, _)| t.name.ends_with(ending)).map(|(_, f)| *f));
            left.push(if why.is_empty() { t.name.to_string() } else { format!("{} ({why})", t.name) });
        }
        if left.is_empty() {
            return Ok(());
        }
        let (n, family) = (left.len(), self.source.family.name());
        let error = self.error(format!("{n} tensors are unknown to the family {family}:{}", listed(&left)));
        Err(match foreign {
            Some(f) => {
                error.hint(format!("these look like {f}, which are not read yet; start from the original"))
            }
            None => error.hint("nothing is dropped silently; config.json may belong to another model"),
        })
    }

    /// Every weight can be decoded.
    pub(super) fn check_encodings(&self) -> Result<()> {
        for (_, claim, t) in self.each().filter(|(at, _, _)| !self.is_scale(*at)) {
            let encoded = self.encoded(t);
            let checked = match claim {
                Claim::Trunk(rule, ..) if rule.role.is_table() => match t.dtype {
                    Dtype::I64 | Dtype::I32 => Ok(()),
                    other => Err(not_integers(other).in_tensor(&*t.name)),
                },
                // A bundle's planes are compared by their codec.
                Claim::Trunk(..) if self.source.checkpoint.coded(&t.name).is_some() => Ok(()),
                Claim::Trunk(..) => {
                    let shape = self.decoded(claim, t).unwrap_or_else(|| t.shape.to_vec());
                    self.check_encoding(&encoded, Holding::plain(matrix(&shape)))
                }
                Claim::Expert { piece, layer, .. } => self.check_piece(piece, layer, &encoded),
                // Copied as it is, but not without what gives the numbers their meaning.
                Claim::Carried(_) => match carried_matrix(&encoded) {
                    Some(shape) => self.check_encoding(&encoded, Holding::plain(shape)),
                    None => Ok(()),
                },
                _ => Ok(()),
            };
            checked.map_err(|e| e.in_file(self.source.checkpoint.path_of(t)))?;
        }
        Ok(())
    }

    fn check_encoding(&self, encoded: &Encoded<'_>, holding: Holding) -> Result<()> {
        encoding(encoded, holding, self.source.hints).map(|_| ())
    }

    fn check_piece(&self, piece: &Piece, layer: usize, encoded: &Encoded<'_>) -> Result<()> {
        let Some(moe) = self.source.spec.moe(layer) else { return Ok(()) };
        let n = piece.n_stacked(moe.n_experts);
        let (rows, cols) = piece.dims(moe, self.source.spec.hidden);
        let transposed = piece.is_transposed(rows, cols, &encoded.tensor.shape);
        self.check_encoding(encoded, Holding { n, rows, cols, transposed })
    }

    fn full_name(&self, name: &str, layer: usize, expert: usize) -> String {
        names::fill(&format!("{}{name}", self.source.family.layer_prefix), layer, expert)
    }

    fn error(&self, what: String) -> Error {
        Error::bad_data(what).in_file(self.source.checkpoint.place().root())
    }

    /// A table of what config.json says and what the tensors say.
    fn contradiction(&self, rows: &[(String, String, String)], n_wrong: usize) -> Error {
        let head = ("".to_owned(), "config.json".to_owned(), "tensors".to_owned());
        let table: Vec<_> = std::iter::once(&head).chain(rows).collect();
        let width = |of: fn(&(String, String, String)) -> &str| {
            table.iter().map(|r| of(r).chars().count()).max().unwrap_or(0)
        };
        let (a, b) = (width(|r| &r.0), width(|r| &r.1));
        let mut what = String::from("config.json and the tensors contradict each other:");
        for (name, config, tensors) in &table {
            what.push_str(&format!("\n    {name:a$}  {config:b$}  {tensors}"));
        }
        if let Some(more) = n_wrong.checked_sub(rows.len()).filter(|&n| n > 0) {
            what.push_str(&format!("\n    and {more} more"));
        }
        self.error(what).hint("config.json may belong to another model; restore the one of the release")
    }
}

/// Lengths as a matrix: vectors are one row.
pub(crate) fn matrix(shape: &[u64]) -> (u64, u64) {
    match *shape {
        [rows, cols] => (rows, cols),
        _ => (1, shape.iter().product()),
    }
}

/// The matrix that a tensor holds of which no rule says the shape; `None` where nothing beside it gives it meaning, or
/// its shape does not tell.
pub(crate) fn carried_matrix(encoded: &Encoded<'_>) -> Option<(u64, u64)> {
    let tensor = encoded.tensor;
    if encoded.companions().is_empty() && tensor.dtype != Dtype::F8E4m3 {
        return None;
    }
    match (tensor.dtype, &*tensor.shape) {
        (Dtype::F8E4m3 | Dtype::Bf16 | Dtype::F16 | Dtype::F32, shape) => Some(matrix(shape)),
        (Dtype::U8, [rows, cols]) => Some((*rows, cols.saturating_mul(2))),
        (Dtype::I8, [rows, cols]) => {
            let scale = encoded.get(names::Companion::Scale)?;
            let pairs = matches!(scale.dtype, Dtype::F8E8m0);
            Some((*rows, if pairs { cols.saturating_mul(2) } else { *cols }))
        }
        _ => None,
    }
}

/// Whether nothing of an expert is there.
fn lacks_all(experts: &LayerExperts, e: usize) -> bool {
    let lacks = |p: &PieceTensors| p.tensors.get(e).is_some_and(|&t| t == NONE);
    let mut own = experts.pieces.iter().filter(|p| !p.is_stacked()).peekable();
    own.peek().is_some() && own.all(lacks)
}

/// Sorted numbers as a short list: `17, 30-32`, the first few and a count.
pub(crate) fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &n in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == n => *last = n,
            _ => runs.push((n, n)),
        }
    }
    let one = |(a, b): &(usize, usize)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    let shown: Vec<_> = runs.iter().take(LISTED_MAX).map(one).collect();
    match runs.len().checked_sub(LISTED_MAX) {
        Some(more) if more > 0 => format!("{} and {more} more", shown.join(", ")),
        _ => shown.join(", "),
    }
}
