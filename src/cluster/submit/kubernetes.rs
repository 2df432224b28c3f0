//! Kubernetes: an Indexed Job whose pods do shards, and a Job that merges.
//!
//! A pod that was evicted is started again, and so is one that failed in a way that may pass, each index a few times of its
//! own. Exit codes that no second try changes fail the index at once. Kubernetes knows no order of jobs: the one
//! that merges fails with 75 as long as shards are missing, and is started again ever more slowly.

use moepack_format::Result;

use super::{Commands, Options, Script, job_name, memory_mib};
use crate::cluster::folder::PlanFolder;
use crate::cluster::plan::Plan;

/// How often an index is tried again.
const RETRIES: usize = 5;
/// Exit codes that a second try does not change: bad data, missing input, impossible plan.
const FINAL_CODES: &str = "[65, 66, 78]";

/// The manifest of both jobs.
///
/// # Errors
/// Paths that manifests cannot name.
pub fn script(folder: &PlanFolder, plan: &Plan, options: &Options) -> Result<Script> {
    let commands = Commands::of(folder, options.bundle.as_deref())?.in_container();
    let (name, n) = (job_name(folder), plan.shards.len());
    let at_once = options.at_once.unwrap_or(n).min(n);
    let cpu = options.cpus.map_or(String::new(), |n| format!("              cpu: \"{n}\"\n"));
    let worker = container("worker", options, &commands.worker("auto", 0));
    let merge = container("merge", options, &commands.merge());
    let volumes = volumes(options);
    let text = format!(
        "apiVersion: batch/v1\n\
         kind: Job\n\
         metadata:\n\
         \x20 name: {name}\n\
         spec:\n\
         \x20 completionMode: Indexed\n\
         \x20 completions: {n}\n\
         \x20 parallelism: {at_once}\n\
         \x20 backoffLimitPerIndex: {RETRIES}\n\
         \x20 podFailurePolicy:\n\
         \x20   rules:\n\
         \x20     - action: Ignore\n\
         \x20       onPodConditions:\n\
         \x20         - type: DisruptionTarget\n\
         \x20           status: \"True\"\n\
         \x20     - action: FailIndex\n\
         \x20       onExitCodes:\n\
         \x20         containerName: worker\n\
         \x20         operator: In\n\
         \x20         values: {FINAL_CODES}\n\
         \x20 template:\n\
         \x20   spec:\n\
         \x20     restartPolicy: Never\n\
         \x20     terminationGracePeriodSeconds: 60\n\
         {worker}\
         \x20         resources:\n\
         \x20           requests:\n\
         {cpu}\
         \x20             memory: {}Mi\n\
         {volumes}\
         ---\n\
         apiVersion: batch/v1\n\
         kind: Job\n\
         metadata:\n\
         \x20 name: {name}-merge\n\
         spec:\n\
         \x20 backoffLimit: 1000000\n\
         \x20 template:\n\
         \x20   spec:\n\
         \x20     restartPolicy: OnFailure\n\
         {merge}{volumes}",
        memory_mib(plan),
    );
    Ok(Script { name: "kubernetes.yaml".to_owned(), text })
}

fn container(name: &str, options: &Options, command: &[String]) -> String {
    let command: Vec<String> = command.iter().map(|word| string(word)).collect();
    let mounts: String = (options.mounts.iter().enumerate())
        .map(|(i, (_, path))| {
            format!("            - name: volume-{i}\n              mountPath: {}\n", string(path))
        })
        .collect();
    format!(
        "      containers:\n\
         \x20       - name: {name}\n\
         \x20         image: {}\n\
         \x20         command: [{}]\n\
         \x20         volumeMounts:\n{mounts}",
        string(&options.image),
        command.join(", "),
    )
}

fn volumes(options: &Options) -> String {
    let of = |(i, (claim, _)): (usize, &(String, String))| {
        format!(
            "        - name: volume-{i}\n          persistentVolumeClaim:\n            claimName: {}\n",
            string(claim)
        )
    };
    format!("      volumes:\n{}", options.mounts.iter().enumerate().map(of).collect::<String>())
}

/// A string of JSON is one of YAML.
fn string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
