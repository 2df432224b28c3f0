//! Budgets with a codec whose rate is free: the closed form of [`moepack_quant::rates`], rounded to bytes.
//!
//! `--bits`: the payload is used up to a few bytes. `--target-size`: records come in units of `align`
//! ([`super::units`]), and inside a record the three projections share what it holds to the byte.

use moepack_convert::Model;
use moepack_format::{Error, PlaneSpec, Result};
use moepack_quant::rates::{Demand, RateRange, rates, relative_error};

use super::units::{Records, Share, hand_out};
use super::{Ask, Group, Limit, Shapes, groups, shapes, sizes};
use crate::engine::sizes::record_end;
use crate::recipe::{BITS, MATRICES, Recipe, Rule, at_rate};

/// No matrix gets less, unless the budget forces it: below, a codec's error grows faster than the closed form says.
const BITS_FLOOR: f64 = 1.2;
/// An expert that calibration hardly saw may still matter: it gets at most so many bits less than the mean.
const BITS_BELOW_MEAN: f64 = 1.0;
/// All rates a codec may be asked for.
const RANGE: RateRange = RateRange { least: *BITS.start(), most: *BITS.end() };

/// The recipe that loses least within the limit, with one codec at many rates.
///
/// # Errors
/// A codec whose rate is fixed; a limit that cannot be met (kind `Plan`, with the smallest possible).
pub fn recipe(model: &Model, ask: &Ask<'_>, codec: &str) -> Result<Recipe> {
    at_rate(codec, RANGE.least)?;
    let planner = Planner::new(model, ask, codec)?;
    match ask.limit {
        Limit::Bits(bits) => planner.within_bits(bits),
        Limit::BundleBytes(bytes) => planner.within_bundle(bytes),
    }
}

struct Planner<'a> {
    model: &'a Model,
    ask: &'a Ask<'a>,
    codec: &'a str,
    /// Each with the shapes of its layer.
    groups: Vec<(Group, Shapes)>,
}

/// Bytes of gate, up and down in each of these experts.
struct Coded {
    group: Group,
    matrices: [(usize, usize); 3],
    bytes: [u64; 3],
}

