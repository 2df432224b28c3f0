#!/usr/bin/env python3
"""llama.cpp's own quantizer and forward pass, called in its library.

    python llama_peer.py quantize IN.gguf OUT.gguf TYPE THREADS
    python llama_peer.py perplexity MODEL.gguf WINDOWS.json THREADS

Runs in the environment of requirements-llama.txt. `perplexity` takes a JSON list of windows of token ids, all of one
length, scores tokens 1 to n-1 of each and prints JSON: tokens, seconds spent in llama_decode alone, perplexity. The
settings are those of llama-perplexity: 2048 tokens a batch, 512 at a time, windows side by side as sequences.
"""

import ctypes
import json
import sys
import time

import llama_cpp as ll
import numpy as np

BATCH = 2048
quiet = ll.llama_log_callback(lambda level, text, data: None)


def main():
    command, args = sys.argv[1], sys.argv[2:]
    ll.llama_log_set(quiet, ctypes.c_void_p(0))
    ll.llama_backend_init()
    {"quantize": quantize, "perplexity": perplexity}[command](*args)


def quantize(source, target, type_name, threads):
    params = ll.llama_model_quantize_default_params()
    params.nthread = int(threads)
    params.ftype = getattr(ll, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    code = ll.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    assert code == 0, f"llama_model_quantize returned {code}"


def perplexity(path, windows_file, threads):
    windows = json.load(open(windows_file))
    ctx = len(windows[0])
    assert all(len(w) == ctx for w in windows), "windows of different lengths"
    side_by_side = max(1, BATCH // ctx)
    model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
    params = ll.llama_context_default_params()
    params.n_ctx = ctx * side_by_side
    params.n_batch = ctx * side_by_side
    params.n_seq_max = side_by_side
    params.n_threads = params.n_threads_batch = int(threads)
    context = ll.llama_init_from_model(model, params)
    n_vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    batch = ll.llama_batch_init(ctx * side_by_side, 0, 1)
    seconds, nll = 0.0, []
    for first in range(0, len(windows), side_by_side):
        group = windows[first : first + side_by_side]
        fill(batch, group)
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        start = time.perf_counter()
        assert ll.llama_decode(context, batch) == 0
        logits = ll.llama_get_logits(context)  # waits until they are there
        seconds += time.perf_counter() - start
        rows = np.ctypeslib.as_array(logits, shape=(ctx * len(group), n_vocab))
        nll += score(rows.reshape(len(group), ctx, n_vocab), np.array(group))
    tokens = ctx * len(windows)
    print(json.dumps({"tokens": tokens, "seconds": seconds, "perplexity": float(np.exp(np.mean(nll)))}))


def fill(batch, group):
    """All windows of the group, each a sequence of its own; logits of every token."""
    batch.n_tokens = at = 0
    for sequence, window in enumerate(group):
        for position, token in enumerate(window):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = True
            at += 1
    batch.n_tokens = at


def score(logits, ids):
    """NLLs of tokens 1 … of every window."""
    out = []
    for rows, window in zip(logits, ids):
        rows = rows[:-1].astype(np.float64)
        top = rows.max(axis=1, keepdims=True)
        total = np.log(np.exp(rows - top).sum(axis=1)) + top[:, 0]
        out += list(total - rows[np.arange(len(rows)), window[1:]])
    return out


if __name__ == "__main__":
    main()
