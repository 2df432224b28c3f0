#!/usr/bin/env python3
"""Our encoding of ggml's block types beside ggml's own: error with the same importance, and speed of one thread.

    pip install ik-llama-cpp-python==0.1.5 gguf==0.19.0 numpy==2.4.6
    cargo build --release -p moepack-quant --example ggml_blocks
    python benches/peers/ggml_blocks.py [--weights FILE.safetensors --tensor PART_OF_NAME]

Both are decoded by gguf-py. Error is Σ w (x̂ − x)² / Σ w x², w the importance of the column (log-normal, or none). The
peer is `ggml_quantize_chunk` of the library that llama-quantize uses. --weights reads bf16. Without it: N(0, 1) with columns of several sizes.
"""

import argparse
import ctypes
import json
import subprocess
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

OURS = Path(__file__).resolve().parents[2] / "target/release/examples/ggml_blocks"
NAMES = "q8_0 q4_0 q4_1 q5_0 q5_1 q2_k q3_k q4_k q5_k q6_k iq4_nl iq4_xs".split()


def library():
    import importlib.util

    root = Path(importlib.util.find_spec("ik_llama_cpp").submodule_search_locations[0])
    lib = ctypes.CDLL(str(root / "lib" / "libggml.so"))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    # Fills the table that f16 is looked up in.
    class Params(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

    lib.ggml_init.argtypes, lib.ggml_init.restype = [Params], ctypes.c_void_p
    lib.ggml_init(Params(1 << 20, None, False))
    return lib


def theirs(lib, kind, data, importance):
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    rows, cols = data.shape
    out = np.zeros((rows, cols // numbers * size), np.uint8)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        weights = None if importance is None else importance.ctypes.data
        lib.ggml_quantize_chunk(kind.value, data.ctypes.data, out.ctypes.data, 0, rows, cols, weights)
        best = min(best, time.perf_counter() - start)
    return out, best


def ours(data, importance):
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        data.tofile(place / "weights")
        (np.zeros(0, np.float32) if importance is None else importance).tofile(place / "importance")
        lines = subprocess.run(
            [OURS, *map(str, data.shape), place / "weights", place / "importance", place],
            check=True, capture_output=True, text=True,
        ).stdout
        seconds = dict(line.split() for line in lines.splitlines())
        return {n: (np.fromfile(place / n, np.uint8).reshape(len(data), -1), float(seconds[n])) for n in NAMES}


def error(blocks, kind, data, importance):
    weights = np.float64(1) if importance is None else importance.astype(np.float64)
    decoded = gguf.quants.dequantize(blocks, kind).astype(np.float64)
    return (weights * (decoded - data) ** 2).sum() / (weights * data.astype(np.float64) ** 2).sum()


def read(path, part):
    """Every tensor with `part` in its name, one below the other."""
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        entries = json.loads(f.read(size))
        found = []
        for entry in (e for name, e in entries.items() if part in name):
            begin, end = entry["data_offsets"]
            f.seek(8 + size + begin)
            bits = np.frombuffer(f.read(end - begin), np.uint16).astype(np.uint32) << 16
            found.append(bits.view(np.float32).reshape(entry["shape"]))
    return np.concatenate(found)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights")
    parser.add_argument("--tensor")
    args = parser.parse_args()
    random = np.random.default_rng(1)
    if args.weights:
        data = read(args.weights, args.tensor)
    else:
        data = (random.normal(size=(512, 2048)) * np.exp(random.normal(size=2048) * 0.3)).astype(np.float32)
    lib = library()
    for what in ["none", "log-normal"]:
        importance = None if what == "none" else np.exp(random.normal(size=data.shape[1])).astype(np.float32)
        print(f"{data.shape} weights, importance {what}\n{'type':8} {'ours':>10} {'ggml':>10} {'ratio':>6}  speed, Mw/s: ours ggml ratio")
        mine = ours(data, importance)
        for name in NAMES:
            kind = gguf.GGMLQuantizationType[name.upper()]
            peer, peer_seconds = theirs(lib, kind, data, importance)
            blocks, seconds = mine[name]
            a, b = error(blocks, kind, data, importance), error(peer, kind, data, importance)
            speed = data.size / 1e6
            print(f"{name:8} {a:10.4e} {b:10.4e} {a / b:6.3f}  {speed / seconds:6.1f} {speed / peer_seconds:6.1f} {peer_seconds / seconds:6.1f}")


if __name__ == "__main__":
    main()
