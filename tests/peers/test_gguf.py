#!/usr/bin/env python3
"""GGUF as llama.cpp and gguf-py see it: every tensor opens and decodes to the numbers of the bundle, texts become the same
tokens, and every token has the NLL that `moepack perplexity` gives it.

    python tests/peers/test_gguf.py target/debug/moepack [MODEL TEXT]

Needs the packages of requirements-gguf.txt. With MODEL, a checkpoint with a tokenizer, and TEXT, it is measured too.

llama.cpp rounds activations to the type that goes with the weights: to 8 bits in blocks of 32 or 256 before most types, to BF16
or F16 before these, not at all before F32. So numbers are compared in F32, where only the order of additions differs, and every
other type within what its rounding does to a small model.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Tokenizer

import llama
import vocabularies
from checkpoints import FIXTURES, copied, deepseek_v4, in_f32, olmoe

# Nats a token where nothing is rounded: mean and worst. Where activations are: mean and median, since a token for which a
# router chooses another expert may be far off.
F32_LIMITS = {"mean": 1e-5, "worst": 1e-3}
ROUNDED_LIMITS = {"mean": 3e-2, "median": 2e-2}

BLOCKS_32 = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "mxfp4"]
BLOCKS_256 = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"]
PLAIN = ["f32", "bf16", "f16"]
MOVED = {"int4-g64": "Q4_0", "int5-g32": "Q5_0", "int8-g128": "Q8_0"}
SMALL = ["--layers", "2", "--experts", "6", "--hidden", "256", "--inter", "256", "--heads", "4"]

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

MODELS = {
    "qwen3_moe": lambda to: copied("random/qwen3_moe", to),
    "qwen3_moe with YaRN": lambda to: copied("random/qwen3_moe", to, rope=YARN),
    "qwen2_moe": lambda to: copied("random/qwen2_moe", to),
    "olmoe": olmoe,
    "mixtral": lambda to: copied("random/mixtral", to),
    # The one number of its graph, and YaRN's ramp rounded as llama.cpp does it.
    "gpt_oss": lambda to: copied("random/gpt_oss", to, swiglu_limit=7.0, rope={"truncate": True}),
    "deepseek_v2": lambda to: copied("random/deepseek_v2", to, topk_method="greedy", rope={"mscale_all_dim": 1.0}),
    "deepseek_v3": lambda to: in_f32(copied("tiny-deepseek-v3", to)),
    "deepseek_v4": deepseek_v4,
}

ODD = """Tab\there  two   spaces\n\n\nnew\r\nline 12345678 naïve CamelCase HTTPServer don't I'LL we'Ve ünïcödé ÉÀ
日本語テスト 漢字かな 한국어 العربية 😀👩‍👩‍👧 ﬁ ①② x²+y²=z² /path/to/file.txt;\n\tif (a!=b) {return;}\n  \n end   """


def main():
    moepack = Path(sys.argv[1]).resolve()
    llama.check_layout()
    passed = 0
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(moepack, Path(work))
        for test in (types_decode, families_compute, types_compute, texts_are_cut, split_files_load):
            passed += test(bench)
        if len(sys.argv) > 3:
            passed += measured(bench, Path(sys.argv[2]), Path(sys.argv[3]))
    print(f"{passed} passed, 0 failed")


class Bench:
    """The program, and a place for what it writes."""

    def __init__(self, moepack, work):
        self.moepack, self.work, self.n = moepack, work, 0

    def run(self, *command):
        done = subprocess.run([str(self.moepack), *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def new(self, name):
        self.n += 1
        return self.work / f"{self.n}-{name}"

    def bundle(self, model, codec):
        out = self.new(codec)
        self.run("quantize", model, "-o", out, "--codec", codec, "--solver", "rtn")
        return out

    def gguf(self, model, *options):
        out = self.new("gguf")
        self.run("convert", model, "--to", "gguf", "-o", out, *options)
        return sorted(out.glob("*.gguf"))[0]

    def expected(self, model, windows):
        tokens, out = self.new("tokens.json"), self.new("nll.json")
        tokens.write_text(json.dumps(windows))
        self.run("perplexity", model, "--tokens", tokens, "--nll-out", out)
        return np.concatenate([np.array(w) for w in json.loads(out.read_text())])

    def found(self, file, windows):
        return np.concatenate(llama.Model(file).nll(windows))

    def small(self):
        """A random model whose rows hold super-blocks."""
        out = self.new("small")
        subprocess.run([sys.executable, FIXTURES / "synthetic.py", out, *SMALL], check=True, capture_output=True)
        return out


def windows_of(directory, n=3, length=60):
    vocab = json.loads((directory / "config.json").read_text())["vocab_size"]
    return [[(k * 7 + i * 37 + i * i) % vocab for i in range(length)] for k in range(n)]


def distances(found, expected):
    difference = found - expected
    far = abs(difference)
    return {"mean": far.mean(), "median": np.median(far), "worst": far.max(), "bias": difference.mean()}


def within(what, found, expected, limits):
    told = distances(found, expected)
    shown = ", ".join(f"{name} {value:.1e}" for name, value in told.items())
    for name, limit in limits.items():
        assert told[name] <= limit, f"{what}: nats apart {shown}, expected {name} {limit}"
    print(f"ok {what}: nats apart {shown}", flush=True)


def numbers(file):
    """Every tensor's type and numbers, by gguf-py."""
    tensors = gguf.GGUFReader(file).tensors
    return {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in tensors}


