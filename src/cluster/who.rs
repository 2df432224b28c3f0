//! Which process on which machine: whose claim, heartbeat or unfinished attempt something is.

use moepack_format::file::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::engine::workspace::host;

/// A process on some machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Who {
    /// Its host, in letters that fit a file name.
    pub host: String,
    /// Its id.
    pub pid: u32,
    /// Which machine since when, and which processes this one sees: process ids mean something only there.
    place: String,
    /// When it began, in clock ticks of that machine.
    began: Option<u64>,
}

impl Who {
    /// This process.
    pub fn this() -> Who {
        let fits = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
        let pid = std::process::id();
        Who { host: host().chars().map(fits).take(64).collect(), pid, place: place(), began: began(pid) }
    }

    /// Where its process id means something, in twelve letters.
    pub fn machine(&self) -> String {
        hex(&Sha256::digest(self.place.as_bytes())).chars().take(12).collect()
    }

    /// Whether it is gone, where that can be seen from here.
    pub fn is_gone(&self) -> bool {
        self.place == place() && (self.began.is_none() || began(self.pid) != self.began)
    }
}

fn place() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    format!("{} {} {}", host(), boot.trim(), namespace.display())
}

/// The 22nd field of the process's line, behind a name that may hold anything but ends with the last parenthesis.
fn began(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Whether a process of this id is here.
pub fn is_here(pid: &str) -> bool {
    std::fs::metadata(std::path::Path::new("/proc").join(pid)).is_ok()
}

#[cfg(test)]
impl Who {
    /// A process of this machine that is gone.
    pub fn gone() -> Who {
        Who { began: Some(0), ..Who::this() }
    }

    /// A process of another machine.
    pub fn elsewhere() -> Who {
        Who { place: "elsewhere".into(), ..Who::this() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_of_this_machine_is_known_to_be_gone() {
        assert!(!Who::this().is_gone() && Who::gone().is_gone() && !Who::elsewhere().is_gone());
        assert!(is_here(&std::process::id().to_string()) && !is_here("4194305"));
    }
}
