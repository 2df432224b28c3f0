#!/usr/bin/env python3
"""Perplexity in f32: moepack against llama.cpp on the same windows of token ids, interleaved in one run.

    python benches/peers/perplexity.py CHECKPOINT TEXT --llama PYTHON [--windows 128] [--rounds 3] [--threads 2]

CHECKPOINT is a BF16 Qwen3-MoE with a tokenizer.json; llama.cpp gets an F32 GGUF of it. Its speed counts the time inside
llama_decode alone, moepack's is the `tokens_per_second` it reports. Both perplexities are printed: they must agree.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from measure import MOEPACK, interleave, report, run, warm

HERE = Path(__file__).resolve().parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--moepack", type=Path, default=MOEPACK)
    parser.add_argument("--llama", required=True, help="python of the environment of requirements-llama.txt")
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        contest(args, Path(work))


def contest(args, work):
    windows, gguf = work / "windows.json", work / "f32.gguf"
    cut = [args.llama, HERE / "windows.py", args.checkpoint / "tokenizer.json", args.text, args.ctx, args.windows]
    windows.write_text(run(cut).stdout)
    run([args.llama, HERE / "to_gguf.py", args.checkpoint, gguf, "--f32"])
    warm([*args.checkpoint.glob("*.safetensors"), gguf])
    ours = [args.moepack, "perplexity", args.checkpoint, "--tokens", windows, "--json", "--threads", args.threads]
    theirs = [args.llama, HERE / "llama_peer.py", "perplexity", gguf, windows, args.threads]
    runs = interleave({"moepack": lambda: run(ours), "llama.cpp f32": lambda: run(theirs)}, args.rounds)
    report(runs, tokens_per_second, "tokens/s")
    for name, of in runs.items():
        print(f"{name}: perplexity {statistics.median(json.loads(r.stdout)['perplexity'] for r in of):.4f}")


def tokens_per_second(run):
    answer = json.loads(run.stdout)
    return answer["tokens"] / answer["seconds"] if "seconds" in answer else answer["tokens_per_second"]


if __name__ == "__main__":
    main()
