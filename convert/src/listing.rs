//! How a checkpoint stored its routed experts, as a short list that a manifest keeps, and back.
//!
//! A model has a hundred thousand expert tensors, whose names differ in two numbers. So names become templates, and
//! layers and experts runs of numbers.

use std::collections::{BTreeMap, BTreeSet};

use moepack_format::limits::{DIMS_MAX, NAME_BYTES_MAX};
use moepack_format::manifest::TensorPattern;
use moepack_format::{Dtype, Error, Result};

use crate::checkpoint::SourceTensor;
use crate::limits::TENSORS_MAX;

/// Tensors that hold parts of one expert; released are nine, three numbers with two scales each.
const TENSORS_EACH_MAX: u64 = 32;
use crate::names::{fill, template};

const LAYER: &str = "{L}";
const EXPERT: &str = "{E}";

/// The list of these tensors. One without a layer in its name is passed over: no rule knows such an expert.
pub fn patterns<'a>(tensors: impl Iterator<Item = &'a SourceTensor>) -> Vec<TensorPattern> {
    let mut alike = BTreeMap::<(String, &str, &[u64]), BTreeMap<usize, BTreeSet<usize>>>::new();
    for tensor in tensors {
        let Some((name, layer, expert)) = template(&tensor.name, 2) else { continue };
        let layers = alike.entry((name, tensor.dtype.name(), &tensor.shape)).or_default();
        layers.entry(layer).or_default().extend(expert);
    }
    let mut found = Vec::new();
    for ((name, dtype, shape), layers) in alike {
        let mut by_experts = BTreeMap::<Vec<[u32; 2]>, BTreeSet<usize>>::new();
        for (layer, experts) in layers {
            by_experts.entry(runs(&experts)).or_default().insert(layer);
        }
        found.extend(by_experts.into_iter().map(|(experts, layers)| TensorPattern {
            name: name.clone(),
            dtype: dtype.to_owned(),
            shape: shape.to_vec(),
            layers: runs(&layers),
            experts,
        }));
    }
    found
}

/// How many layers and experts a model has, so that a list cannot name more.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Layers.
    pub layers: usize,
    /// Experts of the layer that has most.
    pub experts: usize,
}

/// The tensors of a list. They lie nowhere.
///
/// # Errors
/// `BadData` for what is no such list: unknown types, impossible shapes, layers or experts that the model does not have, more
/// tensors than its experts can take.
pub fn tensors(patterns: &[TensorPattern], bounds: Bounds) -> Result<Vec<SourceTensor>> {
    let mut left = most(bounds);
    for pattern in patterns {
        let taken = check(pattern, bounds).map_err(|e| e.in_tensor(&pattern.name))?;
        left = left.checked_sub(taken).ok_or_else(|| {
            let what = format!("more than the {} tensors that the model's experts can take", most(bounds));
            Error::bad_data(what).in_tensor(&pattern.name)
        })?;
    }
    let mut found = Vec::new();
    for pattern in patterns {
        expand(pattern, &mut found).map_err(|e| e.in_tensor(&pattern.name))?;
    }
    Ok(found)
}

/// Tensors of a list at most.
fn most(bounds: Bounds) -> u64 {
    let each = (bounds.layers as u64).saturating_mul(bounds.experts as u64);
    each.saturating_mul(TENSORS_EACH_MAX).min(TENSORS_MAX as u64)
}

/// Refuses a pattern before anything is made of it; gives the number of its tensors.
fn check(pattern: &TensorPattern, bounds: Bounds) -> Result<u64> {
    let stacked = pattern.experts.is_empty();
    if !pattern.name.contains(LAYER) || pattern.name.contains(EXPERT) == stacked {
        return Err(Error::bad_data("a list of expert tensors whose names have no layer or expert"));
    }
    if pattern.name.len() > NAME_BYTES_MAX || pattern.shape.len() > DIMS_MAX {
        let what = format!("a name or shape longer than {NAME_BYTES_MAX} bytes or {DIMS_MAX} lengths");
        return Err(Error::bad_data(what));
    }
    let layers = count(&pattern.layers, bounds.layers, "layers")?;
    let experts = if stacked { 1 } else { count(&pattern.experts, bounds.experts, "experts")? };
    Ok(layers.saturating_mul(experts))
}

