#!/usr/bin/env python3
"""The manifest that `submit --engine k8s` writes against the schemas of Kubernetes.

    python tests/peers/test_kubernetes.py target/debug/moepack

Every object of it must be valid, no field unknown, in the oldest release whose Indexed Jobs have what it uses and in the newest
that the schemas are there for.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
# backoffLimitPerIndex and podFailurePolicy are stable since.
OLDEST = "1.33"


def main():
    moepack = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as work:
        def run(*args):
            subprocess.run([moepack, *args], cwd=work, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

        run("plan", ROOT / "fixtures/tiny-deepseek-v3", "-o", "V3 (a).plan", "--codec", "int4", "--shards", "6")
        run("submit", "--plan", "V3 (a).plan", "--engine", "k8s", "--cpus", "8", "--at-once", "4", "--mount", "models:/m: x",
            "--mount", "work:/work")
        manifest = (Path(work) / "V3 (a).plan/submit/kubernetes.yaml").read_text()
    jobs = list(yaml.safe_load_all(manifest))
    assert [job["kind"] for job in jobs] == ["Job", "Job"], jobs
    versions = [OLDEST, kubernetes_validate.latest_version()]
    for job in jobs:
        for version in versions:
            kubernetes_validate.validate(job, version, strict=True)
    # The schema is what finds mistakes: one it must find.
    jobs[0]["spec"]["podFailurePolicy"]["rules"][0]["action"] = 7
    try:
        kubernetes_validate.validate(jobs[0], OLDEST, strict=True)
    except kubernetes_validate.ValidationError:
        print(f"kubernetes: 2 jobs are valid in {' and '.join(versions)}")
        return
    raise SystemExit("a wrong manifest was found valid")


if __name__ == "__main__":
    main()
