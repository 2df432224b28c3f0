//! Heartbeats: what a shard's worker is doing, in a file that is replaced every few seconds.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use moepack_format::{Error, Kind, Result};
use serde::{Deserialize, Serialize};

use crate::cluster::publish::replace_json;
use crate::cluster::who::Who;
use crate::engine::workspace::read_json;
use crate::progress::Progress;

/// What `schema` says in a heartbeat.
pub const SCHEMA: &str = "moepack.shard/1";

/// How often a heartbeat is written.
pub const INTERVAL: Duration = Duration::from_secs(2);

/// What a worker says of its shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Beat {
    /// [`SCHEMA`].
    pub schema: String,
    /// Id of the plan.
    pub plan: String,
    /// Which shard.
    pub shard: usize,
    /// How many times it was begun.
    pub attempt: u64,
    /// The worker.
    #[serde(flatten)]
    pub who: Who,
    /// What it does.
    pub state: State,
    /// What it waits for, or why it ended.
    pub message: Option<String>,
    /// Routed experts that are done.
    pub experts_done: u64,
    /// Of so many.
    pub n_experts: u64,
    /// Bytes of the checkpoint that are done.
    pub bytes_done: u64,
    /// Of so many.
    pub bytes: u64,
    /// When the attempt began, seconds since 1970.
    pub started_at: f64,
    /// When this was written.
    pub updated_at: f64,
}

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// At work.
    Running,
    /// Waits for what others make.
    Waiting,
    /// Everything is published.
    Done,
    /// Stopped by a signal or for want of space; may be tried again.
    Stopped,
    /// Ended by an error.
    Failed,
}

impl State {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            State::Running => "running",
            State::Waiting => "waiting",
            State::Done => "done",
            State::Stopped => "stopped",
            State::Failed => "failed",
        }
    }
}

/// Seconds since 1970.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Runs something again and again on a thread until it is dropped.
#[derive(Debug)]
pub struct Repeated(Option<(std::sync::mpsc::Sender<()>, std::thread::JoinHandle<()>)>);

impl Repeated {
    /// Calls `each` every [`INTERVAL`].
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(name: &str, mut each: impl FnMut() + Send + 'static) -> Result<Repeated> {
        let (ended, wait) = std::sync::mpsc::channel::<()>();
        let run = move || {
            while wait.recv_timeout(INTERVAL) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                each();
            }
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run);
        let thread =
            thread.map_err(|e| Error::new(Kind::Temporary, format!("cannot start a thread: {e}")))?;
        Ok(Repeated(Some((ended, thread))))
    }
}

impl Drop for Repeated {
    fn drop(&mut self) {
        if let Some((ended, thread)) = self.0.take() {
            drop(ended);
            // It only wrote files that inform.
            let _ = thread.join();
        }
    }
}

/// The heartbeat of this process's shard.
#[derive(Debug)]
pub struct Heart {
    beat: Arc<Mutex<Beat>>,
    progress: Arc<Progress>,
    path: PathBuf,
    _thread: Repeated,
}

impl Heart {
    /// Starts to beat.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn start(
        path: PathBuf,
        plan: &str,
        shard: usize,
        who: &Who,
        progress: Arc<Progress>,
    ) -> Result<Heart> {
        // What cannot be read counts for nothing.
        let earlier = read_json::<Beat>(&path).ok().flatten();
        let beat = Beat {
            schema: SCHEMA.to_owned(),
            plan: plan.to_owned(),
            shard,
            attempt: 1 + earlier.map_or(0, |b| b.attempt),
            who: who.clone(),
            state: State::Running,
            message: None,
            experts_done: 0,
            n_experts: progress.totals().1,
            bytes_done: 0,
            bytes: progress.totals().0,
            started_at: now(),
            updated_at: now(),
        };
        replace_json(&path, &beat)?;
        let beat = Arc::new(Mutex::new(beat));
        let (shared, seen, target) = (Arc::clone(&beat), Arc::clone(&progress), path.clone());
        // A beat that cannot be written is missed; the work goes on.
        let each = move || drop(write(&target, &shared, &seen));
        Ok(Heart { beat, progress, path, _thread: Repeated::start("beat", each)? })
    }

    /// Says what the worker does now.
    pub fn say(&self, state: State, message: Option<String>) {
        {
            let mut beat = self.beat.lock().unwrap_or_else(PoisonError::into_inner);
            (beat.state, beat.message) = (state, message);
        }
        let _ = write(&self.path, &self.beat, &self.progress);
    }
}

fn write(path: &std::path::Path, beat: &Mutex<Beat>, progress: &Progress) -> Result<()> {
    let beat = {
        let mut beat = beat.lock().unwrap_or_else(PoisonError::into_inner);
        (beat.bytes_done, beat.experts_done) = progress.done();
        beat.updated_at = now();
        beat.clone()
    };
    replace_json(path, &beat)
}
