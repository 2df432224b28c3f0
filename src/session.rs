//! What every command shares: how many threads, how much memory, how to talk, when to stop.

use moepack_format::{Error, Kind, Result};

use crate::memory::Limit;
use crate::progress::Progress;
use crate::stop::Stop;

/// Settings of one run of the program.
#[derive(Clone, Debug)]
pub struct Session {
    /// One JSON document on stdout instead of a table.
    pub json: bool,
    /// No progress on stderr.
    pub quiet: bool,
    /// Worker threads.
    pub threads: usize,
    /// Memory the run may take.
    pub memory: Option<Limit>,
    /// Set by signals.
    pub stop: Stop,
}

impl Session {
    /// A progress display for one stage.
    pub fn progress(&self, label: &str, total_bytes: u64, total_experts: u64) -> Progress {
        Progress::new(label, total_bytes, total_experts, self.quiet)
    }

    /// Runs `work` on a pool of this session's threads.
    ///
    /// # Errors
    /// What `work` says, or that threads cannot be started.
    pub fn in_pool<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.threads).build();
        let cannot = |e| Error::new(Kind::Temporary, format!("cannot start {} threads: {e}", self.threads));
        pool.map_err(cannot)?.install(work)
    }
}