impl<'a> Planner<'a> {
    fn new(model: &'a Model, ask: &'a Ask<'a>, codec: &'a str) -> Result<Planner<'a>> {
        let mut known: Option<(usize, Shapes)> = None;
        let mut with_shapes = Vec::new();
        for group in groups(model, ask.per_expert) {
            let shapes = match known.take().filter(|(layer, _)| *layer == group.layer) {
                Some((_, shapes)) => shapes,
                None => shapes(model, group.layer)?,
            };
            known = Some((group.layer, shapes.clone()));
            with_shapes.push((group, shapes));
        }
        Ok(Planner { model, ask, codec, groups: with_shapes })
    }

    /// Bytes of what is kept as it is in all experts.
    fn kept_bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        for (group, shapes) in &self.groups {
            bytes += group.len() * record_bytes(&shapes.kept)?;
        }
        Ok(bytes)
    }

    fn demands(&self, (group, shapes): &(Group, Shapes), mean_bits: f64) -> [Demand; 3] {
        let rare = if self.ask.per_expert { mean_bits - BITS_BELOW_MEAN } else { 0.0 };
        let demand = |i: usize| {
            let (part, (rows, cols)) = (MATRICES[i], shapes.matrices[i]);
            let weights = group.len() * (rows * cols) as u64;
            let sensitivity = group.sensitivity(self.ask, part, weights);
            Demand { weights, sensitivity, bits_floor: BITS_FLOOR.max(rare) }
        };
        [demand(0), demand(1), demand(2)]
    }

    fn within_bits(&self, bits: f64) -> Result<Recipe> {
        let weights = self.model.spec().expert_weights() as f64;
        let kept = self.kept_bytes()?;
        let budget = ((bits * weights / 8.0) as u64).saturating_sub(kept);
        let demands: Vec<Demand> = self.groups.iter().flat_map(|g| self.demands(g, bits)).collect();
        let chosen = rates(&demands, RANGE, budget as f64 * 8.0).map_err(|e| {
            let nearest = ((weights * RANGE.least + 8.0 * kept as f64) * 1e4 / weights).ceil() / 1e4;
            Error::plan(format!("--bits {bits} cannot be met: {}", e.what()))
                .hint(format!("the nearest that can is --bits {nearest}"))
        })?;
        let mut coded: Vec<Coded> = Vec::with_capacity(self.groups.len());
        for ((group, shapes), bits) in self.groups.iter().zip(chosen.as_chunks::<3>().0) {
            let bytes = bytes_at(shapes, *bits);
            coded.push(Coded { group: group.clone(), matrices: shapes.matrices, bytes });
        }
        self.use_up(&mut coded, budget);
        self.recipe(&coded)
    }

    /// Gives a byte more to each matrix in turn while that fits; rounding down left them over.
    fn use_up(&self, coded: &mut [Coded], budget: u64) {
        let spent: u64 = coded.iter().map(|c| c.group.len() * c.bytes.iter().sum::<u64>()).sum();
        let mut left = budget.saturating_sub(spent);
        for (coded, (_, shapes)) in coded.iter_mut().zip(&self.groups) {
            let most = bytes_at(shapes, [RANGE.most; 3]);
            for (bytes, most) in coded.bytes.iter_mut().zip(most) {
                if coded.group.len() <= left && *bytes < most {
                    *bytes += 1;
                    left -= coded.group.len();
                }
            }
        }
    }

    /// What is no record (headers, trunk, manifest) depends a little on the recipe, so a few rounds find the units that
    /// just fit.
    fn within_bundle(&self, target: u64) -> Result<Recipe> {
        const ROUNDS: usize = 12;
        let align = self.ask.align;
        let least: u64 = self.records().iter().map(|r| r.n_records * r.units_least).sum();
        let (mut units, mut best) = (least, None);
        let mut smallest = 0;
        for round in 0..ROUNDS {
            let recipe = self.of_units(units)?;
            let sizes = sizes(self.model, &recipe, self.ask)?;
            let total = sizes.bundle_bytes();
            if round == 0 {
                smallest = total;
            }
            let fits = total <= target;
            if fits && best.as_ref().is_none_or(|(n, _)| *n <= units) {
                best = Some((units, recipe));
            }
            let rest = total - sizes.record_bytes() - sizes.fill_bytes;
            let next = (target.saturating_sub(rest) / align).max(least);
            // One that does not fit has no larger next.
            let next = if fits { next } else { next.min(units.saturating_sub(1)) };
            if next == units || next < least || best.as_ref().is_some_and(|(n, _)| next <= *n) {
                break;
            }
            units = next;
        }
        best.map(|(_, recipe)| recipe).ok_or_else(|| {
            Error::plan(format!(
                "--target-size {target} cannot be met: the smallest possible takes about {smallest} bytes"
            ))
            .hint(format!(
                "nothing but routed experts is quantized; the nearest that can is --target-size {smallest}"
            ))
        })
    }

    fn of_units(&self, units: u64) -> Result<Recipe> {
        let short = || Error::plan("fewer units than the smallest records take");
        let shares = hand_out(&self.records(), units).ok_or_else(short)?;
        let mut coded = Vec::new();
        for (with_shapes, share) in self.groups.iter().zip(shares) {
            coded.extend(self.coded(with_shapes, share)?);
        }
        self.recipe(&coded)
    }

    fn records(&self) -> Vec<Records<'_>> {
        let weights = |(group, shapes): &(Group, Shapes)| group.len() as f64 * n_weights(shapes);
        let all: f64 = self.groups.iter().map(weights).sum();
        let mean = match self.ask.limit {
            Limit::Bits(bits) => bits,
            Limit::BundleBytes(bytes) => bytes as f64 * 8.0 / all.max(1.0),
        };
        self.groups.iter().map(|g| self.records_of(g, mean)).collect()
    }

    /// `mean_bits` is an upper bound of the mean, for floors.
    fn records_of<'g>(&'g self, with_shapes: &'g (Group, Shapes), mean_bits: f64) -> Records<'g> {
        let (group, shapes) = with_shapes;
        let units =
            |bits: f64| (self.room(shapes) as f64 + bits * n_weights(shapes) / 8.0) / self.ask.align as f64;
        let loss = move |units: u64| {
            let demands = self.demands(with_shapes, mean_bits);
            let Ok(bits) = self.split(with_shapes, units) else { return f64::INFINITY };
            demands.iter().zip(bits).map(|(d, b)| d.sensitivity * relative_error(b)).sum()
        };
        let units_least = units(RANGE.least).ceil() as u64;
        let units_most = (units(RANGE.most).ceil() as u64).max(units_least);
        Records { n_records: group.len(), units_least, units_most, loss: Box::new(loss) }
    }

    /// Bytes of a record that are no code: what is kept, and the gaps in front of planes.
    fn room(&self, shapes: &Shapes) -> u64 {
        /// Gaps of a record of gate, up and down.
        const GAPS: u64 = 2 * moepack_format::TENSOR_ALIGN;
        record_bytes(&shapes.kept).unwrap_or(0) + GAPS
    }

    /// Rates of gate, up and down in a record of so many units, gaps estimated.
    fn split(&self, with_shapes: &(Group, Shapes), units: u64) -> Result<[f64; 3]> {
        let (group, shapes) = with_shapes;
        let bytes = (units * self.ask.align).saturating_sub(self.room(shapes));
        let mean = bytes as f64 * 8.0 / n_weights(shapes);
        let demands = self.demands(with_shapes, mean);
        let budget = (bytes as f64 * 8.0).max(RANGE.least * n_weights(shapes)) * group.len() as f64;
        let bits = rates(&demands, RANGE, budget)?;
        Ok(bits.try_into().unwrap_or([RANGE.least; 3]))
    }

    /// The experts with one unit more come last: their rule then wins over that of the whole layer.
    fn coded(&self, with_shapes: &(Group, Shapes), share: Share) -> Result<Vec<Coded>> {
        let (group, Shapes { matrices, .. }) = with_shapes;
        let of = |group, bytes| Coded { group, matrices: *matrices, bytes };
        let mut coded = vec![of(group.clone(), self.fill(with_shapes, share.units)?)];
        if share.n_larger > 0 {
            let end = group.experts.start + share.n_larger as usize;
            let larger = Group { experts: group.experts.start..end, whole: false, ..group.clone() };
            coded.push(of(larger, self.fill(with_shapes, share.units + 1)?));
        }
        Ok(coded)
    }

    /// The largest matrices, apart by what the closed form says, whose record takes no more than `units`.
    fn fill(&self, with_shapes: &(Group, Shapes), units: u64) -> Result<[u64; 3]> {
        const HALVINGS: usize = 50;
        let (_, shapes) = with_shapes;
        let wanted = self.split(with_shapes, units)?;
        let at = |shift: f64| wanted.map(|b| (b + shift).clamp(RANGE.least, RANGE.most));
        let (mut low, mut high) = (-(RANGE.most - RANGE.least), RANGE.most - RANGE.least);
        for _ in 0..HALVINGS {
            let middle = low + (high - low) / 2.0;
            if self.record_of(shapes, at(middle))? <= units * self.ask.align {
                low = middle
            } else {
                high = middle
            }
        }
        Ok(bytes_at(shapes, at(low)))
    }

    /// Bytes of a record at these rates, at most.
    fn record_of(&self, shapes: &Shapes, bits: [f64; 3]) -> Result<u64> {
        let mut end = 0;
        for ((rows, cols), bits) in shapes.matrices.into_iter().zip(bits).filter(|((rows, _), _)| *rows > 0) {
            end = record_end(end, &at_rate(self.codec, bits)?.planes(rows, cols)?)?;
        }
        record_end(end, &shapes.kept)
    }

    fn recipe(&self, coded: &[Coded]) -> Result<Recipe> {
        let there = |c: &Coded, i: &usize| c.matrices.get(*i).is_some_and(|(rows, _)| *rows > 0);
        let rules = coded.iter().flat_map(|c| (0..3).filter(|i| there(c, i)).map(|i| self.rule(c, i)));
        let rules = rules.collect();
        Ok(self.ask.recipe(rules))
    }

    fn rule(&self, coded: &Coded, i: usize) -> Rule {
        let ((rows, cols), bytes, part) = (coded.matrices[i], coded.bytes[i], MATRICES[i]);
        let n = coded.group.len();
        let bits = bits_of(bytes, rows * cols);
        let sensitivity = coded.group.sensitivity(self.ask, part, n * (rows * cols) as u64);
        // A rule for each expert makes a long manifest as it is.
        let told = !self.ask.per_expert;
        Rule {
            tensor: coded.group.pattern(part),
            codec: self.codec.to_owned(),
            bits: Some(bits),
            bytes: told.then_some(n * bytes),
            expected_loss: told.then(|| rounded(sensitivity * relative_error(bits))),
        }
    }
}

