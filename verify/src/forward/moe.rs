//! Routed experts: who gets which token, an expert at a time, the sum in a fixed order, shared experts at the end.
//!
//! The caller drives the experts, because it is the one who reads, decodes or quantizes them:
//! [`MoePass::run_expert`] may run on any thread, [`RoutedSum::add`] is called in ascending order of experts (see
//! [`ordered`](super::ordered)). Rows are gathered and normed block by block; besides the stream there is one sum of
//! its size, and the outputs of the experts in work.

use moepack_convert::spec::{Moe, SharedSum};
use moepack_format::{Error, Result};
use moepack_quant::math;
use rayon::prelude::*;

use super::experts::{GatedMlp, Scratch};
use super::layer::{LayerWeights, MoeWeights, SharedWeights};
use super::residual::Delta;
use super::router::{Assigned, Routing};
use super::{ROWS, Stream, sized};

/// Sees what goes through an expert, a block of tokens at a time, in ascending order of tokens.
pub trait Observer {
    /// `x` is `[n, width]`, the input of gate and up; `a` is `[n, inter]`, the input of down; `weights` is `[n]`,
    /// what the outputs are multiplied by (1 where the router's weight is already in `x`).
    fn block(&mut self, x: &[f32], a: &[f32], weights: &[f32]);
}

/// One layer's experts over one stream.
pub struct MoePass<'a> {
    layer: &'a LayerWeights,
    moe: &'a MoeWeights,
    stream: &'a Stream,
    /// What each token's row needs to become the MLP's input. `[tokens, n_notes]`
    notes: Vec<f32>,
    /// What experts work on, where that is a projection. `[tokens, latent]`
    latents: Option<Vec<f32>>,
    routing: Routing,
}

/// What an expert gives its tokens, before the router's weights.
pub struct ExpertOutput {
    /// Which expert.
    pub expert: usize,
    /// One row for each of [`Routing::tokens_of`]. `[n, width]`
    pub rows: Vec<f32>,
}

/// The weighted sum of the experts so far.
pub struct RoutedSum<'p> {
    pass: &'p MoePass<'p>,
    /// `[tokens, width]`
    sum: Vec<f32>,
    /// One beyond the last expert added.
    next: usize,
    /// What was wrong with the order, or how many rows were added.
    rows: Result<usize>,
}

impl<'a> MoePass<'a> {
    /// Routes every token of the stream; `tokens` are their ids.
    ///
    /// # Errors
    /// The layer has no experts, or the stream has not a row a token (mistakes of the caller).
    pub fn begin(layer: &'a LayerWeights, tokens: &[u32], stream: &'a Stream) -> Result<MoePass<'a>> {
        let moe = layer.moe().ok_or_else(|| Error::bad_data("this layer has no routed experts"))?;
        if tokens.len() != stream.n_tokens() {
            let (rows, n) = (stream.n_tokens(), tokens.len());
            return Err(Error::bad_data(format!("a stream of {rows} rows for {n} tokens")));
        }
        let (isa, around) = (layer.isa, &layer.around_mlp);
        let of_block = |(rows, tokens): (&[f32], &[u32])| {
            let mut notes = vec![0.0; tokens.len() * around.n_notes()]; // [n, n_notes]
            let mut x = vec![0.0; tokens.len() * layer.hidden]; // [n, hidden]
            around.notes(isa, rows, &mut notes);
            around.inputs(isa, rows, &notes, &mut x);
            let (mut experts, mut weights) = (Vec::new(), Vec::new());
            let latents = moe.latent.as_ref().map(|(down, _)| {
                let mut latents = vec![0.0; tokens.len() * down.n()]; // [n, latent]
                down.apply(isa, &x, &mut latents);
                latents
            });
            moe.router.own_inputs(isa, rows, &mut x);
            moe.router.route(isa, &x, tokens, &mut experts, &mut weights);
            (notes, experts, weights, latents)
        };
        let blocks = stream.taken().par_chunks(ROWS * stream.width).zip(tokens.par_chunks(ROWS));
        let blocks: Vec<_> = blocks.map(of_block).collect();
        let (mut notes, mut experts, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        let mut latents = moe.latent.as_ref().map(|_| Vec::new());
        for (n, e, w, l) in blocks {
            notes.extend(n);
            experts.extend(e);
            weights.extend(w);
            latents
                .iter_mut()
                .for_each(|latents| latents.extend_from_slice(l.as_deref().unwrap_or_default()));
        }
        let Moe { n_experts, n_zero, n_experts_used, .. } = moe.spec;
        let routing = Routing::new([n_experts, n_zero], n_experts_used, experts, weights);
        Ok(MoePass { layer, moe, stream, notes, latents, routing })
    }

