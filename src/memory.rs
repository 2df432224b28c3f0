//! How much memory this process has taken, and how much it may take.

use std::path::Path;

/// Peak resident set size of this process in bytes, where the system tells.
pub fn peak_rss_bytes() -> Option<u64> {
    status_field("VmHWM:")
}

fn status_field(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(name))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Memory this process may use: the smallest of the machine's and its control group's, in bytes.
pub fn available_bytes() -> Option<u64> {
    [machine_bytes(), cgroup_bytes()].into_iter().flatten().min()
}

fn machine_bytes() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The memory limit of this process's control group, if it has one: the smallest on the way up from its own. A scheduler sets
/// it on a group of the job, and only inside a container does that one look like the root.
pub fn cgroup_bytes() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().flat_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|c| c == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => return Vec::new(),
        };
        limits_above(Path::new(root), path, file)
    });
    // Version 1 says no limit by a number beyond any memory.
    limits.filter(|&bytes| bytes < 1 << 60).min()
}

/// The limits of a group and of all above it; "max" does not parse and so means no limit.
fn limits_above(root: &Path, group: &str, file: &str) -> Vec<u64> {
    let own = root.join(group.trim_start_matches('/'));
    let groups = own.ancestors().take_while(|dir| dir.starts_with(root));
    groups.filter_map(|dir| std::fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_takes_some_memory() {
        if cfg!(target_os = "linux") {
            assert!(peak_rss_bytes().is_some_and(|b| b > 1 << 20));
            assert!(available_bytes().is_some_and(|b| b > 1 << 20));
        }
    }

    #[test]
    fn the_smallest_limit_on_the_way_up_counts() {
        let root = tempfile::tempdir().unwrap();
        let job = root.path().join("slurm/job_7/step_0");
        std::fs::create_dir_all(&job).unwrap();
        for (dir, limit) in [("slurm", "max"), ("slurm/job_7", "4096"), ("slurm/job_7/step_0", "8192")] {
            std::fs::write(root.path().join(dir).join("memory.max"), format!("{limit}\n")).unwrap();
        }
        assert_eq!(limits_above(root.path(), "/slurm/job_7/step_0", "memory.max"), [8192, 4096]);
        assert!(limits_above(root.path(), "/../../etc", "memory.max").is_empty());
    }
}
