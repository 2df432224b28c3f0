//! Status, and what is written for schedulers. A real Slurm is in `tests/slurm`.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::{plan, tiny, workers};
use crate::support::{assert_same, moepack, moepack_with, succeeds};

const CODEC: [&str; 4] = ["--codec", "int4", "--shards", "6"];

fn json(at: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&succeeds(at, &[args, &["--json"]].concat()).stdout).unwrap()
}

#[test]
fn status_tells_what_is_done_and_what_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    plan(at, &tiny(), "p", &CODEC);
    let array = || succeeds(at, &["status", "--plan", "p", "--slurm-array"]).stdout;
    assert_eq!(array(), "0-5\n");
    let new = json(at, &["status", "--plan", "p"]);
    assert!(new["eta_seconds"].is_null() && new["fraction"] == 0.0, "{new}");
    workers(at, "p", [1, 4]);
    assert_eq!(array(), "0,2-3,5\n");
    let now = json(at, &["status", "--plan", "p"]);
    assert!(now["n_done"] == 2 && now["n_shards"] == 6 && now["missing"] == "0,2-3,5", "{now}");
    assert!(now["eta_seconds"].as_f64().is_some_and(|s| s > 0.0), "{now}");
    let shard = &now["shards"][4];
    assert!(shard["state"] == "done" && shard["attempts"] == 1 && shard["host"].is_string(), "{shard}");
    assert_eq!(
        (&shard["experts_done"], now["shards"][0]["state"].as_str()),
        (&shard["n_experts"], Some("pending"))
    );
    // A worker that was killed says nothing any more.
    let beat = at.join("p/status/shard-4.json");
    let mut dead: Value = serde_json::from_slice(&std::fs::read(&beat).unwrap()).unwrap();
    (dead["state"], dead["shard"], dead["updated_at"]) = ("running".into(), 5.into(), 1e9.into());
    std::fs::write(at.join("p/status/shard-5.json"), dead.to_string()).unwrap();
    let shown = succeeds(at, &["status", "--plan", "p"]).stdout;
    assert!(shown.contains("5  dead") && shown.contains("not done: 0,2-3,5"), "{shown}");
    workers(at, "p", [0, 2, 3, 5]);
    assert_eq!(array(), "\n");
    assert_eq!(json(at, &["status", "--plan", "p"])["shards"][5]["attempts"], 2);
    succeeds(at, &["merge", "--plan", "p"]);
    assert!(succeeds(at, &["status", "--plan", "p"]).stdout.contains("merged"));
}

#[test]
fn slurm_scripts_say_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    plan(at, &tiny(), "p 1", &CODEC);
    workers(at, "p 1", [2]);
    let args = ["submit", "--plan", "p 1", "--engine", "slurm", "--dry-run", "--cpus", "4", "--at-once", "2"];
    let said = json(at, &[&args[..], &["--sbatch=--partition=cpu"]].concat());
    assert!(
        said["shards"] == "0-1,3-5" && said["dry_run"] == true && said["arrays"] == serde_json::json!([])
    );
    let script = |name: &str| std::fs::read_to_string(at.join("p 1/submit").join(name)).unwrap();
    let workers = script("workers-0.sbatch");
    for line in
        ["--array=0-1,3-5%2", "--cpus-per-task=4", "--requeue", "--signal=B:USR1@60", "--partition=cpu"]
    {
        assert!(workers.contains(&format!("#SBATCH {line}\n")), "{line} is missing\n{workers}");
    }
    assert!(workers.contains("p 1' --shard auto --threads"), "{workers}");
    assert!(script("merge.sbatch").contains(" merge --plan "));
    assert_eq!(
        Command::new("sh")
            .args(["-n", "p 1/submit/workers-0.sbatch"])
            .current_dir(at)
            .status()
            .unwrap()
            .code(),
        Some(0)
    );
    // Without Slurm nothing can be submitted, and that is said.
    std::os::unix::fs::symlink("/bin/sh", at.join("sh")).unwrap();
    let path = at.display().to_string();
    let run = moepack_with(at, &[("PATH", &path)], &["submit", "--plan", "p 1", "--engine", "slurm"]);
    assert!(
        run.code == Some(66) && run.stderr.contains("cannot run sbatch"),
        "{:?} {}",
        run.code,
        run.stderr
    );
}

