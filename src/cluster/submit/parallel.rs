//! GNU parallel, and plain command lines for whatever else starts processes.

use moepack_format::Result;

use super::{Commands, Options, Script, quoted};
use crate::cluster::folder::PlanFolder;

/// How often a shard is tried.
const TRIES: usize = 3;

/// A script that does all missing shards and merges; run again, it does what is missing then.
///
/// # Errors
/// Paths that scripts cannot name.
pub fn script(folder: &PlanFolder, options: &Options) -> Result<Script> {
    let commands = Commands::of(folder, options.bundle.as_deref())?;
    let jobs = options.at_once.map_or(String::new(), |n| format!(" --jobs {n}"));
    let threads = options.cpus.map_or(String::new(), |n| format!(" --threads {n}"));
    let shards: Vec<String> = options.missing.iter().map(usize::to_string).collect();
    let text = format!(
        "#!/bin/sh\n\
         set -e\n\
         # With --sshlogin it starts workers on other machines that have the same file system.\n\
         parallel{jobs} --retries {TRIES} --joblog {} {}{threads} ::: {}\n\
         {}\n",
        quoted(&[format!("{}/submit/parallel.log", commands.plan)]),
        quoted(&commands.worker("{}", 0)),
        shards.join(" "),
        quoted(&commands.merge()),
    );
    Ok(Script { name: "parallel.sh".to_owned(), text })
}

/// A line for each missing shard, and one that merges.
///
/// # Errors
/// As [`script`].
pub fn lines(folder: &PlanFolder, options: &Options) -> Result<String> {
    let commands = Commands::of(folder, options.bundle.as_deref())?;
    let workers = options.missing.iter().map(|shard| commands.worker(&shard.to_string(), 0));
    let lines = workers.chain([commands.merge()]);
    Ok(lines.map(|words| quoted(&words) + "\n").collect())
}
