#!/usr/bin/env python3
"""A Qwen3-MoE checkpoint as a GGUF file for the peers: the same numbers, BF16 or F32, nothing quantized.

    python benches/peers/to_gguf.py CHECKPOINT OUT.gguf [--f32]

Experts are stacked into one tensor a layer and projection, one layer in memory at a time. Norms and routers are F32,
as the runtimes want them. The vocabulary is that of tokenizer.json; a peer that is handed token ids never uses it.
"""

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

# Name in the checkpoint → name in GGUF; `{l}` is the layer.
TRUNK = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERT = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--f32", action="store_true", help="F32 instead of BF16")
    args = parser.parse_args()
    config = json.loads((args.checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(args.out, "qwen3moe")
    describe(writer, config, args.f32)
    vocabulary(writer, args.checkpoint, config["vocab_size"])
    plan = list(tensors(config))
    for name, shape, _, keep_f32 in plan:
        kind = Type.F32 if args.f32 or keep_f32 else Type.BF16
        dtype = np.float32 if kind == Type.F32 else np.uint16
        writer.add_tensor_info(name, shape, np.dtype(dtype), np.prod(shape) * np.dtype(dtype).itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    source = Shards(args.checkpoint)
    for _, shape, names, keep_f32 in plan:
        data = np.stack([source.bf16(name) for name in names]).reshape(shape)
        if args.f32 or keep_f32:
            data = (data.astype(np.uint32) << 16).view(np.float32)
        writer.write_tensor_data(data)
    writer.close()


def describe(writer, config, f32):
    """The keys that llama.cpp's qwen3moe reads."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if f32 else gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])


def vocabulary(writer, checkpoint, size):
    """Byte-level BPE of tokenizer.json; ids without a token get a placeholder."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    ids = dict(tokenizer["model"]["vocab"]) | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    special = {t["id"] for t in tokenizer["added_tokens"]}
    tokens = {id: token for token, id in ids.items()}
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([tokens.get(id, f"<unused {id}>") for id in range(size)])
    normal = [id in tokens and id not in special for id in range(size)]
    writer.add_token_types([gguf.TokenType.NORMAL if n else gguf.TokenType.CONTROL for n in normal])
    writer.add_token_merges(merges or ["a b"])  # the runtime wants at least one
    writer.add_add_bos_token(False)


def tensors(config):
    """(GGUF name, shape, names of the matrices stacked in it, stays F32)"""
    hidden, head = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    inter, experts = config["moe_intermediate_size"], config["num_experts"]
    shapes = {
        "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, q),
        "attn_q_norm": (head,),
        "attn_k_norm": (head,),
        "ffn_gate_inp": (experts, hidden),
        "ffn_gate_exps": (experts, inter, hidden),
        "ffn_up_exps": (experts, inter, hidden),
        "ffn_down_exps": (experts, hidden, inter),
    }
    yield "token_embd.weight", (config["vocab_size"], hidden), ["model.embed_tokens.weight"], False
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for ours, theirs in LAYER.items():
            keep = len(shapes[theirs]) == 1 or theirs == "ffn_gate_inp"
            yield f"blk.{layer}.{theirs}.weight", shapes[theirs], [f"{at}{ours}.weight"], keep
        for ours, theirs in EXPERT.items():
            names = [f"{at}mlp.experts.{e}.{ours}.weight" for e in range(experts)]
            yield f"blk.{layer}.{theirs}.weight", shapes[theirs], names, False
    yield "output_norm.weight", (hidden,), ["model.norm.weight"], True
    yield "output.weight", (config["vocab_size"], hidden), ["lm_head.weight"], False


class Shards:
    """BF16 tensors of a checkpoint by name."""

    def __init__(self, checkpoint):
        self.places = {}
        for file in sorted(checkpoint.glob("*.safetensors")):
            with open(file, "rb") as f:
                size = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(size))
            for name, entry in header.items():
                if name != "__metadata__":
                    assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}, expected BF16"
                    self.places[name] = (file, 8 + size + entry["data_offsets"][0], entry["shape"])

    def bf16(self, name):
        """u16 [shape]"""
        file, start, shape = self.places[name]
        return np.fromfile(file, dtype="<u2", count=int(np.prod(shape)), offset=start).reshape(shape)


if __name__ == "__main__":
    main()
