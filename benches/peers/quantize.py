#!/usr/bin/env python3
"""BF16 checkpoint → int4: moepack against llama.cpp's Q4_K_M and llm-compressor's W4A16, interleaved in one run.

    python benches/peers/quantize.py CHECKPOINT --llama PYTHON --llmc PYTHON [--rounds 3] [--threads 2]

moepack makes an int4 g64 bundle, scales searched for the least error, every file hashed and fsynced. llama.cpp starts
from a BF16 GGUF of the same weights, which is made once and not timed. llm-compressor is timed end to end, as moepack
is: process start, reading, writing. MB are those of the checkpoint, 10^6 bytes.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from measure import MOEPACK, interleave, report, run, warm

HERE = Path(__file__).resolve().parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--moepack", type=Path, default=MOEPACK)
    parser.add_argument("--llama", help="python of the environment of requirements-llama.txt")
    parser.add_argument("--llmc", help="python of the environment of requirements-llmc.txt")
    parser.add_argument("--codec", default="int4-g64")
    parser.add_argument("--type", default="Q4_K_M", help="llama.cpp's type, default Q4_K_M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="directory for outputs, default a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        contest(args, Path(work))


def contest(args, work):
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    megabytes = warm(sorted(args.checkpoint.glob("*.safetensors"))) / 1e6
    contenders = {f"moepack {args.codec}": lambda: moepack(args, work)}
    if args.llama:
        gguf = work / "bf16.gguf"
        run([args.llama, HERE / "to_gguf.py", args.checkpoint, gguf])
        command = [args.llama, HERE / "llama_peer.py", "quantize", gguf, work / "out.gguf", args.type, args.threads]
        contenders[f"llama.cpp {args.type}"] = lambda: fresh(work / "out.gguf", command, threads)
    if args.llmc:
        llmc = [args.llmc, HERE / "llmc_peer.py", args.checkpoint, work / "llmc", args.threads]
        contenders["llm-compressor model_free W4A16"] = lambda: fresh(work / "llmc", llmc, threads)
    report(interleave(contenders, args.rounds), lambda r: megabytes / r.seconds, "MB/s")


def moepack(args, work):
    out = work / "out.moepack"
    command = [args.moepack, "quantize", args.checkpoint, "-o", out, "--codec", args.codec, "--threads", args.threads]
    return fresh(out, command, None)


def fresh(out, command, env):
    """Runs with no output of an earlier run there."""
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)
    return run(command, env)


if __name__ == "__main__":
    main()
