//! Handing the shards of a plan to a scheduler: files for all of them, and for Slurm the jobs too.

use std::path::{Path, PathBuf};

use moepack_format::{Error, Result, atomic};
use serde::{Deserialize, Serialize};

use crate::cluster::folder::PlanFolder;
use crate::cluster::plan::Plan;

pub mod kubernetes;
pub mod parallel;
pub mod slurm;

/// What is to be submitted, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Shards that are not done.
    pub missing: Vec<usize>,
    /// Tasks at a time, if there is to be a limit.
    pub at_once: Option<usize>,
    /// CPUs of a task, if it matters.
    pub cpus: Option<usize>,
    /// More options of `sbatch`.
    pub sbatch: Vec<String>,
    /// Image of a pod's container.
    pub image: String,
    /// Volumes of a pod: persistent claim and where it is mounted.
    pub mounts: Vec<(String, String)>,
    /// Where the bundle goes, if not beside the plan.
    pub bundle: Option<PathBuf>,
}

/// A file that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    /// Name inside the plan's directory of scripts.
    pub name: String,
    /// What is in it.
    pub text: String,
}

/// Jobs that were submitted, as the plan keeps them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submitted {
    /// Arrays that do shards.
    pub arrays: Vec<Array>,
    /// The job that merges.
    pub merge: Option<u64>,
}

/// A job array.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Array {
    /// Its id.
    pub job: u64,
    /// What is added to the index of a task.
    pub offset: usize,
    /// Its indices.
    pub indices: String,
}

/// The commands that tasks run.
#[derive(Clone, Debug)]
pub struct Commands {
    /// The program, as an absolute path.
    program: String,
    /// The plan, as an absolute path.
    pub plan: String,
    bundle: Option<String>,
}

impl Commands {
    /// Of this program and plan.
    ///
    /// # Errors
    /// Paths that cannot be found, or are no UTF-8.
    pub fn of(folder: &PlanFolder, bundle: Option<&Path>) -> Result<Commands> {
        let program =
            std::env::current_exe().map_err(|e| Error::io(&e, "find the program", Path::new("moepack")))?;
        Ok(Commands {
            program: text(&program)?,
            plan: absolute(folder.path())?,
            bundle: bundle.map(absolute).transpose()?,
        })
    }

    /// The same with the program that a container has.
    pub fn in_container(self) -> Commands {
        Commands { program: "moepack".to_owned(), ..self }
    }

    /// The words that do a shard.
    pub fn worker(&self, shard: &str, offset: usize) -> Vec<String> {
        let words = [&self.program, "worker", "--plan", &self.plan, "--shard", shard].map(str::to_owned);
        let mut words = words.to_vec();
        if offset > 0 {
            words.extend(["--shard-offset".to_owned(), offset.to_string()]);
        }
        words
    }

    /// The words that merge.
    pub fn merge(&self) -> Vec<String> {
        let words = [&self.program, "merge", "--plan", &self.plan].map(str::to_owned);
        let bundle = self.bundle.iter().flat_map(|bundle| ["-o".to_owned(), bundle.clone()]);
        words.into_iter().chain(bundle).collect()
    }
}

fn absolute(path: &Path) -> Result<String> {
    text(&std::path::absolute(path).map_err(|e| Error::io(&e, "find", path))?)
}

fn text(path: &Path) -> Result<String> {
    let text = path.to_str().filter(|text| !text.contains('\n'));
    text.map(str::to_owned)
        .ok_or_else(|| Error::usage("scripts need a path in UTF-8 without line breaks").in_file(path))
}

/// Words as a shell takes them.
pub fn quoted(words: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-=:@%+,{}".contains(c);
    let quote = |word: &String| match !word.is_empty() && word.chars().all(plain) {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// Writes scripts into the plan; gives their paths.
///
/// # Errors
/// A file that cannot be written.
pub fn write(folder: &PlanFolder, scripts: &[Script]) -> Result<Vec<PathBuf>> {
    let path = |script: &Script| {
        let path = folder.submit().join(&script.name);
        atomic::write_file(&path, script.text.as_bytes()).map(|()| path)
    };
    scripts.iter().map(path).collect()
}

/// Memory of a task in MiB: that of the greediest shard.
pub fn memory_mib(plan: &Plan) -> u64 {
    plan.shards.iter().map(|s| s.peak_memory_bytes).max().unwrap_or(0).div_ceil(1 << 20)
}

/// The name of the plan in names of jobs: what schedulers allow, in lower case.
pub fn job_name(folder: &PlanFolder) -> String {
    let path = std::path::absolute(folder.path()).unwrap_or_default();
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
    let fits: String =
        stem.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(40).collect();
    format!("moepack-{}", fits.trim_matches('-')).trim_end_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_go_through_a_shell_unchanged() {
        let words = ["/a b/moepack", "it's", "--plan", "v4.plan", "$HOME"].map(str::to_owned);
        assert_eq!(quoted(&words), r"'/a b/moepack' 'it'\''s' --plan v4.plan '$HOME'");
    }

    #[test]
    fn a_jobs_name_is_what_every_scheduler_allows() {
        assert_eq!(job_name(&PlanFolder::of(Path::new("/w/V4_Pro.plan"))), "moepack-v4-pro");
        assert_eq!(job_name(&PlanFolder::of(Path::new("/w/--"))), "moepack");
    }
}
