//! The router: which experts a token uses, and with what weights.

use moepack_convert::spec::{Choice, GroupScore, Groups, Moe, Role, RouteWeights, Router as Spec, Score};
use moepack_format::{Error, Result};
use moepack_quant::{Isa, math};

use super::linear::Linear;
use super::norm::Norm;
use super::{Weights, tensor};

/// The weights of a layer's router.
pub(super) struct Router {
    spec: Spec,
    n_experts: usize,
    n_used: usize,
    /// `[n_experts, hidden]`
    linear: Linear,
    /// `[n_experts]`, added to the scores for choosing only
    correction: Option<Vec<f32>>,
    /// `[vocab, n_used]`, the experts of each token id
    table: Option<Vec<u32>>,
    /// Norm of its own input.
    input: Option<Norm>,
    /// `[n_experts]`, factors of weights.
    expert_scale: Option<Vec<f32>>,
}

impl Router {
    pub(super) fn load(weights: &dyn Weights, layer: usize, moe: &Moe) -> Result<Router> {
        let (l, hidden, spec) = (Some(layer), weights.spec().hidden, moe.router);
        let n_experts = moe.n_experts + moe.n_zero;
        let roles = (Role::Router, spec.bias.then_some(Role::RouterBias));
        let correction =
            spec.correction.then(|| vector(weights, layer, Role::RouterCorrection, n_experts)).transpose()?;
        let linear = Linear::load(weights, l, roles, n_experts, hidden)?;
        let by_token = spec.choice == Choice::ByToken;
        let table = by_token.then(|| table(weights, layer, moe)).transpose()?;
        let expert_scale = || tensor(weights, l, Role::RouterExpertScale, &[n_experts]);
        Ok(Router {
            spec,
            n_experts,
            n_used: moe.n_experts_used,
            linear,
            correction,
            table,
            input: spec.own_input.then(|| own_norm(weights, layer)).transpose()?,
            expert_scale: spec.expert_scale.then(expert_scale).transpose()?,
        })
    }

    /// Replaces the MLP's inputs by the router's own, of rows of the stream; both are `[t, hidden]`.
    pub(super) fn own_inputs(&self, isa: Isa, rows: &[f32], x: &mut [f32]) {
        if let Some(norm) = &self.input {
            norm.apply(isa, rows, x);
        }
    }

    /// Chooses for each row of `x`, `[t, hidden]`, whose ids are `tokens`: appends `n_used` experts and their weights,
    /// best first.
    pub(super) fn route(
        &self,
        isa: Isa,
        x: &[f32],
        tokens: &[u32],
        experts: &mut Vec<u32>,
        weights: &mut Vec<f32>,
    ) {
        let t = x.len() / self.linear.k();
        let mut logits = vec![0.0; t * self.n_experts]; // [t, n_experts]
        self.linear.apply(isa, x, &mut logits);
        if let Some(cap) = self.spec.softcap {
            logits.iter_mut().for_each(|v| *v = softcapped(*v, cap));
        }
        for (scores, &token) in logits.chunks_exact_mut(self.n_experts).zip(tokens) {
            self.choose(isa, scores, token, experts, weights);
        }
    }

