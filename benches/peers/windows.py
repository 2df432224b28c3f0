#!/usr/bin/env python3
"""Cuts a text into windows of token ids, as JSON on stdout.

    python windows.py TOKENIZER.json TEXT CTX COUNT
"""

import json
import sys

from tokenizers import Tokenizer

tokenizer, text, ctx, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
ids = Tokenizer.from_file(tokenizer).encode(open(text, encoding="utf-8").read(), add_special_tokens=False).ids
windows = [ids[i : i + ctx] for i in range(0, len(ids) - ctx + 1, ctx)][:count]
assert len(windows) == count, f"the text has only {len(windows)} windows of {ctx} tokens"
print(json.dumps(windows))
