//! A bundle seen as the checkpoint that it was made from: names, types and shapes of the experts' tensors, so that they can
//! be written again.

use moepack_format::manifest::TensorPattern;
use moepack_format::{Dtype, Result};

use super::Model;
use crate::catalog::{Catalog, Source};
use crate::checkpoint::{Checkpoint, SourceTensor};
use crate::family::ExpertLayout;
use crate::listing;
use crate::names::{fill, is_blocks};

impl Model {
    /// How this checkpoint stores its experts, for a bundle's manifest; what a bundle's manifest says of it.
    pub fn expert_tensors(&self) -> Vec<TensorPattern> {
        if let Some(bundle) = &self.bundle {
            return bundle.manifest.provenance.expert_tensors.clone();
        }
        let mut others: Vec<&str> = self.catalog.trunk.iter().map(|t| &*t.name).collect();
        others.extend(self.catalog.left_out.iter().map(|(name, _)| &**name));
        others.sort_unstable();
        let tensors = self.checkpoint.tensors().iter();
        listing::patterns(tensors.filter(|t| others.binary_search(&&*t.name).is_err()))
    }

    /// Of a bundle, the headers of the checkpoint that it was made from, of which nothing can be read; `None` of a
    /// checkpoint. A manifest that does not say how experts were stored (of an early version) gives the family's
    /// plain layout in BF16.
    ///
    /// # Errors
    /// A list in the manifest that does not fit the model.
    pub fn released(&self) -> Result<Option<Model>> {
        let Some(bundle) = &self.bundle else { return Ok(None) };
        let patterns = &bundle.manifest.provenance.expert_tensors;
        let experts = self.spec.moe_layers().map(|(_, moe)| moe.n_experts).max().unwrap_or(0);
        let bounds = listing::Bounds { layers: self.spec.layers.len(), experts };
        let experts =
            if patterns.is_empty() { self.plain_tensors()? } else { listing::tensors(patterns, bounds)? };
        let tensors = self.checkpoint.tensors().iter().cloned().chain(experts).collect();
        let checkpoint = Checkpoint::of_headers(self.checkpoint.place().clone(), tensors)?;
        let catalog = Catalog::build(Source {
            family: self.family,
            spec: &self.spec,
            checkpoint: &checkpoint,
            in_banks: false,
            head_may_be_tied: true,
            hints: self.hints,
        })?;
        Ok(Some(Model {
            checkpoint,
            bundle: None,
            family: self.family,
            config: self.config.clone(),
            spec: self.spec.clone(),
            hints: self.hints,
            catalog,
            names_alone: false,
            warnings: Vec::new(),
        }))
    }

    fn plain_tensors(&self) -> Result<Vec<SourceTensor>> {
        let is_plain = |layout: &&ExpertLayout| !layout.pieces.iter().any(|p| is_blocks(p.name));
        let pieces = self.family.experts.iter().find(is_plain).map_or(&[][..], |layout| layout.pieces);
        let mut tensors = Vec::new();
        for (layer, moe) in self.spec.moe_layers() {
            for piece in pieces {
                let lengths = piece.lengths(piece.dims(moe, self.spec.hidden), piece.transposed);
                let shape = piece.stacked(piece.n_stacked(moe.n_experts), &lengths);
                let bytes = Dtype::Bf16.bytes(&shape)?;
                for expert in 0..if piece.is_stacked() { 1 } else { moe.n_experts } {
                    let name = fill(&format!("{}{}", self.family.layer_prefix, piece.name), layer, expert);
                    let (name, shape) = (name.into(), shape.clone().into());
                    tensors.push(SourceTensor {
                        name,
                        dtype: Dtype::Bf16,
                        file: 0,
                        shape,
                        start: 0,
                        end: bytes,
                    });
                }
            }
        }
        Ok(tensors)
    }
}
