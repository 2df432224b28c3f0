#!/usr/bin/env python3
"""Importance matrices as others see them: read by gguf-py, compared with what llama-imatrix made of the same tokens.

    python tests/peers/test_imatrix.py target/debug/moepack
"""

import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
GOLDEN = FIXTURES / "goldens/imatrix"


def main():
    moepack = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as work:

        def run(*args):
            subprocess.run([moepack, *args], cwd=work, check=True, capture_output=True)

        run("calibrate", FIXTURES / "random/qwen3_moe", "--tokens", GOLDEN / "tokens.json", "-o", "stats")
        for target, name, read in (("imatrix", "imatrix.gguf", read_gguf), ("imatrix-dat", "imatrix.dat", read_dat)):
            run("convert", "stats", "--to", target, "-o", name)
            ours, theirs = read(Path(work) / name), read(GOLDEN / name)
            experts = {n for n in theirs if "_exps." in n}
            assert set(ours) == experts, f"{name}: {sorted(set(ours) ^ experts)}"
            for entry in sorted(experts):
                np.testing.assert_allclose(ours[entry], theirs[entry], rtol=2e-5, err_msg=f"{name}, {entry}")
            print(f"ok {name}: {len(experts)} tensors")
    print("2 passed, 0 failed")


def read_gguf(path):
    reader = GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    return {t.name: np.array(t.data) for t in reader.tensors}


def read_dat(path):
    """As common_imatrix_load_legacy of llama.cpp does it."""
    data, at = path.read_bytes(), 0

    def number():
        nonlocal at
        at += 4
        return struct.unpack_from("<i", data, at - 4)[0]

    def text():
        nonlocal at
        n = number()
        at += n
        return data[at - n : at].decode()

    entries = {}
    for _ in range(number()):
        name, calls, n = text(), number(), number()
        entries[name] = np.frombuffer(data, "<f4", n, at) / calls
        at += 4 * n
    n_chunks, _ = number(), text()
    assert n_chunks == 3 and at == len(data)
    return entries


if __name__ == "__main__":
    main()
