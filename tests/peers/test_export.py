#!/usr/bin/env python3
"""Exports as the programs that they are for see them: transformers with compressed-tensors, and mlx-lm, both on the CPU.

    python tests/peers/test_export.py target/debug/moepack

Needs the packages of requirements-export.txt. Each case packs a fixture, writes it for the target, and compares the NLL of
every token with `moepack perplexity` of the bundle.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
# Of any token; where experts are decompressed in F16, which rounds each weight, of the mean over all tokens.
NLL_MAX = 1e-3


def main():
    moepack = Path(sys.argv[1]).resolve()
    only = sys.argv[2:]
    n = 0
    for model, codec, target, check in CASES:
        if only and target not in only:
            continue
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            windows = windows_of(FIXTURES / model)
            run(moepack, "quantize", FIXTURES / model, "-o", work / "q", "--codec", codec)
            run(moepack, "convert", work / "q", "--to", target, "-o", work / "out", "--max-shard-size", "200KB")
            (work / "windows.json").write_text(json.dumps(windows))
            run(moepack, "perplexity", work / "q", "--tokens", work / "windows.json", "--nll-out", work / "nll.json")
            expected = json.loads((work / "nll.json").read_text())
            found = check(work / "out", windows)
            difference = np.array(found) - np.array(expected)
            worst = np.abs(difference).max()
            distance = abs(difference.mean()) if check is transformers_loads else worst
            assert distance <= NLL_MAX, f"{model} {codec} {target}: {distance:.2e} nats apart, expected {NLL_MAX}"
            print(f"ok {model} {codec} {target}: {distance:.1e} nats, worst token {worst:.1e}", flush=True)
            n += 1
    print(f"{n} passed, 0 failed")


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def windows_of(checkpoint):
    """Three windows of token ids that the model has."""
    vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    return [[(n * 7 + i * 37) % vocab for i in range(40)] for n in range(3)]


# ---- transformers


def transformers_loads(directory, windows):
    """Loaded by transformers, which hands the packed experts to compressed-tensors; nothing missing, nothing left over."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(directory)
    config.quantization_config["dequantize"] = True
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{kind}: {sorted(info[kind])[:5]}"
    # Experts come out in the type of their scales, F16.
    return torch_nll(model.float(), windows)


def decompressor_reads(directory, windows):
    """transformers 5.23 has no way to load packed experts of this format, so compressed-tensors decompresses each module by
    the scheme that config.json gives it, and transformers loads the plain tensors that come out."""
    import torch
    import transformers
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file, save_file

    config = json.loads((directory / "config.json").read_text())
    scheme = QuantizationConfig.model_validate(config.pop("quantization_config"))
    group = scheme.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group.format or scheme.format)
    tensors = {}
    for file in directory.glob("model*.safetensors"):
        tensors |= load_file(file)
    modules = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    assert modules and all(".experts." in m for m in modules)
    for module in sorted(modules):
        own = {k.removeprefix(module + "."): tensors.pop(k) for k in list(tensors) if k.startswith(module + ".")}
        if own["weight_scale"].dtype == torch.float16:
            # Products with levels are exact in F32.
            own["weight_scale"] = own["weight_scale"].float()
        if "weight_global_scale" in own:
            weight = nvfp4_in_f32(own, group)
        else:
            weight = compressor.decompress(own, group)["weight"]
        tensors[module + ".weight"] = weight.float().contiguous()
    with tempfile.TemporaryDirectory() as plain:
        save_file(tensors, Path(plain) / "model.safetensors", metadata={"format": "pt"})
        (Path(plain) / "config.json").write_text(json.dumps(config))
        transformers.utils.logging.disable_progress_bar()
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            plain,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not info[kind], f"{kind}: {sorted(info[kind])[:5]}"
        return torch_nll(model, windows)


def nvfp4_in_f32(own, group):
    """What the decompressor does, but not rounded to BF16 on the way."""
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed, f32 = own["weight_packed"], torch.float32
    levels = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=f32)
    scale, whole = own["weight_scale"].to(f32), own["weight_global_scale"]
    return dequantize(x_q=levels, scale=scale, args=group.weights, global_scale=whole, dtype=f32)


def torch_nll(model, windows):
    import torch

    found = []
    for window in windows:
        window = torch.tensor(window)
        with torch.no_grad():
            logits = model.eval()(window[None], use_cache=False).logits[0, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist())
    return found


# ---- MLX


def mlx_lm_runs(directory, windows):
    """Loaded and run by mlx-lm, strictly: every tensor has its place."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(directory, strict=True)
    model.set_dtype(mx.float32)
    found = []
    for window in windows:
        logits = model(mx.array(window)[None])[0, :-1].astype(mx.float32)
        nll = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, mx.array(window[1:])[:, None], -1)[:, 0]
        found.append(nll.tolist())
    return found


CT, MLX = "compressed-tensors", "mlx"
CASES = [
    ("random/qwen3_moe", "int4-g32", CT, transformers_loads),
    ("random/qwen3_moe", "int8-g32", CT, transformers_loads),
    ("tiny-deepseek-v3", "int4-g64", CT, transformers_loads),
    ("random/qwen3_moe", "int4-g64", CT, decompressor_reads),
    ("random/qwen3_moe", "int8-g32", CT, decompressor_reads),
    ("random/qwen3_moe", "mxfp4", CT, decompressor_reads),
    ("random/qwen3_moe", "nvfp4-div", CT, decompressor_reads),
    ("random/qwen3_moe", "fp8-block-32x32", CT, decompressor_reads),
    ("tiny-deepseek-v3", "fp8-block", CT, decompressor_reads),
    *[("random/qwen3_moe", f"int{bits}-g32", MLX, mlx_lm_runs) for bits in (2, 3, 4, 5, 6, 8)],
    ("random/qwen3_moe", "int4-g64", MLX, mlx_lm_runs),
    ("random/qwen3_moe", "mxfp4", MLX, mlx_lm_runs),
    ("tiny-deepseek-v3", "int4-g64", MLX, mlx_lm_runs),
]

if __name__ == "__main__":
    main()
