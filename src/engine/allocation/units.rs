//! Units: records are padded to multiples of `align`, so a bundle's bytes are handed out in units of that size.
//!
//! Each unit goes to the record that gains most by it. A record's loss falls ever more slowly with its size, so this
//! greedy way is optimal (Fox 1966, "Discrete optimization via marginal analysis", §2). Records of a group are alike:
//! they take a unit each, or, when fewer are left, the first of them do.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Records that gain alike from a unit.
pub struct Records<'a> {
    /// How many.
    pub n_records: u64,
    /// Units that each has at first.
    pub units_least: u64,
    /// Units beyond which none is taken.
    pub units_most: u64,
    /// What all of them together lose with so many units each.
    pub loss: Box<dyn Fn(u64) -> f64 + 'a>,
}

/// Units of a group's records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Units of each record.
    pub units: u64,
    /// How many records, the first ones, have one more.
    pub n_larger: u64,
}

/// Hands out `units`; `None` if they are fewer than all least ones together.
pub fn hand_out(groups: &[Records<'_>], units: u64) -> Option<Vec<Share>> {
    let least: u64 = groups.iter().map(|g| g.n_records * g.units_least).sum();
    let mut left = units.checked_sub(least)?;
    let mut shares: Vec<Share> = groups.iter().map(|g| Share { units: g.units_least, n_larger: 0 }).collect();
    let next = |group: usize, units: u64| {
        let records = groups.get(group).filter(|r| units < r.units_most && r.n_records > 0)?;
        let gain = ((records.loss)(units) - (records.loss)(units + 1)) / records.n_records as f64;
        Some(Next { gain, group })
    };
    let mut heap: BinaryHeap<Next> =
        (0..groups.len()).filter_map(|g| next(g, groups.get(g)?.units_least)).collect();
    while let Some(Next { group, .. }) = heap.pop() {
        let (Some(records), Some(share)) = (groups.get(group), shares.get_mut(group)) else { break };
        if left < records.n_records {
            share.n_larger = left;
            break;
        }
        left -= records.n_records;
        share.units += 1;
        heap.extend(next(group, share.units));
    }
    Some(shares)
}

/// A step that a group could take next; the one that gains most comes first, the earlier group of equal ones.
struct Next {
    gain: f64,
    group: usize,
}

impl Ord for Next {
    fn cmp(&self, other: &Next) -> Ordering {
        self.gain.total_cmp(&other.gain).then(other.group.cmp(&self.group))
    }
}

impl PartialOrd for Next {
    fn partial_cmp(&self, other: &Next) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Next {
    fn eq(&self, other: &Next) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Next {}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(n_records: u64, weight: f64) -> Records<'static> {
        let loss = move |units: u64| weight * n_records as f64 * 0.5_f64.powi(units as i32);
        Records { n_records, units_least: 1, units_most: 10, loss: Box::new(loss) }
    }

    #[test]
    fn the_important_record_grows_first_and_what_is_left_goes_to_the_first_records() {
        let groups = [records(3, 1.0), records(4, 4.0)];
        let share = |units, n_larger| Share { units, n_larger };
        assert_eq!(hand_out(&groups, 6), None);
        assert_eq!(hand_out(&groups, 7).unwrap(), [share(1, 0), share(1, 0)]);
        assert_eq!(hand_out(&groups, 13).unwrap(), [share(1, 0), share(2, 2)]);
        assert_eq!(hand_out(&groups, 17).unwrap(), [share(1, 2), share(3, 0)]);
        assert_eq!(hand_out(&groups, 1000).unwrap(), [share(10, 0), share(10, 0)]);
    }
}