    /// The router's choice.
    pub fn routing(&self) -> &Routing {
        &self.routing
    }

    /// Runs an expert over its tokens. Thread-safe; blocks that nobody observes may run in parallel.
    ///
    /// # Errors
    /// An index beyond the layer's experts.
    pub fn run_expert(
        &self,
        expert: usize,
        mlp: &GatedMlp,
        observer: Option<&mut dyn Observer>,
    ) -> Result<ExpertOutput> {
        if expert >= self.routing.n_experts() {
            let what = format!("expert {expert}, but the layer has {}", self.routing.n_experts());
            return Err(Error::bad_data(what));
        }
        let (tokens, width) = (self.routing.tokens_of(expert), self.width());
        let mut rows = vec![0.0; tokens.len() * width]; // [n, width]
        let blocks = (tokens.par_chunks(ROWS), rows.par_chunks_mut(ROWS * width));
        match observer {
            None => blocks.into_par_iter().for_each_init(Buffers::default, |buffers, (tokens, out)| {
                self.block(mlp, tokens, out, buffers);
            }),
            Some(observer) => {
                let mut buffers = Buffers::default();
                for (tokens, out) in tokens.chunks(ROWS).zip(rows.chunks_mut(ROWS * width)) {
                    let (x, a) = self.block(mlp, tokens, out, &mut buffers);
                    let weights: Vec<f32> = tokens.iter().map(|t| self.factor(t)).collect();
                    observer.block(x, a, &weights);
                }
            }
        }
        Ok(ExpertOutput { expert, rows })
    }

