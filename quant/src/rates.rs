//! Rates: how many bits a weight each item gets, where the rate of a codec can be chosen freely.
//!
//! Near the rate–distortion limit a weight coded with b bits has the squared error `A·2^(−2b)`. The least sum of losses
//! `Σ cᵢ·2^(−2bᵢ)` over items of `nᵢ` weights within `Σ nᵢ·bᵢ = B` has the same slope everywhere, which gives the closed
//! form (reverse water-filling; Cover & Thomas, "Elements of Information Theory", §10.3.3)
//!
//! ```text
//! bᵢ = b̄ + ½·log2(Aᵢ / GM(A)),   Aᵢ = cᵢ/nᵢ,   b̄ = B/Σn,   GM the geometric mean weighted by n
//! ```
//!
//! What we do differently: items have a least and a largest rate. Then `bᵢ = clamp(μ + ½·log2 Aᵢ)`, where the level μ is
//! the one at which the bits are used up. Their sum grows with μ, so bisection finds it.

use moepack_format::{Error, Result};

/// One item that competes for bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    /// Weights that all get the same rate.
    pub weights: u64,
    /// What the item loses is this times its relative squared error; finite and not negative.
    pub sensitivity: f64,
    /// Bits it gets at least, unless the budget is smaller than all of these together.
    pub bits_floor: f64,
}

/// The range of rates that a codec has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RateRange {
    /// Fewest bits a weight.
    pub least: f64,
    /// Most bits a weight.
    pub most: f64,
}

/// Bits that an entropy-coded trellis lies above the rate–distortion limit, side information counted.
const GAP_BITS: f64 = 0.05;

/// The relative squared error to expect at so many bits a weight: `2^(−2(b − gap))`.
pub fn relative_error(bits: f64) -> f64 {
    libm::exp2(-2.0 * (bits - GAP_BITS))
}

/// Halvings of the interval of the level: more than an f64 has bits, so the result is the same everywhere.
const HALVINGS: usize = 100;

/// Bits a weight for each item; `Σ weights · bits` is at most `budget_bits`, and hardly less unless every item has the
/// most there is.
///
/// # Errors
/// Fewer bits than the least rate takes (kind `Plan`, with that minimum in bytes).
pub fn rates(items: &[Demand], range: RateRange, budget_bits: f64) -> Result<Vec<f64>> {
    let sum = |bits: &dyn Fn(&Demand) -> f64| items.iter().map(|i| i.weights as f64 * bits(i)).sum::<f64>();
    let least = sum(&|_| range.least);
    if least > budget_bits {
        let (asked, least) = (budget_bits / 8.0, (least / 8.0).ceil());
        return Err(Error::plan(format!("{asked:.0} bytes are too few, the smallest possible is {least}")));
    }
    let floor = |i: &Demand| i.bits_floor.clamp(range.least, range.most);
    let floors = sum(&floor);
    if floors > budget_bits {
        // The floors give way together, each in proportion to how far it lies above the least rate.
        let share = (budget_bits - least) / (floors - least);
        return Ok(items.iter().map(|i| range.least + share * (floor(i) - range.least)).collect());
    }
    let wants = wants(items);
    let at = |level: f64| -> Vec<f64> {
        items.iter().zip(&wants).map(|(i, want)| (level + want).clamp(floor(i), range.most)).collect()
    };
    let fits = |level: f64| {
        items.iter().zip(at(level)).map(|(i, b)| i.weights as f64 * b).sum::<f64>() <= budget_bits
    };
    let finite = || wants.iter().copied().filter(|w| w.is_finite());
    let mut low = range.least - finite().fold(f64::NEG_INFINITY, f64::max);
    let mut high = range.most - finite().fold(f64::INFINITY, f64::min);
    for _ in 0..HALVINGS {
        let middle = low + (high - low) / 2.0;
        if fits(middle) { low = middle } else { high = middle }
    }
    // The upper end is met where all can have the most.
    Ok(at(if fits(high) { high } else { low }))
}