    /// One token: `logits` is `[n_experts]`.
    fn choose(
        &self,
        isa: Isa,
        logits: &mut [f32],
        token: u32,
        experts: &mut Vec<u32>,
        weights: &mut Vec<f32>,
    ) {
        // 1. Scores.
        match self.spec.score {
            Score::Softmax => math::softmax(isa, logits, None),
            Score::Sigmoid => math::sigmoid_all(isa, logits),
            Score::SqrtSoftplus => logits.iter_mut().for_each(|v| *v = softplus(*v).sqrt()),
            Score::Identity => {}
        }
        let scores = &*logits;
        let (from, from_weights) = (experts.len(), weights.len());
        match (self.spec.choice, &self.table) {
            (Choice::SparseMixer(near), _) => {
                return sparse_mixer(isa, scores, self.n_used, near, experts, weights);
            }
            (Choice::ByToken, Some(table)) => {
                experts.extend_from_slice(&table[token as usize * self.n_used..][..self.n_used]);
            }
            _ => experts.extend(self.best_of(isa, scores).into_iter().map(|e| e as u32)),
        }
        // 3. Weights come from the uncorrected scores.
        weights.extend(experts[from..].iter().map(|&e| scores[e as usize]));
        let weights = &mut weights[from_weights..];
        match self.spec.weights {
            RouteWeights::Scores => {}
            RouteWeights::SoftmaxOverChosen => math::softmax(isa, weights, None),
            RouteWeights::Sigmoid => math::sigmoid_all(isa, weights),
        }
        if let Some(eps) = self.spec.renorm {
            let sum = weights.iter().sum::<f32>() + eps;
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        weights.iter_mut().for_each(|w| *w *= self.spec.scale);
        if let Some(scale) = &self.expert_scale {
            weights.iter_mut().zip(&experts[from..]).for_each(|(w, &e)| *w *= scale[e as usize]);
        }
    }

    /// 2. Those with the best corrected scores, in the best groups.
    fn best_of(&self, isa: Isa, scores: &[f32]) -> Vec<usize> {
        let mut keys = scores.to_vec(); // [n_experts]
        if let Some(correction) = &self.correction {
            math::add(isa, &mut keys, correction);
        }
        if let Some(groups) = self.spec.groups {
            leave_best_groups(groups, &mut keys);
        }
        best(&keys, self.n_used)
    }
}

/// A vector of `n` values; ERNIE stores its corrections as a matrix of one row, Kimi its decays in four dimensions.
pub(super) fn vector(weights: &dyn Weights, layer: usize, role: Role, n: usize) -> Result<Vec<f32>> {
    let tensor = weights.trunk(Some(layer), role)?;
    if tensor.data.len() == n {
        return Ok(tensor.data);
    }
    let what = format!("{} values for {role:?} of layer {layer}, but the model takes {n}", tensor.data.len());
    Err(Error::bad_data(what))
}

/// RMS without weights, then factors over the root of their number.
fn own_norm(weights: &dyn Weights, layer: usize) -> Result<Norm> {
    let (hidden, eps) = (weights.spec().hidden, weights.spec().norm.eps());
    let mut factors = tensor(weights, Some(layer), Role::RouterInput, &[hidden])?;
    let root = (1.0 / (hidden as f64).sqrt()) as f32;
    factors.iter_mut().for_each(|f| *f *= root);
    Ok(Norm::rms(factors, eps))
}

/// The experts of each token id, `[vocab, n_used]`.
fn table(weights: &dyn Weights, layer: usize, moe: &Moe) -> Result<Vec<u32>> {
    let table = weights.trunk_table(Some(layer), Role::RouterTable)?;
    let (n, expected) = (table.len(), weights.spec().vocab * moe.n_experts_used);
    if n != expected {
        let what = format!("{n} numbers in the experts of token ids in layer {layer}, expected {expected}");
        return Err(Error::bad_data(what));
    }
    match table.iter().position(|&e| e as usize >= moe.n_experts) {
        None => Ok(table),
        Some(at) => {
            let (token, e) = (at / moe.n_experts_used, table.get(at).copied().unwrap_or(0));
            let what = format!(
                "token id {token} is routed to expert {e} in layer {layer}, which has {}",
                moe.n_experts
            );
            Err(Error::bad_data(what).hint("the table belongs to another model, or the file is damaged"))
        }
    }
}

/// A value that nears ±cap, but does not go beyond: cap · tanh(x / cap).
pub(super) fn softcapped(x: f32, cap: f32) -> f32 {
    libm::tanh(f64::from(x / cap)) as f32 * cap
}

/// ln(1 + e^x) as transformers has it: x itself above 20, where f32 knows no difference.
pub(super) fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { libm::log1p(libm::exp(f64::from(x))) as f32 }
}

/// Liu et al. 2023 at inference: the best expert, weighed by a softmax over the scores near its own; then the best of the
/// others in the same way.
fn sparse_mixer(
    isa: Isa,
    scores: &[f32],
    n_used: usize,
    near: f32,
    experts: &mut Vec<u32>,
    weights: &mut Vec<f32>,
) {
    let mut left = scores.to_vec(); // [n_experts], those taken at −∞
    for _ in 0..n_used {
        let Some(&e) = best(&left, 1).first() else { return };
        let max = left[e];
        // Distances are those of all scores, also of the experts taken.
        let is_near = |s: f32| (max - s) / s.abs().max(max) <= near;
        let mut gates: Vec<f32> =
            left.iter().zip(scores).map(|(&l, &s)| if is_near(s) { l } else { f32::NEG_INFINITY }).collect();
        math::softmax(isa, &mut gates, None);
        experts.push(e as u32);
        weights.push(gates[e]);
        left[e] = f32::NEG_INFINITY;
    }
}

