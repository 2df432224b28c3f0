//! What calibration knows about the inputs of the trunk's matrices, for solvers that work with Hessians.
//!
//! The text is pushed through the released model once before experts are coded, layer by layer. Every token goes through
//! every matrix of the trunk, so a few tokens for each column are enough, and none are rare. Matrices that take the same
//! input (queries, keys and values) share one Hessian. Some tokens are held out of it and decide whether what the solver
//! did is of use.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use moepack_convert::spec::ModelSpec;
use moepack_convert::tensor::{Expert, Tensor};
use moepack_convert::{Model, Role};
use moepack_format::Result;
use moepack_quant::Isa;
use moepack_quant::hessian::HessianSum;
use moepack_verify::forward::{
    ExpertOutput, LayerWeights, MoePass, RoutedSum, Stream, Tap, Weights, embed, ordered,
};
use moepack_verify::tokens::Windows;
use rayon::prelude::*;

use crate::engine::evidence::{Evidence, HELD_OUT_MAX, Source};
use crate::engine::heldout::HeldOut;
use crate::engine::sensitivity::sample;
use crate::stop::Stop;

use super::inputs;

/// Tokens for each column of the widest matrix: with so many a Hessian is believed as it is.
const TOKENS_A_COLUMN: usize = 8;
/// Tokens whose inputs are collected before they are added up.
const GROUP_TOKENS: usize = 2048;
/// One token in so many is held out.
const HELD_OUT_EACH: usize = 8;
/// Rows of an input that are held at once: those that are collected, in two orders, and those held out.
pub(super) const ROWS_HELD: u64 = 2 * GROUP_TOKENS as u64 + HELD_OUT_MAX as u64;
/// Columns of the widest matrix whose Hessian is made: its factor takes a gigabyte and some minutes.
const COLS_MAX: usize = 16_384;

/// Tokens of a text that are pushed through for matrices of at most so many columns.
pub(super) fn n_tokens(text: &Windows, cols_max: usize) -> usize {
    text.tokens.len().min(TOKENS_A_COLUMN * cols_max)
}

/// A text on its way through the released model.
pub(super) struct Learner<'a> {
    isa: Isa,
    model: &'a Model,
    stop: &'a Stop,
    groups: Vec<Group>,
}

/// Some windows with the stream of their tokens.
struct Group {
    windows: Windows,
    stream: Stream,
}

impl<'a> Learner<'a> {
    /// Embeds a sample of a text, enough for matrices of at most so many columns.
    pub(super) fn begin(
        model: &'a Model,
        text: &Windows,
        cols_max: usize,
        stop: &'a Stop,
    ) -> Result<Learner<'a>> {
        let windows = groups(&sample(text, n_tokens(text, cols_max)));
        let embedded = |windows: Windows| Ok(Group { stream: embed(model, &windows)?, windows });
        let groups = windows.into_iter().map(embedded).collect::<Result<_>>()?;
        Ok(Learner { isa: Isa::get(), model, stop, groups })
    }

    /// Runs a layer; gives what the inputs of these of its matrices, with their columns, are like.
    pub(super) fn layer(&mut self, l: usize, matrices: &[(Role, usize)]) -> Result<LayerEvidence> {
        let mut watched = watched(matrices);
        let weights =
            LayerWeights::load(self.isa, &Tapped { model: self.model, layer: l, watched: &watched }, l)?;
        for group in &mut self.groups {
            self.stop.check()?;
            weights.attention(&group.windows, &mut group.stream)?;
            if weights.n_experts() == 0 {
                weights.dense(&mut group.stream)?;
            }
            add_up(self.isa, &mut watched)?;
        }
        if weights.n_experts() > 0 {
            self.experts(l, &weights, &mut watched)?;
        }
        drop(weights);
        Ok(LayerEvidence { inputs: watched.into_par_iter().map(Watched::finish).collect() })
    }

    /// Routed experts of all groups, each read once, and what runs beside them.
    fn experts(&mut self, l: usize, weights: &LayerWeights, watched: &mut [Watched]) -> Result<()> {
        let passes = self.groups.iter().map(|g| MoePass::begin(weights, &g.windows.tokens, &g.stream));
        let passes = passes.collect::<Result<Vec<_>>>()?;
        let mut sums: Vec<RoutedSum<'_>> = passes.iter().map(RoutedSum::new).collect();
        let work = |e: usize| -> Result<Vec<ExpertOutput>> {
            self.stop.check()?;
            let mlp = weights.pack_expert(&self.model.expert(l, e)?.decode(self.isa)?)?;
            passes.iter().map(|pass| pass.run_expert(e, &mlp, None)).collect()
        };
        ordered(weights.n_experts(), work, |_, outputs| {
            sums.iter_mut().zip(&outputs).for_each(|(sum, output)| sum.add(output));
            Ok(())
        })?;
        let mut deltas = Vec::new();
        for (pass, sum) in passes.iter().zip(sums) {
            deltas.push(pass.finish(sum)?);
            add_up(self.isa, watched)?;
        }
        drop(passes);
        self.groups.iter_mut().zip(&deltas).for_each(|(group, delta)| group.stream.add(self.isa, delta));
        Ok(())
    }
}

