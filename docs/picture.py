"""Draws docs/slots.png, what the slots of the cache hold: python docs/picture.py

Every token is given a value that is 1 in a channel of its own. After a text has been read, channel
t of a slot is therefore the weight of token t in it: the picture is read off the cache itself.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import PowerNorm

from freqkv import FreqKVCache, FreqKVConfig

CONFIG = FreqKVConfig(window=64, sinks=4, ratio=0.5)
LENGTHS = (64, 94, 184)  # tokens: the window full; after one round; after four


def weights(length: int) -> torch.Tensor:
    """[N, length]: the weight of each token in each slot after `length` tokens."""
    cache, value = FreqKVCache(CONFIG), torch.eye(length)[None, None]
    cache(0, torch.zeros_like(value), torch.zeros_like(value), value, lambda x, *_, **__: x)
    return cache.state_dict()["v"][0, 0, 0]


figure, axes = plt.subplots(
    1, 3, figsize=(10, 2.7), width_ratios=LENGTHS, sharey=True, layout="constrained"
)
for axis, length in zip(axes, LENGTHS, strict=True):
    image = axis.imshow(weights(length).abs(), cmap="gray_r", norm=PowerNorm(0.6, 0, 1))
    rounds = CONFIG.rounds(length)
    axis.set_title(f"{length} tokens, {rounds} round{'s' * (rounds != 1)}", fontsize=10)
    axis.set_xlabel("token of the text")
axes[0].set_ylabel("slot of the cache")
figure.colorbar(image, ax=axes, label="weight, absolute", shrink=0.9)
figure.savefig(Path(__file__).with_name("slots.png"), dpi=130)
