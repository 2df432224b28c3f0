//! Claims: who makes a unit of activations. A claim keeps others from doing the same work, and nothing else: two who
//! both think that it is theirs make the same bytes.
//!
//! A claim is renewed every few seconds. Clocks of machines differ, so another's claim is dead when whoever waits has seen
//! no change for a while by a clock of its own, or at once when its process is gone from this machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use moepack_format::{Result, storage};
use serde::{Deserialize, Serialize};

use crate::cluster::beat::Repeated;
use crate::cluster::publish::{create_json, replace_json};
use crate::cluster::who::Who;
use crate::engine::workspace::read_json;

/// How long a claim or a heartbeat may stay as it is.
const DEAD_AFTER: Duration = Duration::from_secs(60);
/// The same in seconds, for tests and for storage that shows changes late.
const DEAD_AFTER_ENV: &str = "MOEPACK_DEAD_AFTER";

/// How long a claim or a heartbeat may stay as it is before its worker counts as dead.
pub fn dead_after() -> Duration {
    let asked = std::env::var(DEAD_AFTER_ENV).ok().and_then(|s| s.parse().ok());
    asked.map_or(DEAD_AFTER, Duration::from_secs)
}

/// What a claim's file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    who: Who,
    /// Grows with every renewal.
    beat: u64,
}

/// A claim that is this process's until it is dropped.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    who: Who,
    _thread: Repeated,
}

impl Claim {
    fn hold(path: &Path, who: &Who) -> Result<Claim> {
        let (target, mut held) = (path.to_path_buf(), Held { who: who.clone(), beat: 0 });
        let renew = move || {
            held.beat += 1;
            // A renewal that cannot be written may cost the claim, which costs work done twice.
            drop(replace_json(&target, &held));
        };
        Ok(Claim { path: path.to_path_buf(), who: who.clone(), _thread: Repeated::start("claim", renew)? })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if read_json::<Held>(&self.path).is_ok_and(|held| held.is_some_and(|held| held.who == self.who)) {
            let _ = storage::remove_file(&self.path);
        }
    }
}

/// What one who waits has seen of others' claims.
#[derive(Debug, Default)]
pub struct Watch(BTreeMap<PathBuf, (Held, Instant)>);

impl Watch {
    /// Claims `path` if it is free or its holder is dead.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn claim(&mut self, path: &Path, who: &Who) -> Result<Option<Claim>> {
        let held = Held { who: who.clone(), beat: 0 };
        if create_json(path, &held)? {
            return Claim::hold(path, who).map(Some);
        }
        // A claim that was given up a moment ago, or one half written, is looked at again later.
        let Ok(Some(found)) = read_json::<Held>(path) else { return Ok(None) };
        if !self.is_dead(path, found) {
            return Ok(None);
        }
        replace_json(path, &held)?;
        self.0.remove(path);
        Claim::hold(path, who).map(Some)
    }

    fn is_dead(&mut self, path: &Path, found: Held) -> bool {
        if found.who.is_gone() {
            return true;
        }
        let now = Instant::now();
        let (seen, since) = self.0.entry(path.to_path_buf()).or_insert_with(|| (found.clone(), now));
        if *seen != found {
            (*seen, *since) = (found, now);
        }
        since.elapsed() > dead_after()
    }

    /// Who holds the claim at `path`, for people.
    pub fn holder(path: &Path) -> Option<String> {
        let held = read_json::<Held>(path).ok()??;
        Some(format!("process {} on {}", held.who.pid, held.who.host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_one_processes_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let (path, who) = (dir.path().join("unit.claim"), Who::this());
        let claim = Watch::default().claim(&path, &who).unwrap();
        assert!(claim.is_some());
        assert!(Watch::default().claim(&path, &who).unwrap().is_none(), "it is held by a process that lives");
        drop(claim);
        assert!(!path.exists());
        assert!(Watch::default().claim(&path, &who).unwrap().is_some());
    }

    #[test]
    fn the_claim_of_a_dead_process_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("unit.claim");
        let dead = Who::gone();
        replace_json(&path, &Held { who: dead, beat: 7 }).unwrap();
        assert!(Watch::default().claim(&path, &Who::this()).unwrap().is_some());
    }

    #[test]
    fn what_another_machine_does_not_renew_is_dead_after_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("unit.claim");
        let who = Who::elsewhere();
        let held = Held { who, beat: 7 };
        let mut watch = Watch::default();
        assert!(!watch.is_dead(&path, held.clone()));
        let long_ago = Instant::now().checked_sub(DEAD_AFTER + Duration::from_secs(1)).unwrap();
        watch.0.get_mut(&path).unwrap().1 = long_ago;
        assert!(!watch.is_dead(&path, Held { beat: 8, ..held.clone() }), "it was renewed");
        watch.0.get_mut(&path).unwrap().1 = long_ago;
        assert!(watch.is_dead(&path, Held { beat: 8, ..held }));
    }
}