/// What the inputs of a layer's matrices are like.
pub(super) struct LayerEvidence {
    inputs: Vec<(&'static [Role], Evidence<'static>)>,
}

impl LayerEvidence {
    /// That of the inputs of one matrix; none where they are not known.
    pub(super) fn of(&self, role: Role, cols: usize) -> Option<&Evidence<'static>> {
        let found = self.inputs.iter().find(|(roles, e)| roles.contains(&role) && e.hessian.cols == cols);
        found.map(|(_, evidence)| evidence)
    }
}

/// One input of a layer's matrices, being watched at the first of them.
struct Watched {
    roles: &'static [Role],
    at: Role,
    tap: Arc<Tap>,
    sum: HessianSum,
    /// `[tokens, cols]`
    held_out: Vec<f32>,
}

fn watched(matrices: &[(Role, usize)]) -> Vec<Watched> {
    distinct(matrices).into_iter().map(|(at, cols)| Watched::new(at, cols)).collect()
}

/// Columns of each input that is learnt about.
pub(super) fn input_cols(matrices: &[(Role, usize)]) -> Vec<u64> {
    distinct(matrices).into_iter().map(|(_, cols)| cols as u64).collect()
}

/// The first matrix of each input.
fn distinct(matrices: &[(Role, usize)]) -> Vec<(Role, usize)> {
    let mut distinct: Vec<(Role, usize)> = Vec::new();
    for &(role, cols) in matrices.iter().filter(|(_, cols)| *cols <= COLS_MAX) {
        if distinct.iter().all(|(known, _)| inputs(*known) != inputs(role)) {
            distinct.push((role, cols));
        }
    }
    distinct
}

/// Adds up what has gone by since the last time.
fn add_up(isa: Isa, watched: &mut [Watched]) -> Result<()> {
    watched.par_iter_mut().try_for_each(|w| w.add_up(isa))
}

impl Watched {
    fn new(at: Role, cols: usize) -> Watched {
        let (tap, sum) = (Arc::new(Tap::new(cols)), HessianSum::new(cols));
        Watched { roles: inputs(at), at, tap, sum, held_out: Vec::new() }
    }

    fn add_up(&mut self, isa: Isa) -> Result<()> {
        let (rows, cols) = (self.tap.take(), self.tap.cols());
        let mut seen = Vec::with_capacity(rows.len());
        for (i, row) in rows.chunks_exact(cols.max(1)).enumerate() {
            let is_held_out = i % HELD_OUT_EACH == 0 && self.held_out.len() < HELD_OUT_MAX * cols;
            if is_held_out { &mut self.held_out } else { &mut seen }.extend_from_slice(row);
        }
        self.sum.add(isa, &seen, &vec![1.0; seen.len() / cols.max(1)])
    }

    fn finish(self) -> (&'static [Role], Evidence<'static>) {
        let held_out = HeldOut::alike(Cow::Owned(self.held_out), self.tap.cols());
        let hessian = Cow::Owned(self.sum.finish());
        (self.roles, Evidence { hessian, source: Source::Own, held_out })
    }
}

/// The released model, the inputs of one layer's matrices being watched.
struct Tapped<'a> {
    model: &'a Model,
    layer: usize,
    watched: &'a [Watched],
}

impl Weights for Tapped<'_> {
    fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    fn trunk(&self, layer: Option<usize>, role: Role) -> Result<Tensor> {
        self.model.trunk(layer, role)
    }

    fn trunk_rows(&self, layer: Option<usize>, role: Role, rows: Range<usize>) -> Result<Tensor> {
        self.model.trunk_rows(layer, role, rows)
    }

    fn trunk_table(&self, layer: Option<usize>, role: Role) -> Result<Vec<u32>> {
        self.model.trunk_table(layer, role)
    }

    fn trunk_integers(&self, layer: Option<usize>, role: Role) -> Result<Vec<i64>> {
        self.model.trunk_integers(layer, role)
    }

    fn expert(&self, layer: usize, expert: usize) -> Result<Expert> {
        Weights::expert(self.model, layer, expert)
    }

    fn tap(&self, layer: Option<usize>, role: Role) -> Option<Arc<Tap>> {
        let found = self.watched.iter().find(|w| layer == Some(self.layer) && w.at == role);
        found.map(|w| Arc::clone(&w.tap))
    }
}

