//! What experts on a shortcut are a shortcut past: behind the layer's attention a dense MLP, a second attention and a
//! second dense MLP (LongCat-Flash, arXiv 2509.01322, section 2.1.2). The experts take what the first attention left.

use std::ops::Range;
use std::sync::Arc;

use moepack_convert::spec::{LayerSpec, ModelSpec, Role, Shortcut};
use moepack_convert::tensor::{Expert, Tensor};
use moepack_format::Result;
use moepack_quant::Isa;

use super::attention::Attention;
use super::experts::GatedMlp;
use super::layer::add_mlp;
use super::residual::{self, Sublayer};
use super::{Stream, Tap, Weights};
use crate::tokens::Windows;

/// The weights of one layer.
pub(super) struct Beside {
    first_mlp: GatedMlp,
    around_attention: Sublayer,
    attention: Attention,
    around_mlp: Sublayer,
    second_mlp: GatedMlp,
}

impl Beside {
    pub(super) fn load(weights: &dyn Weights, l: usize, layer: &LayerSpec, spec: Shortcut) -> Result<Beside> {
        let roles = [Role::DenseGate, Role::DenseUp, Role::DenseDown];
        let mlp = |weights: &dyn Weights| GatedMlp::load(weights, l, roles, spec.inter, spec.activation);
        let second = Second(weights);
        Ok(Beside {
            first_mlp: mlp(weights)?,
            around_attention: Sublayer::load(&second, l, layer.residual, &residual::ATTENTION)?,
            attention: Attention::load(&second, l, &layer.attention)?,
            around_mlp: Sublayer::load(&second, l, layer.residual, &residual::MLP)?,
            second_mlp: mlp(&second)?,
        })
    }

    /// The stream behind all of it; `first` is the way in and out of the first MLP.
    pub(super) fn run(&self, isa: Isa, first: &Sublayer, windows: &Windows, stream: &mut Stream) {
        add_mlp(isa, first, &self.first_mlp, stream);
        self.attention.run_in_place(isa, &self.around_attention, windows, stream);
        add_mlp(isa, &self.around_mlp, &self.second_mlp, stream);
    }
}

/// A model whose layers have the second of what they have twice.
struct Second<'a>(&'a dyn Weights);

impl Weights for Second<'_> {
    fn spec(&self) -> &ModelSpec {
        self.0.spec()
    }

    fn trunk(&self, layer: Option<usize>, role: Role) -> Result<Tensor> {
        self.0.trunk(layer, role.second().unwrap_or(role))
    }

    fn trunk_rows(&self, layer: Option<usize>, role: Role, rows: Range<usize>) -> Result<Tensor> {
        self.0.trunk_rows(layer, role.second().unwrap_or(role), rows)
    }

    fn trunk_table(&self, layer: Option<usize>, role: Role) -> Result<Vec<u32>> {
        self.0.trunk_table(layer, role.second().unwrap_or(role))
    }

    fn trunk_integers(&self, layer: Option<usize>, role: Role) -> Result<Vec<i64>> {
        self.0.trunk_integers(layer, role.second().unwrap_or(role))
    }

    fn expert(&self, layer: usize, expert: usize) -> Result<Expert> {
        self.0.expert(layer, expert)
    }

    fn tap(&self, layer: Option<usize>, role: Role) -> Option<Arc<Tap>> {
        self.0.tap(layer, role.second().unwrap_or(role))
    }
}
