//! What is known of finished pieces, and so which shards are done.

use std::path::Path;

use moepack_format::bank::BankSummary;
use moepack_format::manifest::Manifest;
use moepack_format::{Context, Error, Result, storage};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::cluster::folder::{PlanFolder, part_file};
use crate::cluster::plan::{Piece, Plan, Shard};
use crate::engine::workspace::read_json;
use crate::engine::writer::{BankFacts, LayerNote};

/// Of a piece, under the id of its plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report<T> {
    /// Id of the plan.
    pub plan: String,
    /// What is known.
    pub note: T,
}

/// Of the trunk: the manifest, without the banks.
pub type TrunkReport = Report<Manifest>;
/// Of a bank.
pub type BankReport = Report<LayerNote>;
/// Of some experts of a layer: their file, and what the manifest wants to know of each.
pub type ExpertsReport = Report<(BankSummary, BankFacts)>;

/// The report of a piece, if it is there.
///
/// # Errors
/// `BadData` for one that is damaged, or of another plan.
pub fn report<T: DeserializeOwned>(
    folder: &PlanFolder,
    plan: &Plan,
    piece: Piece,
) -> Result<Option<Report<T>>> {
    let path = folder.report(piece);
    let Some(report) = read_json::<Report<T>>(&path)? else { return Ok(None) };
    if report.plan == plan.id {
        return Ok(Some(report));
    }
    Err(Error::bad_data(format!("a report of plan {}, this is plan {}", report.plan, plan.id))
        .hint("workers of another plan wrote here; remove the file, then run its shard again"))
    .in_file(path)
}

/// Whether a piece is finished: its report is there, and so are its files in the length that it says.
///
/// # Errors
/// As [`report`].
pub fn is_done(folder: &PlanFolder, plan: &Plan, piece: Piece) -> Result<bool> {
    let bundle = folder.bundle();
    Ok(match piece {
        Piece::Trunk => report::<Manifest>(folder, plan, piece)?
            .is_some_and(|r| r.note.files.iter().all(|f| has_length(&bundle.join(&f.path), f.bytes))),
        Piece::Bank { .. } => report::<LayerNote>(folder, plan, piece)?
            .is_some_and(|r| has_length(&bundle.join(&r.note.summary.file), r.note.summary.bytes)),
        Piece::Experts { layer, first, end } => {
            let experts = report::<(BankSummary, BankFacts)>(folder, plan, piece)?;
            let part = folder.parts().join(part_file(layer, &(first..end)));
            is_done(folder, plan, Piece::Bank { layer })?
                || experts.is_some_and(|r| has_length(&part, r.note.0.bytes))
        }
    })
}

fn has_length(path: &Path, bytes: u64) -> bool {
    storage::metadata(path).is_ok_and(|m| m.is_file() && m.len() == bytes)
}

/// Whether a layer that is made in several pieces has them all, but nobody put them together.
///
/// # Errors
/// As [`report`].
pub fn is_apart(folder: &PlanFolder, plan: &Plan, layer: usize) -> Result<bool> {
    let ranges = plan.ranges_of(layer);
    if ranges.is_empty() || is_done(folder, plan, Piece::Bank { layer })? {
        return Ok(false);
    }
    for range in ranges {
        if !is_done(folder, plan, Piece::Experts { layer, first: range.start, end: range.end })? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a shard has nothing left to do. Where a layer's pieces are all there but not put together, its last shard has.
///
/// # Errors
/// As [`report`].
pub fn is_shard_done(folder: &PlanFolder, plan: &Plan, shard: &Shard) -> Result<bool> {
    for &piece in &shard.pieces {
        if !is_done(folder, plan, piece)? {
            return Ok(false);
        }
        if let Piece::Experts { layer, end, .. } = piece
            && end == plan.n_experts(layer)
            && is_apart(folder, plan, layer)?
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The shards that are not done.
///
/// # Errors
/// As [`report`].
pub fn missing(folder: &PlanFolder, plan: &Plan) -> Result<Vec<usize>> {
    let mut missing = Vec::new();
    for (i, shard) in plan.shards.iter().enumerate() {
        if !is_shard_done(folder, plan, shard)? {
            missing.push(i);
        }
    }
    Ok(missing)
}

/// Numbers as job arrays take them: `3,7-9`.
pub fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &n in numbers {
        match runs.last_mut().filter(|(_, last)| last.checked_add(1) == Some(n)) {
            Some((_, last)) => *last = n,
            None => runs.push((n, n)),
        }
    }
    let run = |&(first, last): &(usize, usize)| match last - first {
        0 => first.to_string(),
        _ => format!("{first}-{last}"),
    };
    runs.iter().map(run).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_job_arrays_take_them() {
        assert_eq!(ranges(&[]), "");
        assert_eq!(ranges(&[3]), "3");
        assert_eq!(ranges(&[3, 7, 8, 9]), "3,7-9");
        assert_eq!(ranges(&[0, 1, 3, 5, 6]), "0-1,3,5-6");
    }
}