/// Windows in their order, each group of as many tokens as are collected at once.
fn groups(windows: &Windows) -> Vec<Windows> {
    let mut groups: Vec<Windows> = Vec::new();
    for window in windows.iter() {
        match groups.last_mut().filter(|g| g.tokens.len() + window.len() <= GROUP_TOKENS) {
            Some(group) => {
                group.tokens.extend(window);
                group.lens.push(window.len());
            }
            None => groups.push(Windows { tokens: window.to_vec(), lens: vec![window.len()] }),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use moepack_convert::OpenOptions;

    use super::*;
    use crate::engine::trunk::MATRICES;

    /// Every input of a layer watched at every matrix that is said to take it.
    fn watched_everywhere(model: &Model, l: usize) -> Vec<Watched> {
        let of_layer = model.trunk_tensors().iter().filter(|t| t.layer == Some(l) && !t.is_scale);
        let matrices = of_layer.filter_map(|t| match *t.decoded {
            [_, cols] if !inputs(t.role).is_empty() => Some((t.role, cols as usize)),
            _ => None,
        });
        matrices.map(|(at, cols)| Watched::new(at, cols)).collect()
    }

    /// Lets a text through a layer.
    fn run(model: &Model, l: usize, weights: &LayerWeights, text: &Windows, stream: &mut Stream) {
        weights.attention(text, stream).unwrap();
        if weights.n_experts() == 0 {
            return weights.dense(stream).unwrap();
        }
        let pass = MoePass::begin(weights, &text.tokens, stream).unwrap();
        let mut sum = RoutedSum::new(&pass);
        for e in 0..weights.n_experts() {
            let mlp = weights.pack_expert(&Weights::expert(model, l, e).unwrap()).unwrap();
            sum.add(&pass.run_expert(e, &mlp, None).unwrap());
        }
        let delta = pass.finish(sum).unwrap();
        stream.add(Isa::get(), &delta);
    }

    /// Compares what the matrices of a model see that are said to take the same input; gives those that saw anything.
    fn compare(path: &Path) -> Vec<Role> {
        let (model, mut seen) = (Model::open(path, &OpenOptions::default()).unwrap(), Vec::new());
        let text = Windows { tokens: (0..40).map(|i| i * 7 % 50).collect(), lens: vec![20, 20] };
        let Ok(mut stream) = embed(&model, &text) else { return seen };
        for l in 0..model.spec().layers.len() {
            let watched = watched_everywhere(&model, l);
            let tapped = Tapped { model: &model, layer: l, watched: &watched };
            let Ok(weights) = LayerWeights::load(Isa::get(), &tapped, l) else { return seen };
            run(&model, l, &weights, &text, &mut stream);
            let mut rows: Vec<(&Watched, Vec<f32>)> = watched.iter().map(|w| (w, w.tap.take())).collect();
            // Where several matrices are one map, it is watched as the first of them.
            rows.retain(|(_, rows)| !rows.is_empty());
            for (i, (a, of_a)) in rows.iter().enumerate() {
                assert_eq!(of_a.len(), text.tokens.len() * a.tap.cols(), "{path:?} layer {l}: {:?}", a.at);
                for (b, of_b) in rows.iter().skip(i + 1).filter(|(b, _)| b.roles == a.roles) {
                    assert!(of_a == of_b, "{path:?} layer {l}: {:?} and {:?}", a.at, b.at);
                }
            }
            seen.extend(rows.iter().map(|(w, _)| w.at));
        }
        seen
    }

    #[test]
    fn matrices_of_one_list_take_the_same_input() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let random = std::fs::read_dir(fixtures.join("random")).unwrap().map(|e| e.unwrap().path());
        let paths = random.filter(|p| p.is_dir()).chain([fixtures.join("tiny-deepseek-v4")]);
        let seen: Vec<Role> = paths.flat_map(|path| compare(&path)).collect();
        let all = MATRICES.iter().copied().flatten();
        let unseen: Vec<&Role> = all.filter(|role| !seen.contains(role)).collect();
        assert_eq!(
            unseen,
            [&Role::OA],
            "an input for each group of heads, which no Hessian of one matrix says"
        );
    }
}
