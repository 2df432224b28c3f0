//! Slurm: an array whose tasks do shards, and a job behind it that merges.
//!
//! Slurm starts a task again by itself when its node is lost, but not when it fails; then the merging job, which waits
//! for all to be well, can never run and is removed. `--retry-failed` submits what is missing, and a new merging job.

use std::collections::BTreeSet;
use std::process::Command;

use moepack_format::{Context, Error, Kind, Result};

use super::{Array, Commands, Options, Script, Submitted, job_name, memory_mib, quoted};
use crate::cluster::folder::PlanFolder;
use crate::cluster::plan::Plan;
use crate::cluster::publish::replace_json;
use crate::cluster::reports::ranges;
use crate::engine::workspace::read_json;

/// Indices of an array where Slurm does not say: 0 to 1000.
const ARRAY_SIZE_DEFAULT: usize = 1001;
/// How long before the end of its time a task is told to stop, in seconds.
const WARNING_SECONDS: u32 = 60;
const JOBS: &str = "jobs.json";
const MERGE: &str = "merge.sbatch";

/// Some shards in one array.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Chunk {
    offset: usize,
    indices: Vec<usize>,
}

/// The scripts: one for each array, and the one that merges.
///
/// # Errors
/// Paths that scripts cannot name.
pub fn scripts(folder: &PlanFolder, plan: &Plan, options: &Options) -> Result<Vec<Script>> {
    let commands = Commands::of(folder, options.bundle.as_deref())?;
    let chunks = chunks(&options.missing, array_size());
    let array = |chunk: &Chunk| array_script(folder, plan, options, &commands, chunk);
    let merge = Script { name: MERGE.to_owned(), text: merge_script(folder, options, &commands) };
    Ok(chunks.iter().map(array).chain([merge]).collect())
}

fn chunks(missing: &[usize], size: usize) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::new();
    for &shard in missing {
        let offset = shard - shard % size.max(1);
        match chunks.last_mut().filter(|c| c.offset == offset) {
            Some(chunk) => chunk.indices.push(shard - offset),
            None => chunks.push(Chunk { offset, indices: vec![shard - offset] }),
        }
    }
    chunks
}

fn array_script(
    folder: &PlanFolder,
    plan: &Plan,
    options: &Options,
    commands: &Commands,
    chunk: &Chunk,
) -> Script {
    let Chunk { offset, indices } = chunk;
    let limit = options.at_once.map_or(String::new(), |n| format!("%{n}"));
    let cpus = options.cpus.map_or(String::new(), |n| format!("#SBATCH --cpus-per-task={n}\n"));
    let name = job_name(folder);
    let text = format!(
        "#!/bin/sh\n\
         #SBATCH --job-name={name}\n\
         #SBATCH --array={}{limit}\n\
         {cpus}\
         #SBATCH --mem={}M\n\
         #SBATCH --requeue\n\
         #SBATCH --open-mode=append\n\
         #SBATCH --signal=B:USR1@{WARNING_SECONDS}\n\
         #SBATCH --output={}/submit/%A_%a.log\n\
         {}\
         # Stops at the next expert when its time ends or the node is wanted back, with exit code 75.\n\
         exec {} --threads \"${{SLURM_CPUS_PER_TASK:-1}}\"\n",
        ranges(indices),
        memory_mib(plan),
        commands.plan,
        more(options),
        quoted(&commands.worker("auto", *offset)),
    );
    Script { name: format!("workers-{offset}.sbatch"), text }
}

fn merge_script(folder: &PlanFolder, options: &Options, commands: &Commands) -> String {
    format!(
        "#!/bin/sh\n\
         #SBATCH --job-name={}-merge\n\
         #SBATCH --open-mode=append\n\
         #SBATCH --output={}/submit/merge_%j.log\n\
         {}\
         exec {}\n",
        job_name(folder),
        commands.plan,
        more(options),
        quoted(&commands.merge()),
    )
}

fn more(options: &Options) -> String {
    options.sbatch.iter().map(|option| format!("#SBATCH {option}\n")).collect()
}

