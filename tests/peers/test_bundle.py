#!/usr/bin/env python3
"""Bundles as others see them: opened by the stock safetensors reader, read again from format/SPEC.md alone.

    python tests/peers/test_bundle.py target/debug/moepack

Needs the packages of requirements.txt. Nothing of moepack's code is used to read; the codecs are decoded by a few lines
of numpy each, from their descriptions.
"""

import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
PAD = "__pad__."


def main():
    moepack = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as work:
        for n, (model, codec, check) in enumerate(CASES):
            out = Path(work) / str(n)
            command = [moepack, "quantize", FIXTURES / model, "-o", out, "--codec", codec]
            subprocess.run(command, check=True, capture_output=True, text=True)
            n_tensors = check(FIXTURES / model, out)
            print(f"ok {model} {codec}: {n_tensors} tensors")
    print(f"{len(CASES)} passed, 0 failed")


# ---- what must hold


def bits_are_kept(checkpoint, bundle):
    """Every tensor of the checkpoint is in the bundle, byte for byte; experts may lie split and turned."""
    source, (trunk, planes) = tensors_of(checkpoint), contents(bundle)
    left_out = {t["name"] for t in manifest(bundle)["left_out"]}
    n_experts = 0
    for name, tensor in source.items():
        if name in trunk:
            assert trunk[name] == tensor, f"{name} changed"
        elif name not in left_out:
            assert is_expert(name), f"{name} is neither in the bundle nor listed as left out"
            n_experts += 1
    assert n_experts > 0
    original = expert_bytes({name: t for name, t in source.items() if name not in trunk})
    stored = sorted(bytes(t["data"]) for t in planes.values())
    assert stored == sorted(original), "the experts' bytes are not those of the checkpoint"
    return len(source)


def int_levels_fit(bits, group, max_error):
    """Decodes every matrix with numpy; it is close to the checkpoint's."""

    def check(checkpoint, bundle):
        source, (trunk, planes) = tensors_of(checkpoint), contents(bundle)
        assert all(trunk[name] == source[name] for name in source if not is_expert(name)), "the trunk changed"
        n_matrices = 0
        for name, codes in planes.items():
            if not name.endswith(".codes"):
                continue
            matrix = name.removesuffix(".codes")
            layer, expert, part = matrix.removeprefix("layers.").replace("experts.", "").split(".")
            upstream = f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
            expected = numbers(source[upstream])
            found = int_matrix(codes, planes[matrix + ".scales"], bits, group, expected.shape)
            error = np.square(found - expected).sum() / np.square(expected).sum()
            assert error < max_error, f"{matrix}: relative squared error {error:.2e}, expected below {max_error}"
            n_matrices += 1
        assert n_matrices == sum(is_expert(name) for name in source), "some matrices are missing"
        return n_matrices

    return check


# A normal distribution loses about this much at the best scale of 64 values, and somewhat less with smaller groups.
CASES = [
    ("random/qwen3_moe_sharded", "native", bits_are_kept),
    ("random/deepseek_v3_fp8", "native", bits_are_kept),
    ("random/gpt_oss_mxfp4", "native", bits_are_kept),
    ("random/mixtral", "native", bits_are_kept),
    ("tiny-deepseek-v3", "native", bits_are_kept),
    ("tiny-deepseek-v3", "int4", int_levels_fit(4, 64, 1.2e-2)),
    ("tiny-deepseek-v3", "int8-g32", int_levels_fit(8, 32, 5e-5)),
    ("random/qwen3_moe", "int3-g64", int_levels_fit(3, 64, 5e-2)),
]


# ---- reading, from SPEC.md


def contents(bundle):
    """Tensors of the trunk, and planes of the experts, without pads; both by name."""
    described = manifest(bundle)
    trunk, planes = {}, {}
    for file in described["trunk"]:
        trunk |= stock_read(bundle / file["file"])
    for layer in described["layers"]:
        bank = stock_read(bundle / layer["bank"])
        check_index(bundle / layer["bank"], layer, described["align"])
        bank.pop("__index__")
        planes |= bank
    for name in list(trunk):
        if name.startswith(PAD):
            del trunk[name]
    return trunk, {name: t for name, t in planes.items() if not name.startswith(PAD)}


def manifest(bundle):
    return json.loads((bundle / "manifest.json").read_text())


def stock_read(path):
    """{name: {dtype, shape, data}} by the reference implementation; it also validates the file."""
    return {name: t for name, t in safetensors.deserialize(path.read_bytes())}


def check_index(path, layer, align):
    """Records are aligned, contiguous, whole, and have the checksum that the index says (section 4)."""
    data = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", data)
    at, end = 8 + header_bytes, None
    assert at % align == 0
    for expert in range(layer["n_experts"]):
        offset, size, padded, crc, of_layer, of_expert = struct.unpack_from("<QQQIII", data, at + 64 * expert)
        assert (of_layer, of_expert) == (layer["layer"], expert)
        assert offset % align == 0 and padded == -(-size // align) * align
        assert end is None or offset == end, f"a gap before record {expert}"
        end = offset + padded
        assert crc == crc32c(data[offset : offset + size]), f"checksum of record {expert}"
        assert not any(data[offset + size : end]), f"padding of record {expert}"
    assert end == len(data)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def crc_row(n):
    for _ in range(8):
        n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
    return n


CRC_TABLE = [crc_row(n) for n in range(256)]


# ---- codecs, from their descriptions


def int_matrix(codes, scales, bits, group, shape):
    """int<bits>: (u − 2^(bits−1)) × scale, a row of codes is one stream of bits, least significant first."""
    rows, cols = shape
    streams = np.frombuffer(codes["data"], np.uint8).reshape(rows, -1)
    stream = np.unpackbits(streams, axis=1, bitorder="little")[:, : cols * bits].reshape(rows, cols, bits)
    levels = (stream * (1 << np.arange(bits))).sum(axis=2) - (1 << bits - 1)
    scale = np.frombuffer(scales["data"], np.float16).reshape(rows, -1).astype(np.float64)
    return levels * np.repeat(scale, group, axis=1)[:, :cols]


def numbers(tensor):
    """f64 of BF16 or F32."""
    if tensor["dtype"] == "BF16":
        values = (np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        assert tensor["dtype"] == "F32", tensor["dtype"]
        values = np.frombuffer(tensor["data"], np.float32)
    return values.astype(np.float64).reshape(tensor["shape"])


# ---- checkpoints


def tensors_of(checkpoint):
    files = sorted(f for f in checkpoint.glob("model*.safetensors"))
    return {name: t for f in files for name, t in stock_read(f).items()}


def is_expert(name):
    """A routed expert; those of MTP layers are carried in the trunk."""
    return ".experts." in name


def expert_bytes(source):
    """The bytes of each expert's planes: one matrix each, or slices of fused tensors, gate and up taken apart."""
    out = []
    for name, tensor in source.items():
        if not is_expert(name):
            continue
        if not name.rsplit(".", 1)[-1].startswith(("gate_up_proj", "down_proj_")):
            out.append(bytes(tensor["data"]))
            continue
        whole = np.frombuffer(tensor["data"], np.uint8).reshape(*tensor["shape"][:2], -1)
        for expert in whole:
            halves = [expert[0::2], expert[1::2]] if "gate_up" in name else [expert]
            out += [half.tobytes() for half in halves]
    return out


if __name__ == "__main__":
    main()