/// How many numbers these runs have, all of which are below `end`.
fn count(runs: &[[u32; 2]], end: usize, what: &str) -> Result<u64> {
    let mut n = 0_u64;
    for &[first, last] in runs {
        if first > last || last as usize >= end {
            return Err(Error::bad_data(format!("{what} {first} to {last}, of {end} in the model")));
        }
        n = n.saturating_add(u64::from(last - first) + 1);
    }
    Ok(n)
}

/// Appends the tensors of a pattern that was checked.
fn expand(pattern: &TensorPattern, found: &mut Vec<SourceTensor>) -> Result<()> {
    let dtype = Dtype::from_name(&pattern.dtype)?;
    let bytes = dtype.bytes(&pattern.shape)?;
    let experts: &[[u32; 2]] = if pattern.experts.is_empty() { &[[0, 0]] } else { &pattern.experts };
    let each = |runs: &[[u32; 2]]| runs.iter().flat_map(|&[first, last]| first..=last).collect::<Vec<_>>();
    let experts = each(experts);
    for layer in each(&pattern.layers) {
        for &expert in &experts {
            let name = fill(&pattern.name, layer as usize, expert as usize).into();
            let shape = pattern.shape.clone().into();
            found.push(SourceTensor { name, dtype, file: 0, shape, start: 0, end: bytes });
        }
    }
    Ok(())
}

/// Ascending numbers as first and last of each run.
fn runs(numbers: &BTreeSet<usize>) -> Vec<[u32; 2]> {
    let mut runs: Vec<[u32; 2]> = Vec::new();
    for n in numbers.iter().map(|&n| u32::try_from(n).unwrap_or(u32::MAX)) {
        match runs.last_mut() {
            Some([_, last]) if last.checked_add(1) == Some(n) => *last = n,
            _ => runs.push([n, n]),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[u64]) -> SourceTensor {
        SourceTensor { name: name.into(), dtype: Dtype::U8, file: 0, shape: shape.into(), start: 0, end: 6 }
    }

    #[test]
    fn a_list_is_short_and_gives_the_tensors_back() {
        let mut all = Vec::new();
        for layer in [1, 2, 3, 5] {
            all.push(tensor(&format!("layers.{layer}.experts.gate"), &[6]));
            for expert in 0..300 {
                let shape: &[u64] = if (layer, expert) == (3, 7) { &[3, 2] } else { &[2, 3] };
                all.push(tensor(&format!("layers.{layer}.experts.{expert}.up"), shape));
            }
        }
        let list = patterns(all.iter());
        assert_eq!(list.len(), 4, "{list:?}");
        assert_eq!(list[0].layers, [[1, 3], [5, 5]]);
        let mut back = tensors(&list, Bounds { layers: 6, experts: 300 }).unwrap();
        back.sort_by(|a, b| a.name.cmp(&b.name));
        all.sort_by(|a, b| a.name.cmp(&b.name));
        assert_eq!(back, all);
    }

    #[test]
    fn nonsense_is_refused() {
        let good = TensorPattern {
            name: "a.{L}.b.{E}".to_owned(),
            dtype: "U8".to_owned(),
            shape: vec![6],
            layers: vec![[0, 1]],
            experts: vec![[0, 2]],
        };
        let bounds = Bounds { layers: 2, experts: 3 };
        assert_eq!(tensors(std::slice::from_ref(&good), bounds).unwrap().len(), 6);
        let e = tensors(&vec![good.clone(); 100], bounds).unwrap_err();
        assert_eq!(e.what(), "more than the 192 tensors that the model's experts can take");
        for bad in [
            TensorPattern { name: "a.b".to_owned(), ..good.clone() },
            TensorPattern { name: "a.{L}".to_owned(), ..good.clone() },
            TensorPattern { dtype: "U7".to_owned(), ..good.clone() },
            TensorPattern { shape: vec![u64::MAX, 3], ..good.clone() },
            TensorPattern { layers: vec![[0, u32::MAX]], ..good.clone() },
            TensorPattern { layers: vec![[0, 2]], ..good.clone() },
            TensorPattern { experts: vec![[0, 3]], ..good.clone() },
            TensorPattern { layers: vec![[0, u32::MAX]; 100], experts: vec![[1, 0]], ..good.clone() },
            TensorPattern { name: format!("a.{{L}}.{{E}}.{}", "b".repeat(2000)), ..good.clone() },
            TensorPattern { shape: vec![1; 100], ..good.clone() },
        ] {
            assert!(tensors(&[bad], bounds).is_err());
        }
    }
}