/// Puts every expert outside of the best groups beyond reach.
fn leave_best_groups(groups: Groups, keys: &mut [f32]) {
    let size = keys.len() / groups.n_groups;
    let score = |group: &[f32]| {
        let top = best(group, 2);
        let value = |i: usize| top.get(i).map_or(0.0, |&e| group[e]);
        match groups.score {
            GroupScore::Max => value(0),
            GroupScore::Top2Sum => value(0) + value(1),
        }
    };
    let scores: Vec<f32> = keys.chunks_exact(size).map(score).collect(); // [n_groups]
    let kept = best(&scores, groups.n_groups_used);
    for (g, group) in keys.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&g) {
            group.fill(f32::NEG_INFINITY);
        }
    }
}

/// Indices of the `k` largest values, largest first, the lower index first where they are equal. NaN comes last.
pub(super) fn best(values: &[f32], k: usize) -> Vec<usize> {
    let mut top: Vec<usize> = Vec::with_capacity(k + 1);
    let key = |i: usize| if values[i].is_nan() { f32::NEG_INFINITY } else { values[i] };
    for i in 0..values.len() {
        if top.len() < k || top.last().is_some_and(|&last| key(i) > key(last)) {
            let at = top.partition_point(|&j| key(j) >= key(i));
            top.insert(at, i);
            top.truncate(k);
        }
    }
    top
}

/// One token of an expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Assigned {
    /// Row of the stream.
    pub token: u32,
    /// What the expert's output is multiplied by.
    pub weight: f32,
}

/// The router's choice for all tokens of a stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// Experts a token uses.
    pub n_used: usize,
    /// Chosen experts of each token, best first. `[tokens, n_used]`
    pub experts: Vec<u32>,
    /// Their weights. `[tokens, n_used]`
    pub weights: Vec<f32>,
    /// Tokens by expert, ascending. `[tokens · n_used]`
    assigned: Vec<Assigned>,
    /// Where each expert's tokens begin, and the end. `[n_experts + n_zero + 1]`
    starts: Vec<usize>,
    /// Experts with weights.
    n_experts: usize,
}

impl Routing {
    /// Sorts the choice by expert; `experts` are all below the number of those with weights and of those that hand their
    /// input on together.
    pub(super) fn new(
        [n_experts, n_zero]: [usize; 2],
        n_used: usize,
        experts: Vec<u32>,
        weights: Vec<f32>,
    ) -> Routing {
        let n_weighty = n_experts;
        let n_experts = n_experts + n_zero;
        let mut starts = vec![0; n_experts + 1];
        experts.iter().for_each(|&e| starts[e as usize + 1] += 1);
        for e in 0..n_experts {
            starts[e + 1] += starts[e];
        }
        let (mut next, mut assigned) =
            (starts.clone(), vec![Assigned { token: 0, weight: 0.0 }; experts.len()]);
        for (i, (&e, &weight)) in experts.iter().zip(&weights).enumerate() {
            assigned[next[e as usize]] = Assigned { token: (i / n_used) as u32, weight };
            next[e as usize] += 1;
        }
        Routing { n_used, experts, weights, assigned, starts, n_experts: n_weighty }
    }

    /// Number of experts with weights there are to choose from.
    pub fn n_experts(&self) -> usize {
        self.n_experts
    }

    /// The tokens that use this expert, ascending.
    pub fn tokens_of(&self, expert: usize) -> &[Assigned] {
        &self.assigned[self.starts[expert]..self.starts[expert + 1]]
    }

    /// The tokens that use experts that hand their input on, expert by expert.
    pub(super) fn handed_on(&self) -> &[Assigned] {
        self.assigned.get(self.starts[self.n_experts]..).unwrap_or_default()
    }

