//! How a column is coded: its step, and the table that will about fit.

use super::coder::{Coder, STEP_LOG2_MIN};
use super::column;
use super::layout::{ROWS_OF_STEPS, SIDE_MAX, STEP_OCTAVE, step};
use super::rate;
use super::rows::Size;
use super::tables::{PER_OCTAVE, TABLE_OF_ONE, TABLES};
use crate::math;

/// How a column is coded.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// Step in units from the scale.
    pub value: i8,
    pub step: f32,
    /// log2 of deviation over step, by which bits are priced.
    pub octaves: f64,
    pub table: i32,
}

impl Coder<'_> {
    /// Step and table of a column of this size.
    pub(super) fn choose(&self, size: Size, u: f64) -> Choice {
        let Size { deviation, largest } = size;
        let unit = f64::from(self.stored.step_unit) / STEP_OCTAVE;
        let scale = math::log(f64::from(self.stored.scale)) / std::f64::consts::LN_2;
        let wanted = deviation - rate::octaves(u);
        let least = math::log(f64::from(largest) / f64::from(column::SAMPLE_MAX)) / std::f64::consts::LN_2;
        let value = if deviation.is_finite() { ((wanted - scale) / unit).round() } else { 0.0 };
        // A value far from the others makes all of them dearer; `shrink` then does what the step may not.
        let value =
            self.known.as_ref().map_or(value, |k| value.clamp(f64::from(k.steps.0), f64::from(k.steps.1)));
        let value = value.max(((least.max(STEP_LOG2_MIN) - scale) / unit).ceil());
        let value = value.clamp(f64::from(-SIDE_MAX), f64::from(SIDE_MAX)) as i8;
        let step = step(self.stored.scale, self.stored.step_unit, value);
        let octaves = if deviation.is_finite() {
            deviation - math::log(f64::from(step)) / std::f64::consts::LN_2
        } else {
            -2.0
        };
        let octaves = octaves.min(rate::octaves(u) + unit);
        Choice { value, step, octaves, table: table_for(octaves) }
    }

    /// The same with the step that is `by` units coarser, if other columns have it too.
    pub(super) fn neighbour(&self, choice: Choice, by: i8) -> Option<Choice> {
        let value = choice.value.checked_add(by)?;
        let steps = self.known.as_ref()?.steps;
        let is_known = (steps.0.max(-SIDE_MAX)..=steps.1.min(SIDE_MAX)).contains(&i32::from(value));
        let octaves = choice.octaves - f64::from(by) * f64::from(self.stored.step_unit) / STEP_OCTAVE;
        (is_known && self.w.rows >= ROWS_OF_STEPS).then(|| Choice {
            value,
            step: step(self.stored.scale, self.stored.step_unit, value),
            octaves,
            table: table_for(octaves),
        })
    }

    /// The class, a multiple of the unit, that will about fit columns so many octaves wider than their steps.
    pub(super) fn class_of(&self, octaves: f64) -> i32 {
        table_for(octaves) / i32::from(self.stored.class_unit) * i32::from(self.stored.class_unit)
    }
}

/// The table for a column so many octaves wider than its step.
fn table_for(octaves: f64) -> i32 {
    let table = TABLE_OF_ONE as f64 + PER_OCTAVE * rate::table_octaves(octaves);
    table.round().clamp(0.0, TABLES as f64 - 1.0) as i32
}
