"""llama.cpp through ctypes: the library that the wheel of xllamacpp carries, b11549.

The structures are those of llama.h at that build; `check_layout` compares their defaults with what they are known to be, so
that another build does not compute nonsense in silence.
"""

import ctypes as C

import numpy as np
import xllamacpp.xllamacpp as extension

LIBRARY = C.CDLL(extension.__file__)
F32_CACHE, NO_FLASH_ATTENTION, N_THREADS = 0, 0, 2
CONTEXT_MIN = 512

ptr, i32, u32, flag, f32 = C.c_void_p, C.c_int32, C.c_uint32, C.c_bool, C.c_float


class ModelParams(C.Structure):
    _fields_ = (
        [("devices", ptr), ("buft_overrides", ptr)]
        + [(n, i32) for n in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")]
        + [(n, ptr) for n in ("tensor_split", "progress", "progress_data", "kv_overrides")]
        + [(n, flag) for n in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")]
    )


class ContextParams(C.Structure):
    _fields_ = (
        [(n, u32) for n in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max")]
        + [("n_outputs_max_per_seq", u32), ("n_threads", i32), ("n_threads_batch", i32), ("ctx_type", i32)]
        + [(n, i32) for n in ("rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type")]
        + [(n, f32) for n in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")]
        + [("yarn_beta_fast", f32), ("yarn_beta_slow", f32), ("yarn_orig_ctx", u32), ("defrag_thold", f32)]
        + [("cb_eval", ptr), ("cb_eval_data", ptr), ("type_k", i32), ("type_v", i32), ("moe_cache_size", C.c_size_t)]
        + [("abort", ptr), ("abort_data", ptr)]
        + [(n, flag) for n in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")]
        + [("samplers", ptr), ("n_samplers", C.c_size_t), ("ctx_other", ptr)]
    )


class Batch(C.Structure):
    _fields_ = [
        ("n_tokens", i32),
        ("token", C.POINTER(i32)),
        ("embd", ptr),
        ("pos", C.POINTER(i32)),
        ("n_seq_id", C.POINTER(i32)),
        ("seq_id", C.POINTER(C.POINTER(i32))),
        ("logits", C.POINTER(C.c_int8)),
    ]


def call(name, result, *types):
    function = getattr(LIBRARY, "llama_" + name)
    function.restype, function.argtypes = result, types
    return function


LOG = []
_on_log = C.CFUNCTYPE(None, i32, C.c_char_p, ptr)(lambda _, text, __: LOG.append(text.decode(errors="replace")))
call("log_set", None, type(_on_log), ptr)(_on_log, None)
call("backend_init", None)()


def check_layout():
    model = call("model_default_params", ModelParams)()
    context = call("context_default_params", ContextParams)()
    found = (model.use_extra_bufts, context.n_ctx, context.n_batch, context.yarn_ext_factor, context.type_k, context.no_perf)
    assert found == (True, 512, 2048, -1.0, 1, True), f"another llama.h: {found}"


class Model:
    def __init__(self, path, vocab_only=False):
        params = call("model_default_params", ModelParams)()
        params.vocab_only, params.use_extra_bufts, params.check_tensors = vocab_only, False, True
        load = call("model_load_from_file", ptr, C.c_char_p, ModelParams)
        self.model = load(str(path).encode(), params)
        assert self.model, f"llama.cpp does not load {path}:\n{''.join(LOG[-5:])}"
        self.vocab = call("model_get_vocab", ptr, ptr)(self.model)

    def tokens(self, text):
        """Ids of a text, no special tokens added or parsed."""
        raw = text.encode()
        buffer = (i32 * (len(raw) + 8))()
        tokenize = call("tokenize", i32, ptr, C.c_char_p, i32, C.POINTER(i32), i32, flag, flag)
        return list(buffer[: tokenize(self.vocab, raw, len(raw), buffer, len(buffer), False, False)])

    def nll(self, windows):
        """NLLs of the tokens of each window but its first, each window fresh; keys and values cached in F32."""
        longest = max(map(len, windows))
        context = self.context(max(longest, CONTEXT_MIN))
        n_vocab = call("vocab_n_tokens", i32, ptr)(self.vocab)
        batch = call("batch_init", Batch, i32, i32, i32)(longest, 0, 1)
        memory = call("get_memory", ptr, ptr)(context)
        found = []
        for window in windows:
            call("memory_clear", None, ptr, flag)(memory, True)
            batch.n_tokens = len(window)
            for i, token in enumerate(window):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
                batch.seq_id[i][0] = 0
            assert call("decode", i32, ptr, Batch)(context, batch) == 0
            logits = call("get_logits", C.POINTER(f32), ptr)(context)
            found.append(losses(np.ctypeslib.as_array(logits, (len(window), n_vocab)), window))
        call("free", None, ptr)(context)
        return found

    def context(self, n):
        params = call("context_default_params", ContextParams)()
        params.n_ctx = params.n_batch = params.n_ubatch = params.n_outputs_max = params.n_outputs_max_per_seq = n
        params.n_threads = params.n_threads_batch = N_THREADS
        params.type_k = params.type_v = F32_CACHE
        params.flash_attn_type = NO_FLASH_ATTENTION
        context = call("init_from_model", ptr, ptr, ContextParams)(self.model, params)
        assert context, "".join(LOG[-5:])
        return context


def losses(logits, window):
    logits = logits[:-1].astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(window) - 1), window[1:]]