fn n_weights(shapes: &Shapes) -> f64 {
    shapes.matrices.iter().map(|(rows, cols)| (rows * cols) as f64).sum()
}

/// Bytes of planes that lie together from the start of a record.
fn record_bytes(planes: &[PlaneSpec]) -> Result<u64> {
    planes.iter().map(PlaneSpec::bytes).sum()
}

/// Bytes of each matrix at these rates.
fn bytes_at(shapes: &Shapes, bits: [f64; 3]) -> [u64; 3] {
    let bytes = |i: usize| {
        let (rows, cols) = shapes.matrices[i];
        (bits[i] * (rows * cols) as f64 / 8.0) as u64
    };
    [bytes(0), bytes(1), bytes(2)]
}

/// The shortest decimal number of bits at which `weights` take just `bytes`.
fn bits_of(bytes: u64, weights: usize) -> f64 {
    let exact = bytes as f64 * 8.0 / weights as f64;
    let scales = std::iter::successors(Some(100.0), |scale| Some(scale * 10.0)).take(10);
    let rounded = scales.map(|scale: f64| (exact * scale).ceil() / scale);
    let holds = |bits: &f64| (bits * weights as f64 / 8.0) as u64 == bytes && BITS.contains(bits);
    { rounded }.find(holds).unwrap_or(exact)
}

/// Four significant digits.
fn rounded(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_say_just_the_bytes_they_stand_for() {
        for weights in [128 * 128, 256 * 256, 96 * 80, 2048 * 7168] {
            for bytes in (weights / 8..weights).step_by(weights / 97) {
                let bits = bits_of(bytes as u64, weights);
                assert_eq!((bits * weights as f64 / 8.0) as u64, bytes as u64, "{weights} {bytes} {bits}");
            }
        }
        assert_eq!(bits_of(6144, 128 * 128), 3.0);
    }
}