/// Submits the scripts, the merging job to follow all arrays; keeps the ids in the plan.
///
/// # Errors
/// Slurm refuses, or is not there.
pub fn submit(folder: &PlanFolder, options: &Options) -> Result<Submitted> {
    let earlier = submitted(folder)?;
    let mut new = Submitted::default();
    for chunk in chunks(&options.missing, array_size()) {
        let script = folder.submit().join(format!("workers-{}.sbatch", chunk.offset));
        let job = sbatch(&[script.display().to_string()])?;
        new.arrays.push(Array { job, offset: chunk.offset, indices: ranges(&chunk.indices) });
    }
    // Tasks of earlier arrays that still run have shards too; that others of them failed is no matter any more.
    let running =
        earlier.arrays.iter().filter(|a| !active(a.job).is_empty()).map(|a| format!("afterany:{}", a.job));
    let after = new.arrays.iter().map(|a| format!("afterok:{}", a.job)).chain(running).collect::<Vec<_>>();
    cancel_waiting(earlier.merge);
    let mut args = vec!["--kill-on-invalid-dep=yes".to_owned()];
    if !after.is_empty() {
        args.push(format!("--dependency={}", after.join(",")));
    }
    args.push(folder.submit().join(MERGE).display().to_string());
    new.merge = Some(sbatch(&args)?);
    let all = earlier.arrays.into_iter().chain(new.arrays.iter().cloned()).collect();
    replace_json(&folder.submit().join(JOBS), &Submitted { arrays: all, merge: new.merge })?;
    Ok(new)
}

/// What was submitted so far.
///
/// # Errors
/// A damaged file.
pub fn submitted(folder: &PlanFolder) -> Result<Submitted> {
    Ok(read_json(&folder.submit().join(JOBS))?.unwrap_or_default())
}

/// Shards whose tasks wait or run.
///
/// # Errors
/// A damaged file.
pub fn queued(folder: &PlanFolder) -> Result<BTreeSet<usize>> {
    let shards = |array: Array| active(array.job).into_iter().map(move |index| index + array.offset);
    Ok(submitted(folder)?.arrays.into_iter().flat_map(shards).collect())
}

/// Indices of an array's tasks that wait or run; none of a job that Slurm has forgotten.
fn active(job: u64) -> Vec<usize> {
    let args = ["--noheader", "--array", "--format=%K", "--jobs", &job.to_string()].map(str::to_owned);
    let listed = run("squeue", &args).unwrap_or_default();
    listed.lines().filter_map(|line| line.trim().parse().ok()).collect()
}

/// A merging job that still waits gives way to the new one.
fn cancel_waiting(job: Option<u64>) {
    if let Some(job) = job {
        // It may be gone, which is as well.
        let _ = run("scancel", &["--state=PENDING".to_owned(), job.to_string()]);
    }
}

fn sbatch(args: &[String]) -> Result<u64> {
    let args: Vec<String> = ["--parsable".to_owned()].into_iter().chain(args.iter().cloned()).collect();
    let said = run("sbatch", &args)?;
    // With several clusters it is `job;cluster`.
    let id = said.trim().split(';').next().and_then(|id| id.parse().ok());
    id.ok_or_else(|| Error::new(Kind::Io, format!("sbatch says {:?}, expected the id of a job", said.trim())))
}

/// Indices that an array may have.
fn array_size() -> usize {
    let config = run("scontrol", &["show".to_owned(), "config".to_owned()]).unwrap_or_default();
    let line = config.lines().find_map(|l| l.trim().strip_prefix("MaxArraySize"));
    let size = line.and_then(|l| l.trim_start_matches([' ', '=']).trim().parse().ok());
    size.filter(|&n: &usize| n > 0).unwrap_or(ARRAY_SIZE_DEFAULT)
}

fn run(program: &str, args: &[String]) -> Result<String> {
    let missing = |e: std::io::Error| {
        Error::missing(format!("cannot run {program}: {e}"))
            .hint("run this where Slurm's commands are, or write the scripts only, with --dry-run")
    };
    let output = Command::new(program).args(args).output().map_err(missing)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    let what = format!("{program}: {}", text(&output.stderr));
    Err(Error::new(Kind::Temporary, what)
        .hint("mend what Slurm complains about, then run the same command again"))
    .in_file(args.last().map(String::as_str).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_plan_takes_several_arrays() {
        let chunk = |offset, indices: &[usize]| Chunk { offset, indices: indices.to_vec() };
        assert_eq!(chunks(&[3, 7, 8], 1001), [chunk(0, &[3, 7, 8])]);
        assert_eq!(chunks(&[0, 9, 10, 11, 25], 10), [chunk(0, &[0, 9]), chunk(10, &[0, 1]), chunk(20, &[5])]);
        assert_eq!(chunks(&[], 10), []);
    }
}
