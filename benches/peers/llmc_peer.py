#!/usr/bin/env python3
"""llm-compressor's model_free W4A16 (group 128, round to nearest), in the environment of requirements-llmc.txt.

    python llmc_peer.py CHECKPOINT OUT THREADS
"""

import sys

import torch
from llmcompressor import model_free_ptq

checkpoint, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
# Embedding, head and router stay as they are, as in moepack's default recipe.
kept = ["lm_head", "re:.*embed_tokens$", "re:.*mlp.gate$"]
model_free_ptq(checkpoint, out, scheme="W4A16", ignore=kept, device="cpu")
