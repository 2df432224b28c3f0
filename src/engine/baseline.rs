//! Baselines: keeping a checkpoint's predictions, and measuring a bundle against them.

use std::ops::Range;
use std::path::Path;

use moepack_convert::Model;
use moepack_format::{Context, Error, Kind, Result};
use moepack_quant::Isa;
use moepack_verify::baseline::{Baseline, BaselineWriter, Meta};
use moepack_verify::drift::{LogitDrift, WindowDrift};
use moepack_verify::forward::{Head, HeadScratch, Stream, ordered};
use moepack_verify::tokens::Windows;
use rayon::prelude::*;

use crate::engine::verify::run_layers;
use crate::session::Session;

/// Runs the reference and keeps what it predicts; returns the bytes of the file.
///
/// # Errors
/// Weights that cannot be read, a file that cannot be written, a requested stop.
pub fn write_baseline(
    session: &Session,
    model: &Model,
    windows: &Windows,
    path: &Path,
    meta: &Meta,
) -> Result<u64> {
    let isa = Isa::get();
    let mut writer = BaselineWriter::create(path, meta, windows, model.spec().vocab)?;
    let stream = run_layers(session, "baseline", model, windows)?;
    let head = Head::load(isa, model)?;
    let format = writer.row_format();
    let ranges: Vec<Range<usize>> = windows.ranges().collect();
    let firsts: Vec<u64> = ranges
        .iter()
        .scan(0, |n, r| {
            let first = *n;
            *n += r.len().saturating_sub(1) as u64;
            Some(first)
        })
        .collect();
    let work = |w: usize| {
        session.stop.check()?;
        let (range, mut position) =
            (ranges.get(w).cloned().unwrap_or_default(), firsts.get(w).copied().unwrap_or(0));
        let mut rows = Vec::new();
        each_scored(&head, &stream, windows, range, |target, logits| {
            format.encode(isa, logits, target, position, &mut rows)?;
            position += 1;
            Ok(())
        })?;
        Ok(rows)
    };
    ordered(ranges.len(), work, |_, rows| writer.push_window(&rows))?;
    writer.finish()
}

/// Measures a bundle against a baseline, on the tokens that the baseline has; gives the drift and the window length.
///
/// # Errors
/// A bundle of another vocabulary, weights that cannot be read, a requested stop.
pub fn against_baseline(
    session: &Session,
    bundle: &Model,
    baseline: &Baseline,
) -> Result<(LogitDrift, usize)> {
    let (isa, windows) = (Isa::get(), baseline.windows());
    baseline.check_vocab(bundle.spec().vocab).in_file(bundle.root())?;
    let stream = run_layers(session, "verify", bundle, windows)?;
    let head = Head::load(isa, bundle)?;
    let ranges: Vec<Range<usize>> = windows.ranges().collect();
    let of_window = |(w, range): (usize, Range<usize>)| {
        session.stop.check()?;
        let rows = baseline.rows(w)?;
        let mut rows = rows.iter();
        let mut drift = WindowDrift::default();
        each_scored(&head, &stream, windows, range, |target, logits| {
            let row = rows.next().ok_or_else(|| Error::bad_data("the baseline has too few rows"))?;
            drift.add_row(isa, row, logits, target)
        })?;
        Ok(drift)
    };
    let drift = ranges.into_par_iter().enumerate().map(of_window).collect::<Result<Vec<_>>>()?;
    Ok((LogitDrift { windows: drift }, windows.ctx()))
}

/// Calls `each` with the target and the logits of every scored position of a window, in order.
fn each_scored(
    head: &Head,
    stream: &Stream,
    windows: &Windows,
    range: Range<usize>,
    mut each: impl FnMut(u32, &[f32]) -> Result<()>,
) -> Result<()> {
    let lost = || Error::new(Kind::Io, "a scored token is not there");
    let mut scratch = HeadScratch::default();
    let end = range.end.saturating_sub(1);
    let mut at = range.start;
    while at < end {
        let rows = at..end.min(at + head.rows());
        let values = rows.start * stream.width..rows.end * stream.width;
        let logits = head.logits(stream.hidden.get(values).ok_or_else(lost)?, &mut scratch);
        for (token, logits) in rows.clone().zip(logits.chunks_exact(head.vocab())) {
            each(*windows.tokens.get(token + 1).ok_or_else(lost)?, logits)?;
        }
        at = rows.end;
    }
    Ok(())
}