/// How far each item's rate lies above the level: half the binary logarithm of what a weight of it matters. Minus
/// infinity for what does not matter, unless nothing does: then all are alike.
fn wants(items: &[Demand]) -> Vec<f64> {
    if items.iter().all(|i| i.sensitivity <= 0.0) {
        return vec![0.0; items.len()];
    }
    items.iter().map(|i| 0.5 * libm::log2(i.sensitivity / i.weights.max(1) as f64)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RANGE: RateRange = RateRange { least: 1.0, most: 8.0 };

    fn item(weights: u64, sensitivity: f64) -> Demand {
        Demand { weights, sensitivity, bits_floor: 1.2 }
    }

    fn loss(items: &[Demand], bits: &[f64]) -> f64 {
        items.iter().zip(bits).map(|(i, b)| i.sensitivity * libm::exp2(-2.0 * b)).sum()
    }

    fn used(items: &[Demand], bits: &[f64]) -> f64 {
        items.iter().zip(bits).map(|(i, b)| i.weights as f64 * b).sum()
    }

    #[test]
    fn between_the_bounds_it_is_the_closed_form() {
        let items = [item(100, 1.0), item(300, 12.0), item(100, 16.0)];
        let bits = rates(&items, RANGE, 3.0 * 500.0).unwrap();
        let logs: Vec<f64> =
            items.iter().map(|i| libm::log2(i.sensitivity / i.weights as f64) / 2.0).collect();
        let mean = items.iter().zip(&logs).map(|(i, l)| i.weights as f64 * l).sum::<f64>() / 500.0;
        for (b, l) in bits.iter().zip(&logs) {
            assert!((b - (3.0 + l - mean)).abs() < 1e-9, "{bits:?}");
        }
    }

    #[test]
    fn floors_hold_until_the_budget_is_below_them() {
        let items = [item(100, 1e-9), item(100, 1.0)];
        assert_eq!(rates(&items, RANGE, 600.0).unwrap()[0], 1.2);
        let tight = rates(&items, RANGE, 210.0).unwrap();
        assert!((tight[0] - 1.05).abs() < 1e-9 && (tight[1] - 1.05).abs() < 1e-9, "{tight:?}");
        assert_eq!(rates(&items, RANGE, 199.0).unwrap_err().kind().exit_code(), 78);
        assert_eq!(rates(&items, RANGE, 1e9).unwrap(), [8.0, 8.0]);
    }

    #[test]
    fn what_does_not_matter_at_all_leaves_its_bits_to_others() {
        let bits = rates(&[item(100, 0.0), item(100, 1.0)], RANGE, 600.0).unwrap();
        assert!((bits[0] - 1.2).abs() < 1e-9 && (bits[1] - 4.8).abs() < 1e-6, "{bits:?}");
        let alike = rates(&[item(100, 0.0), item(100, 0.0)], RANGE, 600.0).unwrap();
        assert!((alike[0] - 3.0).abs() < 1e-9 && alike[0] == alike[1], "{alike:?}");
    }

    proptest! {
        #[test]
        fn the_budget_is_used_up_and_no_exchange_of_bits_helps(
            raw in prop::collection::vec((1_u64..1000, 0.001_f64..1000.0), 1..12),
            mean in 1.3_f64..6.0,
        ) {
            let items: Vec<Demand> = raw.iter().map(|&(n, c)| item(n, c)).collect();
            let budget = mean * items.iter().map(|i| i.weights as f64).sum::<f64>();
            let bits = rates(&items, RANGE, budget).unwrap();
            let spent = used(&items, &bits);
            prop_assert!(spent <= budget && spent > budget * (1.0 - 1e-9), "{} of {}", spent, budget);
            for from in 0..items.len() {
                for to in 0..items.len() {
                    // Moves so many bits in all that the floor and the top stay where they are.
                    let amount = 0.01 * items[from].weights.min(items[to].weights) as f64;
                    let mut moved = bits.clone();
                    moved[from] -= amount / items[from].weights as f64;
                    moved[to] += amount / items[to].weights as f64;
                    if from != to && moved[from] >= 1.2 && moved[to] <= RANGE.most {
                        prop_assert!(loss(&items, &moved) >= loss(&items, &bits) * (1.0 - 1e-12));
                    }
                }
            }
        }
    }
}
