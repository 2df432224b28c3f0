//! The router: which experts a token uses, and with what weights.

use moepack_convert::spec::{GroupScore, Groups, Moe, Role, RouteWeights, Router as Spec, Score};
use moepack_format::Result;
use moepack_quant::{Isa, math};

use super::linear::Linear;
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
}

impl Router {
    pub(super) fn load(weights: &dyn Weights, layer: usize, moe: &Moe) -> Result<Router> {
        let (l, hidden, n_experts, spec) = (Some(layer), weights.spec().hidden, moe.n_experts, moe.router);
        let roles = (Role::Router, spec.bias.then_some(Role::RouterBias));
        let correction =
            spec.correction.then(|| tensor(weights, l, Role::RouterCorrection, &[n_experts])).transpose()?;
        let linear = Linear::load(weights, l, roles, n_experts, hidden)?;
        Ok(Router { spec, n_experts, n_used: moe.n_experts_used, linear, correction })
    }

    /// Chooses for each row of `x`, `[t, hidden]`: appends `n_used` experts and their weights, best first.
    pub(super) fn route(&self, isa: Isa, x: &[f32], experts: &mut Vec<u32>, weights: &mut Vec<f32>) {
        let t = x.len() / self.linear.k();
        let mut logits = vec![0.0; t * self.n_experts]; // [t, n_experts]
        self.linear.apply(isa, x, &mut logits);
        for scores in logits.chunks_exact_mut(self.n_experts) {
            self.choose(isa, scores, experts, weights);
        }
    }

    /// One token: `logits` is `[n_experts]`.
    fn choose(&self, isa: Isa, logits: &mut [f32], experts: &mut Vec<u32>, weights: &mut Vec<f32>) {
        // 1. Scores.
        match self.spec.score {
            Score::Softmax => math::softmax(isa, logits, None),
            Score::Sigmoid => math::sigmoid_all(isa, logits),
            Score::Identity => {}
        }
        let scores = &*logits;
        // 2. What they compete with: corrected, and only in the best groups.
        let mut keys = scores.to_vec(); // [n_experts]
        if let Some(correction) = &self.correction {
            math::add(isa, &mut keys, correction);
        }
        if let Some(groups) = self.spec.groups {
            leave_best_groups(groups, &mut keys);
        }
        // 3. The best; their weights come from the uncorrected scores.
        let from = weights.len();
        for e in best(&keys, self.n_used) {
            experts.push(e as u32);
            weights.push(scores[e]);
        }
        let weights = &mut weights[from..];
        // 4. Weights.
        if self.spec.weights == RouteWeights::SoftmaxOverChosen {
            math::softmax(isa, weights, None);
        }
        if let Some(eps) = self.spec.renorm {
            let sum = weights.iter().sum::<f32>() + eps;
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        weights.iter_mut().for_each(|w| *w *= self.spec.scale);
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
fn best(values: &[f32], k: usize) -> Vec<usize> {
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
    /// Where each expert's tokens begin, and the end. `[n_experts + 1]`
    starts: Vec<usize>,
}

impl Routing {
    /// Sorts the choice by expert; `experts` are all below `n_experts`.
    pub(super) fn new(n_experts: usize, n_used: usize, experts: Vec<u32>, weights: Vec<f32>) -> Routing {
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
        Routing { n_used, experts, weights, assigned, starts }
    }

    /// Number of experts there are to choose from.
    pub fn n_experts(&self) -> usize {
        self.starts.len() - 1
    }

    /// The tokens that use this expert, ascending.
    pub fn tokens_of(&self, expert: usize) -> &[Assigned] {
        &self.assigned[self.starts[expert]..self.starts[expert + 1]]
    }

    /// How many tokens use each expert. `[n_experts]`
    pub fn counts(&self) -> Vec<u64> {
        self.starts.windows(2).map(|w| (w[1] - w[0]) as u64).collect()
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
        Router { spec, n_experts, n_used, linear: Linear::new(&[], None, n_experts, 0), correction }
    }

    const PLAIN: Spec = Spec {
        bias: false,
        score: Score::Identity,
        correction: false,
        groups: None,
        weights: RouteWeights::Scores,
        renorm: None,
        scale: 1.0,
    };

    fn choice(router: &Router, logits: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let (mut experts, mut weights) = (Vec::new(), Vec::new());
        router.choose(Isa::get(), &mut logits.to_vec(), &mut experts, &mut weights);
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
    fn tokens_are_listed_by_expert_in_ascending_order() {
        let routing = Routing::new(4, 2, vec![3, 0, 0, 1, 3, 1], vec![0.1, 0.2, 0.3, 0.4, 0.5, 0.6]);
        let of = |e| routing.tokens_of(e).iter().map(|a| (a.token, a.weight)).collect::<Vec<_>>();
        assert_eq!(of(0), [(0, 0.2), (1, 0.3)]);
        assert_eq!(of(1), [(1, 0.4), (2, 0.6)]);
        assert_eq!(of(2), []);
        assert_eq!(of(3), [(0, 0.1), (2, 0.5)]);
        assert_eq!((routing.counts(), routing.n_experts()), (vec![2, 2, 0, 2], 4));
    }
}
