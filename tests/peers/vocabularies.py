"""Tokenizers of every kind that becomes a vocabulary of GGUF, trained on a text by the tokenizers library."""

import json

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

SIZE = 2048
SPACE = "\u2581"
SPECIAL = ["<s>", "</s>"]

# As in the tokenizer.json of Qwen3, DeepSeek V3 and gpt-oss.
QWEN2 = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
]
DEEPSEEK_V3 = [
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
    + "\r\n"
    + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+".replace(r"\r\n", "\r\n"),
]
LOWER, UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = [
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDS}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
]


def over_bytes(patterns, text):
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def sentencepiece(text):
    """As tokenizer.json has what was converted from SentencePiece: every pair that gives a token, in the order of tokens."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}\n]+|\n|{SPACE}+"), "isolated")
    trained.train_from_iterator([text], trainers.BpeTrainer(vocab_size=1700, limit_alphabet=300, show_progress=False))
    learnt = sorted(trained.get_vocab().items(), key=lambda entry: entry[1])
    tokens = ["<unk>", *SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *(t for t, _ in learnt if t != "\n")]
    ids = {token: i for i, token in enumerate(tokens[:SIZE])}
    merges = []
    for token in list(ids)[3 + 256 :]:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [split for split in splits if split[0] in ids and split[1] in ids]
        merges += sorted(known, key=lambda split: (ids[split[0]], ids[split[1]]))
    steps = [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]
    said = json.loads(trained.to_str())
    said |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": steps}}
    said["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "vocab": ids, "merges": merges}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    said["added_tokens"] = [{"id": i, "content": t, **flags} for i, t in enumerate(["<unk>", *SPECIAL])]
    return Tokenizer.from_str(json.dumps(said))
