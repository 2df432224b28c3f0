//! How a job is cut into shards.
//!
//! Unless something else is asked for, the trunk is one shard and so is every layer's bank; a layer whose experts are too
//! large is cut by ranges of experts. Asked for fewer shards, consecutive layers go together; asked for more, layers are cut.

use moepack_format::{Error, Result};

use crate::cluster::plan::{LayerExperts, Piece};

/// Bytes of released experts above which a layer is cut: a third of an hour of reading from slow shared storage.
pub const LAYER_BYTES_MAX: u64 = 64 << 30;

/// A layer as it counts here: its experts, and their bytes as released.
pub type Weighed = (LayerExperts, u64);

/// The pieces of each shard: the trunk first, then layers in their order.
///
/// # Errors
/// More shards than there are experts, or none (kind `Plan`).
pub fn split(layers: &[Weighed], n_shards: Option<usize>) -> Result<Vec<Vec<Piece>>> {
    let Some(n) = n_shards else {
        let cut = |(layer, bytes): &Weighed| cut(*layer, bytes.div_ceil(LAYER_BYTES_MAX) as usize);
        let banks = layers.iter().flat_map(cut).map(|piece| vec![piece]);
        return Ok([vec![Piece::Trunk]].into_iter().chain(banks).collect());
    };
    let most = 1 + layers.iter().map(|(l, _)| l.n_experts).sum::<usize>();
    if n == 0 || n > most {
        return Err(Error::plan(format!(
            "{n} shards, expected 1 to {most}: the trunk and one for each expert"
        )));
    }
    if n == 1 {
        return Ok(vec![[Piece::Trunk].into_iter().chain(layers.iter().map(|(l, _)| whole(*l))).collect()]);
    }
    let banks = if n - 1 <= layers.len() { together(layers, n - 1) } else { apart(layers, n - 1) };
    Ok([vec![Piece::Trunk]].into_iter().chain(banks).collect())
}

/// Consecutive layers in `n` shards, nearly as many in each.
fn together(layers: &[Weighed], n: usize) -> Vec<Vec<Piece>> {
    let at = |i: usize| i * layers.len() / n;
    let of = |i: usize| layers.get(at(i)..at(i + 1)).unwrap_or_default();
    (0..n).map(|i| of(i).iter().map(|(l, _)| whole(*l)).collect()).collect()
}

/// Layers cut into `n` shards in all: each further one goes to the layer whose pieces are largest.
fn apart(layers: &[Weighed], n: usize) -> Vec<Vec<Piece>> {
    let mut n_pieces = vec![1; layers.len()];
    for _ in layers.len()..n {
        let size = |i: &usize| {
            let ((layer, _), n_pieces) = (layers.get(*i)?, *n_pieces.get(*i)?);
            (n_pieces < layer.n_experts).then(|| layer.n_experts as f64 / n_pieces as f64)
        };
        // The first of the largest.
        let sizes = (0..layers.len()).filter_map(|i| Some((i, size(&i)?)));
        let largest = sizes.reduce(|a, b| if b.1 > a.1 { b } else { a });
        largest.and_then(|(i, _)| n_pieces.get_mut(i)).into_iter().for_each(|n| *n += 1);
    }
    layers.iter().zip(n_pieces).flat_map(|((l, _), n)| cut(*l, n)).map(|piece| vec![piece]).collect()
}

/// A layer in `n` pieces.
fn cut(layer: LayerExperts, n: usize) -> Vec<Piece> {
    let LayerExperts { layer: l, n_experts } = layer;
    let n = n.clamp(1, n_experts.max(1));
    let at = |i: usize| i * n_experts / n;
    match n {
        1 => vec![whole(layer)],
        _ => (0..n).map(|i| Piece::Experts { layer: l, first: at(i), end: at(i + 1) }).collect(),
    }
}

fn whole(layer: LayerExperts) -> Piece {
    Piece::Bank { layer: layer.layer }
}

/// Windows of each of `n` units, as even as can be.
pub fn units(n_windows: usize, n: usize) -> Vec<[usize; 2]> {
    let n = n.clamp(1, n_windows.max(1));
    (0..n).map(|i| [i * n_windows / n, (i + 1) * n_windows / n]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers() -> Vec<Weighed> {
        (1..9).map(|layer| (LayerExperts { layer, n_experts: 16 }, 1 << 20)).collect()
    }

    fn n_experts(shard: &[Piece]) -> usize {
        let of = |piece: &Piece| match piece {
            Piece::Trunk => 0,
            Piece::Bank { .. } => 16,
            Piece::Experts { first, end, .. } => end - first,
        };
        shard.iter().map(of).sum()
    }

    #[test]
    fn as_many_shards_as_asked_for_and_every_expert_once() {
        for n in [1, 2, 3, 5, 8, 9, 10, 61, 129] {
            let shards = split(&layers(), Some(n)).unwrap();
            assert_eq!(shards.len(), n);
            assert_eq!(shards.iter().map(|s| n_experts(s)).sum::<usize>(), 128, "{n} shards");
            assert!(shards.iter().all(|s| !s.is_empty()), "{n} shards");
            let banks = shards.iter().skip(usize::from(n > 1)).map(|s| n_experts(s));
            let (least, most) = (banks.clone().min().unwrap(), banks.max().unwrap());
            assert!(n < 3 || most <= 2 * least + 16 * usize::from(n < 9), "{n} shards: {least} to {most}");
        }
        for n in [0, 130] {
            assert_eq!(split(&layers(), Some(n)).unwrap_err().kind().exit_code(), 78);
        }
        assert_eq!(split(&[], Some(1)), Ok(vec![vec![Piece::Trunk]]), "a dense model");
    }

    #[test]
    fn a_layer_that_is_too_large_is_cut() {
        let large = |bytes| vec![(LayerExperts { layer: 0, n_experts: 3 }, bytes)];
        assert_eq!(split(&large(LAYER_BYTES_MAX), None).unwrap().len(), 2);
        assert_eq!(split(&large(LAYER_BYTES_MAX + 1), None).unwrap().len(), 3);
        assert_eq!(split(&large(100 * LAYER_BYTES_MAX), None).unwrap().len(), 4, "an expert each");
    }

    #[test]
    fn units_take_all_windows_in_order() {
        assert_eq!(units(7, 3), [[0, 2], [2, 4], [4, 7]]);
        assert_eq!(units(2, 9), [[0, 1], [1, 2]]);
    }
}
