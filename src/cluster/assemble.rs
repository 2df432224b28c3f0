//! A layer that was coded in several pieces becomes one bank: whoever publishes the last of them puts it together.

use moepack_format::{Bank, BankSummary, Result, storage};

use crate::cluster::folder::{PlanFolder, part_file};
use crate::cluster::plan::{Piece, Plan};
use crate::cluster::publish::Attempt;
use crate::cluster::reports::{BankReport, is_apart, is_done, report};
use crate::engine::parts::join;
use crate::engine::writer::{BankFacts, LayerNote, bank_file};

/// Puts a layer's bank together, if all its experts are there and nobody did; then removes the pieces.
///
/// # Errors
/// A piece that cannot be read; a bank that cannot be written or that differs from another attempt's.
pub fn assemble(folder: &PlanFolder, plan: &Plan, layer: usize, attempt: &Attempt) -> Result<()> {
    if is_apart(folder, plan, layer)?
        && let Err(e) = put_together(folder, plan, layer, attempt)
        // Somebody else did at the same time and has removed the pieces.
        && !is_done(folder, plan, Piece::Bank { layer })?
    {
        return Err(e);
    }
    if is_done(folder, plan, Piece::Bank { layer })? {
        for range in plan.ranges_of(layer) {
            // It may be gone already, and what stays is removed by merging.
            let _ = storage::remove_file(&folder.parts().join(part_file(layer, &range)));
        }
    }
    Ok(())
}

fn put_together(folder: &PlanFolder, plan: &Plan, layer: usize, attempt: &Attempt) -> Result<()> {
    let (mut banks, mut facts) = (Vec::new(), BankFacts::default());
    for range in plan.ranges_of(layer) {
        let piece = Piece::Experts { layer, first: range.start, end: range.end };
        let Some(found) = report::<(BankSummary, BankFacts)>(folder, plan, piece)? else { return Ok(()) };
        facts.append(found.note.1);
        banks.push(Bank::open(&folder.parts().join(part_file(layer, &range)))?);
    }
    let name = bank_file(layer);
    let path = attempt.path().join(&name);
    let note = LayerNote::of(layer, join(&path, (layer, plan.recipe.align), &banks, facts)?);
    publish_bank(folder, plan, layer, attempt, note)
}

/// Publishes a bank that this attempt wrote, and its report.
///
/// # Errors
/// Another attempt's bank or report differs, or the file system refuses.
pub fn publish_bank(
    folder: &PlanFolder,
    plan: &Plan,
    layer: usize,
    attempt: &Attempt,
    note: LayerNote,
) -> Result<()> {
    let name = bank_file(layer);
    attempt.publish(&name, &folder.bundle().join(&name), &note.summary.sha256)?;
    let report = BankReport { plan: plan.id.clone(), note };
    attempt.publish_report(&report, &folder.report(Piece::Bank { layer })).map(drop)
}