    /// One block of an expert's tokens: gather, norm, MLP. Gives the inputs of gate and up, and of down.
    fn block<'b>(
        &self,
        mlp: &GatedMlp,
        tokens: &[Assigned],
        out: &mut [f32],
        buffers: &'b mut Buffers,
    ) -> (&'b [f32], &'b [f32]) {
        let x = sized(&mut buffers.x, out.len()); // [n, width]
        for (t, x) in tokens.iter().zip(x.chunks_exact_mut(self.width())) {
            self.expert_input(t.token as usize, x);
            if self.moe.spec.weighs_input {
                x.iter_mut().for_each(|v| *v *= t.weight);
            }
        }
        let a = mlp.apply(self.layer.isa, x, out, &mut buffers.mlp);
        (x, a)
    }

    /// What goes into gate and up of whatever expert gets these tokens, `[tokens.len(), width]`; where the router's weight
    /// is applied to the input, without it.
    ///
    /// # Panics
    /// A token beyond the stream's.
    pub fn inputs(&self, tokens: &[u32]) -> Vec<f32> {
        let width = self.width();
        let mut x = vec![0.0; tokens.len() * width];
        for (&token, x) in tokens.iter().zip(x.chunks_exact_mut(width)) {
            self.expert_input(token as usize, x);
        }
        x
    }

    /// Length of what goes into an expert and comes out of it.
    pub fn width(&self) -> usize {
        self.moe.spec.width(self.layer.hidden)
    }

    /// Tokens of the stream.
    pub fn n_tokens(&self) -> usize {
        self.stream.n_tokens()
    }

    /// What a token gives to an expert.
    fn expert_input(&self, token: usize, out: &mut [f32]) {
        match &self.latents {
            Some(latents) => out.copy_from_slice(&latents[token * out.len()..][..out.len()]),
            None => self.input(token, out),
        }
    }

    /// What a token gives to the MLP.
    fn input(&self, token: usize, out: &mut [f32]) {
        let around = &self.layer.around_mlp;
        let notes = &self.notes[token * around.n_notes()..][..around.n_notes()];
        let row = &self.stream.taken()[token * self.stream.width..][..self.stream.width];
        around.input(self.layer.isa, row, notes, out);
    }

    /// What an expert's output for a token is multiplied by.
    fn factor(&self, assigned: &Assigned) -> f32 {
        if self.moe.spec.weighs_input { 1.0 } else { assigned.weight }
    }

    /// Adds the shared experts: what the whole MLP does to the stream.
    ///
    /// # Errors
    /// Experts were not added in ascending order, or one that has tokens was not added.
    pub fn finish(&self, sum: RoutedSum<'_>) -> Result<Delta> {
        let (rows, due) = (sum.rows?, self.routing.counts().iter().sum::<u64>() as usize);
        if rows != due {
            return Err(Error::bad_data(format!("{rows} rows of experts were added, but {due} are routed")));
        }
        let mut sum = sum.sum;
        self.add_handed_on(&mut sum);
        if let Some((_, up)) = &self.moe.latent {
            let mut rows = vec![0.0; self.n_tokens() * self.layer.hidden]; // [tokens, hidden]
            up.apply(self.layer.isa, &sum, &mut rows);
            sum = rows;
        }
        if let Some(bias) = &self.moe.sum_bias {
            sum.chunks_exact_mut(bias.len()).for_each(|row| math::add(self.layer.isa, row, bias));
        }
        if let Some(shared) = &self.moe.shared {
            self.add_shared(shared, &mut sum);
            if self.moe.spec.shared.is_some_and(|s| s.sum == SharedSum::Mean) {
                sum.par_chunks_mut(ROWS * self.layer.hidden).flatten().for_each(|v| *v *= 0.5);
            }
        }
        Ok(self.layer.around_mlp.delta(self.layer.isa, sum, &self.notes))
    }

    /// Adds what experts without weights give, their inputs, to `[tokens, width]`.
    fn add_handed_on(&self, sum: &mut [f32]) {
        let (width, mut x) = (self.width(), vec![0.0; self.width()]);
        for t in self.routing.handed_on() {
            self.expert_input(t.token as usize, &mut x);
            math::add_scaled(self.layer.isa, &mut sum[t.token as usize * width..][..width], t.weight, &x);
        }
    }

    /// Adds the shared experts' outputs to `[tokens, hidden]`.
    fn add_shared(&self, shared: &SharedWeights, sum: &mut [f32]) {
        let (isa, hidden) = (self.layer.isa, self.layer.hidden);
        sum.par_chunks_mut(ROWS * hidden).enumerate().for_each_init(
            Buffers::default,
            |buffers, (block, sum)| {
                let x = sized(&mut buffers.x, sum.len()); // [n, hidden]
                for (i, x) in x.chunks_exact_mut(hidden).enumerate() {
                    match &shared.norms {
                        None => self.input(block * ROWS + i, x),
                        Some(norms) => norms.before.apply(isa, self.stream.row(block * ROWS + i), x),
                    }
                }
                let out = sized(&mut buffers.out, sum.len()); // [n, hidden]
                shared.mlp.apply(isa, x, out, &mut buffers.mlp);
                if let Some(norms) = &shared.norms {
                    norms.behind.apply_in_place(isa, out);
                    norms.routed.apply_in_place(isa, sum);
                }
                match &shared.gate {
                    None => math::add(isa, sum, out),
                    Some(gate) => {
                        let mut gates = vec![0.0; x.len() / hidden]; // [n]
                        gate.apply(isa, x, &mut gates);
                        math::sigmoid_all(isa, &mut gates);
                        let rows = sum.chunks_exact_mut(hidden).zip(out.chunks_exact(hidden));
                        rows.zip(&gates).for_each(|((sum, out), &g)| math::add_scaled(isa, sum, g, out));
                    }
                }
            },
        );
    }
}

impl<'p> RoutedSum<'p> {
    /// Nothing added yet.
    pub fn new(pass: &'p MoePass<'_>) -> RoutedSum<'p> {
        let mut sum = vec![0.0; pass.stream.n_tokens() * pass.width()];
        // Touched in order and by all threads: pages that come row by row come twice, first to be read.
        sum.par_chunks_mut(1 << 16).for_each(|part| part.fill(0.0));
        RoutedSum { pass, sum, next: 0, rows: Ok(0) }
    }

    /// Adds an expert's rows times the router's weights. Experts come in ascending order: then a token's sum is the
    /// same chain whatever thread computed what.
    pub fn add(&mut self, output: &ExpertOutput) {
        let width = self.pass.width();
        let tokens = self.pass.routing.tokens_of(output.expert);
        if output.expert < self.next && self.rows.is_ok() {
            let what = format!("expert {} was added after expert {}", output.expert, self.next - 1);
            self.rows = Err(Error::bad_data(what));
        }
        self.next = output.expert + 1;
        if let Ok(rows) = &mut self.rows {
            *rows += tokens.len();
        }
        for (t, row) in tokens.iter().zip(output.rows.chunks_exact(width)) {
            let sum = &mut self.sum[t.token as usize * width..][..width];
            math::add_scaled(self.pass.layer.isa, sum, self.pass.factor(t), row);
        }
    }
}

/// Buffers of one thread, kept from block to block.
#[derive(Default)]
struct Buffers {
    x: Vec<f32>,
    out: Vec<f32>,
    mlp: Scratch,
}
