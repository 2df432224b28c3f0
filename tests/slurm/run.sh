#!/usr/bin/env bash
# A job on a real Slurm, two nodes on this host: plan, submit, a task killed, submitted again, merged, and the bundle is that
# of one process, byte by byte.
#
#     tests/slurm/run.sh target/debug/moepack                     # about a minute
#     tests/slurm/run.sh --slow target/debug/moepack              # a lost node and a requeued task too, about three
#     MODEL=DIR TEXT=FILE tests/slurm/run.sh target/release/moepack    # another model than the fixture
#
# Installs slurmctld, slurmd, slurm-client, munge and parallel with apt-get where it may. Exit code 77: could not be run here.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)

slow=
if [ "${1:-}" = --slow ]; then slow=yes; shift; fi
moepack=$(realpath "${1:-$root/target/debug/moepack}")
model=${MODEL:-$root/fixtures/tiny-deepseek-v3}
text=${TEXT:-$root/fixtures/text/calibration.txt}
options=(--codec int3-g64 --trunk-codec int8 --calibrate calibration.txt)
read -ra options <<<"${OPTIONS:-${options[*]}}"

say() { printf -- '-- %s\n' "$*"; }
not_run() { echo "NOT RUN: Slurm (tests/slurm/run.sh): $*" >&2; exit 77; }
fail() { echo "FAILED: $*" >&2; tail -n 30 "$dir"/*.log >&2 || true; exit 1; }
wait_for() { # what, seconds, command …
    local what=$1 end=$((SECONDS + $2)); shift 2
    until "$@"; do [ "$SECONDS" -lt "$end" ] || fail "no $what in time"; sleep 0.05; done
}

install() {
    command -v slurmctld slurmd sbatch munged >/dev/null && return
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || not_run "it is not installed, and this user may not"
    say "installs Slurm"
    (timeout 90 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 120 apt-get install -y -qq \
        --no-install-recommends slurmctld slurmd slurm-client munge parallel) >/dev/null 2>&1 || not_run "its packages are out of reach"
}

# Everything of this cluster is in $dir, on ports of its own.
start_cluster() {
    local host=${HOSTNAME:-$(uname -n)} port=$((20000 + $$ % 20000)) user
    user=$(id -un)
    mkdir -p "$dir"/{state,spool.n1,spool.n2,munge}
    chmod 700 "$dir/munge"
    head -c 1024 /dev/urandom >"$dir/munge/key"
    chmod 600 "$dir/munge/key"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=moepack
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
MaxArraySize=5
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
    export SLURM_CONF=$dir/slurm.conf
    start munged munged --foreground --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
        --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    wait_for "munge socket" 10 test -S "$dir/munge/socket"
    start slurmctld slurmctld -D
    start_node n1
    start_node n2
    wait_for "idle nodes" 40 idle 2
}
start() { local name=$1; shift; "$@" >"$dir/$name.out.log" 2>&1 & pids+=("$!"); eval "pid_$name=$!"; }
start_node() { start "slurmd_$1" slurmd -D -N "$1"; }
idle() { [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = "$1" ]; }
stop_cluster() {
    [ -z "${SLURM_CONF:-}" ] || scancel --user="$(id -un)" 2>/dev/null || true
    kill "${pids[@]}" 2>/dev/null || true
    wait 2>/dev/null || true
    [ -n "${KEEP:-}" ] || rm -rf "$dir"
}

queue_empty() { [ -z "$(squeue -h 2>/dev/null)" ]; }
# The number and the process of a shard of plan $1 whose worker is at work, of those that match $2.
at_work() {
    local beat
    for beat in "$1"/status/shard-*.json; do
        grep -qE '"state": "(running|waiting)"' "$beat" 2>/dev/null || continue
        shard=$(sed -n 's/.*"shard": \([0-9]*\),/\1/p' "$beat")
        pid=$(sed -n 's/.*"pid": \([0-9]*\),/\1/p' "$beat")
        kill -0 "${pid:-0}" 2>/dev/null && grep -qz "$2" "/proc/$pid/environ" 2>/dev/null && return
    done
    return 1
}
# Ends all of a node at once: what would tell of a task's end goes before the task.
lose_node() {
    local stat process doomed=() name=pid_slurmd_$1
    for stat in /proc/[0-9]*/environ; do
        if grep -qz "SLURMD_NODENAME=$1" "$stat" 2>/dev/null && grep -qz "SLURM_CONF=$SLURM_CONF" "$stat" 2>/dev/null; then
            process=${stat#/proc/}
            process=${process%/environ}
            doomed=("$(sed -n 's/^PPid:\t//p' "/proc/$process/status")" "${doomed[@]}" "$process")
        fi
    done
    kill -9 "${!name}" "${doomed[@]}" 2>/dev/null || true
}
same() { diff -r one "$1" >/dev/null || fail "the bundle $1 differs from that of one process"; }

install
dir=$(mktemp -d /tmp/moepack-slurm.XXXXXX)
pids=()
trap stop_cluster EXIT
cd "$dir"
start_cluster
sinfo

say "one process"
head -c "${TEXT_BYTES:-40000}" "$text" | iconv -c -f utf-8 -t utf-8 >calibration.txt
"$moepack" quantize "$model" -o one "${options[@]}" -q >/dev/null

# Nine shards, more than an array takes here.
say "plan, submit, and a task is killed"
"$moepack" plan "$model" -o job.plan "${options[@]}" --shards 9 --calibration-shards 3 -q >/dev/null
"$moepack" submit --plan job.plan --engine slurm --cpus 1
wait_for "task at work" 60 at_work job.plan SLURM_ARRAY_TASK_ID
kill -9 "$pid"
say "killed shard $shard, process $pid"
killed=$shard
wait_for "end of the queue" 120 queue_empty
"$moepack" status --plan job.plan
missing=$("$moepack" status --plan job.plan --slurm-array)
[ "$missing" = "$killed" ] || fail "shards $missing are missing, expected $killed"
code=0
"$moepack" merge --plan job.plan || code=$?
[ "$code" = 75 ] || fail "merging an unfinished plan exits with $code, expected 75"

say "submitted again"
"$moepack" submit --plan job.plan --engine slurm --cpus 1 --retry-failed
wait_for "end of the queue" 120 queue_empty
[ -d job.moepack ] || fail "no bundle; $(cat job.plan/submit/merge_*.log)"
same job.moepack
say "the bundle is that of one process, byte by byte"

if command -v parallel >/dev/null; then
    say "the same by GNU parallel"
    "$moepack" plan "$model" -o parallel.plan "${options[@]}" --shards 9 --calibration-shards 3 -q >/dev/null
    "$moepack" submit --plan parallel.plan --engine parallel --cpus 1 --at-once 2
    sh parallel.plan/submit/parallel.sh >/dev/null || fail "the script of GNU parallel"
    same parallel.moepack
else
    echo "NOT RUN: GNU parallel, which is not installed" >&2
fi

if [ -n "$slow" ]; then
    say "a node is lost, a task is requeued"
    "$moepack" plan "$model" -o slow.plan "${options[@]}" --shards 9 --calibration-shards 3 -q >/dev/null
    "$moepack" submit --plan slow.plan --engine slurm --cpus 1
    wait_for "task at work on n1" 60 at_work slow.plan SLURMD_NODENAME=n1
    job=$(tr '\0' '\n' <"/proc/$pid/environ" | sed -n 's/^SLURM_JOB_ID=//p')
    scontrol requeue "$job" && say "requeued shard $shard, job $job"
    wait_for "task at work on n2" 60 at_work slow.plan SLURMD_NODENAME=n2
    lost=$shard
    # So that it cannot finish before its node goes.
    kill -STOP "$pid"
    lose_node n2
    say "lost n2 with shard $lost"
    wait_for "bundle" 300 test -d slow.moepack
    wait_for "end of the queue" 60 queue_empty
    "$moepack" status --plan slow.plan
    grep -q "stopped by SIGTERM" slow.plan/submit/[0-9]*.log || fail "no requeued task was told to stop"
    grep -qE '"attempt": ([2-9]|[1-9][0-9])' "slow.plan/status/shard-$lost.json" || fail "shard $lost was not begun again"
    same slow.moepack
    say "the bundle is that of one process, byte by byte"
fi
say "done in $SECONDS s"
