#!/usr/bin/env python3
"""Random reads of experts: `moepack bench` against fio with O_DIRECT on the same bank files, interleaved in one run.

    python benches/peers/paging.py BUNDLE [--reads 4000] [--seconds 3] [--rounds 5] [--threads 2]

fio (Debian package `fio`) reads blocks of the record's size at random places, one synchronous reader a thread, past
the page cache. Both speeds are GB/s of bytes read, 10^9.
"""

import argparse
import json
from pathlib import Path

from measure import MOEPACK, interleave, report, run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--moepack", type=Path, default=MOEPACK)
    parser.add_argument("--reads", type=int, default=4000, help="experts that moepack asks for")
    parser.add_argument("--seconds", type=int, default=3, help="length of a fio run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    manifest = json.loads((args.bundle / "manifest.json").read_text())
    layers = manifest["layers"]
    record = max(layer["max_record_bytes"] for layer in layers)
    align = manifest["align"]
    block = (record + align - 1) // align * align
    banks = ":".join(str(args.bundle / layer["bank"]) for layer in layers)
    ours = [args.moepack, "bench", args.bundle, "--json", "--reads", args.reads, "--threads", args.threads]
    theirs = [
        "fio",
        "--name=experts",
        f"--filename={banks}",
        "--readonly",
        "--rw=randread",
        f"--bs={block}",
        # Records start at multiples of this, not of their size; where blocks start matters to some disks.
        f"--blockalign={align}",
        "--direct=1",
        "--ioengine=psync",
        f"--numjobs={args.threads}",
        "--group_reporting",
        "--time_based",
        f"--runtime={args.seconds}",
        "--output-format=json",
    ]
    runs = interleave({"moepack bench": lambda: run(ours), "fio randread O_DIRECT": lambda: run(theirs)}, args.rounds)
    report(runs, gigabytes_per_second, "GB/s")


def gigabytes_per_second(run):
    """fio and moepack both answer in JSON."""
    answer = json.loads(run.stdout)
    if "jobs" in answer:
        return answer["jobs"][0]["read"]["bw_bytes"] / 1e9
    return answer["bytes_per_second"] / 1e9


if __name__ == "__main__":
    main()
