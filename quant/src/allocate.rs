//! Bit allocation: which option each item gets, so that the sum of losses is small and the bytes fit.
//!
//! This is the multiple-choice knapsack, solved in two steps.
//!
//! 1. With a price λ on bytes, each item takes the option that minimises loss + λ·bytes, independently of the others;
//!    the λ at which the bytes just fit gives the best possible result among all that use no more bytes (Everett 1963,
//!    "Generalized Lagrange multiplier method"). Walking λ from infinity down is the same as taking the steps of each
//!    item's lower convex hull in order of loss saved per byte, so we sort those once; and the bytes that are left when
//!    the next step does not fit are filled with any later steps that still do.
//! 2. The multiplier misses options off the hull and combinations that fill the budget better. Where the table is small
//!    enough, dynamic programming over bytes finds the optimum (Kellerer, Pferschy and Pisinger, "Knapsack Problems",
//!    §11.5): `best[i][u]` is the least loss of the first i items within u units of bytes. A unit is the greatest common
//!    divisor of all differences, a few kilobytes for matrices of one shape, so nothing is rounded. Otherwise there are
//!    so many items that a step of one of them is nothing, and the first step's result stands.

use moepack_format::{Error, Result};

/// One way to code an item.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Alternative {
    /// Bytes it takes.
    pub bytes: u64,
    /// What it loses, in any unit that adds up over items; finite.
    pub loss: f64,
}

/// Cells of the table beyond which the optimum is not sought: at 15 alternatives this takes a second.
const CELLS_MAX: u64 = 32 << 20;

/// For each item the index of its chosen alternative; the bytes sum to at most `budget_bytes`.
///
/// # Errors
/// An item without alternatives, or a budget below the smallest possible (kind `Plan`, with that minimum).
pub fn allocate(items: &[Vec<Alternative>], budget_bytes: u64) -> Result<Vec<usize>> {
    let near = along_hulls(items, budget_bytes)?;
    Ok(optimum(items, budget_bytes).unwrap_or(near))
}

/// The first step: near the optimum, for any number of items.
fn along_hulls(items: &[Vec<Alternative>], budget_bytes: u64) -> Result<Vec<usize>> {
    let hulls: Vec<Vec<usize>> = items.iter().map(|i| lower_hull(i)).collect();
    if let Some(empty) = hulls.iter().position(Vec::is_empty) {
        return Err(Error::plan(format!("item {empty} has no alternative")));
    }
    let at = |item: usize, step: usize| items[item][hulls[item][step]];
    let least: u64 = (0..items.len()).map(|i| at(i, 0).bytes).sum();
    if least > budget_bytes {
        return Err(Error::plan(format!(
            "{budget_bytes} bytes are too few, the smallest possible is {least}"
        )));
    }
    let mut steps: Vec<Step> = (0..items.len())
        .flat_map(|item| (1..hulls[item].len()).map(move |to| (item, to)))
        .map(|(item, to)| Step::new(item, to, at(item, to - 1), at(item, to)))
        .collect();
    // Ties go to the lower item and step, so the order is the same everywhere.
    steps.sort_by(|a, b| b.gain.total_cmp(&a.gain).then(a.item.cmp(&b.item)).then(a.to.cmp(&b.to)));
    let mut chosen = vec![0; items.len()];
    let mut left = budget_bytes - least;
    for step in steps {
        // A step whose predecessor did not fit is skipped: it starts from there.
        if chosen[step.item] + 1 == step.to && step.bytes <= left {
            chosen[step.item] = step.to;
            left -= step.bytes;
        }
    }
    Ok(chosen.iter().zip(&hulls).map(|(&step, hull)| hull[step]).collect())
}

