//! Watching what goes into a matrix of the trunk, for those who quantize it.

use std::cmp::Ordering;
use std::sync::{Mutex, PoisonError};

/// Collects the inputs of one matrix. A map is applied on many threads and its inputs arrive in any order, so they are given
/// out in an order that depends on nothing but their values: sums over them have the same bits for any number of threads.
#[derive(Debug)]
pub struct Tap {
    cols: usize,
    /// `[tokens, cols]`
    seen: Mutex<Vec<f32>>,
}

impl Tap {
    /// Of a matrix with so many columns.
    pub fn new(cols: usize) -> Tap {
        Tap { cols, seen: Mutex::default() }
    }

    /// Columns of the matrix.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Takes the inputs since the last time, `[tokens, cols]`, rows sorted by their values.
    pub fn take(&self) -> Vec<f32> {
        let seen = std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        let mut rows: Vec<&[f32]> = seen.chunks_exact(self.cols.max(1)).collect();
        rows.sort_unstable_by(|a, b| by_value(a, b));
        rows.concat()
    }

    /// `x` is `[tokens, cols]`.
    pub(super) fn see(&self, x: &[f32]) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(x);
    }
}

fn by_value(a: &[f32], b: &[f32]) -> Ordering {
    let differ = a.iter().zip(b).map(|(a, b)| a.total_cmp(b)).find(|o| o.is_ne());
    differ.unwrap_or(Ordering::Equal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_in_the_same_order_however_they_arrived() {
        let tap = Tap::new(2);
        tap.see(&[3.0, 1.0, -2.0, 5.0]);
        tap.see(&[3.0, 0.5]);
        let first = tap.take();
        assert_eq!(first, [-2.0, 5.0, 3.0, 0.5, 3.0, 1.0]);
        tap.see(&[3.0, 0.5, 3.0, 1.0]);
        tap.see(&[-2.0, 5.0]);
        assert_eq!(tap.take(), first);
        assert!(tap.take().is_empty());
    }
}
