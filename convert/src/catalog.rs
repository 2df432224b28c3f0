//! The catalog: every tensor of a checkpoint claimed exactly once, or an error that says which are not.
//!
//! Built from names, dtypes and shapes alone. What comes out is complete (nothing that the model needs is
//! missing), consistent (every shape is what config.json says) and total (no tensor is left over), so that
//! whoever reads it need not ask again.

use std::collections::BTreeMap;

use moepack_format::{Dtype, Result};

use crate::checkpoint::{Checkpoint, SourceTensor};
use crate::dims;
use crate::encoding::{Encoded, Hints};
use crate::family::{ExpertLayout, Family, Mtp, Piece, Rule};
use crate::names::{self, Meaning, Names};
use crate::spec::{LayerSpec, Mlp, ModelSpec, Role};

mod check;
mod outline;
pub(crate) use check::{carried_matrix, matrix, ranges};
pub(crate) use outline::{Scales, Storage, outline};
#[cfg(test)]
mod tests;

/// No tensor.
pub(crate) const NONE: u32 = u32::MAX;

/// Every tensor of a model and what it is for.
#[derive(Debug)]
pub struct Catalog {
    /// Everything that is not a routed expert, in the order of the files.
    pub trunk: Vec<TrunkTensor>,
    /// Tensors that are not kept, with the reason.
    pub left_out: Vec<(String, String)>,
    /// The routed experts of each layer; `None` for dense layers.
    pub experts: Vec<Option<LayerExperts>>,
    /// Places in `trunk` of the tensors that the forward pass uses.
    roles: BTreeMap<(Option<usize>, Role), usize>,
}

/// A tensor of the trunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrunkTensor {
    /// Its name upstream.
    pub name: String,
    /// Layer, if it belongs to one.
    pub layer: Option<usize>,
    /// What it is for; scales have the role of their weight.
    pub role: Role,
    /// It belongs to another tensor's numbers: their scales, zero points and the like.
    pub is_scale: bool,
    /// Element type.
    pub dtype: Dtype,
    /// Lengths, outermost first.
    pub shape: Vec<u64>,
    /// Lengths of what it decodes to, which packed numbers do not have.
    pub decoded: Vec<u64>,
    /// Its length in bytes.
    pub bytes: u64,
    /// Place in [`Checkpoint::tensors`].
    pub(crate) tensor: usize,
}

/// Where the experts of a layer are.
#[derive(Debug)]
pub struct LayerExperts {
    /// How many.
    pub n_experts: usize,
    /// How they are stored; `None` in a bundle, whose banks say it themselves.
    pub layout: Option<&'static ExpertLayout>,
    /// One entry a piece of the layout.
    pub(crate) pieces: Vec<PieceTensors>,
}

/// The tensors of one piece of a layout.
#[derive(Debug)]
pub(crate) struct PieceTensors {
    pub piece: &'static Piece,
    /// Places in [`Checkpoint::tensors`]: one an expert, or one for all.
    pub tensors: Vec<u32>,
}

impl PieceTensors {
    /// Whether one tensor holds all experts.
    pub fn is_stacked(&self) -> bool {
        self.piece.is_stacked()
    }
}

/// What a catalog is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    pub family: &'static Family,
    pub spec: &'a ModelSpec,
    pub checkpoint: &'a Checkpoint,
    /// Experts are in the banks of a bundle, not among the tensors.
    pub in_banks: bool,
    /// The head may be the embedding.
    pub head_may_be_tied: bool,
    /// What config.json says of stored numbers.
    pub hints: Hints,
}