#[test]
fn kubernetes_is_told_what_no_second_try_mends() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    plan(at, &tiny(), "V3.plan", &CODEC);
    let args = [
        "submit",
        "--plan",
        "V3.plan",
        "--engine",
        "k8s",
        "--image",
        "hub/moepack:1",
        "--mount",
        "models:/m",
    ];
    succeeds(at, &args);
    let text = std::fs::read_to_string(at.join("V3.plan/submit/kubernetes.yaml")).unwrap();
    for said in [
        "name: moepack-v3\n",
        "completions: 6\n",
        "completionMode: Indexed",
        "backoffLimitPerIndex: 5",
        "values: [65, 66, 78]",
        "image: \"hub/moepack:1\"",
        "claimName: \"models\"",
        "mountPath: \"/m\"",
        "\"--shard\", \"auto\"",
    ] {
        assert!(text.contains(said), "{said:?} is missing\n{text}");
    }
}

#[test]
fn a_plan_says_what_a_job_takes_on_many_machines() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["plan", &tiny(), "--codec", "int4", "--solver", "gptq", "--trunk-codec", "int8"];
    let of = ["--calibration-tokens", "1000000", "--nodes", "1,4,64", "--node-cpus", "8"];
    let plan = json(dir.path(), &[&args[..], &of].concat());
    let rows = plan["nodes"].as_array().unwrap();
    let column = |key: &str| rows.iter().map(|r| r[key].as_f64().unwrap()).collect::<Vec<_>>();
    assert_eq!(column("nodes"), [1.0, 4.0, 64.0]);
    assert_eq!(column("shards"), [4.0, 5.0, 49.0], "as many as there are machines, or experts");
    assert_eq!(plan["node"]["cpus"], 8);
    let (total, forward, read) = (column("total_seconds"), column("forward_seconds"), column("read_bytes"));
    assert!(total[0] > total[1] && total[1] > total[2] && total[2] > 0.0, "{total:?}");
    assert!(forward[0] == 0.0 && forward[1] > forward[2] && forward[2] > 0.0, "{forward:?}");
    assert!(read[0] < read[1] && read[1] < read[2], "{read:?}");
    // A row of 128 numbers for each token at each of the three layers.
    assert_eq!(column("activation_bytes"), [3.0 * 4.0 * 128.0 * 1e6; 3]);
    assert!(succeeds(dir.path(), &[&args[..], &of].concat()).stdout.contains("On machines of 8 cores"));
}

#[test]
fn plain_commands_make_the_bundle() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    succeeds(at, &["quantize", &tiny(), "-o", "one", "--codec", "int4"]);
    plan(at, &tiny(), "p", &CODEC);
    let printed = succeeds(at, &["submit", "--plan", "p", "--engine", "print"]).stdout;
    assert_eq!(printed.lines().count(), 7, "{printed}");
    let run = Command::new("sh").args(["-ec", &printed]).current_dir(at).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    assert_same(&at.join("one"), &at.join("p.moepack"), "printed commands");
}

#[test]
fn gnu_parallel_makes_the_bundle() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    plan(at, &tiny(), "p", &CODEC);
    succeeds(
        at,
        &["submit", "--plan", "p", "--engine", "parallel", "--at-once", "2", "--cpus", "1", "-o", "out"],
    );
    let script = std::fs::read_to_string(at.join("p/submit/parallel.sh")).unwrap();
    assert!(script.contains("--jobs 2 --retries 3") && script.contains("::: 0 1 2 3 4 5\n"), "{script}");
    if Command::new("parallel").arg("--version").output().is_err() {
        eprintln!("NOT RUN: GNU parallel is not installed");
        return;
    }
    succeeds(at, &["quantize", &tiny(), "-o", "one", "--codec", "int4"]);
    let run = Command::new("sh").arg("p/submit/parallel.sh").current_dir(at).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    assert_same(&at.join("one"), &at.join("out"), "GNU parallel");
    assert_eq!(moepack(at, &["status", "--plan", "p", "--slurm-array"]).stdout, "\n");
}
