"""Fixtures changed so that llama.cpp computes them: in F32, and where its loader or graph is narrower than the family, as
the same model in another shape."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
TENSORS = "model.safetensors"


def copied(name, to, **changes):
    """A fixture with changed keys of config.json; `rope` changes its rotary section."""
    to.mkdir()
    for file in (FIXTURES / name).iterdir():
        if file.is_file() and file.name != "golden.safetensors":
            shutil.copy(file, to / file.name)
    config = json.loads((to / "config.json").read_text())
    section = config.get("rope_parameters") or config.get("rope_scaling") or {}
    section.update(changes.pop("rope", {}))
    config.update(changes)
    (to / "config.json").write_text(json.dumps(config))
    return to


def in_f32(directory):
    """Rewrites BF16 as F32, of which llama.cpp rounds no activation."""
    raw = (directory / TENSORS).read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    tensors = {}
    for name, entry in json.loads(raw[8 : 8 + n]).items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        data = raw[8 + n + start : 8 + n + end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data, {"F32": np.float32, "I64": np.int64, "I32": np.int32}[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"]).copy()
    save_file(tensors, directory / TENSORS)
    return directory


def deepseek_v4(to):
    """The trained V4 with indexer heads of 128 dimensions, the only ones that llama.cpp has, filled up with zeros in front.
    All scores shrink by one factor, so the same entries are chosen."""
    directory = in_f32(copied("tiny-deepseek-v4", to))
    config = json.loads((directory / "config.json").read_text())
    narrow, wide = config["index_head_dim"], 128
    tensors = load_file(directory / TENSORS)
    for name in [n for n in tensors if ".indexer." in n and not n.endswith("weights_proj.weight")]:
        axis = 1 if name.endswith(".ape") else 0
        heads = np.moveaxis(tensors[name], axis, 0)
        heads = heads.reshape(-1, narrow, *heads.shape[1:])
        filled = np.zeros((heads.shape[0], wide) + heads.shape[2:], np.float32)
        filled[:, wide - narrow :] = heads
        filled = filled.reshape(-1, *heads.shape[2:])
        tensors[name] = np.ascontiguousarray(np.moveaxis(filled, 0, axis))
    config["index_head_dim"] = wide
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / TENSORS)
    return directory


def olmoe(to):
    """OLMoE with as many keys as queries, each head of keys and values twice."""
    directory = copied("random/olmoe", to, clip_qkv=None, num_key_value_heads=4)
    tensors = load_file(directory / TENSORS)
    head = 16
    for name in [n for n in tensors if any(key in n for key in ("k_proj", "v_proj", "k_norm"))]:
        heads = tensors[name].reshape(-1, head, *tensors[name].shape[1:])
        tensors[name] = np.ascontiguousarray(np.repeat(heads, 2, axis=0).reshape(-1, *tensors[name].shape[1:]))
    save_file(tensors, directory / TENSORS)
    return directory
