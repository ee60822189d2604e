"""Time and memory of a token of SmolLM2 in transformers, with and without FreqKV, and in model.py.

python -m examples.time_transformers 4096 16384
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import weights
from examples.transformers_freqkv import CACHE, Conversation, attach, detach
from freqkv import FreqKVCache, FreqKVConfig


@torch.no_grad()
def time_token(read: Callable[[Tensor], Any], tokens: int) -> float:
    """Milliseconds that a token takes once `tokens` of them are read: the median of 16."""
    text = torch.randint(1000, (1, tokens))
    for part in text.split(512, dim=1):
        read(part)
    times = []
    for _ in range(16):
        start = time.perf_counter()
        read(text[:, :1])
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main(lengths: Sequence[int]) -> None:
    path = weights.find("smollm2")
    host = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    own = weights.load_model("smollm2")
    config = FreqKVConfig(window=2048)
    for tokens in lengths:
        full = DynamicCache()
        ms = time_token(partial(host, **{CACHE: full}), tokens)
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
        print(f"{tokens} tokens, transformers: {ms:.1f} ms a token, {size / 1e6:.0f} MB")

        attach(host, config)
        talk = Conversation(config)
        ms = time_token(partial(host, **{CACHE: talk}), tokens)
        size = talk.freqkv.nbytes
        print(f"{tokens} tokens, with FreqKV: {ms:.1f} ms a token, {size / 1e6:.0f} MB")
        detach(host)

        ms = time_token(partial(own, attend=FreqKVCache(config)), tokens)
        print(f"{tokens} tokens, model.py with FreqKV: {ms:.1f} ms a token")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [4096, 16384])