def types_decode(bench):
    """gguf-py decodes each type to the bits that the bundle decodes to; where zero may change its sign, to the numbers."""
    model, n = bench.small(), 0
    for codec in [*PLAIN, *BLOCKS_32, *BLOCKS_256, *MOVED]:
        bundle = bench.bundle(model, codec)
        file, plain = numbers(bench.gguf(bundle)), numbers(bench.gguf(bundle, "--requantize", "f32"))
        assert file.keys() == plain.keys() and len(file) > 20
        for name, (kind, values) in file.items():
            wanted = plain[name][1]
            if "_exps" in name:
                assert kind == MOVED.get(codec, codec.upper()), f"{codec}: {name} is {kind}"
            # Integers, of which MXFP4's are some to ggml, have one zero.
            view = np.float32 if codec in MOVED or codec == "mxfp4" else np.uint32
            same = np.array_equal(values.astype(np.float32).view(view), wanted.astype(np.float32).view(view))
            assert same, f"{codec}: {name} decodes to other numbers"
        print(f"ok {codec}: {len(file)} tensors, decoded by gguf-py", flush=True)
        n += 1
    return n


def families_compute(bench):
    """In F32 each graph of llama.cpp gives what our reference gives."""
    for name, make in MODELS.items():
        model = make(bench.new(name))
        windows = windows_of(model)
        found, expected = bench.found(bench.gguf(model), windows), bench.expected(model, windows)
        within(f"{name} f32", found, expected, F32_LIMITS)
    return len(MODELS)


def types_compute(bench):
    """A bundle's NLLs: to the last digits from its numbers in F32, within the rounding of activations from its own types."""
    trained, small = MODELS["deepseek_v3"](bench.new("v3")), bench.small()
    cases = [(trained, codec) for codec in [*PLAIN[1:], *BLOCKS_32, *MOVED]] + [(small, codec) for codec in BLOCKS_256]
    for model, codec in cases:
        windows = windows_of(model)
        bundle = bench.bundle(model, codec)
        expected = bench.expected(bundle, windows)
        if model is trained:
            exact = bench.found(bench.gguf(bundle, "--requantize", "f32"), windows)
            within(f"{codec} in f32", exact, expected, F32_LIMITS)
        within(codec, bench.found(bench.gguf(bundle), windows), expected, ROUNDED_LIMITS)
    return len(cases)


def texts_are_cut(bench):
    """Each kind of vocabulary gives the tokens that the tokenizers library gives."""
    text = (FIXTURES / "text" / "eval.txt").read_text()
    learnt = (FIXTURES / "text" / "calibration.txt").read_text() + ODD * 20
    over_bytes = {"qwen2": vocabularies.QWEN2, "deepseek-v3": vocabularies.DEEPSEEK_V3, "gpt-4o": vocabularies.GPT4O}
    made = {name: vocabularies.over_bytes(patterns, learnt) for name, patterns in over_bytes.items()}
    made["sentencepiece"] = vocabularies.sentencepiece(learnt)
    made["gpt-2"] = Tokenizer.from_file(str(FIXTURES / "tiny-deepseek-v3" / "tokenizer.json"))
    for name, tokenizer in made.items():
        model = copied("tiny-deepseek-v3", bench.new(name))
        tokenizer.save(str(model / "tokenizer.json"))
        engine = llama.Model(bench.gguf(model), vocab_only=True)
        for what in (text, ODD):
            same_tokens(name, engine, tokenizer, what)
        print(f"ok {name}: same tokens", flush=True)
    return len(made)


def same_tokens(name, engine, tokenizer, text):
    found, expected = engine.tokens(text), tokenizer.encode(text, add_special_tokens=False).ids
    at = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))
    shown = [[tokenizer.id_to_token(t) for t in ids[at : at + 4]] for ids in (found, expected)]
    assert found == expected, f"{name}: token {at} is {shown[0]}, expected {shown[1]}"


def split_files_load(bench):
    model = MODELS["deepseek_v3"](bench.new("split"))
    windows = windows_of(model)
    whole, first = bench.gguf(model), bench.gguf(model, "--split-max-size", "2MB")
    assert "-00001-of-" in first.name
    assert np.array_equal(bench.found(whole, windows), bench.found(first, windows))
    print("ok split: loaded as one", flush=True)
    return 1


def measured(bench, model, text):
    """A larger model in every type that its rows hold, on windows of a text."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = text.read_text()
    same_tokens(model.name, llama.Model(bench.gguf(model), vocab_only=True), tokenizer, text)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    windows = [ids[k * 256 : (k + 1) * 256] for k in range(0, 40, 5)]
    for codec in [*PLAIN, *BLOCKS_32, *BLOCKS_256, *MOVED]:
        bundle = bench.bundle(model, codec)
        found, expected = bench.found(bench.gguf(bundle), windows), bench.expected(bundle, windows)
        within(f"{model.name} {codec}", found, expected, ROUNDED_LIMITS)
    return 1


if __name__ == "__main__":
    main()