    /// How many tokens use each expert. `[n_experts]`
    pub fn counts(&self) -> Vec<u64> {
        self.starts.windows(2).take(self.n_experts).map(|w| (w[1] - w[0]) as u64).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_sorted_and_ties_go_to_the_lower_index() {
        assert_eq!(best(&[1.0, 3.0, 2.0, 3.0, 0.0], 3), [1, 3, 2]);
        assert_eq!(best(&[0.0; 4], 2), [0, 1]);
        assert_eq!(best(&[f32::NAN, 1.0, f32::NEG_INFINITY, f32::NAN], 2), [1, 0]);
        assert_eq!(best(&[5.0], 2), [0]);
    }

    fn router(spec: Spec, n_experts: usize, n_used: usize, correction: Option<Vec<f32>>) -> Router {
        let linear = Linear::new(&[], None, n_experts, 0);
        Router { spec, n_experts, n_used, linear, correction, table: None, input: None, expert_scale: None }
    }

    const PLAIN: Spec = Spec {
        bias: false,
        softcap: None,
        own_input: false,
        expert_scale: false,
        score: Score::Identity,
        correction: false,
        choice: Choice::Best,
        groups: None,
        weights: RouteWeights::Scores,
        renorm: None,
        scale: 1.0,
    };

    fn choice(router: &Router, logits: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let (mut experts, mut weights) = (Vec::new(), Vec::new());
        router.choose(Isa::get(), &mut logits.to_vec(), 0, &mut experts, &mut weights);
        (experts, weights)
    }

    #[test]
    fn the_correction_chooses_but_does_not_weigh() {
        let spec = Spec { correction: true, renorm: Some(0.0), scale: 2.5, ..PLAIN };
        let router = router(spec, 3, 2, Some(vec![0.0, 10.0, 0.0]));
        assert_eq!(choice(&router, &[3.0, 1.0, 2.0]), (vec![1, 0], vec![0.625, 1.875]));
    }

    #[test]
    fn groups_compete_by_their_two_best_or_by_their_best() {
        let logits = [5.0, 0.0, 3.0, 3.0, 4.0, 1.0]; // sums of two 5, 6, 5; largest 5, 3, 4
        let of = |score, n_groups_used| {
            let groups = Some(Groups { n_groups: 3, n_groups_used, score });
            choice(&router(Spec { groups, ..PLAIN }, 6, 2, None), &logits).0
        };
        assert_eq!(of(GroupScore::Top2Sum, 1), [2, 3]);
        assert_eq!(of(GroupScore::Top2Sum, 2), [0, 2]);
        assert_eq!(of(GroupScore::Max, 1), [0, 1]);
        assert_eq!(of(GroupScore::Max, 2), [0, 4]);
    }

    #[test]
    fn softmax_before_or_after_the_choice() {
        let before = router(Spec { score: Score::Softmax, ..PLAIN }, 3, 1, None);
        let (_, weights) = choice(&before, &[1.0, 1.0, 0.0]);
        assert!((weights[0] - 0.422_319).abs() < 1e-6, "{weights:?}");
        let after = router(Spec { weights: RouteWeights::SoftmaxOverChosen, ..PLAIN }, 3, 2, None);
        assert_eq!(choice(&after, &[1.0, 1.0, 0.0]).1, [0.5, 0.5]);
    }

    #[test]
    fn a_table_chooses_by_token_and_scores_weigh() {
        let spec = Spec { choice: Choice::ByToken, renorm: Some(0.0), ..PLAIN };
        let mut router = router(spec, 3, 2, None);
        router.table = Some(vec![0, 1, 2, 0]);
        let (mut experts, mut weights) = (Vec::new(), Vec::new());
        router.choose(Isa::get(), &mut [1.0, 5.0, 3.0], 1, &mut experts, &mut weights);
        assert_eq!((experts, weights), (vec![2, 0], vec![0.75, 0.25]));
    }

    #[test]
    fn softplus_is_ln_of_one_plus_exp() {
        assert_eq!(softplus(0.0), std::f32::consts::LN_2);
        assert_eq!(softplus(25.0), 25.0);
        assert!((softplus(-20.0) - 2.061_153_6e-9).abs() < 1e-16);
    }

    #[test]
    fn the_sparse_mixer_weighs_each_choice_among_those_near_it() {
        let router = router(Spec { choice: Choice::SparseMixer(0.02), ..PLAIN }, 4, 2, None);
        // 10 and 9.9 are near each other: e^10 / (e^10 + e^9.9). 9.9 alone is left near itself.
        let (experts, weights) = choice(&router, &[9.9, 3.0, 10.0, -10.0]);
        assert_eq!(experts, [2, 0]);
        assert!((weights[0] - 0.524_979_2).abs() < 1e-6 && weights[1] == 1.0, "{weights:?}");
    }

    #[test]
    fn tokens_are_listed_by_expert_in_ascending_order() {
        let routing = Routing::new([4, 0], 2, vec![3, 0, 0, 1, 3, 1], vec![0.1, 0.2, 0.3, 0.4, 0.5, 0.6]);
        let of = |e| routing.tokens_of(e).iter().map(|a| (a.token, a.weight)).collect::<Vec<_>>();
        assert_eq!(of(0), [(0, 0.2), (1, 0.3)]);
        assert_eq!(of(1), [(1, 0.4), (2, 0.6)]);
        assert_eq!(of(2), []);
        assert_eq!(of(3), [(0, 0.1), (2, 0.5)]);
        assert_eq!((routing.counts(), routing.n_experts()), (vec![2, 2, 0, 2], 4));
    }
}
