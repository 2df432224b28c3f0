//! How far a job is: what is published, what workers say, and how long the rest takes.

use moepack_format::Result;
use serde::Serialize;

use crate::cluster::beat::{Beat, State, now};
use crate::cluster::claim::dead_after;
use crate::cluster::folder::PlanFolder;
use crate::cluster::merge::is_merged;
use crate::cluster::plan::{Plan, Shard};
use crate::cluster::reports::{is_shard_done, ranges};
use crate::engine::workspace::read_json;

/// A whole job.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Version of this document.
    pub schema: &'static str,
    /// Id of the plan.
    pub plan: String,
    /// Whether the bundle is written.
    pub merged: bool,
    /// Shards of the plan.
    pub n_shards: usize,
    /// Shards that are published.
    pub n_done: usize,
    /// Shards that workers are at.
    pub n_active: usize,
    /// Shards that are not published, as job arrays take them.
    pub missing: String,
    /// Part of the work that is done, by the times that were planned.
    pub fraction: f64,
    /// Seconds until all of it is, with the workers there are; none where nothing says how fast they are.
    pub eta_seconds: Option<f64>,
    /// Every shard.
    pub shards: Vec<ShardStatus>,
}

/// A shard.
#[derive(Clone, Debug, Serialize)]
pub struct ShardStatus {
    /// Its number.
    pub shard: usize,
    /// `done`, `running`, `waiting`, `stopped`, `failed`, `dead` or `pending`.
    pub state: &'static str,
    /// How many times it was begun.
    pub attempts: u64,
    /// Host of the last attempt.
    pub host: Option<String>,
    /// Process of the last attempt.
    pub pid: Option<u32>,
    /// Routed experts that are done.
    pub experts_done: u64,
    /// Of so many.
    pub n_experts: u64,
    /// Bytes of the checkpoint that are done.
    pub bytes_done: u64,
    /// Of so many.
    pub bytes: u64,
    /// When the last attempt was heard of, seconds since 1970.
    pub updated_at: Option<f64>,
    /// What it waits for, or why it ended.
    pub message: Option<String>,
    /// Seconds that were planned for it.
    #[serde(skip)]
    planned: f64,
    /// Seconds of the last attempt.
    #[serde(skip)]
    taken: Option<f64>,
}

/// Looks at reports and heartbeats.
///
/// # Errors
/// A report that is damaged or foreign.
pub fn status(folder: &PlanFolder, plan: &Plan) -> Result<Status> {
    let merged = is_merged(folder, plan)?;
    let mut shards = Vec::new();
    for (i, shard) in plan.shards.iter().enumerate() {
        let done = merged || is_shard_done(folder, plan, shard)?;
        // A heartbeat that cannot be read tells nothing.
        let beat = read_json::<Beat>(&folder.status(i)).ok().flatten().filter(|b| b.plan == plan.id);
        shards.push(ShardStatus::of(i, shard, done, beat));
    }
    let missing: Vec<usize> = shards.iter().filter(|s| s.state != DONE).map(|s| s.shard).collect();
    let planned: f64 = shards.iter().map(|s| s.planned).sum();
    let left: f64 = shards.iter().map(ShardStatus::left).sum();
    Ok(Status {
        schema: "moepack.status/1",
        plan: plan.id.clone(),
        merged,
        n_shards: shards.len(),
        n_done: shards.len() - missing.len(),
        n_active: shards.iter().filter(|s| s.is_active()).count(),
        missing: ranges(&missing),
        fraction: if planned > 0.0 { 1.0 - left / planned } else { 0.0 },
        eta_seconds: eta(&shards),
        shards,
    })
}

const DONE: &str = "done";
const DEAD: &str = "dead";
const PENDING: &str = "pending";

/// What is left, at the speed that the work so far had, over the workers that are there; no less than the longest shard.
fn eta(shards: &[ShardStatus]) -> Option<f64> {
    let left: Vec<f64> = shards.iter().map(ShardStatus::left).filter(|&s| s > 0.0).collect();
    if left.is_empty() {
        return Some(0.0);
    }
    let begun = || shards.iter().filter_map(|s| Some((s.planned - s.left(), s.taken?)));
    let (planned, taken) = begun().fold((0.0, 0.0), |(p, t), (planned, taken)| (p + planned, t + taken));
    if planned <= 0.0 {
        return None;
    }
    let n_workers = shards.iter().filter(|s| s.is_active()).count().max(1) as f64;
    let longest = left.iter().copied().fold(0.0, f64::max);
    Some((left.iter().sum::<f64>() / n_workers).max(longest) * taken / planned)
}

impl ShardStatus {
    fn of(shard: usize, planned: &Shard, done: bool, beat: Option<Beat>) -> ShardStatus {
        let silent = |b: &Beat| b.who.is_gone() || now() - b.updated_at > dead_after().as_secs_f64();
        let state = match &beat {
            _ if done => DONE,
            None => PENDING,
            // What it published is gone.
            Some(b) if b.state == State::Done => PENDING,
            Some(b) if matches!(b.state, State::Running | State::Waiting) && silent(b) => DEAD,
            Some(b) => b.state.name(),
        };
        let progress =
            |of: fn(&Beat) -> u64, all: u64| if done { all } else { beat.as_ref().map_or(0, of).min(all) };
        ShardStatus {
            shard,
            state,
            attempts: beat.as_ref().map_or(0, |b| b.attempt),
            host: beat.as_ref().map(|b| b.who.host.clone()),
            pid: beat.as_ref().map(|b| b.who.pid),
            experts_done: progress(|b| b.experts_done, planned.n_experts),
            n_experts: planned.n_experts,
            bytes_done: progress(|b| b.bytes_done, planned.source_bytes),
            bytes: planned.source_bytes,
            updated_at: beat.as_ref().map(|b| b.updated_at),
            planned: planned.seconds,
            taken: beat.as_ref().map(|b| (b.updated_at - b.started_at).max(0.0)),
            message: beat.and_then(|b| b.message).filter(|_| !done),
        }
    }

    /// Whether a worker is at it.
    pub fn is_active(&self) -> bool {
        [State::Running.name(), State::Waiting.name()].contains(&self.state)
    }

    /// Planned seconds that are left.
    fn left(&self) -> f64 {
        match self.state {
            DONE => 0.0,
            _ if self.is_active() => {
                self.planned * (1.0 - self.bytes_done as f64 / self.bytes.max(1) as f64).clamp(0.0, 1.0)
            }
            // What a dead worker had is begun again.
            _ => self.planned,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(state: &'static str, fraction: f64, taken: Option<f64>) -> ShardStatus {
        ShardStatus {
            shard: 0,
            state,
            attempts: 1,
            host: None,
            pid: None,
            experts_done: 0,
            n_experts: 0,
            bytes_done: (fraction * 100.0) as u64,
            bytes: 100,
            updated_at: None,
            message: None,
            planned: 10.0,
            taken,
        }
    }

    #[test]
    fn what_is_left_is_shared_by_the_workers_at_the_speed_they_have() {
        let done = shard("done", 1.0, Some(20.0));
        let running = shard("running", 0.5, Some(10.0));
        let pending = shard("pending", 0.0, None);
        // Twice as slow as planned; 5 + 5 + 4 × 10 planned seconds are left for two.
        let shards = [vec![done, running.clone(), running], vec![pending.clone(); 4]].concat();
        assert_eq!(eta(&shards), Some(50.0));
        assert_eq!(eta(&[pending]), None);
        assert_eq!(eta(&[]), Some(0.0));
        assert_eq!(eta(&shards[..2]), Some(10.0));
    }
}