/// The second step, or `None` where the table would be too large.
fn optimum(items: &[Vec<Alternative>], budget_bytes: u64) -> Option<Vec<usize>> {
    let least: Vec<u64> = items.iter().map(|i| i.iter().map(|a| a.bytes).min()).collect::<Option<_>>()?;
    let extra = |item: usize, a: &Alternative| a.bytes - least[item];
    let extras = || items.iter().enumerate().flat_map(|(i, list)| list.iter().map(move |a| extra(i, a)));
    let unit = extras().fold(0, gcd).max(1);
    let most: u64 = (0..items.len()).filter_map(|i| items[i].iter().map(|a| extra(i, a)).max()).sum();
    let units = (budget_bytes.checked_sub(least.iter().sum())?.min(most)) / unit;
    if (units + 1).checked_mul(items.len() as u64)? > CELLS_MAX {
        return None;
    }
    let units = units as usize;
    let mut best = vec![0.0; units + 1];
    let mut choices = Vec::with_capacity(items.len()); // [n_items][units + 1]
    for (i, list) in items.iter().enumerate() {
        let mut next = vec![f64::INFINITY; units + 1];
        let mut choice = vec![0_u16; units + 1];
        for (a, alternative) in list.iter().enumerate() {
            let from = (extra(i, alternative) / unit) as usize;
            // Ties go to the earlier alternative, so the result is the same everywhere.
            let reached = next.iter_mut().zip(&mut choice).skip(from).zip(&best);
            for ((next, choice), before) in reached {
                let loss = before + alternative.loss;
                if loss < *next {
                    (*next, *choice) = (loss, a as u16);
                }
            }
        }
        best = next;
        choices.push(choice);
    }
    let mut left = units;
    let mut chosen: Vec<usize> = Vec::with_capacity(items.len());
    for (i, choice) in choices.iter().enumerate().rev() {
        let a = usize::from(choice[left]);
        left -= (extra(i, &items[i][a]) / unit) as usize;
        chosen.push(a);
    }
    chosen.reverse();
    Some(chosen)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// One step up an item's hull.
struct Step {
    item: usize,
    to: usize,
    bytes: u64,
    /// Loss saved per byte.
    gain: f64,
}

impl Step {
    fn new(item: usize, to: usize, from: Alternative, into: Alternative) -> Step {
        let bytes = into.bytes - from.bytes;
        Step { item, to, bytes, gain: (from.loss - into.loss) / bytes as f64 }
    }
}

/// Indices of the lower convex hull of (bytes, loss), from the fewest bytes to the smallest loss.
fn lower_hull(alternatives: &[Alternative]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..alternatives.len()).collect();
    order.sort_by(|&a, &b| {
        let (x, y) = (alternatives[a], alternatives[b]);
        x.bytes.cmp(&y.bytes).then(x.loss.total_cmp(&y.loss)).then(a.cmp(&b))
    });
    let slope = |a: usize, b: usize| {
        let (x, y) = (alternatives[a], alternatives[b]);
        (y.loss - x.loss) / (y.bytes - x.bytes) as f64
    };
    let mut hull: Vec<usize> = Vec::new();
    for next in order {
        let beaten = |&last: &usize| {
            let (x, y) = (alternatives[last], alternatives[next]);
            y.bytes == x.bytes || y.loss >= x.loss
        };
        if hull.last().is_some_and(beaten) {
            continue;
        }
        while let [.., before, last] = hull[..] {
            if slope(before, last) < slope(last, next) {
                break;
            }
            hull.pop();
        }
        hull.push(next);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(items: &[Vec<Alternative>], chosen: &[usize]) -> u64 {
        items.iter().zip(chosen).map(|(i, &c)| i[c].bytes).sum()
    }

    fn loss(items: &[Vec<Alternative>], chosen: &[usize]) -> f64 {
        items.iter().zip(chosen).map(|(i, &c)| i[c].loss).sum()
    }

    fn best_by_trying_all(items: &[Vec<Alternative>], budget: u64) -> f64 {
        match items.split_first() {
            None => 0.0,
            Some((first, rest)) => first
                .iter()
                .filter(|a| a.bytes <= budget)
                .map(|a| a.loss + best_by_trying_all(rest, budget - a.bytes))
                .fold(f64::INFINITY, f64::min),
        }
    }

    #[test]
    fn the_important_item_gets_the_bits() {
        let item = |weight: f64| {
            (1..=8).map(|b| Alternative { bytes: b * 100, loss: weight * 0.25_f64.powi(b as i32) }).collect()
        };
        let items: Vec<Vec<_>> = vec![item(1.0), item(64.0)];
        assert_eq!(allocate(&items, 900).unwrap(), [2, 5]);
        assert_eq!(allocate(&items, 199).unwrap_err().kind().exit_code(), 78);
    }

    proptest! {
        #[test]
        fn never_over_budget_and_the_optimum_where_it_can_be_had(
            raw in prop::collection::vec(prop::collection::vec((1_u64..40, 0.0_f64..10.0), 1..5), 1..6),
            extra in 0_u64..100,
        ) {
            let items: Vec<Vec<Alternative>> = raw
                .iter()
                .map(|i| i.iter().map(|&(bytes, loss)| Alternative { bytes, loss }).collect())
                .collect();
            let least: u64 = items.iter().map(|i| i.iter().map(|a| a.bytes).min().unwrap()).sum();
            let best = best_by_trying_all(&items, least + extra);
            let chosen = allocate(&items, least + extra).unwrap();
            prop_assert!(bytes(&items, &chosen) <= least + extra);
            prop_assert!((loss(&items, &chosen) - best).abs() < 1e-9);
            // Everett's bound: at most one item's step away from the optimum.
            let near = along_hulls(&items, least + extra).unwrap();
            prop_assert!(bytes(&items, &near) <= least + extra);
            let largest = items.iter().flatten().map(|a| a.loss).fold(0.0, f64::max);
            prop_assert!(loss(&items, &near) <= best + largest + 1e-9);
        }
    }
}
