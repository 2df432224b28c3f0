#!/usr/bin/env python3
"""Our encoding of ggml's block types beside ggml's own: error with the same importance, and speed of one thread.

    pip install ik-llama-cpp-python==0.1.5 xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6
    cargo build --release -p moepack-quant --example ggml_blocks
    python benches/peers/ggml_blocks.py [--weights FILE.safetensors --tensor PART_OF_NAME] [--rounds N]

All are decoded by gguf-py. Error is Σ w (x̂ − x)² / Σ w x², w the importance of the column (log-normal, or none). The
peers are `ggml_quantize_chunk` of ik_llama.cpp and of llama.cpp, which their llama-quantize calls; a peer that is not
installed is left out, and said to be. Rounds are taken in turn, the best of each counts. --weights reads bf16. Without it:
N(0, 1) with columns of several sizes.
"""

import argparse
import ctypes
import importlib.util
import json
import subprocess
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

OURS = Path(__file__).resolve().parents[2] / "target/release/examples/ggml_blocks"
NAMES = "q8_0 q4_0 q4_1 q5_0 q5_1 q2_k q3_k q4_k q5_k q6_k iq4_nl iq4_xs".split()


def libraries():
    """Name and library of each peer."""
    places = {"ik": ("ik_llama_cpp", "lib/libggml.so"), "llama.cpp": ("xllamacpp", "xllamacpp.abi3.so")}
    found = {}
    for name, (package, file) in places.items():
        spec = importlib.util.find_spec(package)
        if spec is None:
            print(f"without {name}: {package} is not installed")
            continue
        found[name] = prepare(ctypes.CDLL(str(Path(spec.submodule_search_locations[0]) / file)))
    return found


def prepare(lib):
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


def rounds(libs, data, importance, n):
    """Blocks and best seconds of each type, by who made them."""
    best = {}
    for _ in range(n):
        made = {("ours", name): found for name, found in ours(data, importance).items()}
        for peer, lib in libs.items():
            made |= {(peer, name): theirs(lib, gguf.GGMLQuantizationType[name.upper()], data, importance) for name in NAMES}
        best = {key: min(made[key], best.get(key, made[key]), key=lambda m: m[1]) for key in made}
    return best


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights")
    parser.add_argument("--tensor")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    random = np.random.default_rng(1)
    if args.weights:
        data = read(args.weights, args.tensor)
    else:
        data = (random.normal(size=(512, 2048)) * np.exp(random.normal(size=2048) * 0.3)).astype(np.float32)
    libs = libraries()
    for what in ["none", "log-normal"]:
        importance = None if what == "none" else np.exp(random.normal(size=data.shape[1])).astype(np.float32)
        print(f"{data.shape} weights, importance {what}\n{'':8} {'error':>10} {'Mw/s':>7}" + "".join(f"  over {p}'s: error speed" for p in libs))
        best = rounds(libs, data, importance, args.rounds)
        for name in NAMES:
            kind = gguf.GGMLQuantizationType[name.upper()]
            blocks, seconds = best["ours", name]
            mine = error(blocks, kind, data, importance)
            line = f"{name:8} {mine:10.4e} {data.size / 1e6 / seconds:7.1f}"
            for peer in libs:
                blocks, peer_seconds = best[peer, name]
                ratio = mine / error(blocks, kind, data, importance)
                line += f"{ratio:{len(peer) + 15}.3f} {peer_seconds / seconds:5.1f}"
            print(line)


if __name__ == "__main__":
    main()
