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

/// The tensors of a list. They lie nowhere.
///
/// # Errors
/// `BadData` for what is no such list: unknown types, impossible shapes, more tensors than a checkpoint may have.
pub fn tensors(patterns: &[TensorPattern]) -> Result<Vec<SourceTensor>> {
    let mut found = Vec::new();
    for pattern in patterns {
        expand(pattern, &mut found).map_err(|e| e.in_tensor(&pattern.name))?;
    }
    Ok(found)
}

fn expand(pattern: &TensorPattern, found: &mut Vec<SourceTensor>) -> Result<()> {
    let stacked = pattern.experts.is_empty();
    if !pattern.name.contains(LAYER) || pattern.name.contains(EXPERT) == stacked {
        return Err(Error::bad_data("a list of expert tensors whose names have no layer or expert"));
    }
    if pattern.name.len() > NAME_BYTES_MAX || pattern.shape.len() > DIMS_MAX {
        let what = format!("a name or shape longer than {NAME_BYTES_MAX} bytes or {DIMS_MAX} lengths");
        return Err(Error::bad_data(what));
    }
    // Without one, no tensor counts towards the limit, however long the loops below run.
    if let Some([first, last]) = pattern.layers.iter().chain(&pattern.experts).find(|[a, b]| a > b) {
        return Err(Error::bad_data(format!("a run of layers or experts from {first} to {last}")));
    }
    let dtype = Dtype::from_name(&pattern.dtype)?;
    let bytes = dtype.bytes(&pattern.shape)?;
    let experts: &[[u32; 2]] = if stacked { &[[0, 0]] } else { &pattern.experts };
    for &[first, last] in &pattern.layers {
        for layer in first..=last {
            for &[first, last] in experts {
                for expert in first..=last {
                    if found.len() == TENSORS_MAX {
                        return Err(Error::bad_data(format!("more than {TENSORS_MAX} tensors")));
                    }
                    let name = fill(&pattern.name, layer as usize, expert as usize).into();
                    let shape = pattern.shape.clone().into();
                    found.push(SourceTensor { name, dtype, file: 0, shape, start: 0, end: bytes });
                }
            }
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
        let mut back = tensors(&list).unwrap();
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
        assert_eq!(tensors(std::slice::from_ref(&good)).unwrap().len(), 6);
        for bad in [
            TensorPattern { name: "a.b".to_owned(), ..good.clone() },
            TensorPattern { name: "a.{L}".to_owned(), ..good.clone() },
            TensorPattern { dtype: "U7".to_owned(), ..good.clone() },
            TensorPattern { shape: vec![u64::MAX, 3], ..good.clone() },
            TensorPattern { layers: vec![[0, u32::MAX]], ..good.clone() },
            TensorPattern { layers: vec![[0, u32::MAX]; 100], experts: vec![[1, 0]], ..good.clone() },
            TensorPattern { name: format!("a.{{L}}.{{E}}.{}", "b".repeat(2000)), ..good.clone() },
            TensorPattern { shape: vec![1; 100], ..good.clone() },
        ] {
            assert!(tensors(&[bad]).is_err());
        }
    }
}
