"""What the benches share: a timed child process, medians, a table of ratios."""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOEPACK = ROOT / "target" / "release" / "moepack"


@dataclass
class Run:
    """One finished process."""

    seconds: float
    cpu_seconds: float
    peak_mib: float
    stdout: str


def run(command, env=None):
    """Runs a command to its end; raises with its stderr if it fails."""
    command = [str(part) for part in command]
    start = time.perf_counter()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child = subprocess.Popen(command, env={**os.environ, **(env or {})}, **pipes)
    stdout, stderr = drain(child)
    _, status, usage = os.wait4(child.pid, 0)  # the usage of this child alone
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{' '.join(command)}\nexit code {child.returncode}\n{stderr[-3000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, stdout)


def drain(child):
    """Both streams to their ends, without waiting for the child itself."""
    import threading

    texts = {}
    readers = [
        threading.Thread(target=lambda name=name, stream=stream: texts.__setitem__(name, stream.read()))
        for name, stream in (("out", child.stdout), ("err", child.stderr))
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return texts["out"], texts["err"]


def warm(paths):
    """Reads files once, so that every contender finds them in the page cache; returns their bytes.

    In small pieces: the kernel counts this process's memory into the peak of its children.
    """
    total = 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(1 << 20):
                total += len(chunk)
    return total


def interleave(contenders, rounds):
    """{name: [Run, …]} of {name: callable}, one after the other within each round."""
    runs = {name: [] for name in contenders}
    for n in range(rounds):
        for name, go in contenders.items():
            runs[name].append(go())
            print(f"  round {n + 1}: {name} {runs[name][-1].seconds:.2f} s", file=sys.stderr)
    return runs


def report(runs, per_second, unit):
    """Prints a row for each contender; `per_second` makes a speed of a Run. Ratios are of medians, first to each."""
    speed = {name: statistics.median(per_second(r) for r in of) for name, of in runs.items()}
    first = next(iter(runs))
    rounds = f"(medians of {len(runs[first])})"
    print(f"{'':34} {unit:>12} {'wall s':>8} {'CPU s':>8} {'peak MiB':>9} {'ratio':>7}   {rounds}")
    for name, of in runs.items():
        median = lambda key: statistics.median(getattr(r, key) for r in of)
        ratio = speed[first] / speed[name]
        print(
            f"{name:34} {speed[name]:12.2f} {median('seconds'):8.2f} {median('cpu_seconds'):8.2f} "
            f"{median('peak_mib'):9.0f} {ratio:7.2f}"
        )
