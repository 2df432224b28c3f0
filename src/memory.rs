//! How much memory this process has taken, and how much it may take.

use std::path::Path;

use rustix::process::{Resource, getrlimit};

/// Peak resident set size of this process in bytes, where the system tells.
pub fn peak_rss_bytes() -> Option<u64> {
    status_field("VmHWM:")
}

fn status_field(name: &str) -> Option<u64> {
    let status = text("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix(name))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Memory that a run must not exceed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Bytes.
    pub bytes: u64,
    /// Who says so.
    pub of: &'static str,
}

/// What nobody asks before a process is ended: its control group or one above it, and `ulimit -v`.
pub fn imposed_limit() -> Option<Limit> {
    let groups = text("/proc/self/cgroup");
    let group = groups.and_then(|groups| cgroup_bytes(&groups, Path::new("/sys/fs/cgroup")));
    let limits = [(group, "the control group"), (getrlimit(Resource::As).current, "`ulimit -v`")];
    let limits = limits.into_iter().filter_map(|(bytes, of)| Some(Limit { bytes: bytes?, of }));
    limits.min_by_key(|limit| limit.bytes)
}

/// A file of the kernel's, which is made when it is read.
fn text(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// The smallest limit of the control groups that `groups`, a `/proc/PID/cgroup`, names, and of those above them.
fn cgroup_bytes(groups: &str, root: &Path) -> Option<u64> {
    let limits = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, group) = rest.split_once(':')?;
        let (root, file) = match controllers {
            "" => (root.to_path_buf(), "memory.max"),
            named if named.split(',').any(|c| c == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes")
            }
            _ => return None,
        };
        let inner = root.join(group.trim_start_matches('/'));
        // In a container the group's own directory is the root. "max" does not parse and so means no limit.
        let above = inner.ancestors().take_while(|dir| dir.starts_with(&root));
        above.filter_map(|dir| text(dir.join(file))?.trim().parse::<u64>().ok()).min()
    };
    groups.lines().filter_map(limits).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_the_limits_of_those_above_it() {
        let root = tempfile::tempdir().unwrap();
        let job = root.path().join("slurm/job_7/step_0");
        std::fs::create_dir_all(&job).unwrap();
        let limit = |dir: &str, bytes: &str| {
            std::fs::write(root.path().join(dir).join("memory.max"), bytes).unwrap();
        };
        limit("slurm/job_7/step_0", "max\n");
        assert_eq!(cgroup_bytes("0::/slurm/job_7/step_0\n", root.path()), None);
        limit("slurm/job_7", "4096\n");
        assert_eq!(cgroup_bytes("0::/slurm/job_7/step_0\n", root.path()), Some(4096));
        // In a container the path is the host's.
        limit("", "8192\n");
        assert_eq!(cgroup_bytes("0::/../../elsewhere\n", root.path()), Some(8192));
        std::fs::create_dir_all(root.path().join("memory/a")).unwrap();
        std::fs::write(root.path().join("memory/a/memory.limit_in_bytes"), "512").unwrap();
        let first_version = "12:cpuset:/\n5:cpu,memory:/a\n";
        assert_eq!(cgroup_bytes(first_version, root.path()), Some(512));
    }

    #[test]
    fn this_process_takes_some_memory() {
        if cfg!(target_os = "linux") {
            assert!(peak_rss_bytes().is_some_and(|b| b > 1 << 20));
        }
    }
}