/// What one tensor turned out to be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Claim {
    /// Rule, layer, and which of several tensors.
    Trunk(&'static Rule, Option<usize>, Option<usize>),
    Expert {
        layouts: u32,
        piece: &'static Piece,
        layer: usize,
        expert: Option<usize>,
    },
    Carried(Option<usize>),
    LeftOut(&'static str),
    /// Nobody's; the reason, where there is one.
    Unclaimed(&'static str),
}

impl Catalog {
    /// Claims every tensor of a checkpoint.
    pub(crate) fn build(source: Source<'_>) -> Result<Catalog> {
        let claims = Claims::of(source);
        claims.check_layers()?;
        claims.check_scales()?;
        claims.check_twice()?;
        claims.check_shapes()?;
        let mut catalog = Catalog {
            trunk: claims.trunk(),
            left_out: claims.left_out(),
            experts: claims.experts()?,
            roles: BTreeMap::new(),
        };
        let named = catalog.trunk.iter().enumerate().filter(|(_, t)| !t.is_scale && t.role != Role::Carried);
        catalog.roles = named.map(|(i, t)| ((t.layer, t.role), i)).collect();
        claims.check_experts(&catalog)?;
        claims.check_missing(&catalog)?;
        claims.check_unclaimed()?;
        claims.check_encodings()?;
        Ok(catalog)
    }

    /// The trunk tensor with this role.
    pub fn find(&self, layer: Option<usize>, role: Role) -> Option<&TrunkTensor> {
        self.roles.get(&(layer, role)).and_then(|&i| self.trunk.get(i))
    }

    /// The experts of a layer.
    pub fn layer(&self, layer: usize) -> Option<&LayerExperts> {
        self.experts.get(layer).and_then(Option::as_ref)
    }
}

/// One claim a tensor, in the order of [`Checkpoint::tensors`].
struct Claims<'a> {
    source: Source<'a>,
    names: Names,
    claims: Vec<Claim>,
    /// Places of scales and whatever else belongs to other tensors.
    is_scale: Vec<bool>,
    /// Places of scales whose weight is not there.
    orphans: Vec<u32>,
}

impl<'a> Claims<'a> {
    fn of(source: Source<'a>) -> Claims<'a> {
        let tensors = source.checkpoint.tensors();
        let mut this = Claims {
            source,
            names: Names::of(source.family),
            claims: Vec::with_capacity(tensors.len()),
            is_scale: vec![false; tensors.len()],
            orphans: Vec::new(),
        };
        for (i, tensor) in tensors.iter().enumerate() {
            let own = this.claim(&tensor.name);
            let known = |n: &String| source.checkpoint.find(n).is_some();
            let numbers = names::numbers_of(&tensor.name).find(known);
            // Numbers that are not there, if the tensor has no meaning of its own.
            let missing = || names::numbers_of(&tensor.name).next().filter(|_| is_scale(own));
            let is_orphan = numbers.is_none();
            match numbers.or_else(missing) {
                None => this.claims.push(own),
                Some(name) => {
                    this.claims.push(this.claim(&name));
                    match this.is_scale.get_mut(i).filter(|_| !is_orphan) {
                        Some(s) => *s = true,
                        None => this.orphans.push(index(i)),
                    }
                }
            }
        }
        this
    }

    /// What the name says.
    fn claim(&self, name: &str) -> Claim {
        let Source { family, spec, .. } = self.source;
        if family.carried.iter().any(|beginning| name.starts_with(beginning)) {
            return Claim::Carried(None);
        }
        let name = &*self.names.canonical(name);
        if let Some((_, why)) = family.left_out.iter().find(|(ending, _)| name.ends_with(ending)) {
            return Claim::LeftOut(why);
        }
        let in_layer = self.names.layer_of(name);
        if let Some((layer, _)) = in_layer.filter(|(l, _)| *l >= spec.layers.len()) {
            return match family.mtp {
                Mtp::ExtraLayers { .. } => Claim::Carried(Some(layer)),
                Mtp::None => Claim::Unclaimed("config.json has fewer layers"),
            };
        }
        let Some(place) = self.names.find(name) else {
            let carried = |rest: &str| {
                let inner = family.carried.iter().filter_map(|beginning| beginning.strip_prefix('.'));
                names::is_of_activations(name) || inner.clone().any(|b| rest.starts_with(b))
            };
            return match in_layer.filter(|(_, rest)| carried(rest)) {
                Some((layer, _)) => Claim::Carried(Some(layer)),
                None => Claim::Unclaimed(""),
            };
        };
        let layer = place.layer.and_then(|l| spec.layers.get(l));
        match (place.meaning, layer) {
            (Meaning::Trunk(rule), layer) if dims::has(spec, layer, rule.role) => {
                Claim::Trunk(rule, place.layer, place.expert)
            }
            (Meaning::Trunk(_), None) => Claim::Unclaimed("config.json says that there is no such tensor"),
            (Meaning::Trunk(_), Some(_)) => {
                Claim::Unclaimed("config.json says that this layer has no such tensor")
            }
            (Meaning::Expert { .. }, Some(spec)) if !matches!(spec.mlp, Mlp::Moe(_)) => {
                Claim::Unclaimed("config.json says that this layer is dense")
            }
            (Meaning::Expert { .. }, Some(spec)) if is_zero(spec, place.expert) => {
                Claim::LeftOut("a zero expert hands its input on; its weights are never used")
            }
            (Meaning::Expert { .. }, _) if self.source.in_banks => {
                Claim::Unclaimed("a bundle's experts are in its banks")
            }
            (Meaning::Expert { layouts, piece }, _) => {
                Claim::Expert { layouts, piece, layer: place.layer.unwrap_or(0), expert: place.expert }
            }
        }
    }

    fn tensor(&self, at: usize) -> Option<&'a SourceTensor> {
        self.source.checkpoint.tensors().get(at)
    }

    /// A tensor with what gives its numbers meaning.
    fn encoded(&self, tensor: &'a SourceTensor) -> Encoded<'a> {
        Encoded::of(self.source.checkpoint, tensor)
    }

    fn is_scale(&self, at: usize) -> bool {
        self.is_scale.get(at).copied().unwrap_or(false)
    }

    /// Claims with their tensors, scales included.
    fn each(&self) -> impl Iterator<Item = (usize, Claim, &'a SourceTensor)> {
        self.claims.iter().zip(self.source.checkpoint.tensors()).enumerate().map(|(i, (c, t))| (i, *c, t))
    }

    fn trunk(&self) -> Vec<TrunkTensor> {
        let mut order: Vec<(u32, u64, TrunkTensor)> = Vec::new();
        for (at, claim, t) in self.each() {
            let (layer, role) = match claim {
                Claim::Trunk(rule, layer, part) => (layer, rule.role.of_part(part)),
                Claim::Carried(layer) => (layer, Role::Carried),
                _ => continue,
            };
            let is_scale = self.is_scale(at);
            let (name, shape) = (t.name.to_string(), t.shape.to_vec());
            let decoded = self.decoded(claim, t).filter(|_| !is_scale).unwrap_or_else(|| shape.clone());
            let entry = TrunkTensor {
                name,
                layer,
                role,
                is_scale,
                dtype: t.dtype,
                shape,
                decoded,
                bytes: t.bytes(),
                tensor: at,
            };
            order.push((t.file, t.start, entry));
        }
        order.sort_by_key(|(file, start, t)| (*file, *start, t.tensor));
        order.into_iter().map(|(_, _, t)| t).collect()
    }

    fn left_out(&self) -> Vec<(String, String)> {
        let reason = |c: Claim| if let Claim::LeftOut(why) = c { Some(why) } else { None };
        self.each().filter_map(|(_, c, t)| Some((t.name.to_string(), reason(c)?.to_owned()))).collect()
    }

    /// The experts of every layer, with [`NONE`] for what is not there.
    fn experts(&self) -> Result<Vec<Option<LayerExperts>>> {
        let layouts = self.layouts()?;
        let mut layers: Vec<Option<LayerExperts>> = Vec::new();
        for (spec, layout) in self.source.spec.layers.iter().zip(layouts) {
            let Mlp::Moe(moe) = &spec.mlp else {
                layers.push(None);
                continue;
            };
            let pieces = layout.map_or(&[][..], |l| l.pieces);
            let pieces = pieces.iter().map(|piece| {
                let n = if piece.is_stacked() { 1 } else { moe.n_experts };
                PieceTensors { piece, tensors: vec![NONE; n] }
            });
            layers.push(Some(LayerExperts { n_experts: moe.n_experts, layout, pieces: pieces.collect() }));
        }
        for (at, claim, _) in self.each().filter(|(at, _, _)| !self.is_scale(*at)) {
            let Claim::Expert { piece, layer, expert, .. } = claim else { continue };
            let Some(Some(experts)) = layers.get_mut(layer) else { continue };
            let Some(tensors) = experts.pieces.iter_mut().find(|p| p.piece.name == piece.name) else {
                continue;
            };
            let slot = expert.unwrap_or(0);
            if let Some(t) = tensors.tensors.get_mut(slot) {
                *t = index(at);
            }
        }
        Ok(layers)
    }
}

/// Whether an expert hands its input on.
fn is_zero(layer: &LayerSpec, expert: Option<usize>) -> bool {
    let Some((moe, e)) = layer.mlp.moe().zip(expert) else { return false };
    (moe.n_experts..moe.n_experts + moe.n_zero).contains(&e)
}

/// Whether a name that ends like one of scales may be no tensor of its own.
fn is_scale(claim: Claim) -> bool {
    !matches!(claim, Claim::Trunk(..) | Claim::Carried(_))
}

/// A place in the tensor list; [`crate::limits::TENSORS_MAX`] keeps it far below [`NONE`].
fn index(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(NONE)
}
